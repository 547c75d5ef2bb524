"""Scores and a budget give a plan.

One ranking over the indices of all axes: the lowest are removed until the budget is met. The number removed is found by
bisection, since cost falls with every index that goes; each trial asks the cost model of :class:`AxisGraph` and builds
nothing. What the last rounding left free of the budget is then filled with the best indices that still fit.

Every axis has a ladder of widths that it may keep: all of them, multiples of a number, or, with a table of measured times,
those that are fast on this machine.
"""

from __future__ import annotations

import fnmatch
import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hf_compress.axes import Axis, AxisGraph, Cost
from hf_compress.errors import BudgetError, NothingToShrinkError, PlanError

from .plan import Plan

if TYPE_CHECKING:
    from hf_compress.measurement.latency_table import LatencyTable

Budget = float | int | None
Latency = float | tuple[Callable[[Plan], float], float] | None


def select(
    axes: AxisGraph,
    scores: Mapping[str, Tensor],
    *,
    macs: Budget = None,
    params: Budget = None,
    latency: Latency = None,
    latency_table: LatencyTable | None = None,
    ratio: float | Mapping[str, float] | None = None,
    round_to: int = 1,
    min_keep: int = 1,
    inexact: bool = False,
    same_size: Iterable[str | Sequence[str]] = (),
    per_cost: bool = False,
) -> Plan:
    """Choose which indices every axis keeps.

    Scores are ranked across all axes, so they must be comparable between axes. Indices with equal scores go at equal
    rates from all axes, later indices first. The result is the same for the same arguments.

    Args:
        axes: from :func:`hf_compress.find_axes`.
        scores: axis name -> float [axis size], higher is kept. Axes without scores stay whole.
        macs: budget of multiply-accumulates: a float in (0, 1] is a share of the dense model's, a number above 1 is
            absolute.
        params: budget of parameters, in the same way. With several budgets all are met.
        latency: budget of time: a float in (0, 1] is a share of the dense model's, a number above 1 is milliseconds, both
            as ``latency_table`` predicts them. Or ``(measure, limit)``: ``measure(plan)`` gives milliseconds (called about
            ``log2`` of the number of indices times), ``limit`` is in the same unit.
        latency_table: ``LatencyTable.for_model(model, axes)``, for a ``latency`` that is a number. Under any budget, axes
            then keep widths that are fast on the machine of the table.
        ratio: instead of a budget, the share of indices removed from every axis, or glob pattern of axis names ->
            share; the first pattern that matches counts and axes that match none stay whole.
        round_to: kept counts become multiples of this number, or the whole axis; with a table, the fast ones of those.
        min_keep: no axis keeps fewer (or all of it, when it is smaller).
        inexact: whether axes may shrink whose removal is not the same function as masking.
        same_size: groups of axes that must keep equally many indices, each given as a glob pattern or a sequence of
            names or patterns; added to those that the architecture ties.
        per_cost: rank by score per MAC that the index carries, instead of by score; per millisecond, with a table.

    Returns:
        A plan that meets the budget as closely as single indices (or ``round_to`` of them) allow.

    Raises:
        BudgetError: when the budget is malformed or out of reach; names the lowest reachable and what holds it.
        PlanError: when scores or names do not fit the axes.
        NothingToShrinkError: when no axis may shrink.
    """
    _check_count("round_to", round_to)
    _check_count("min_keep", min_keep)
    latency = _latency_limit(axes, latency, latency_table)
    table = None if isinstance(latency, tuple) else latency_table
    units = _units(axes, scores, inexact, same_size)
    for unit in units:
        unit.set_widths(min_keep, round_to, table)
        if per_cost:
            unit.divide_by_cost(axes, table)
    floors = np.array([unit.widths[0] for unit in units])
    sizes = np.array([unit.size for unit in units])

    if ratio is not None:
        if not (macs is None and params is None and latency is None):
            raise BudgetError("ratio= says how much of every axis goes; it cannot be combined with a budget.")
        shares = _shares(axes, units, ratio)
        return _plan(axes, units, _rounded(units, sizes - np.floor(shares * sizes + 1e-9)))

    limits = budget_limits(axes, macs, params)
    if not limits and latency is None:
        raise BudgetError("no budget was given: pass macs=, params= or latency=, or ratio=.")

    def kept(counts: np.ndarray) -> dict[str, int]:
        pairs = zip(units, counts, strict=True)
        return {name: int(count) for unit, count in pairs if count < unit.size for name in unit.names}

    def cost(counts: np.ndarray) -> tuple[int, int]:
        return axes.cost(kept(counts))

    def time(counts: np.ndarray) -> tuple[float, float]:
        """Milliseconds, and their limit."""
        if isinstance(latency, tuple):
            return _milliseconds(latency[0], _plan(axes, units, counts)), latency[1]
        return (0.0, math.inf) if latency is None or table is None else (table.predict(kept(counts)), latency)

    def within(counts: np.ndarray) -> bool:
        if limits:
            found = cost(counts)
            if any(found[kind] > limit for kind, limit in limits):
                return False
        taken, limit = time(counts)
        return taken <= limit

    order = _removal_order(units, floors)

    def counts_without(number: int) -> np.ndarray:
        return _rounded(units, sizes - np.bincount(order[:number], minlength=len(units)))

    low, high = 0, len(order)  # `high` removals are enough; the answer is the smallest such number
    if within(counts_without(0)):
        return _plan(axes, units, sizes)
    if not within(counts_without(high)):
        raise _out_of_reach(axes, units, cost, floors, limits, time, table, inexact, (macs, params), min_keep, round_to)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if within(counts_without(middle)) else (middle, high)
    counts = counts_without(high)
    if not isinstance(latency, tuple):
        _fill(units, counts, within)
    return _plan(axes, units, counts)


