"""Predicted latency of a model as a function of its axes' sizes, from times measured on this machine.

The forward pass is taken apart into operator calls (``workload``). A contraction takes its time in the dense model,
times what the operator alone takes at the new sizes over what it takes at the dense ones (``operator_times``,
interpolated); every other call scales with the numbers that it reads and writes; what is between the calls stays. So the
prediction for the dense model is the time that was measured in it, and only ratios come from the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Union

import numpy as np
import torch
from torch import nn

from ..axes import AxisGraph
from ..axes.finding import Inputs, example_inputs_for
from ..errors import PlanError
from .cost import first_example
from .operator_times import Grid, OperatorTimes, Times, time_calls
from .workload import Law, Operation, profile, record

if TYPE_CHECKING:
    from ..surgery.plan import Plan

Keep = Union["Plan", Mapping[str, int], None]

_MOST_VARYING = 3


class LatencyTable:
    """Milliseconds of one example as a function of the sizes of a model's axes, on this machine.

    Make one with :meth:`for_model`.

    Attributes:
        hardware: processor, threads, torch version and dtype that the times are for.
        names, sizes: the axes, and their dense sizes [n].
        dense_ms: of the dense model: the sum of its calls, measured in place, and of what is between them.
        timed_share: share of ``dense_ms`` that contractions take, which the table knows; the rest is scaled by traffic.
    """

    def __init__(self, axes: AxisGraph, operations: _Operations, rest: _Laws, constant_ms: float, hardware: str):
        self.hardware = hardware
        self.names = tuple(axes.axes)
        self.sizes = np.array([axis.size for axis in axes], dtype=np.float64)
        self._operations, self._rest, self._constant_ms = operations, rest, constant_ms
        self._place = {name: i for i, name in enumerate(self.names)}
        self._dense = np.append(self.sizes, 1.0)
        self.dense_ms = self.predict()
        self.timed_share = float(operations.ms(self._dense[None])[0]) / self.dense_ms

    @classmethod
    def for_model(
        cls, model: nn.Module, axes: AxisGraph, example_inputs: Inputs = None, *, folder: str | Path | None = None
    ) -> LatencyTable:
        """Take a model's forward pass apart and time what has not been timed on this machine before.

        Takes a few seconds when all operators are known, and up to some minutes (large images, many layer shapes) the
        first time. The model is run in evaluation mode with the current number of torch threads, on its own device and
        in its own dtype, and is left as it was.

        Args:
            model: the model that ``axes`` were found in.
            axes: from :func:`hf_compress.find_axes`.
            example_inputs: as for :func:`hf_compress.find_axes`; the latency is that of the first example.
            folder: where times are kept; ``$HF_COMPRESS_CACHE/latency`` or ``$HF_HOME/hf_compress/latency`` if not given.

        Raises:
            PlanError: when the axes do not belong to the model.
            ModelError: when the model cannot be run on the inputs.

        Warns:
            UserWarning: when the file of measured times is damaged; they are then measured again.
        """
        inputs = first_example(example_inputs_for(model) if example_inputs is None else example_inputs)
        calls = record(model, axes, inputs)
        found = profile(model, inputs)
        parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
        times = OperatorTimes(parameter.device, parameter.dtype, folder)

        names = list(axes.axes)
        place = {name: i for i, name in enumerate(names)}
        dense = np.append([float(axis.size) for axis in axes], 1.0)
        rows: dict[tuple[Grid, tuple[Law, ...]], float] = {}
        rest: dict[tuple[str, ...], float] = {}
        call_ms = _call_overhead(parameter.device)
        constant = found.between_ms
        for operation in calls:
            ms = found.calls_ms.get(operation.signature, 0.0)
            grid = _grid(operation, place, dense)
            if grid is not None:
                laws = tuple(operation.sizes[p] for p in grid.varying)
                rows[grid, laws] = rows.get((grid, laws), 0.0) + ms
                continue
            moving = max(0.0, ms - call_ms)
            whole = sum(c * float(np.prod([dense[place[name]] for name in m])) for m, c in operation.work)
            for monomial, coefficient in operation.work if whole else ():
                if monomial:
                    rest[monomial] = rest.get(monomial, 0.0) + coefficient / whole * moving
            fixed = sum(c for m, c in operation.work if not m) / whole if whole else 1.0
            constant += ms - moving + fixed * moving
        operations = _Operations.build(rows, times.get(grid for grid, _ in rows), place)
        scaled = _Laws.build([tuple(rest.items())], place)
        described = ", ".join(f"{name} {value}" for name, value in times.hardware.items())
        return cls(axes, operations, scaled, constant, described)

    def predict(self, keep: Keep = None) -> float:
        """Milliseconds of one example when each axis keeps the given number of indices.

        Args:
            keep: a plan, or axis name -> number kept; axes that are missing stay whole.

        Raises:
            PlanError: when an axis is unknown.
        """
        sizes: Mapping[str, int] = {}
        if keep is not None:
            sizes = keep if isinstance(keep, Mapping) else keep.sizes
        current = self._dense.copy()
        for name, size in sizes.items():
            if name not in self._place:
                raise PlanError(f"no axis of the latency table is called {name!r}; it was made for other axes.")
            current[self._place[name]] = size
        return float(self._operations.ms(current[None])[0] + self._rest(current[None])[0, 0] + self._constant_ms)

    def curve(self, names: Sequence[str], counts: Sequence[int] | np.ndarray) -> np.ndarray:
        """Milliseconds of the model when the named axes keep equally many indices and all others are whole.

        Args:
            names: of axes.
            counts: [k] numbers of indices kept.

        Returns:
            float64 [k].
        """
        places = [self._place[name] for name in names]
        current = np.repeat(self._dense[None], len(counts), axis=0)
        current[:, places] = np.asarray(counts, dtype=np.float64)[:, None]
        touched = self._operations.subset(np.any(self._operations.depends[:, places], axis=1))
        fixed = (
            self.dense_ms - self._constant_ms - self._rest(self._dense[None])[0, 0] - touched.ms(self._dense[None])[0]
        )
        return touched.ms(current) + self._rest(current)[:, 0] + self._constant_ms + fixed

    def __repr__(self) -> str:
        return (
            f"LatencyTable({self.dense_ms:.3g} ms dense, {self.timed_share:.0%} of it timed by shape; {self.hardware})"
        )


def _call_overhead(device: torch.device) -> float:
    """Milliseconds of a call that has next to nothing to do."""
    tiny = torch.zeros(1, device=device)
    return time_calls({"add": lambda: torch.add(tiny, tiny)}, device)["add"]


def _grid(operation: Operation, place: Mapping[str, int], dense: np.ndarray) -> Grid | None:
    """What to time for an operation; None where its time does not follow the axes, or more of them than a grid can hold."""
    if operation.kind == "other":
        return None
    varying = [number for number, law in enumerate(operation.sizes) if any(monomial for monomial, _ in law)]
    if not 0 < len(varying) <= _MOST_VARYING:
        return None
    values = _Laws.build(operation.sizes, place)(dense[None])[0]
    return Grid.of(operation.kind, operation.settings, [round(value) for value in values], varying)


@dataclass
class _Laws:
    """Polynomials in the sizes of axes, as padded arrays.

    ``table`` int [laws, monomials, degree] holds places of axes, and the place of a 1 behind them; ``coefficients``
    [laws, monomials].
    """

    table: np.ndarray
    coefficients: np.ndarray

    @classmethod
    def build(cls, laws: Sequence[Law], place: Mapping[str, int]) -> _Laws:
        longest = max((len(law) for law in laws), default=0) or 1
        degree = max((len(monomial) for law in laws for monomial, _ in law), default=0) or 1
        table = np.full((len(laws), longest, degree), len(place), dtype=np.int64)
        coefficients = np.zeros((len(laws), longest))
        for i, law in enumerate(laws):
            for j, (monomial, coefficient) in enumerate(law):
                table[i, j, : len(monomial)] = [place[name] for name in monomial]
                coefficients[i, j] = coefficient
        return cls(table, coefficients)

    def __call__(self, sizes: np.ndarray) -> np.ndarray:
        """Values [k, laws] at ``sizes`` [k, axes + 1], whose last column is 1."""
        values = sizes[:, self.table[..., 0]]
        for factor in range(1, self.table.shape[2]):
            values = values * sizes[:, self.table[..., factor]]
        return np.einsum("klm,lm->kl", values, self.coefficients)


_PAD = np.inf


@dataclass
class _Operations:
    """The contractions of a model, as arrays over r of them with three widths each (unused ones are 1).

    ``laws`` give the widths [3 r]; ``grid`` [r, 3, points] and ``values`` the measured times, those of an operation from
    ``start`` [r] on with ``stride`` [r, 3]; ``block``, ``unaligned`` [r, 3]; ``weight`` [r]: milliseconds in the dense
    model over measured time at the dense widths; ``depends`` bool [r, axes].
    """

    laws: _Laws
    grid: np.ndarray
    values: np.ndarray
    start: np.ndarray
    stride: np.ndarray
    block: np.ndarray
    unaligned: np.ndarray
    weight: np.ndarray
    depends: np.ndarray

    @classmethod
    def build(
        cls,
        rows: Mapping[tuple[Grid, tuple[Law, ...]], float],
        times: Mapping[Grid, Times],
        place: Mapping[str, int],
    ) -> _Operations:
        number, width = len(rows), _MOST_VARYING
        longest = max((len(w) for grid, _ in rows for w in grid.widths), default=1)
        offsets = dict(zip(times, np.cumsum([0, *(len(found.ms) for found in times.values())]), strict=False))
        grid_values = np.full((number, width, longest), _PAD)
        grid_values[:, :, 0] = 1.0
        stride = np.zeros((number, width), dtype=np.int64)
        block, unaligned = np.ones((number, width)), np.ones((number, width))
        weight, start = np.zeros(number), np.zeros(number, dtype=np.int64)
        depends = np.zeros((number, len(place)), dtype=bool)
        one: Law = (((), 1.0),)
        laws: list[Law] = []
        for row, ((grid, varying), ms) in enumerate(rows.items()):
            found = times[grid]
            start[row] = offsets[grid]
            weight[row] = ms / found.ms[-1]
            step = 1
            for number_, widths in reversed(list(enumerate(grid.widths))):
                grid_values[row, number_, : len(widths)] = widths
                stride[row, number_] = step if len(widths) > 1 else 0
                step *= len(widths)
                block[row, number_] = grid.blocks[number_]
                unaligned[row, number_] = found.unaligned[number_]
            laws += [*varying, *[one] * (width - len(varying))]
            depends[row, [place[name] for law in varying for monomial, _ in law for name in monomial]] = True
        values = np.array([ms for found in times.values() for ms in found.ms] or [0.0])
        return cls(_Laws.build(laws, place), grid_values, values, start, stride, block, unaligned, weight, depends)

    def subset(self, mask: np.ndarray) -> _Operations:
        """The operations where ``mask`` [r] is true."""
        width = np.repeat(mask, _MOST_VARYING)
        changed = {
            field.name: getattr(self, field.name)[mask]
            for field in fields(self)
            if field.name not in ("laws", "values")
        }
        return _Operations(
            laws=_Laws(self.laws.table[width], self.laws.coefficients[width]), values=self.values, **changed
        )

    def ms(self, sizes: np.ndarray) -> np.ndarray:
        """Milliseconds [k] of all together at ``sizes`` [k, axes + 1]."""
        if not len(self.weight):
            return np.zeros(len(sizes))
        wanted = self.laws(sizes).reshape(len(sizes), -1, _MOST_VARYING)
        last = np.where(np.isinf(self.grid), -np.inf, self.grid).max(axis=2)
        whole_blocks = np.minimum(np.ceil(wanted / self.block - 1e-9) * self.block, last)
        between = (whole_blocks != wanted) & (wanted < last)
        factor = np.where(between, self.unaligned, 1.0).prod(axis=2)
        below = (self.grid <= whole_blocks[..., None]).sum(axis=3) - 1
        below = np.clip(below, 0, None)
        row, dim = np.ogrid[: self.grid.shape[0], :_MOST_VARYING]
        low = self.grid[row, dim, below]
        after = np.minimum(below + 1, self.grid.shape[2] - 1)
        high = self.grid[row, dim, after]
        has_next = np.isfinite(high) & (high > low)
        share = np.where(has_next, (whole_blocks - low) / np.where(has_next, high - low, 1.0), 0.0)
        first = self.start + (below * self.stride).sum(axis=2)
        step = np.where(has_next, self.stride, 0)
        total = np.zeros(wanted.shape[:2])
        for corner in range(2**_MOST_VARYING):
            bits = np.array([corner >> d & 1 for d in range(_MOST_VARYING)])
            portion = np.where(bits, share, 1.0 - share).prod(axis=2)
            total += portion * self.values[first + (step * bits).sum(axis=2)]
        return (total * factor) @ self.weight
