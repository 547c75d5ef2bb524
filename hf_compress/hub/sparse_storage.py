"""Sparse tensors in checkpoints: one bit for every weight, and the values of those that are not zero.

A tensor ``name`` with enough zeros is stored as ``name:bitmask`` (uint8 [ceil(n / 8)], bit i % 8 of byte i // 8 says whether
entry i is there, in row-major order) and ``name:values`` (the entries that are there, in the tensor's own dtype). All
others are stored as ever. ``save_pretrained`` and ``from_pretrained`` encode and decode through transformers' weight
conversions; the loaded model is dense, bit for bit. ``"storage": "sparse"`` in the checkpoint's ``quantization_config``
says that it is so.
"""

from __future__ import annotations

import copy
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, PrefixChange, WeightConverter, WeightTransform

from hf_compress.errors import ModelError, RecordError
from hf_compress.surgery.skeleton import named_tensors, record_of

from .config import HfCompressConfig, storage_of

BITMASK, VALUES = ":bitmask", ":values"
_DAMAGE = "hf_compress_damage"  # what could not be decoded, while a model is being loaded
_CONVERSIONS = "_weight_conversions"
_POWERS = tuple(1 << i for i in range(8))
_ANYTHING = "."  # the pattern under which every tensor is offered for encoding


# -- one tensor ---------------------------------------------------------------------------------------------------


