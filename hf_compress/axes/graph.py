"""The axes of a model: what can shrink, what hangs on it, and what it costs.

:class:`AxisGraph` is the result of one watched forward pass, in plain data: names, sizes and positions. It holds no
module and no tensor of the model, so it stays valid for any copy of the same architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, NamedTuple, Union

import numpy as np
import torch
from torch import Tensor

from hf_compress.errors import PlanError

if TYPE_CHECKING:
    from hf_compress.surgery.plan import Plan

Keep = Union["Plan", Mapping[str, int], None]


class Cost(NamedTuple):
    """What a model costs for one example: multiply-accumulates and parameters."""

    macs: int
    params: int


@dataclass(frozen=True, eq=False)
class Member:
    """One dimension of one parameter or buffer in which an axis takes part.

    Attributes:
        parameter: name in ``named_parameters()`` or ``named_buffers()``.
        dim: which dimension.
        positions: int64 [axis size, k]: the positions along ``dim`` that belong to each index of the axis. k exceeds 1
            where the dimension is a product (heads x head_dim) or repeats the axis.
    """

    parameter: str
    dim: int
    positions: Tensor


@dataclass(frozen=True, eq=False)
class Axis:
    """A set of interchangeable indices that several parameter dimensions share.

    Attributes:
        name: unique and stable: the module of the first producer, with ``:heads`` and the like where one dimension
            holds several axes.
        size: number of indices.
        members: every parameter dimension that the axis touches.
        producers: the members that make the values, parameters or buffers (the shift of a frozen norm); zeroing them at
            an index masks it.
        scales: one-dimensional learned factors, one number per index (a BatchNorm weight, a layer scale).
        is_exact: whether removing an index equals masking it.
        reasons: why it is not exact; empty when it is.
        macs: MACs of one example that disappear with the whole axis.
        params: parameters that disappear with the whole axis.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    producers: tuple[Member, ...]
    scales: tuple[Member, ...]
    is_exact: bool
    reasons: tuple[str, ...]
    macs: int = 0
    params: int = 0

    def __repr__(self) -> str:
        kind = "exact" if self.is_exact else "inexact"
        return f"Axis({self.name!r}, size={self.size}, {kind}, members={len(self.members)}, macs={self.macs})"


class SizeLaw:
    """An integer as a polynomial in the sizes of axes, evaluated in microseconds.

    Args:
        names: axis names, in the order of the index columns.
        sizes: the dense sizes of these axes.
        monomials: (indices of axes with repetition, coefficient) pairs.
    """

    def __init__(self, names: list[str], sizes: list[int], monomials: list[tuple[tuple[int, ...], float]]):
        self._place = {name: i for i, name in enumerate(names)}
        self._dense = np.array([*sizes, 1], dtype=np.float64)
        degree = max((len(m) for m, _ in monomials), default=0) or 1
        table = np.full((len(monomials), degree), len(names), dtype=np.int64)
        for row, (monomial, _) in enumerate(monomials):
            table[row, : len(monomial)] = monomial
        self._table = table
        self._coefficients = np.array([c for _, c in monomials], dtype=np.float64)

    def __call__(self, sizes: Mapping[str, int]) -> int:
        """The value when each named axis has the given size and all others are whole."""
        current = self._dense.copy()
        for name, size in sizes.items():
            place = self._place.get(name)
            if place is not None:
                current[place] = size
        return round(float(self._coefficients @ current[self._table].prod(axis=1)))


@dataclass(frozen=True)
class AttributeLaw:
    """A module attribute that must follow the axes: ``module.name`` (or its item ``index``) equals ``law(sizes)``."""

    module: str
    name: str
    index: int | None
    law: SizeLaw


class SizeFactor:
    """A product of powers of sizes, as the ratio of its dense value to that for other sizes.

    Args:
        powers: (size as a function of axis sizes, exponent) pairs.
    """

    def __init__(self, powers: list[tuple[Callable[[Mapping[str, int]], int], float]]):
        self._powers = powers

    def __call__(self, sizes: Mapping[str, int]) -> float:
        """Dense value over the value when each named axis has the given size and all others are whole."""
        return prod((size({}) / size(sizes)) ** power for size, power in self._powers)


