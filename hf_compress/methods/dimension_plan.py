"""From the scores of a dimension search to a plan: by counts, by shares of dimensions, or in a budget.

Axes that the architecture ties in size form one unit: their sorted scores are averaged and they keep equally many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_compress.axes import AxisGraph
from hf_compress.errors import BudgetError
from hf_compress.surgery.plan import Plan
from hf_compress.surgery.select import select

from .dimension_kinds import kind_of

Unit = tuple[str, ...]


def plan_of_counts(
    graph: AxisGraph, scores: Mapping[str, Tensor], floors: Mapping[str, int], counts: Mapping[str, int]
) -> Plan:
    """Keep of every axis the given number of indices, the highest; tied axes as many as the largest of them.

    Args:
        graph: the axes.
        scores: axis name -> [axis size]; of equal ones the earlier index stays.
        floors: axis name -> fewest indices kept.
        counts: axis name -> number kept.
    """
    keep = {}
    for unit in _units(graph, scores):
        count = max(max(floors[name], counts[name]) for name in unit)
        for name in unit:
            if count < graph[name].size:
                keep[name] = tuple(sorted(_ranking(scores[name])[:count].tolist()))
    return Plan({name: keep[name] for name in graph.axes if name in keep}, graph)


def plan_of_shares(
    graph: AxisGraph, scores: Mapping[str, Tensor], floors: Mapping[str, int], shares: Mapping[str, float]
) -> Plan:
    """Remove a share of the dimensions of each kind, ranked over all layers.

    Of n dimensions of a kind ``round((1 - share) * n)`` stay. Kinds that some layer ties count together.

    Args:
        graph, scores, floors: as for :func:`plan_of_counts`.
        shares: axis name -> share removed of its kind.

    Raises:
        BudgetError: when floors hold more than the share leaves, or tied axes have different shares.
    """
    counts: dict[str, int] = {}
    for units, removed in _share_groups(graph, list(scores), floors, shares):
        candidates = []
        for place, unit in enumerate(units):
            size, floor = graph[unit[0]].size, max(floors[name] for name in unit)
            ranked = torch.stack([scores[name][_ranking(scores[name])] for name in unit]).mean(dim=0).tolist()
            # of equal scores the index that is last within its axis, as a share, goes first
            candidates += [(ranked[j], -j / size, place) for j in range(floor, size)]
        gone = Counter(place for *_, place in sorted(candidates)[:removed])
        counts |= {name: graph[name].size - gone[place] for place, unit in enumerate(units) for name in unit}
    return plan_of_counts(graph, scores, floors, counts)


class Lowest:
    """Which scores :func:`plan_of_shares` would remove, as a mask, on the scores' device and without waiting for it.

    Args:
        graph, floors, shares: as there.
        names: the axes, in the order in which their scores make up one vector.
        device: of the scores.

    Raises:
        BudgetError: as there.
    """

    def __init__(
        self,
        graph: AxisGraph,
        names: Sequence[str],
        floors: Mapping[str, int],
        shares: Mapping[str, float],
        device: torch.device,
    ) -> None:
        start, length = {}, 0
        for name in names:
            start[name], length = length, length + graph[name].size
        self._groups: list[tuple[Tensor, Tensor, int]] = []
        for units, removed in _share_groups(graph, names, floors, shares):
            if removed == 0:
                continue
            width = max(graph[unit[0]].size for unit in units)
            depth = max(map(len, units))
            # [unit, axis, index]: places in the vector; padded with the place of an appended infinity
            places = torch.full((len(units), depth, width), length)
            is_held = torch.ones(len(units), width, dtype=torch.bool)
            for row, unit in enumerate(units):
                size = graph[unit[0]].size
                is_held[row, : size - max(floors[name] for name in unit)] = False  # ascending: the floor comes last
                for column in range(depth):  # a unit of fewer axes repeats its last one
                    begin = start[unit[min(column, len(unit) - 1)]]
                    places[row, column, :size] = torch.arange(begin, begin + size)
            self._groups.append((places.to(device), is_held.to(device), removed))

    def __call__(self, scores: Tensor) -> Tensor:
        """bool [n] for [n] magnitudes; of equal ones at the limit all."""
        padded = torch.cat([scores, scores.new_full((1,), torch.inf)])
        lowest = torch.zeros(len(padded), dtype=torch.bool, device=scores.device)
        for places, is_held, removed in self._groups:
            ascending, order = padded[places].sort(dim=-1, stable=True)
            rank = ascending.mean(dim=1).masked_fill(is_held, torch.inf)
            is_low = rank <= rank.flatten().kthvalue(removed).values
            lowest.scatter_(0, places.gather(-1, order).flatten(), is_low[:, None].expand_as(places).flatten())
        return lowest[:-1]


def plan_in_budget(
    graph: AxisGraph, scores: Mapping[str, Tensor], floors: Mapping[str, int], budgets: Mapping[str, Any]
) -> Plan:
    """Remove the lowest scores until the model fits a budget; a kind's scores are divided by their mean.

    Args:
        graph, scores, floors: as for :func:`plan_of_counts`.
        budgets: ``macs``, ``params`` and ``latency`` as for :func:`hf_compress.select`.

    Raises:
        BudgetError: when the floors hold more than the budget.
    """
    units = _units(graph, scores)
    unit_floor = {name: max(floors[other] for other in unit) for unit in units for name in unit}
    smallest = graph.cost(unit_floor)
    for name, least, dense in zip(smallest._fields, smallest, graph.cost(), strict=True):
        asked = budgets.get(name)
        if asked is not None and least > (asked * dense * (1 + 1e-12) if asked <= 1 else asked):
            raise BudgetError(
                f"target: {name}={asked:g} cannot be met: the searched axes at their smallest (min_keep) leave "
                f"{least / dense:.3f} of the dense {name} ({least:,} of {dense:,}). Ask for more, search more kinds, or "
                "lower min_keep."
            )
    kinds = {name: kind_of(graph[name], graph) for name in scores}
    mean = {
        kind: float(torch.cat([score.double() for name, score in scores.items() if kinds[name] == kind]).mean()) or 1.0
        for kind in kinds.values()
    }
    ranked = {}
    for name, score in scores.items():
        ranked[name] = score.double() / mean[kinds[name]]
        ranked[name][_ranking(score)[: unit_floor[name]]] = float("inf")  # these go after everything else
    plan = select(graph, ranked, inexact=True, **budgets)
    for name, size in plan.sizes.items():
        if size < unit_floor[name]:
            raise BudgetError(
                f"target={dict(budgets)} cannot be met: it would leave {size} indices of {name!r}, and min_keep is "
                f"{unit_floor[name]}. Ask for more, search more kinds, or lower min_keep."
            )
    return plan


def _share_groups(
    graph: AxisGraph, names: Sequence[str], floors: Mapping[str, int], shares: Mapping[str, float]
) -> list[tuple[list[Unit], int]]:
    """Units that are ranked together, and how many of their indices go."""
    by_kinds: dict[Unit, list[Unit]] = {}
    for unit in _units(graph, names):
        by_kinds.setdefault(tuple(sorted({kind_of(graph[name], graph) for name in unit})), []).append(unit)
    groups = []
    for kinds, units in by_kinds.items():
        asked = {shares[name] for unit in units for name in unit}
        if len(asked) > 1:
            raise BudgetError(
                f"target: {' and '.join(kinds)} must keep equally many dimensions in this model, but shares of "
                f"{sorted(asked)} were asked for. Give them one share."
            )
        (share,) = asked
        total = sum(graph[unit[0]].size for unit in units)
        removed = total - round((1 - share) * total)
        most = total - sum(max(floors[name] for name in unit) for unit in units)
        if removed > most:
            raise BudgetError(
                f"target={share:g} of {' and '.join(kinds)} cannot be met: with what each layer keeps at least (min_keep="
                f"{max(floors[unit[0]] for unit in units)}) at most {most / total:.3f} can go. Ask for at most that, or "
                "lower min_keep."
            )
        groups.append((units, removed))
    return groups


def _units(graph: AxisGraph, scores: Iterable[str]) -> list[Unit]:
    """The scored axes, those tied in size together."""
    unit_of = {name: tuple(sorted(tied)) for tied in graph.sizes_tied for name in tied}
    return list(dict.fromkeys(unit_of.get(name, (name,)) for name in scores))


def _ranking(score: Tensor) -> Tensor:
    """The indices, best first; of equal scores the earlier one is the better."""
    return torch.argsort(score, descending=True, stable=True)