@dataclass
class _Unit:
    """Axes that keep equally many indices; most hold one axis.

    ``ranked`` holds each axis's indices, best first; ``scores[j]`` is the mean score of the j-th best over the axes.
    ``widths`` are the numbers that may be kept, increasing, the last one all; ``gains[i]`` is what speaks for the step
    from ``widths[i]`` to the next.
    """

    names: tuple[str, ...]
    size: int
    ranked: tuple[np.ndarray, ...]
    scores: np.ndarray
    widths: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    gains: np.ndarray = field(default_factory=lambda: np.empty(0))

    def set_widths(self, min_keep: int, round_to: int, table: LatencyTable | None) -> None:
        floor = min(self.size, math.ceil(min_keep / round_to) * round_to)
        widths = np.unique([floor, *range(-(-floor // round_to) * round_to, self.size, round_to), self.size])
        if table is None:
            self.widths, self.gains = widths, self.scores[widths[:-1]]
            return
        if len(widths) > 128:  # no vector unit has blocks that multiples of 8 would miss
            widths = widths[(widths % 8 == 0) | (widths == self.size)]
        ms = table.curve(self.names, widths)
        places = _fast(widths, ms)
        self.widths = widths[places]
        removed = np.array([self.scores[a:b].sum() for a, b in itertools.pairwise(self.widths)])
        self.gains = removed / np.diff(ms[places])

    def divide_by_cost(self, axes: AxisGraph, table: LatencyTable | None) -> None:
        if table is None:
            carried = max(sum(axes[name].macs for name in self.names) / self.size, 1.0)
        else:
            carried = max((table.dense_ms - float(table.curve(self.names, [1])[0])) / self.size, 1e-9)
        self.scores = self.scores / carried


def _fast(widths: np.ndarray, ms: np.ndarray) -> list[int]:
    """Places of the widths that are worth their time.

    Going down from the whole axis, a width counts when it saves at least half of what its indices would on average; a
    width between two blocks does not, since it takes as long as the block above.
    """
    places = [len(widths) - 1]
    slope = (ms[-1] - ms.min()) / max(widths[-1] - widths[0], 1)
    for place in range(len(widths) - 2, -1, -1):
        last = places[-1]
        if slope > 0 and ms[last] - ms[place] >= 0.5 * slope * (widths[last] - widths[place]):
            places.append(place)
    return places[::-1]


def _units(
    axes: AxisGraph,
    scores: Mapping[str, Tensor],
    inexact: bool,
    same_size: Iterable[str | Sequence[str]],
) -> list[_Unit]:
    if len(axes) == 0:
        raise NothingToShrinkError(
            "the model has no axis that may shrink; print the AxisGraph's `fixed` for what keeps its dimensions whole."
        )
    values = {name: _values(axes[name], score) for name, score in scores.items()}
    groups = _groups(axes, same_size)
    units = []
    for group in groups:
        if not all(name in values and (inexact or axes[name].is_exact) for name in group):
            continue  # one member that must stay whole keeps all that are tied to it whole
        group_sizes = {name: axes[name].size for name in group}
        if len(set(group_sizes.values())) > 1:
            raise PlanError(
                f"axes that shall keep equally many indices have different sizes: {group_sizes}. Name axes of one size "
                "in same_size."
            )
        # stable, so that of equal scores the earlier index is the better one
        ranked = tuple(np.argsort(-values[name], kind="stable") for name in group)
        score = np.mean([values[name][best] for name, best in zip(group, ranked, strict=True)], axis=0)
        units.append(_Unit(group, axes[group[0]].size, ranked, score))
    if not units:
        held = [axis.name for axis in axes if axis.name in values and not axis.is_exact]
        hint = (
            f" The scored axes ({', '.join(held[:4])}) are not exact; pass inexact=True to shrink them." if held else ""
        )
        raise NothingToShrinkError(
            f"none of the {len(axes)} axes has scores and may shrink; scores were given for {len(values)}.{hint}"
        )
    return units


def _values(axis: Axis, score: Tensor) -> np.ndarray:
    if torch.is_complex(score := torch.as_tensor(score)):
        raise PlanError(f"the scores of axis {axis.name!r} are complex; one real number per index is needed.")
    if tuple(score.shape) != (axis.size,):
        raise PlanError(
            f"the scores of axis {axis.name!r} have shape {tuple(score.shape)}; expected one number for each of its "
            f"{axis.size} indices."
        )
    values = score.detach().to("cpu", torch.float64).numpy()
    if np.isnan(values).any():
        where = int(np.isnan(values).argmax())
        raise PlanError(
            f"the scores of axis {axis.name!r} contain NaN (first at index {where}). Look for NaN weights or a training "
            "run that diverged."
        )
    # infinities mean 'always keep' and 'remove first'; finite stand-ins survive the mean over tied axes
    return np.clip(values, -1e300, 1e300)


def _groups(axes: AxisGraph, same_size: Iterable[str | Sequence[str]]) -> list[tuple[str, ...]]:
    """Axes that keep equally many, as connected components in the order of the graph."""
    leader = {name: name for name in axes.axes}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    wanted = [list(tied) for tied in axes.sizes_tied]
    for entry in same_size:
        patterns = [entry] if isinstance(entry, str) else list(entry)
        found = []
        for pattern in patterns:
            matches = [name for name in axes.axes if name == pattern or fnmatch.fnmatchcase(name, pattern)]
            if not matches:
                raise PlanError(
                    f"same_size names {pattern!r}, which matches no axis. Print the AxisGraph for the names."
                )
            found += matches
        wanted.append(found)
    place = {name: i for i, name in enumerate(axes.axes)}
    for names in wanted:
        for name in names[1:]:
            first, second = sorted((find(names[0]), find(name)), key=place.__getitem__)
            leader[second] = first
    components: dict[str, list[str]] = {}
    for name in axes.axes:
        components.setdefault(find(name), []).append(name)
    return [tuple(names) for names in components.values()]


def _rounded(units: list[_Unit], kept: np.ndarray) -> np.ndarray:
    """The nearest width of every unit (halves go up); never decreasing in ``kept``, which bisection needs."""
    middles = [(unit.widths[:-1] + unit.widths[1:]) / 2 for unit in units]
    places = [np.searchsorted(middle, count, side="right") for middle, count in zip(middles, kept, strict=True)]
    return np.array([unit.widths[place] for unit, place in zip(units, places, strict=True)], dtype=np.int64)


def _removal_order(units: list[_Unit], floors: np.ndarray) -> np.ndarray:
    """The unit that loses an index at every step, lowest score first."""
    owner = np.concatenate([np.full(u.size - f, i) for i, (u, f) in enumerate(zip(units, floors, strict=True))])
    score = np.concatenate([u.scores[f:] for u, f in zip(units, floors, strict=True)])
    rank = np.concatenate([np.arange(f, u.size) / u.size for u, f in zip(units, floors, strict=True)])
    # equal scores: the index that is last within its axis, as a share, goes first, so all axes shrink alike
    return owner[np.lexsort((owner, -rank, score))].astype(np.int64)


def _fill(units: list[_Unit], counts: np.ndarray, within: Callable[[np.ndarray], bool]) -> None:
    """Give back the best removed indices that still fit, in place."""
    steps = [int(np.searchsorted(unit.widths, count)) for unit, count in zip(units, counts, strict=True)]

    def entry(place: int) -> tuple[float, float, int]:
        # of equal gains the axis that lost most is served first, so all axes shrink alike
        return -float(units[place].gains[steps[place]]), counts[place] / units[place].size, place

    heap = [entry(place) for place, unit in enumerate(units) if counts[place] < unit.size]
    heapq.heapify(heap)
    while heap:
        *_, place = heapq.heappop(heap)
        before = counts[place]
        counts[place] = units[place].widths[steps[place] + 1]
        if not within(counts):
            counts[place] = before  # and no later index of this axis fits either: cost only grows
            continue
        steps[place] += 1
        if counts[place] < units[place].size:
            heapq.heappush(heap, entry(place))


def _plan(axes: AxisGraph, units: list[_Unit], counts: np.ndarray) -> Plan:
    keep: dict[str, tuple[int, ...]] = {}
    for unit, count in zip(units, counts, strict=True):
        if count < unit.size:
            for name, ranked in zip(unit.names, unit.ranked, strict=True):
                keep[name] = tuple(np.sort(ranked[: int(count)]).tolist())
    return Plan({name: keep[name] for name in axes.axes if name in keep}, axes)


# -- budgets ------------------------------------------------------------------------------------------------------

_KINDS = ("macs", "params")


def budget_limits(axes: AxisGraph | Cost, macs: Budget, params: Budget) -> list[tuple[int, int]]:
    """(place in Cost, absolute limit) for every budget that was given."""
    limits = []
    for kind, (name, budget) in enumerate(zip(_KINDS, (macs, params), strict=True)):
        if budget is None:
            continue
        if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not math.isfinite(budget) or budget <= 0:
            raise BudgetError(
                f"{name}={budget!r} is not a budget: give a float in (0, 1] for a share of the dense model, or a number "
                "above 1 for an absolute count."
            )
        dense = getattr(axes, name)
        # the margin keeps a float share that means a whole number of MACs from losing one to rounding
        limits.append((kind, int(math.floor(budget * dense * (1 + 1e-12))) if budget <= 1 else int(budget)))
    return limits


def _out_of_reach(
    axes: AxisGraph,
    units: list[_Unit],
    cost: Callable[[np.ndarray], tuple[int, int]],
    floors: np.ndarray,
    limits: list[tuple[int, int]],
    time: Callable[[np.ndarray], tuple[float, float]],
    table: LatencyTable | None,
    inexact: bool,
    asked: tuple[Budget, Budget],
    min_keep: int,
    round_to: int,
) -> BudgetError:
    lowest = cost(floors)
    remedies = [
        f"lower min_keep={min_keep}" if min_keep > 1 else "",
        f"lower round_to={round_to}" if round_to > 1 else "",
    ]
    if not inexact and any(not axis.is_exact for axis in axes):
        remedies.append("allow inexact axes")
    whole = len(axes) - sum(len(unit.names) for unit in units)
    if whole and inexact:
        remedies.append(f"give scores for the {whole} axes that have none")
    missed = [(kind, limit) for kind, limit in limits if lowest[kind] > limit]
    if not missed:
        found, limit = time(floors)
        share = f", {math.ceil(found / table.dense_ms * 1000) / 1000:g} of the dense time" if table else ""
        return BudgetError(
            f"latency of {limit:.4g} ms cannot be reached: the smallest model that these axes allow takes "
            f"{found:.4g} ms{share}. Ask for more" + "".join(f", or {remedy}" for remedy in remedies if remedy) + "."
        )
    kind, _ = missed[0]
    name = _KINDS[kind]
    dense = getattr(axes, name)
    share = lowest[kind] / dense
    # what would still go if an axis could vanish says how much it holds at its smallest
    held = []
    for place, unit in enumerate(units):
        gone = floors.copy()
        gone[place] = 0
        held.append((lowest[kind] - cost(gone)[kind], f"{unit.names[0]} (held at {floors[place]} of {unit.size})"))
    holders = ", ".join(text for amount, text in sorted(held, key=lambda pair: -pair[0])[:3] if amount > 0)
    value = asked[kind]
    ask = (
        f"ask for {name} >= {math.ceil(share * 1000) / 1000:g}"
        if isinstance(value, float) and value <= 1
        else (f"ask for {name} >= {lowest[kind]}")
    )
    options = [ask, *(remedy for remedy in remedies if remedy)]
    text = ", or ".join(options)
    return BudgetError(
        f"{name}={value} cannot be reached: the smallest model that these axes allow has {share:.3f} of the dense {name} "
        f"({lowest[kind]:,} of {dense:,}). Most of it hangs on {holders or 'dimensions that no axis covers'}. "
        f"{text[0].upper()}{text[1:]}."
    )


def _shares(axes: AxisGraph, units: list[_Unit], ratio: float | Mapping[str, float]) -> np.ndarray:
    if not isinstance(ratio, Mapping):
        return np.full(len(units), _share("ratio", ratio))
    rules = {pattern: _share(f"ratio[{pattern!r}]", share) for pattern, share in ratio.items()}
    for pattern in rules:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in axes.axes):
            raise PlanError(f"ratio names {pattern!r}, which matches no axis. Print the AxisGraph for the names.")
    shares = []
    for unit in units:
        found = {
            name: next((share for pattern, share in rules.items() if fnmatch.fnmatchcase(name, pattern)), 0.0)
            for name in unit.names
        }
        if len(set(found.values())) > 1:
            raise PlanError(f"axes that must keep equally many indices were given different ratios: {found}.")
        shares.append(found[unit.names[0]])
    return np.array(shares)


def _share(name: str, share: float) -> float:
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise BudgetError(f"{name}={share!r} is not a share of indices to remove; give a float from 0 to 1.")
    return float(share)


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PlanError(f"{name}={value!r} is not possible: it must be an integer of at least 1.")


def _latency_limit(axes: AxisGraph, latency: Latency, table: LatencyTable | None) -> Latency:
    """The budget, checked; a number becomes milliseconds."""
    if table is not None and (table.names != tuple(axes.axes) or [axis.size for axis in axes] != table.sizes.tolist()):
        raise PlanError("the latency table was made for other axes. Make it with LatencyTable.for_model(model, axes).")
    if latency is None:
        return None
    is_pair = isinstance(latency, tuple) and len(latency) == 2 and callable(latency[0])
    limit = latency[1] if isinstance(latency, tuple) and is_pair else latency
    if isinstance(limit, bool) or not isinstance(limit, (int, float)):
        raise BudgetError(
            f"latency={latency!r} is not possible: give a share of the dense time or milliseconds, with latency_table=, or "
            "(measure, limit in ms) where measure(plan) gives ms."
        )
    if not 0 < limit < math.inf:
        raise BudgetError(f"latency limit {limit!r} is not possible: give a share in (0, 1] or milliseconds above 0.")
    if isinstance(latency, tuple):
        return latency
    if table is None:
        raise BudgetError(
            f"latency={latency!r} needs a table of times: pass latency_table=LatencyTable.for_model(model, axes) (the axes "
            "hold no model that could be timed), or latency=(measure, limit in ms)."
        )
    return float(limit * table.dense_ms) if limit <= 1 else float(limit)


def _milliseconds(measure: Callable[[Plan], float], plan: Plan) -> float:
    found = float(measure(plan))
    if math.isnan(found):
        raise BudgetError("the latency function returned NaN; it must return milliseconds.")
    return found
