"""Layers that compute with low-bit weights and activations, without a change to what they are called or hold.

A quantized layer is the module that it was, with a class derived from its own: ``weight`` reads as ``scale * code``, and
the input goes through its quantizer before the layer's own ``forward``. The float weights stay the parameter
``weight``, so optimizers, DistributedDataParallel, gradient checkpointing, hooks and state dicts see what they always
did. Only what a quantizer learns is added, under names that begin with ``hf_compress_``.

A model is in one of two states. *Training*: as above. *Frozen*: the parameter holds the quantized values, layers whose
inputs are float have their own class again, and run at the speed of any float model.
"""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_compress.axes.tracing import Tracer
from hf_compress.errors import MethodError, ModelError, RecordError

from .quantizers import (
    FIRST_ALPHA,
    clipped_relu,
    codes_of,
    dequantized,
    fake_quantized,
    for_broadcast,
    in_own_range,
    in_range,
    scale_of,
    unit_of,
)
from .scheme import SKIP_WORDS, Quantization

_QUANTIZABLE = (nn.Linear, nn.modules.conv._ConvNd)
ALPHA, BOUNDS, STEP = "hf_compress_alpha", "hf_compress_range", "hf_compress_step"


@dataclass(frozen=True)
class WeightQuantizer:
    """How a module's weights are quantized while training; kept as ``module.hf_compress_weight``."""

    bits: int
    rule: str
    channel_dim: int | None


@dataclass(frozen=True, eq=False)
class FrozenWeight:
    """What a module's weights, quantized already, are made of; kept as ``module.hf_compress_weight``.

    Args:
        quantizer: the one they came from.
        scale: float32 [channels] or [1] on the CPU, out of the reach of ``half()``: codes times it are the weights.
        was_trained: whether the parameter asked for gradients before it was frozen.
    """

    quantizer: WeightQuantizer
    scale: Tensor
    was_trained: bool

    def codes(self, weight: Tensor, name: str) -> Tensor:
        """Codes of the module's weights, [shape of ``weight``], on the CPU.

        Raises:
            ModelError: when the weights are not on their grid.
        """
        quantizer = self.quantizer
        wide = weight.detach().cpu().float()
        codes = codes_of(wide, for_broadcast(self.scale, wide, quantizer.channel_dim), quantizer.bits)
        # half() and bfloat16() round the product to 11 and 8 bits; more than that is another weight
        difference = (dequantized(codes, self.scale, quantizer.channel_dim, wide.dtype) - wide).abs()
        if not bool((difference <= 2**-8 * wide.abs()).all()):
            raise ModelError(
                f"the weights of {name!r} are not on their {quantizer.bits}-bit grid any more: they were changed after "
                "quantization. Train with QuantizationAwareTrainingCallback, or call model.dequantize() to keep them "
                "in float."
            )
        return codes


@dataclass(frozen=True)
class InputQuantizer:
    """How a module's inputs are quantized; kept as ``module.hf_compress_input``."""

    bits: int
    scheme: str


class ClippedReLU(nn.ReLU):
    """A ReLU module with a few levels (:func:`~.quantizers.clipped_relu`); made from one by :func:`prepare`."""

    hf_compress_bits: int

    def forward(self, input: Tensor) -> Tensor:
        observer = self.__dict__.get("hf_compress_observer")
        if observer is not None:
            observer(input)
        if observer is not None or _is_watched():
            return torch.relu(input)
        return clipped_relu(input, cast(Tensor, self._parameters[ALPHA]), self.hf_compress_bits)


