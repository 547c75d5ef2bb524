"""Ranges of activations from a few batches: the least squared error over all values that were seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.axes.finding import run_model, undisturbed
from hf_compress.errors import DataError, ModelError

from .layers import ALPHA, BOUNDS, ClippedReLU, quantization_of
from .quantizers import SMALLEST_ALPHA, clipped_relu, in_range

_SHRINKINGS = tuple(i / 20 for i in range(20, 3, -1))
_MOST_BATCHES = 64


def calibrate(model: nn.Module, batches: Iterable[Any] | None, *, batch_statistics: bool = False) -> None:
    """Choose the ranges of all activation quantizers that have one, in place.

    The model runs in float, in evaluation mode, twice: for the extremes, then for the error of ranges that are a part
    of them. The batches' labels are not read.

    Args:
        model: in the training state.
        batches: what a ``DataLoader`` gives: dicts with ``pixel_values``, tensors, or tuples with the images first. At
            most 64 are used.
        batch_statistics: let BatchNorm normalise by the batch, as it will in training; a model that was not trained yet
            has no running statistics.

    Raises:
        DataError: when there is no batch, or one has no images.
        ModelError: when activations are not finite.
    """
    scheme = quantization_of(model)
    assert scheme is not None and scheme.activation_layers is not None and scheme.activations is not None
    held = [images_of(batch) for batch in islice(batches, _MOST_BATCHES)] if batches is not None else []
    if not any(len(images) for images in held):
        raise DataError(
            f"activation_scheme={scheme.activation_scheme!r} needs calibration batches, and there are none. Pass "
            "batches= with a few hundred images, for example a DataLoader, or use activation_scheme='dynamic'."
        )
    observers = {path: _Observer(model.get_submodule(path), scheme.activations) for path in scheme.activation_layers}
    for path, observer in observers.items():
        vars(model.get_submodule(path))["hf_compress_observer"] = observer
    try:
        for observe in ("see_extremes", "see_errors"):
            for observer in observers.values():
                observer.now = getattr(observer, observe)
            _run(model, held, batch_statistics)
            if observe == "see_extremes":
                _check(observers)
    finally:
        for path in observers:
            vars(model.get_submodule(path)).pop("hf_compress_observer", None)
    for observer in observers.values():
        observer.write()


def images_of(batch: Any) -> Tensor:
    """The images of a batch.

    Raises:
        DataError: when there are none.
    """
    images = batch
    if isinstance(batch, Mapping):
        images = batch.get("pixel_values")
    elif isinstance(batch, (tuple, list)) and batch:
        images = batch[0]
    if not isinstance(images, Tensor):
        raise DataError(
            f"a calibration batch is a {type(batch).__name__} without images; it must be a dict with 'pixel_values', a "
            "tensor, or a tuple whose first item is one."
        )
    return images


def _run(model: nn.Module, batches: list[Tensor], batch_statistics: bool) -> None:
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    with undisturbed(model), torch.no_grad():
        for module in model.modules():
            if batch_statistics and isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train()
        for images in batches:
            if len(images):
                run_model(model, images.to(parameter.device, parameter.dtype))


def _check(observers: Mapping[str, _Observer]) -> None:
    for path, observer in observers.items():
        if observer.low is not None and not bool(observer.low.isfinite() & observer.high.isfinite()):
            raise ModelError(
                f"the activations at {path!r} are not finite on the calibration batches. Check the images and the model."
            )


class _Observer:
    """Watches what goes into one activation quantizer."""

    def __init__(self, module: nn.Module, bits: int):
        self.module, self.bits = module, bits
        self.is_clipped = isinstance(module, ClippedReLU)
        self.low: Any = None  # stays None where a layer does not run
        self.high: Any = None
        self.errors: Any = 0
        self.now: Any = None

    def __call__(self, x: Tensor) -> None:
        self.now(x.detach())

    def see_extremes(self, x: Tensor) -> None:
        low, high = x.float().aminmax()
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    def see_errors(self, x: Tensor) -> None:
        x = x.relu() if self.is_clipped else x
        errors = [(self._quantized(x, part) - x).float().square().sum() for part in _SHRINKINGS]
        self.errors = self.errors + torch.stack(errors)

    def _quantized(self, x: Tensor, part: float) -> Tensor:
        if self.is_clipped:
            return clipped_relu(x, self._alpha(part), self.bits)
        return in_range(x, torch.stack([self.low, self.high]) * part, self.bits)

    def _alpha(self, part: float) -> Tensor:
        return (part * self.high / (2**self.bits - 1)).clamp_min(SMALLEST_ALPHA)

    def write(self) -> None:
        if self.low is None:
            return
        part = _SHRINKINGS[int(self.errors.argmin())]
        with torch.no_grad():
            if self.is_clipped:
                self.module._parameters[ALPHA].copy_(self._alpha(part))  # type: ignore[union-attr]
            else:
                self.module._parameters[BOUNDS].copy_(torch.stack([self.low, self.high]) * part)  # type: ignore[union-attr]
