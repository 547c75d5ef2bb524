"""How an architecture search went: the operator that leads on every edge over the training, and how decided it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .plots import _GREY, _figure, _ticker
from .plots_cells import _COLOURS as _CELL_COLOURS

# Okabe & Ito's colours, the strongest contrasts first
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442", "#000000")
_FADED = 0.22  # opacity of edges that the discrete cell leaves out
_NOTHING = "none"

Matrix = Sequence[Sequence[float]]


def plot_architecture(
    path: str | Path,
    history: Iterable[Mapping[str, Any]],
    operators: Sequence[str] | None = None,
    edges: Sequence[str] | None = None,
    kept: Callable[[list[list[float]]], Collection[int]] | None = None,
) -> Path:
    """The leading operator of every edge over the training, one panel for each architecture matrix, and the entropy.

    Args:
        path: the PNG to write.
        history: ``trainer.state.log_history`` of a run with ``ArchitectureSearchCallback``; entries with ``step`` and
            ``architecture`` are drawn.
        operators: names of the matrices' columns; "none" never leads. Numbers when not given.
        edges: names of the rows; numbers when not given.
        kept: softmax weights, ``[edges][operators]``, -> rows that the discrete architecture keeps; the others are drawn pale.

    Raises:
        ValueError: when there is nothing to draw, or more than eight operators.
    """
    entries = [entry for entry in history if "step" in entry and entry.get("architecture")]
    if not entries:
        raise ValueError("no entry of the history has `step` and `architecture`; was an architecture searched?")
    names = list(entries[0]["architecture"])
    width = len(entries[0]["architecture"][names[0]][0])
    labels = list(operators) if operators is not None else [f"operator {i}" for i in range(width)]
    candidates = [i for i, label in enumerate(labels) if label != _NOTHING]
    if len(candidates) > len(_COLOURS):
        raise ValueError(f"{len(candidates)} operators cannot be told apart by {len(_COLOURS)} colours.")
    colours = {operator: _COLOURS[place] for place, operator in enumerate(candidates)}
    if all(labels[i] in _CELL_COLOURS for i in candidates):  # as in the other pictures of cells
        colours = {i: _CELL_COLOURS[labels[i]] for i in candidates}
    rows = max(len(entries[0]["architecture"][name]) for name in names)
    with _figure(path, 2.6 + len(names) * (0.75 + 0.24 * rows)) as axes:
        figure = axes.figure
        axes.remove()
        heights = [0.24 * rows + 0.6] * len(names) + [1.3]
        panels = figure.subplots(len(names) + 1, 1, sharex=True, height_ratios=heights)
        for panel, name in zip(panels, names, strict=False):
            weights = [[_softmax(row) for row in entry["architecture"][name]] for entry in entries]
            _timeline(panel, [entry["step"] for entry in entries], weights, candidates, colours, kept)
            panel.set_title(_short(name, names), loc="left", fontsize=13)
            ticks = list(range(len(weights[0])))
            panel.set_yticks(ticks, edges if edges is not None else [str(i) for i in ticks], fontsize=9)
        _entropies(panels[-1], entries, names)
        used = [labels[i] for i in candidates]
        figure.legend(
            [_patch(colours[i]) for i in candidates], used, loc="outside lower center", ncols=2, fontsize=11,
            columnspacing=1.2, handlelength=1.2,
        )  # fmt: skip
    return Path(path)


def _timeline(
    panel: Any,
    steps: list[int],
    weights: list[list[list[float]]],
    candidates: list[int],
    colours: Mapping[int, str],
    kept: Callable[[list[list[float]]], Collection[int]] | None,
) -> None:
    """Cells of the size of one log entry, coloured by the leading operator."""
    import numpy as np
    from matplotlib.colors import to_rgba

    picture = np.zeros((len(weights[0]), len(steps), 4))
    for column, matrix in enumerate(weights):
        chosen = set(range(len(matrix))) if kept is None else set(kept(matrix))
        for row, shares in enumerate(matrix):
            leader = max(candidates, key=lambda i: shares[i])
            picture[row, column] = to_rgba(colours[leader], 1.0 if row in chosen else _FADED)
    bounds = [0, *steps]
    panel.pcolormesh(bounds, np.arange(len(weights[0]) + 1) - 0.5, picture)
    panel.set_ylim(len(weights[0]) - 0.5, -0.5)
    panel.set_ylabel("edge")
    panel.tick_params(left=False)


def _entropies(panel: Any, entries: list[Mapping[str, Any]], names: list[str]) -> None:
    """The mean entropy of the edges' softmax weights, as a share of that of equal weights."""
    for place, name in enumerate(names):
        values = []
        for entry in entries:
            rows = [_softmax(row) for row in entry["architecture"][name]]
            most = math.log(len(rows[0])) or 1.0
            values.append(sum(-sum(p * math.log(p) for p in row if p > 0) for row in rows) / len(rows) / most)
        steps = [entry["step"] for entry in entries]
        panel.plot(
            steps, values, color=_GREY, linewidth=2.5, linestyle=("-", "--", ":", "-.")[place % 4],
            marker="o" if len(steps) == 1 else None, label=_short(name, names),
        )  # fmt: skip
    panel.set_title("entropy, 1 = all operators equal", loc="left", fontsize=13)
    panel.margins(y=0.15)
    panel.yaxis.set_major_locator(_ticker().MaxNLocator(3))
    panel.xaxis.set_major_locator(_ticker().MaxNLocator(4, integer=True))
    panel.set_xlabel("training step")
    if len(names) > 1:
        panel.legend(loc="best", fontsize=10, ncols=2)


def _softmax(row: Sequence[float]) -> list[float]:
    largest = max(row)
    powers = [math.exp(value - largest) for value in row]
    return [power / sum(powers) for power in powers]


def _short(name: str, names: Sequence[str]) -> str:
    """The last part of a parameter's name, where that is enough to tell the matrices apart."""
    last = [other.rpartition(".")[2] for other in names]
    return name.rpartition(".")[2] if len(set(last)) == len(names) else name


def _patch(colour: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour)
