"""The tensors of a quantized checkpoint: codes at their real width and scales, in place of float weights.

``<module>.weight`` becomes ``<module>.hf_compress_codes`` (uint8, :mod:`~.packing`) and ``<module>.hf_compress_scale``
(float32, one for each output channel or one in all). What activation quantizers have learned is stored as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.errors import ModelError, RecordError

from .layers import (
    STEP,
    FrozenWeight,
    WeightQuantizer,
    channel_dim,
    freeze,
    freeze_as,
    prepare,
    quantizable_layers,
    quantization_of,
    resolve,
)
from .packing import pack, packed_size, unpack
from .quantizers import dequantized
from .scheme import Quantization

CODES, SCALE = "hf_compress_codes", "hf_compress_scale"


def packed_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a frozen model as it is stored.

    Raises:
        ModelError: when quantized weights were changed since.
    """
    scheme = quantization_of(model)
    assert scheme is not None and scheme.layers is not None
    state = dict(model.state_dict())
    for path in scheme.layers:
        frozen: FrozenWeight = vars(model.get_submodule(path))["hf_compress_weight"]
        codes = frozen.codes(state.pop(f"{path}.weight"), path)
        state[f"{path}.{CODES}"] = pack(codes, frozen.quantizer.bits)
        state[f"{path}.{SCALE}"] = frozen.scale.clone()
    return state


def prepare_skeleton(model: nn.Module, scheme: Quantization) -> None:
    """Give a freshly built model the tensors that its checkpoint holds.

    Raises:
        RecordError: when the scheme does not fit the model.
        ModelError: when it needs calibration batches, which loading cannot have.
    """
    if scheme.format == "dense":
        if scheme.needs_batches:
            raise ModelError(
                f"activation_scheme={scheme.activation_scheme!r} needs calibration batches, which from_pretrained does "
                "not have. Load the model without quantization_config and call hf_compress.quantize(model, config, "
                "batches), or use activation_scheme='dynamic'."
            )
        return
    prepare(model, scheme)
    if scheme.format == "training":
        return
    assert scheme.layers is not None
    for path in scheme.layers:
        assert scheme.weights is not None  # or there would be no layer
        module = model.get_submodule(path)
        weight = module._parameters["weight"]
        module._parameters["weight"] = None  # keeps its place in the order of parameters
        module._parameters.pop(STEP, None)
        assert weight is not None
        dim = channel_dim(module, scheme.per_channel)
        count = 1 if dim is None else weight.shape[dim]
        size = packed_size(weight.numel(), scheme.weights)
        module.register_buffer(CODES, torch.empty(size, dtype=torch.uint8, device=weight.device))
        module.register_buffer(SCALE, torch.empty(count, dtype=torch.float32, device=weight.device))
        vars(module)["hf_compress_shape"] = (weight.shape, weight.dtype, weight.requires_grad)
        vars(module)["_is_hf_initialized"] = True  # it has no weight that could be given first values


def finish_loading(model: nn.Module, scheme: Quantization) -> None:
    """Turn what was loaded into a frozen model.

    Raises:
        RecordError: when codes or scales are missing or impossible.
    """
    if scheme.format == "dense":
        check_finite(model)
        prepare(model, resolve(model, scheme))
    if scheme.format == "packed":
        assert scheme.layers is not None
        for path in scheme.layers:
            assert scheme.weights is not None
            _unpack_layer(path, model.get_submodule(path), scheme.weights)
    if scheme.format == "training":
        for path in {*(scheme.layers or ()), *(scheme.activation_layers or ())}:
            for name, parameter in model.get_submodule(path)._parameters.items():
                if parameter is not None:
                    _check_is_loaded(f"{path}.{name}", parameter)
    freeze(model)


def _check_is_loaded(name: str, tensor: Tensor) -> None:
    if tensor.is_meta or not getattr(tensor, "_is_hf_initialized", False):  # transformers marks what it has read
        raise RecordError(f"the checkpoint has no tensor {name}, which its config.json asks for. Save it again.")


def _unpack_layer(path: str, module: nn.Module, bits: int) -> None:
    shape, dtype, requires_grad = vars(module).pop("hf_compress_shape")
    quantizer: WeightQuantizer = vars(module)["hf_compress_weight"]
    stored: dict[str, Any] = {name: module._buffers.pop(name) for name in (CODES, SCALE)}
    for name, tensor in stored.items():
        _check_is_loaded(f"{path}.{name}", tensor)
    scale = stored[SCALE]
    if not scale.is_floating_point() or not bool((scale.isfinite() & (scale >= 0)).all()):
        raise RecordError(f"{path}.{SCALE} must hold finite numbers of at least 0. The checkpoint is damaged.")
    try:
        codes = unpack(stored[CODES], bits, tuple(shape))
    except RecordError as error:
        raise RecordError(f"{path}.{CODES}: {error}") from error
    weight = dequantized(codes, scale, quantizer.channel_dim, dtype)
    module._parameters["weight"] = nn.Parameter(weight, requires_grad=requires_grad)
    freeze_as(module, quantizer, scale)


def stored_bytes(model: nn.Module) -> int:
    """Bytes that the tensors of a model take in a checkpoint: packed for a frozen model, as they are otherwise."""
    scheme = quantization_of(model)
    state = packed_state_dict(model) if scheme is not None and scheme.format == "packed" else model.state_dict()
    return sum({id(tensor): tensor.nbytes for tensor in state.values()}.values())


def check_finite(model: nn.Module) -> None:
    """Refuse weights that no quantizer can represent.

    Raises:
        ModelError: naming the parameter.
    """
    for path, module in quantizable_layers(model).items():
        if not bool(module._parameters["weight"].isfinite().all()):  # type: ignore[union-attr]
            raise ModelError(
                f"parameter '{path}.weight' holds NaN or infinite values, which cannot be quantized. Load or train the "
                "model again."
            )
