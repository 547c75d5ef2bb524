"""Stand-ins for what takes most of a watched forward pass: products with large weights, and attention.

Rules look at shapes and at which tensor came from which, never at activations, so what a convolution would have computed may
as well be noise of the same shape. Small products are computed: their results are more often what a program decides by
(routers, offsets, scores of proposals), and cost nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_WORTH = 1_000_000  # multiply-accumulates; fewer take no longer than the stand-in
_LARGE = 1 << 14  # numbers of a weight
_NOISE = 1 << 16  # numbers, repeated where more are needed

limits = {"macs": _WORTH, "weight": _LARGE}
"""What is too small for a stand-in; tests set both to 0."""


def stand_in(name: str, arguments: Mapping[str, Any]) -> Tensor | None:
    """Noise in the shape, type and place of an operator's result; None where the operator is to be computed.

    Args:
        name: of the operator, as :func:`~.tracing.operator_name` gives it.
        arguments: by name, as its rule sees them.
    """
    find_shape = _SHAPES.get(name)
    if find_shape is None:
        return None
    first = arguments.get("query" if name == "scaled_dot_product_attention" else "input")
    if not isinstance(first, Tensor) or not first.is_floating_point() or first.is_meta:
        return None
    if torch.is_autocast_enabled(first.device.type):
        return None  # which decides the type of the result
    found = find_shape(arguments)
    if found is None:
        return None
    shape, macs, weights = found
    if macs < limits["macs"] or weights < limits["weight"]:
        return None
    return _noise(shape, first.dtype, first.device)


_Found = tuple[list[int], int, int]
"""Shape of the result, MACs, numbers in the weight."""


def _is_plain(*tensors: Any) -> bool:
    return all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)


def _linear(arguments: Mapping[str, Any]) -> _Found | None:
    x: Any = arguments["input"]
    weight: Any = arguments.get("weight")
    if not _is_plain(x, weight) or weight.dim() != 2 or x.shape[-1] != weight.shape[1] or x.dtype != weight.dtype:
        return None
    shape = [*x.shape[:-1], weight.shape[0]]
    return shape, math.prod(shape) * weight.shape[1], weight.numel()


def _convolution(arguments: Mapping[str, Any]) -> _Found | None:
    x: Any = arguments["input"]
    weight: Any = arguments.get("weight")
    if not _is_plain(x, weight) or weight.dim() != x.dim() or x.dtype != weight.dtype:
        return None
    rank = weight.dim() - 2
    settings = [arguments.get(name) or default for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))]
    if any(isinstance(value, str) for value in settings):
        return None
    stride, padding, dilation = ([v] * rank if isinstance(v, int) else list(v) * (rank // len(v)) for v in settings)
    groups = arguments.get("groups") or 1
    if x.shape[1] != weight.shape[1] * groups or any(len(value) != rank for value in (stride, padding, dilation)):
        return None
    places = [
        (int(size) + 2 * p - d * (int(kernel) - 1) - 1) // s + 1
        for size, kernel, s, p, d in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    ]
    if min(places) < 1:
        return None  # let the operator say so
    shape = [x.shape[0], weight.shape[0], *places]
    return shape, math.prod(shape) * math.prod(weight.shape[1:]), weight.numel()


def _attention(arguments: Mapping[str, Any]) -> _Found | None:
    tensors: list[Any] = [arguments.get(name) for name in ("query", "key", "value")]
    query, key, value = tensors
    if not _is_plain(query, key, value) or not query.dim() == key.dim() == value.dim() >= 3:
        return None
    if query.shape[:-2] != key.shape[:-2] or key.shape[:-1] != value.shape[:-1] or query.shape[-1] != key.shape[-1]:
        return None
    shape = [*query.shape[:-1], value.shape[-1]]
    return shape, query.numel() * key.shape[-2] + math.prod(shape) * key.shape[-2], limits["weight"]


_SHAPES = {
    "linear": _linear,
    "conv1d": _convolution,
    "conv2d": _convolution,
    "conv3d": _convolution,
    "scaled_dot_product_attention": _attention,
}


@functools.cache
def _source(dtype: torch.dtype, device: torch.device) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(_NOISE, generator=draw).to(device, dtype)


def _noise(shape: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    source, count = _source(dtype, device), math.prod(shape)
    if count <= _NOISE:
        return source[:count].clone().view(shape)
    flat = torch.empty(count, dtype=dtype, device=device)
    rows = count // _NOISE
    flat[: rows * _NOISE].view(rows, _NOISE).copy_(source.expand(rows, _NOISE))
    flat[rows * _NOISE :].copy_(source[: count - rows * _NOISE])
    return flat.view(shape)
