"""Scores and a budget give a plan.

One ranking over the indices of all axes: the lowest are removed until the budget is met. The number removed is found by
bisection, since cost falls with every index that goes; each trial asks the cost model of :class:`AxisGraph` and builds
nothing. What the last rounding left free of the budget is then filled with the best indices that still fit.
"""

from __future__ import annotations

import fnmatch
import heapq
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_compress.axes import Axis, AxisGraph
from hf_compress.errors import BudgetError, NothingToShrinkError, PlanError

from .plan import Plan

Budget = float | int | None
Latency = tuple[Callable[[Plan], float], float] | None


def select(
    axes: AxisGraph,
    scores: Mapping[str, Tensor],
    *,
    macs: Budget = None,
    params: Budget = None,
    latency: Latency = None,
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
        latency: ``(measure, limit)``: ``measure(plan)`` gives milliseconds (called about ``log2`` of the number of
            indices times), ``limit`` is in the same unit.
        ratio: instead of a budget, the share of indices removed from every axis, or glob pattern of axis names ->
            share; the first pattern that matches counts and axes that match none stay whole.
        round_to: kept counts become multiples of this number, or the whole axis.
        min_keep: no axis keeps fewer (or all of it, when it is smaller).
        inexact: whether axes may shrink whose removal is not the same function as masking.
        same_size: groups of axes that must keep equally many indices, each given as a glob pattern or a sequence of
            names or patterns; added to those that the architecture ties.
        per_cost: rank by score per MAC that the index carries, instead of by score.

    Returns:
        A plan that meets the budget as closely as single indices (or ``round_to`` of them) allow.

    Raises:
        BudgetError: when the budget is malformed or out of reach; names the lowest reachable and what holds it.
        PlanError: when scores or names do not fit the axes.
        NothingToShrinkError: when no axis may shrink.
    """
    _check_count("round_to", round_to)
    _check_count("min_keep", min_keep)
    units = _units(axes, scores, inexact, same_size, per_cost)
    floors = np.array([unit.floor(min_keep, round_to) for unit in units])
    sizes = np.array([unit.size for unit in units])

    if ratio is not None:
        if not (macs is None and params is None and latency is None):
            raise BudgetError("ratio= says how much of every axis goes; it cannot be combined with a budget.")
        shares = _shares(axes, units, ratio)
        return _plan(axes, units, _rounded(sizes - np.floor(shares * sizes + 1e-9), round_to, floors, sizes))

    limits = _limits(axes, macs, params)
    if not limits and latency is None:
        raise BudgetError("no budget was given: pass macs=, params= or latency=, or ratio=.")

    def cost(counts: np.ndarray) -> tuple[int, int]:
        kept = {
            name: int(count)
            for unit, count in zip(units, counts, strict=True)
            if count < unit.size
            for name in unit.names
        }
        return axes.cost(kept)

    def within(counts: np.ndarray) -> bool:
        if limits:
            found = cost(counts)
            if any(found[kind] > limit for kind, limit in limits):
                return False
        return latency is None or _milliseconds(latency[0], _plan(axes, units, counts)) <= latency[1]

    if latency is not None:
        _check_latency(latency)
    order = _removal_order(units, floors)

    def counts_without(number: int) -> np.ndarray:
        kept = sizes - np.bincount(order[:number], minlength=len(units))
        return _rounded(kept, round_to, floors, sizes)

    low, high = 0, len(order)  # `high` removals are enough; the answer is the smallest such number
    if within(counts_without(0)):
        return _plan(axes, units, sizes)
    if not within(counts_without(high)):
        raise _out_of_reach(axes, units, cost, floors, limits, latency, inexact, (macs, params), min_keep, round_to)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if within(counts_without(middle)) else (middle, high)
    counts = counts_without(high)
    if latency is None:
        _fill(units, counts, round_to, within)
    return _plan(axes, units, counts)


@dataclass(frozen=True)
class _Unit:
    """Axes that keep equally many indices; most hold one axis.

    ``ranked`` holds each axis's indices, best first; ``scores[j]`` is the mean score of the j-th best over the axes.
    """

    names: tuple[str, ...]
    size: int
    ranked: tuple[np.ndarray, ...]
    scores: np.ndarray

    def floor(self, min_keep: int, round_to: int) -> int:
        return min(self.size, math.ceil(min_keep / round_to) * round_to)


def _units(
    axes: AxisGraph,
    scores: Mapping[str, Tensor],
    inexact: bool,
    same_size: Iterable[str | Sequence[str]],
    per_cost: bool,
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
        size = axes[group[0]].size
        if per_cost:
            score = score / max(sum(axes[name].macs for name in group) / size, 1.0)
        units.append(_Unit(group, size, ranked, score))
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


def _rounded(kept: np.ndarray, round_to: int, floors: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The nearest multiple (halves go up), within the limits; never decreasing in ``kept``, which bisection needs."""
    # of the two neighbours of a count above the last multiple, the whole axis counts as one
    nearest = np.floor(kept / round_to + 0.5) * round_to
    nearest = np.where(kept == sizes, sizes, nearest)
    return np.clip(nearest, floors, sizes).astype(np.int64)


def _removal_order(units: list[_Unit], floors: np.ndarray) -> np.ndarray:
    """The unit that loses an index at every step, lowest score first."""
    owner = np.concatenate([np.full(u.size - f, i) for i, (u, f) in enumerate(zip(units, floors, strict=True))])
    score = np.concatenate([u.scores[f:] for u, f in zip(units, floors, strict=True)])
    rank = np.concatenate([np.arange(f, u.size) / u.size for u, f in zip(units, floors, strict=True)])
    # equal scores: the index that is last within its axis, as a share, goes first, so all axes shrink alike
    return owner[np.lexsort((owner, -rank, score))].astype(np.int64)


def _fill(units: list[_Unit], counts: np.ndarray, round_to: int, within: Callable[[np.ndarray], bool]) -> None:
    """Give back the best removed indices that still fit, in place."""

    def entry(place: int) -> tuple[float, float, int]:
        # of equal scores the axis that lost most is served first, so all axes shrink alike
        return -float(units[place].scores[counts[place]]), counts[place] / units[place].size, place

    heap = [entry(place) for place, unit in enumerate(units) if counts[place] < unit.size]
    heapq.heapify(heap)
    while heap:
        *_, place = heapq.heappop(heap)
        before = int(counts[place])
        counts[place] = min(before + round_to - before % round_to, units[place].size)
        if not within(counts):
            counts[place] = before  # and no later index of this axis fits either: cost only grows
        elif counts[place] < units[place].size:
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


def _limits(axes: AxisGraph, macs: Budget, params: Budget) -> list[tuple[int, int]]:
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
    latency: Latency,
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
        assert latency is not None
        found = _milliseconds(latency[0], _plan(axes, units, floors))
        return BudgetError(
            f"latency of {latency[1]:g} ms cannot be reached: the smallest model that these axes allow takes "
            f"{found:.4g} ms. Ask for more" + "".join(f", or {remedy}" for remedy in remedies if remedy) + "."
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


def _check_latency(latency: tuple[Callable[[Plan], float], float]) -> None:
    if not (isinstance(latency, tuple) and len(latency) == 2 and callable(latency[0])):
        raise BudgetError(f"latency={latency!r} is not possible: give (measure, limit in ms), measure(plan) -> ms.")
    if isinstance(latency[1], bool) or not isinstance(latency[1], (int, float)) or not latency[1] > 0:
        raise BudgetError(f"latency limit {latency[1]!r} is not possible: give milliseconds above 0.")


def _milliseconds(measure: Callable[[Plan], float], plan: Plan) -> float:
    found = float(measure(plan))
    if math.isnan(found):
        raise BudgetError("the latency function returned NaN; it must return milliseconds.")
    return found