def encode(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The bitmask and the values of a tensor.

    Only the bit pattern of +0 is left out, so that -0 and NaN come back as they were.

    Args:
        tensor: floating point, any shape.

    Returns:
        uint8 [ceil(n / 8)], and the values in the tensor's dtype.
    """
    flat = tensor.detach().contiguous().flatten()
    present = _present(flat)
    padded = torch.nn.functional.pad(present, (0, -len(flat) % 8)).view(-1, 8)
    powers = torch.tensor(_POWERS, dtype=torch.uint8, device=flat.device)
    return (padded * powers).sum(1, dtype=torch.uint8), flat[present]


def _present(tensor: Tensor) -> Tensor:
    return (tensor != 0) | tensor.signbit()


def decode(bitmask: Tensor, values: Tensor, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor that :func:`encode` was given.

    Args:
        bitmask: uint8 [ceil(n / 8)], or the same numbers in another dtype (transformers casts what it loads).
        values: one for every bit that is set.
        shape: of the tensor; from the model, never from the checkpoint.
        dtype: of the result.

    Raises:
        RecordError: when the two do not belong together or to the shape.
    """
    count = torch.Size(shape).numel()
    for name, part in (("bitmask", bitmask), ("values", values)):
        if part.dim() != 1:
            raise RecordError(f"the {name} has {part.dim()} dimensions, and needs one.")
    if not values.is_floating_point():
        raise RecordError(f"the values have dtype {values.dtype}, and need a floating-point one.")
    if len(bitmask) != -(-count // 8):
        raise RecordError(f"the bitmask has {len(bitmask)} bytes; {count} entries need {-(-count // 8)}.")
    octets = bitmask.to(torch.uint8)
    if octets.dtype != bitmask.dtype and not torch.equal(octets.to(bitmask.dtype), bitmask):
        raise RecordError("the bitmask does not hold whole numbers between 0 and 255.")
    powers = torch.tensor(_POWERS, dtype=torch.uint8, device=octets.device)
    bits = (octets[:, None] & powers).ne(0).flatten()
    if bool(bits[count:].any()):
        raise RecordError("the bitmask has bits behind the last entry.")
    present = bits[:count]
    if (found := int(present.sum())) != len(values):
        raise RecordError(f"the bitmask has {found} bits and there are {len(values)} values.")
    flat = torch.zeros(count, dtype=dtype, device=values.device)
    flat[present.to(values.device)] = values.to(dtype)
    return flat.view(shape)


def pays_off(tensor: Tensor) -> bool:
    """Whether a tensor is smaller as bitmask and values."""
    if not tensor.is_floating_point() or tensor.is_meta or tensor.dim() < 2:
        return False
    zeros = tensor.numel() - int(_present(tensor).sum())
    return zeros * tensor.element_size() > -(-tensor.numel() // 8)


# -- a model ------------------------------------------------------------------------------------------------------


def compact(model: PreTrainedModel) -> PreTrainedModel:
    """Have a model's zeros take no place in the checkpoints that ``save_pretrained`` writes from now on.

    It is written in ``model.config.quantization_config``, so loading it needs ``import hf_compress``, and whatever is
    loaded from such a checkpoint is saved so again. The model itself does not change. Tensors without enough zeros for it
    to pay are stored as ever, and so are those that transformers itself converts when saving.

    Args:
        model: for example one that :class:`~hf_compress.methods.SparseGroupCallback` has trained, after ``shrink``.

    Returns:
        ``model``.

    Raises:
        ModelError: for something other than a model of transformers, or one that another method quantized.
    """
    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"{type(model).__name__} has no save_pretrained; wrap it in a PreTrainedModel to store it compactly."
        )
    record_of(model, may_be_quantized=True)  # raises where another library has quantized it
    config: Any = model.config
    own = copy.deepcopy(config)  # another model may have been built from the same configuration object
    held = getattr(own, "quantization_config", None)
    own.quantization_config = HfCompressConfig(**{**(dict(held) if held else {}), "storage": "sparse"})
    for module in model.modules():
        if vars(module).get("config") is config:
            module.config = own
    attach(model)
    return model


def attach(model: PreTrainedModel) -> None:
    """Make saving encode, and ``load_state_dict`` (Trainer resumes with it) decode."""
    conversions = vars(model).get(_CONVERSIONS)
    if conversions is None:  # as transformers itself finds them when it saves a model that was not loaded
        found = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [conversion for conversion in found if not isinstance(conversion, PrefixChange)]
    if not any(isinstance(conversion, SparseConverter) for conversion in conversions):
        vars(model)[_CONVERSIONS] = with_decoding(conversions)
    if _decode_state_dict not in [getattr(hook, "hook", hook) for hook in model._load_state_dict_pre_hooks.values()]:
        model.register_load_state_dict_pre_hook(_decode_state_dict)


def finish_loading(model: nn.Module) -> None:
    """What follows when the tensors of a checkpoint with sparse ones are in the model.

    Raises:
        RecordError: when one of them could not be decoded.
    """
    if damage := vars(model).pop(_DAMAGE, None):
        raise RecordError(damage)
    assert isinstance(model, PreTrainedModel)
    attach(model)


def with_decoding(conversions: list[WeightTransform] | None) -> list[WeightTransform]:
    """Conversions of a checkpoint's tensors, with the decoding of sparse ones in front.

    In front, so that it comes last when they are reversed for saving, and leaves alone what the others have taken.
    """
    return [SparseConverter([BITMASK, VALUES], "", [_Decode()]), *(conversions or [])]


class _Decode(ConversionOps):
    """Bitmask and values -> the dense tensor of the model's own shape."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        name: str = kwargs["full_layer_name"]
        model = kwargs["model"]
        target = model.get_parameter_or_buffer(name)
        parts = [input_dict.get(part) for part in (BITMASK, VALUES)]
        bitmask, values = (part[0] if isinstance(part, list) and len(part) == 1 else part for part in parts)
        try:
            if not isinstance(bitmask, Tensor) or not isinstance(values, Tensor):
                raise RecordError(f"there must be exactly one {BITMASK!r} and one {VALUES!r}.")
            return {name: decode(bitmask, values, target.shape, values.dtype)}
        except RecordError as error:
            # transformers would log it and raise an error of its own that does not say what is wrong
            vars(model).setdefault(_DAMAGE, _damaged(name, error))
            return {name: torch.zeros(target.shape, dtype=target.dtype)}

    @property
    def reverse_op(self) -> ConversionOps:
        return _Encode()


class _Encode(ConversionOps):
    """A tensor -> bitmask and values where that is smaller, else itself."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        name: str = kwargs["full_layer_name"]
        (tensor,) = input_dict.values()
        tensor = tensor[0] if isinstance(tensor, list) else tensor
        if storage_of(kwargs["config"]) != "sparse" or not pays_off(tensor):
            return {name: tensor}
        bitmask, values = encode(tensor)
        return {f"{name}{BITMASK}": bitmask, f"{name}{VALUES}": values}

    @property
    def reverse_op(self) -> ConversionOps:
        return _Decode()


class SparseConverter(WeightConverter):
    """Loading: joins ``name:bitmask`` and ``name:values``. Reversed, for saving: splits any tensor where it pays."""

    __slots__ = ()

    def reverse_transform(self) -> WeightTransform:
        return _SparseEncoder([_ANYTHING], [BITMASK, VALUES], [_Encode()])


class _SparseEncoder(WeightConverter):
    __slots__ = ()

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        self._was_used = True
        return source_key, self.source_patterns[0]  # whether it is split, and so renamed, depends on the values

    def reverse_transform(self) -> WeightTransform:
        return SparseConverter([BITMASK, VALUES], "", [_Decode()])


def _decode_state_dict(module: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, *_: Any) -> None:
    """Decode in place what a state dict holds as bitmask and values."""
    shapes = None
    for key in [key for key in state_dict if key.startswith(prefix) and key.endswith(BITMASK)]:
        name = key.removesuffix(BITMASK)
        if f"{name}{VALUES}" not in state_dict:
            continue  # load_state_dict reports it as unexpected, and the tensor as missing
        shapes = dict(named_tensors(module)) if shapes is None else shapes
        target = shapes.get(name.removeprefix(prefix))
        if target is None:
            continue
        bitmask, values = state_dict.pop(key), state_dict.pop(f"{name}{VALUES}")
        try:
            state_dict[name] = decode(bitmask, values, target.shape, values.dtype)
        except RecordError as error:
            raise RecordError(_damaged(name, error)) from error


def _damaged(name: str, error: RecordError) -> str:
    return f"{name}: {error} The checkpoint is damaged; save it again."


__all__ = ["attach", "compact", "decode", "encode", "finish_loading", "pays_off", "with_decoding"]
