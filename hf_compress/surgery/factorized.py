"""A layer in two factors: the module that stands where a linear layer or convolution was.

Both factors are ordinary layers of torch, so that axes, pruning, export and checkpoints see nothing new. Schemes and
weights: :mod:`.decomposition`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .decomposition import Scheme

_BOTH = ("kernel_size", "stride", "dilation", "padding", "padding_mode")  # a dimension is left neutral by one of two
_ENDS = {"in_features": "first", "in_channels": "first", "groups": "first", "out_features": "second",
         "out_channels": "second", "bias": "second"}  # fmt: skip


class Factorized(nn.Module):
    """Two layers in place of one: ``second(first(input))``.

    What code reads of a layer without running it (``in_features``, ``out_channels``, ``stride``, ``bias``, ``weight.dtype``)
    is that of the layer replaced.

    Args:
        first: makes the rank; it has no bias of its own at first.
        second: reads the rank; holds the bias of the layer replaced.
        scheme: by which that was decomposed.
    """

    def __init__(self, first: nn.Module, second: nn.Module, scheme: Scheme):
        super().__init__()
        self.first: Any = first
        self.second: Any = second
        self.scheme: Scheme = scheme

    def forward(self, input: Tensor) -> Tensor:
        return self.second(self.first(input))

    def __getattr__(self, name: str) -> Any:
        if name in _ENDS:
            return getattr(getattr(self, _ENDS[name]), name)
        if name in _BOTH:
            first, second = getattr(self.first, name), getattr(self.second, name)
            if isinstance(first, str) or isinstance(second, str):  # padding="same", or a padding mode
                return next((value for value in (first, second) if isinstance(value, str) and value != "zeros"), first)
            return tuple(map(max, first, second))
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        return f"scheme={self.scheme!r}, rank={self.rank}"

    @property
    def rank(self) -> int:
        """Of every matrix into which the scheme unfolds the weight."""
        return self.second.weight.shape[1]

    @property
    def weight(self) -> Tensor:
        """A stand-in with the dense weight's shape, dtype and device, for code that asks for these.

        It is full of NaN, so that nobody computes with it unawares, and new at every reading, so that what is written to
        it (initial values, by models that look into their parts) is lost. :meth:`dense_weight` has the values.
        """
        return self.second.weight.detach().new_full(self._dense_shape(), math.nan)

    def dense_weight(self) -> Tensor:
        """The weight of the one layer that computes the same."""
        first, second = self.first.weight, self.second.weight
        blocks, rank = getattr(self.second, "groups", 1), self.rank
        first = first.reshape(blocks, rank, first.shape[1], *_two(first.shape[2:]))
        second = second.reshape(blocks, -1, rank, *_two(second.shape[2:]))
        # of each kernel dimension one factor has all and the other has one
        return torch.einsum("brcij,bnrkl->bncikjl", first, second).reshape(self._dense_shape())

    def _dense_shape(self) -> tuple[int, ...]:
        kernel = () if isinstance(self.first, nn.Linear) else self.kernel_size
        return (self.second.weight.shape[0], self.first.weight.shape[1], *kernel)


def _two(kernel: tuple[int, ...]) -> tuple[int, ...]:
    return (*kernel, *(1,) * (2 - len(kernel)))


def factorized_shell(layer: nn.Module, scheme: Scheme, rank: int) -> Factorized:
    """The module that replaces a layer, with weights on the meta device and with the layer's own bias.

    Args:
        layer: a plain linear layer or convolution.
        scheme: how its weight is unfolded.
        rank: of every matrix.
    """
    weight: Tensor = layer.weight  # type: ignore[assignment]
    place: dict[str, Any] = {"device": "meta", "dtype": weight.dtype}
    if isinstance(layer, nn.Linear):
        first: nn.Module = nn.Linear(layer.in_features, rank, bias=False, **place)
        second: nn.Module = nn.Linear(rank, layer.out_features, bias=False, **place)
    else:
        assert isinstance(layer, (nn.Conv1d, nn.Conv2d))
        whole, taken = range(len(layer.kernel_size)), dims_of_first(layer, scheme)
        blocks = layer.out_channels if scheme == "decoupled" else layer.groups
        middle, kind = blocks * rank, type(layer)
        first = kind(layer.in_channels, middle, groups=layer.groups, bias=False, **_part(layer, taken), **place)
        second = kind(
            middle, layer.out_channels, groups=blocks, bias=False, **_part(layer, set(whole) - taken), **place
        )
    second.bias = layer.bias  # type: ignore[assignment]
    return Factorized(first, second, scheme).train(layer.training)


def dims_of_first(layer: nn.Module, scheme: Scheme) -> set[int]:
    """Dimensions of a convolution's kernel, and so of its stride, that the first factor has; the second has the others."""
    dims: dict[Scheme, set[int]] = {"channel": set(range(len(layer.kernel_size))), "spatial": {0}, "decoupled": set()}  # type: ignore[arg-type]
    return dims[scheme]


def _part(layer: nn.Conv1d | nn.Conv2d, taken: set[int]) -> dict[str, Any]:
    """The geometry of one factor: that of the layer along the dimensions taken, neutral along the others."""

    def along(values: tuple[int, ...], neutral: int) -> Any:
        return tuple(value if dim in taken else neutral for dim, value in enumerate(values))

    padding: Any = layer.padding
    if isinstance(padding, str):  # "same" or "valid"
        padding = padding if taken else 0
    else:
        padding = along(padding, 0)
    return {
        "kernel_size": along(layer.kernel_size, 1),
        "stride": along(layer.stride, 1),
        "dilation": along(layer.dilation, 1),
        "padding": padding,
        "padding_mode": layer.padding_mode if taken else "zeros",
    }


def factorized_in(model: nn.Module) -> Iterator[tuple[str, Factorized]]:
    """Every layer in two factors, by its path."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, Factorized))