@dataclass(frozen=True, eq=False)
class Rescale:
    """Rows of a parameter that make up for a factor which the forward pass computes from a size (1 / sqrt(head_dim)).

    Attributes:
        parameter: name in ``named_parameters()``, of a layer that alone makes what the factor multiplies.
        dim: which dimension.
        positions: int64 [k], along ``dim`` of the dense parameter.
        factor: what surgery multiplies them by, as a function of axis sizes.
    """

    parameter: str
    dim: int
    positions: Tensor
    factor: SizeFactor


@dataclass(frozen=True)
class Contraction:
    """A linear layer or convolution that sums over ``weight`` dimension ``dim``.

    ``norm`` names the BatchNorm module that alone reads its output, where there is one; ``has_padding`` tells whether
    zeros enter at the borders, so that a constant input is not constant there.
    """

    axis_names: tuple[str, ...]
    module: str
    weight: str
    dim: int
    has_padding: bool
    norm: str | None


@dataclass(eq=False)
class AxisGraph:
    """All axes of a model. Iterates over :class:`Axis`; prints as a table.

    Attributes:
        axes: name -> axis, in the order of the forward pass.
        fixed: reason -> how many parameter dimensions stay whole for it.
        attributes: module attributes that surgery must set.
        contractions: layers that sum over an axis.
        sizes_tied: groups of axes that must keep equally many indices (they share one module attribute).
        parameter_dims: shape of every parameter and buffer.
        without_rule: operators that were met without a rule -> module where each was met first.
        rescales: rows that surgery multiplies to make up for factors that change with a size.
    """

    axes: dict[str, Axis]
    fixed: dict[str, int]
    attributes: tuple[AttributeLaw, ...]
    contractions: tuple[Contraction, ...]
    sizes_tied: tuple[tuple[str, ...], ...]
    parameter_dims: dict[str, tuple[int, ...]]
    without_rule: dict[str, str]
    _macs: SizeLaw
    _params: SizeLaw
    rescales: tuple[Rescale, ...] = ()
    _by_dim: dict[tuple[str, int], list[tuple[str, Tensor]]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for axis in self.axes.values():
            for member in axis.members:
                self._by_dim.setdefault((member.parameter, member.dim), []).append((axis.name, member.positions))

    def __iter__(self) -> Iterator[Axis]:
        return iter(self.axes.values())

    def __len__(self) -> int:
        return len(self.axes)

    def __contains__(self, name: object) -> bool:
        return name in self.axes

    def __getitem__(self, name: str) -> Axis:
        try:
            return self.axes[name]
        except KeyError:
            known = ", ".join(list(self.axes)[:8])
            raise PlanError(
                f"no axis is called {name!r}; the first axes are: {known}. Print the graph for all."
            ) from None

    @property
    def macs(self) -> int:
        """MACs of the dense model for one example."""
        return self._macs({})

    @property
    def params(self) -> int:
        """Parameters of the dense model."""
        return self._params({})

    def cost(self, keep: Keep = None) -> Cost:
        """MACs and parameters when each axis keeps the given number of indices.

        Args:
            keep: a plan, or axis name -> number kept; axes that are missing stay whole.
        """
        sizes: Mapping[str, int] = {}
        if keep is not None:
            sizes = keep if isinstance(keep, Mapping) else keep.sizes
        return Cost(self._macs(sizes), self._params(sizes))

    def keep_mask(self, parameter: str, dim: int, keep: Mapping[str, Tensor]) -> Tensor:
        """Which positions of a parameter dimension survive.

        Args:
            keep: axis name -> bool [axis size]; axes that are missing stay whole.

        Returns:
            bool [size of the dimension].
        """
        result = torch.ones(self.parameter_dims[parameter][dim], dtype=torch.bool)
        for name, positions in self._by_dim.get((parameter, dim), ()):
            if name in keep:
                result[positions[~keep[name].cpu()].flatten()] = False
        return result

    def __str__(self) -> str:
        rows = [("axis", "size", "exact", "params", "MACs", "parameters touched")]
        for axis in self:
            mark = "yes" if axis.is_exact else "no: " + ", ".join(axis.reasons)
            touched = str(len({member.parameter for member in axis.members}))
            rows.append((axis.name, str(axis.size), mark, f"{axis.params:,}", f"{axis.macs:,}", touched))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        left = {0, 2}
        lines = [
            "  ".join(
                cell.ljust(width) if column in left else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        lines.insert(1, "-" * max(map(len, lines)))
        lines.append(f"{len(self)} axes; dense: {self.params:,} parameters, {self.macs:,} MACs for one example")
        return "\n".join(lines)
