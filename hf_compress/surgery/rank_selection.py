"""A budget for a whole model gives every layer a scheme and a rank, or leaves it alone: one solution for all layers.

Maximised is the product over layers of the share of energy that their factors keep, as Zhang et al. 2016 (arXiv
1505.06798) do greedily for one scheme. In logarithms that is a sum, and the problem a multiple-choice
knapsack: every layer contributes the lower convex hull of (cost, -log of the share kept) over all schemes and ranks, the
layer itself included, and all segments of all hulls are taken in the order of their slopes until the budget is met. That
is the Lagrangian solution, the best there is for the budget that it ends at; what then is left of the budget is filled.
Segments that lose nothing come first, and are taken whatever the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .decomposition import Scheme


@dataclass(frozen=True, eq=False)
class Options:
    """What can be done with one layer. Entry 0 leaves it alone.

    Attributes:
        schemes: of every entry; None leaves the layer alone.
        ranks: int64 [n].
        costs: int64 [n, 2]: MACs of one example and parameters.
        lost: float64 [n]: share of the energy that goes, in [0, 1).
    """

    schemes: Sequence[Scheme | None]
    ranks: np.ndarray
    costs: np.ndarray
    lost: np.ndarray

    @property
    def losses(self) -> np.ndarray:
        """-log of the share of energy kept."""
        return -np.log1p(-np.minimum(self.lost, 1 - 1e-15))


def cheapest(options: Options) -> int:
    """The entry with the fewest MACs; of several, the one that loses least."""
    return int(np.lexsort((options.lost, options.costs[:, 0]))[0])


def choose(tables: Sequence[Options], room: Sequence[float]) -> list[int] | None:
    """One entry of every table, such that the costs fit and the losses are small together.

    Args:
        tables: of all layers.
        room: what all layers together may cost, MACs and parameters; infinite where there is no limit.

    Returns:
        The entry of every table; None when the budget is out of reach.
    """
    limits = np.asarray(room, dtype=np.float64)
    whole = np.maximum(sum(table.costs[0] for table in tables), 1)
    # two budgets are weighed against each other in several ways, and the best result counts
    both = np.isfinite(limits).all()
    weights = [(1 - share, share) for share in np.linspace(0, 1, 11)] if both else [np.isfinite(limits) * 1.0]
    best: tuple[float, list[int]] | None = None
    for weight in weights:
        chosen = _descend(tables, np.asarray(weight) / whole, limits)
        if chosen is None:
            continue
        loss = sum(float(table.losses[i]) for table, i in zip(tables, chosen, strict=True))
        if best is None or loss < best[0]:
            best = (loss, chosen)
    return None if best is None else best[1]


def _descend(tables: Sequence[Options], weight: np.ndarray, limits: np.ndarray) -> list[int] | None:
    chosen = [0] * len(tables)
    used = np.sum([table.costs[0] for table in tables], axis=0, dtype=np.float64)
    steps = []
    for number, table in enumerate(tables):
        hull = _lower_hull(table.costs @ weight, table.losses)
        prices, losses = table.costs @ weight, table.losses
        for position, (before, after) in enumerate(zip(hull, hull[1:], strict=False)):
            slope = (losses[after] - losses[before]) / max(prices[before] - prices[after], 1e-300)
            steps.append((slope, number, position, after))
    for slope, number, _, entry in sorted(steps):
        if slope > 0 and (used <= limits).all():  # what loses nothing is taken in any case
            break
        used += tables[number].costs[entry] - tables[number].costs[chosen[number]]
        chosen[number] = entry
    if (used > limits).any():
        return None
    while True:  # fill what is left, the largest gain first
        gains = []
        for number, table in enumerate(tables):
            fits = (used - table.costs[chosen[number]] + table.costs <= limits).all(axis=1)
            losses = np.where(fits, table.losses, np.inf)
            entry = int(np.lexsort((table.costs @ weight, losses))[0])
            gains.append((table.losses[chosen[number]] - table.losses[entry], number, entry))
        gain, number, entry = max(gains, key=lambda item: item[0])
        if gain <= 0:
            return chosen
        used += tables[number].costs[entry] - tables[number].costs[chosen[number]]
        chosen[number] = entry


def _lower_hull(prices: np.ndarray, losses: np.ndarray) -> list[int]:
    """Corners of the lower convex hull, from entry 0 (no loss) to the cheapest."""
    order = [int(i) for i in np.lexsort((losses, prices)) if prices[i] < prices[0]]
    hull: list[int] = []
    for entry in [*order, 0]:  # from the cheapest upwards
        if entry and hull and losses[entry] >= losses[hull[-1]]:
            continue  # costs more and loses as much
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            turn = (prices[b] - prices[a]) * (losses[entry] - losses[a]) - (prices[entry] - prices[a]) * (
                losses[b] - losses[a]
            )
            if turn > 0:
                break
            hull.pop()
        hull.append(entry)
    return hull[::-1]
