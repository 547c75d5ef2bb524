"""Quantizing a trained model without training it again, and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from hf_compress.errors import ModelError
from hf_compress.surgery.skeleton import record_of

from .calibration import calibrate
from .layers import freeze, make_plain, prepare, quantization_of, resolve
from .scheme import Quantization
from .storage import check_finite

if TYPE_CHECKING:
    from hf_compress.hub.config import HfCompressConfig


def quantize(
    model: nn.Module, config: HfCompressConfig | Quantization, batches: Iterable[Any] | None = None
) -> nn.Module:
    """Quantize a trained model, in place.

    Weights become the values that their bits can hold, activations are quantized in every forward pass from then on.
    The model keeps its class and is saved by ``save_pretrained`` at its real size; ``model.dequantize()`` (or
    :func:`dequantize`) makes an ordinary float model of it.

    Args:
        model: a float model, pruned or not.
        config: ``HfCompressConfig(weights=4)``, for example.
        batches: images for the ranges of activations, as a ``DataLoader`` gives them; needed for the activation
            schemes "static" and "clipped_relu". A few hundred images do.

    Returns:
        ``model``.

    Raises:
        MethodError: for a skip pattern that matches nothing, or when no layer is left.
        DataError: when batches are needed and there are none.
        ModelError: when the model is quantized already, or weights or activations are not finite.
    """
    begin(model, config)
    try:
        if scheme_in(config).needs_batches:
            calibrate(model, batches)
    except BaseException:
        _undo(model)
        raise
    freeze(model)
    attach(model)
    return model


def begin(model: nn.Module, config: HfCompressConfig | Quantization) -> Quantization:
    """Put a float model into the training state; see :func:`quantize` for what is refused."""
    if quantization_of(model) is not None:
        raise ModelError(
            f"{type(model).__name__} is quantized already. Call model.dequantize() before quantizing again."
        )
    record_of(model)  # refuses a model that another library quantized
    check_finite(model)
    return prepare(model, resolve(model, scheme_in(config)))


def dequantize(model: nn.Module) -> nn.Module:
    """Make an ordinary float model of a quantized one, in place. Weights keep their quantized values.

    Args:
        model: quantized by :func:`quantize`, by quantization-aware training, or loaded from such a checkpoint.

    Returns:
        ``model``; its record of pruning is kept.
    """
    make_plain(model)
    attach(model)
    return model


def scheme_in(config: Any) -> Quantization:
    """The scheme that a configuration holds.

    Raises:
        ModelError: when it holds none.
    """
    scheme = config if isinstance(config, Quantization) else getattr(config, "quantization", None)
    if scheme is None:
        raise ModelError("the configuration names no bits; give HfCompressConfig(weights=4), for example.")
    return scheme


def attach(model: nn.Module) -> None:
    """Let a model of transformers carry how it is quantized in its configuration; does nothing to others."""
    if getattr(model, "config", None) is not None:
        from hf_compress.hub.quantizer import (
            attach_quantization,
        )  # transformers is there, since there is a configuration

        attach_quantization(model)


def _undo(model: nn.Module) -> None:
    """Back from the training state to the float model that it came from."""
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    make_plain(model)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(kept[name])