@cache
def _quantized_class(base: type[nn.Module]) -> type[nn.Module]:
    def weight(self: nn.Module) -> Tensor:
        raw = cast(Tensor, self._parameters["weight"])
        quantizer = self.__dict__.get("hf_compress_weight")
        if not isinstance(quantizer, WeightQuantizer) or raw is None or raw.is_meta or _is_watched():
            return raw
        learned = cast("Tensor | None", self._parameters.get(STEP))
        return fake_quantized(raw, quantizer.bits, quantizer.rule, quantizer.channel_dim, learned)

    def forward(self: nn.Module, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        quantizer = self.__dict__.get("hf_compress_input")
        observer = self.__dict__.get("hf_compress_observer")
        if observer is not None:
            observer(input)
        elif quantizer is not None and not _is_watched():
            if quantizer.scheme == "static":
                input = in_range(input, cast(Tensor, self._parameters[BOUNDS]), quantizer.bits)
            else:
                input = in_own_range(input, quantizer.bits)
        return base.forward(self, input, *args, **kwargs)

    members = {"weight": property(weight), "forward": forward, "hf_compress_base": base, "__module__": base.__module__}
    return type(f"Quantized{base.__name__}", (base,), members)


def _is_watched() -> bool:
    """Whether find_axes is looking: it must see the parameters themselves."""
    return not torch.compiler.is_compiling() and isinstance(torch.overrides._get_current_function_mode(), Tracer)


# -- choosing -----------------------------------------------------------------------------------------------------


def is_quantizable(module: nn.Module) -> bool:
    """Whether a module is a linear layer or a convolution with a float weight of its own."""
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    if not isinstance(module, _QUANTIZABLE) and not (conv1d is not None and isinstance(module, conv1d)):
        return False
    weight = module._parameters.get("weight")
    return weight is not None and weight.is_floating_point() and weight.dim() > 1


def quantizable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module, for all that can be quantized. Weights shared between modules cannot."""
    paths: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                paths.setdefault(id(parameter), []).append((path, module))
    own = {id(module._parameters["weight"]): module for module in model.modules() if is_quantizable(module)}
    return {paths[key][0][0]: module for key, module in own.items() if len(paths[key]) == 1}


def resolve(model: nn.Module, scheme: Quantization) -> Quantization:
    """The scheme with the names of the modules that it applies to.

    Raises:
        MethodError: when a skip pattern matches nothing, or nothing is left.
    """
    layers = quantizable_layers(model)
    is_clipped = scheme.activations is not None and scheme.activation_scheme == "clipped_relu"
    relus = [path for path, module in model.named_modules() if isinstance(module, nn.ReLU)] if is_clipped else []
    skipped: set[str] = set()
    for pattern in scheme.skip:
        if pattern in SKIP_WORDS:
            skipped.update(_SKIPPED[pattern](model, layers))
            continue
        matched = {path for path in (*layers, *relus) if fnmatch.fnmatchcase(path, pattern)}
        if not matched:
            raise MethodError(
                f"skip={pattern!r} matches no layer of {type(model).__name__}; it has {', '.join([*layers][:6])}"
                f"{', ...' if len(layers) > 6 else ''}. Patterns are globs of module names, like '*.downsample.*'."
            )
        skipped |= matched
    chosen = tuple(path for path in layers if path not in skipped)
    inputs = tuple(path for path in relus if path not in skipped) if is_clipped else chosen
    if scheme.weights is not None and not chosen:
        raise MethodError(
            f"{type(model).__name__} has {len(layers)} layers that can be quantized, and skip={list(scheme.skip)} leaves "
            "none of them. Pass skip=() to quantize all."
        )
    if scheme.activations is not None and not inputs:
        raise MethodError(
            f"{type(model).__name__} has no {'ReLU module' if is_clipped else 'layer'} whose activations could be "
            f"quantized (skip={list(scheme.skip)}). "
            + ("Use activation_scheme='static' or 'dynamic'." if is_clipped else "Pass skip=() to quantize all.")
        )
    return replace(
        scheme,
        layers=chosen if scheme.weights is not None else (),
        activation_layers=inputs if scheme.activations is not None else (),
    )


def _last(model: nn.Module, layers: dict[str, nn.Module]) -> Iterator[str]:
    """The last layer, and the heads: everything outside the base model with one output per class."""
    yield from [*layers][-1:]
    classes = getattr(getattr(model, "config", None), "num_labels", None)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for path, module in layers.items():
        weight = module._parameters["weight"]
        if classes is not None and weight is not None and weight.shape[0] == classes and not path.startswith(prefix):
            yield path


_SKIPPED: dict[str, Any] = {
    "first": lambda model, layers: [*layers][:1],
    "last": _last,
    "positions": lambda model, layers: [path for path in layers if "position" in path],
}


def channel_dim(module: nn.Module, per_channel: bool) -> int | None:
    """The dimension of the weight that counts outputs; None when one scale serves all."""
    if not per_channel:
        return None
    is_transposed = getattr(module, "transposed", False) or not isinstance(module, _QUANTIZABLE)
    return 1 if is_transposed else 0


# -- changing state -----------------------------------------------------------------------------------------------


def quantization_of(model: nn.Module) -> Quantization | None:
    """The resolved scheme of a model that is quantized or being trained so, or None."""
    return vars(model).get("hf_compress_quantization")


def prepare(model: nn.Module, scheme: Quantization) -> Quantization:
    """Put a float model into the training state, in place; the scheme must be resolved.

    Raises:
        RecordError: when a name in the scheme belongs to no suitable module; the model is then unchanged.
    """
    assert scheme.layers is not None and scheme.activation_layers is not None
    layers = quantizable_layers(model)
    modules = dict(model.named_modules())
    is_clipped = scheme.activation_scheme == "clipped_relu"
    for path in scheme.layers:
        _check(path, path in layers, "linear layer or convolution with weights of its own")
    for path in scheme.activation_layers:
        if is_clipped:
            _check(path, isinstance(modules.get(path), nn.ReLU), "ReLU module")
        else:
            _check(path, path in layers, "linear layer or convolution")
    for path in scheme.layers:
        module = modules[path]
        dim = channel_dim(module, scheme.per_channel)
        assert scheme.weights is not None
        _attach_weight(module, WeightQuantizer(scheme.weights, scheme.scale, dim))
    for path in scheme.activation_layers:
        module = modules[path]
        assert scheme.activations is not None
        device = next((p.device for p in module.parameters()), _device(model))
        if is_clipped:
            module.__class__ = ClippedReLU
            module.hf_compress_bits = scheme.activations  # type: ignore[assignment]
            first = torch.full((), FIRST_ALPHA[scheme.activations], device=device)
            module.register_parameter(ALPHA, nn.Parameter(first))
            continue
        module.hf_compress_input = InputQuantizer(scheme.activations, scheme.activation_scheme)  # type: ignore[assignment]
        _become_quantized(module)
        if scheme.activation_scheme == "static":
            module.register_parameter(BOUNDS, nn.Parameter(torch.tensor([-1.0, 1.0], device=device)))
    scheme = replace(scheme, format="training")
    model.hf_compress_quantization = scheme  # type: ignore[assignment]
    return scheme


def _check(path: str, is_right: bool, what: str) -> None:
    if not is_right:
        shown = path if len(path) <= 60 else path[:60] + "..."
        raise RecordError(
            f"quantization: {shown!r} is no {what} of this architecture. The checkpoint's config.json was written for "
            "another model, or changed since; save the checkpoint again."
        )


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _become_quantized(module: nn.Module) -> None:
    if not hasattr(type(module), "hf_compress_base"):
        module.__class__ = _quantized_class(type(module))  # type: ignore[arg-type]


def _attach_weight(module: nn.Module, quantizer: WeightQuantizer, scale: Tensor | None = None) -> None:
    module.hf_compress_weight = quantizer  # type: ignore[assignment]
    _become_quantized(module)
    if quantizer.rule == "learned":
        _attach_step(module, quantizer, scale)


def _attach_step(module: nn.Module, quantizer: WeightQuantizer, scale: Tensor | None = None) -> None:
    """Give a module a learned step, which begins at ``scale`` or the best one for its weights."""
    weight = module._parameters["weight"]
    assert weight is not None
    unit = unit_of(weight, quantizer.bits, quantizer.channel_dim)
    if not weight.is_meta:
        if scale is None:
            _, scale = scale_of(weight, quantizer.bits, quantizer.rule, quantizer.channel_dim)
        unit = torch.where(unit > 0, scale.to(unit.device) / unit, 1)
    module.register_parameter(STEP, nn.Parameter(unit))


def freeze(model: nn.Module) -> nn.Module:
    """Replace the float weights of a model in the training state by their quantized values, in place.

    The quantized weights, and what activation quantizers have learned, ask for no gradients afterwards; the rest of
    the model can be trained on.
    """
    scheme = quantization_of(model)
    assert scheme is not None and scheme.layers is not None and scheme.activation_layers is not None
    for path in scheme.layers:
        module = model.get_submodule(path)
        quantizer = vars(module)["hf_compress_weight"]
        if isinstance(quantizer, FrozenWeight):
            continue
        weight = module._parameters["weight"]
        learned = module._parameters.pop(STEP, None)
        assert weight is not None
        with torch.no_grad():
            _, scale = scale_of(weight, quantizer.bits, quantizer.rule, quantizer.channel_dim, learned)
            weight.copy_(fake_quantized(weight, quantizer.bits, quantizer.rule, quantizer.channel_dim, learned))
        freeze_as(module, quantizer, scale)
    _train_ranges(model, scheme.activation_layers, False)
    model.hf_compress_quantization = replace(scheme, format="packed")  # type: ignore[assignment]
    return model


def _train_ranges(model: nn.Module, paths: Iterable[str], wanted: bool) -> None:
    """Whether what activation quantizers learn asks for gradients."""
    for path in paths:
        for name in (ALPHA, BOUNDS):
            parameter = model.get_submodule(path)._parameters.get(name)
            if parameter is not None:
                parameter.requires_grad_(wanted)


def freeze_as(module: nn.Module, quantizer: WeightQuantizer, scale: Tensor) -> None:
    """Note that a module's weights are codes times ``scale``, and give it its own class back where it can have it."""
    weight = module._parameters["weight"]
    assert weight is not None
    kept = scale.detach().float().cpu().clone()
    module.hf_compress_weight = FrozenWeight(quantizer, kept, weight.requires_grad)  # type: ignore[assignment]
    weight.requires_grad_(False)
    if "hf_compress_input" not in vars(module):
        _become_plain(module)


def _become_plain(module: nn.Module) -> None:
    base = getattr(type(module), "hf_compress_base", None)
    if base is not None:
        module.__class__ = base


def unfreeze(model: nn.Module) -> nn.Module:
    """Put a frozen model into the training state, in place; the float weights start from the quantized ones."""
    scheme = quantization_of(model)
    assert scheme is not None and scheme.layers is not None and scheme.activation_layers is not None
    for path in scheme.layers:
        module = model.get_submodule(path)
        frozen = vars(module)["hf_compress_weight"]
        if isinstance(frozen, WeightQuantizer):
            continue
        weight = module._parameters["weight"]
        assert weight is not None
        weight.requires_grad_(frozen.was_trained)
        _attach_weight(module, frozen.quantizer, frozen.scale)
    _train_ranges(model, scheme.activation_layers, True)
    model.hf_compress_quantization = replace(scheme, format="training")  # type: ignore[assignment]
    return model


def make_plain(model: nn.Module) -> nn.Module:
    """Make an ordinary float model of a quantized one, in place: quantized weights stay, activations become float."""
    scheme = quantization_of(model)
    if scheme is None:
        return model
    if scheme.format == "training":
        freeze(model)
    assert scheme.layers is not None and scheme.activation_layers is not None
    for path in scheme.layers:
        module = model.get_submodule(path)
        frozen = vars(module).pop("hf_compress_weight")
        module._parameters["weight"].requires_grad_(frozen.was_trained)  # type: ignore[union-attr]
    for path in {*scheme.layers, *scheme.activation_layers}:
        module = model.get_submodule(path)
        for name in ("hf_compress_input", "hf_compress_bits"):
            vars(module).pop(name, None)
        for name in (ALPHA, BOUNDS):
            module._parameters.pop(name, None)
        _become_plain(module)
        if type(module) is ClippedReLU:
            module.__class__ = nn.ReLU  # type: ignore[assignment]
    del model.hf_compress_quantization
    return model
