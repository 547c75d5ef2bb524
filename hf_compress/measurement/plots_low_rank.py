"""Singular values and ranks of every layer, before and after: the pictures of rank pruning and factorisation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .plots import _BLUE, _GREY, _ORANGE, _PALE, _figure, _ticker, plot_widths, short_names

_MOST_PANELS = 12
_COLUMNS = 3
_FLOOR = 1e-3  # of the largest singular value; smaller ones are not drawn


def plot_spectra(
    path: str | Path,
    before: Mapping[str, Any],
    after: Mapping[str, Any] | None = None,
    ranks: Mapping[str, int] | None = None,
) -> Path:
    """Singular values of every layer, relative to the largest, as small curves on a logarithmic scale.

    Args:
        path: the PNG to write.
        before: layer -> singular values (or their squares' roots, summed over matrices), largest first: of the model as
            it was trained plainly, or before it was factorised.
        after: the same layers after rank pruning in training; drawn over it.
        ranks: layer -> rank that is kept; marked by a line.

    Of more than 12 layers, 12 are drawn, evenly spread over the model.
    """
    if not before:
        raise ValueError("there are no layers to draw; give at least one.")
    after, ranks = after or {}, ranks or {}
    names = _spread(list(before), _MOST_PANELS)
    rows = -(-len(names) // _COLUMNS)
    with _figure(path, 0.9 + 1.55 * rows) as axes:
        figure = axes.figure
        axes.remove()
        panels = figure.subplots(rows, min(_COLUMNS, len(names)), sharey=True, squeeze=False).flatten()
        for panel in panels[len(names) :]:
            panel.set_visible(False)
        labels = short_names(names, longest=17)
        for panel, name in zip(panels, names, strict=False):
            _panel(panel, before[name], after.get(name), ranks.get(name))
            panel.set_title(labels[name], loc="left", fontsize=11)
        handles, texts = _legend(bool(after), bool(ranks))
        figure.legend(handles, texts, loc="outside upper center", ncols=len(handles), handlelength=1.5)
        figure.supylabel("singular value, largest = 1", fontsize=12)
        figure.supxlabel("component", fontsize=12)
    return Path(path)


def plot_ranks(path: str | Path, full: Mapping[str, int], kept: Mapping[str, int]) -> Path:
    """Rank of every layer before and after, as :func:`~.plots.plot_widths` draws widths.

    Args:
        path: the PNG to write.
        full: layer -> the most that its rank can be.
        kept: layer -> rank; a missing layer kept its full rank.
    """
    return plot_widths(path, full, kept)


def _spread(names: Sequence[str], most: int) -> list[str]:
    if len(names) <= most:
        return list(names)
    return [names[round(i * (len(names) - 1) / (most - 1))] for i in range(most)]


def _panel(panel: Any, before: Any, after: Any, rank: int | None) -> None:
    for values, colour, width in ((before, _GREY, 2.0), (after, _BLUE, 2.5)):
        if values is not None:
            values = [float(value) for value in values]
            largest = max(values[0], 1e-300)
            relative = [value / largest if value >= _FLOOR * largest else math.nan for value in values]
            panel.plot(range(1, len(values) + 1), relative, color=colour, linewidth=width)
    if rank is not None:
        panel.axvspan(rank + 0.5, len(before) + 0.5, color=_PALE, alpha=0.6, linewidth=0)
        panel.axvline(rank + 0.5, color=_ORANGE, linewidth=2)
    panel.set_yscale("log")
    panel.set_ylim(_FLOOR, 1.5)
    panel.set_xlim(0.5, len(before) + 0.5)
    panel.set_yticks([1e-3, 1e-2, 1e-1, 1])
    panel.minorticks_off()
    panel.tick_params(labelsize=10)
    panel.xaxis.set_major_locator(_ticker().MaxNLocator(3, integer=True))


def _legend(has_after: bool, has_ranks: bool) -> tuple[list[Any], list[str]]:
    from matplotlib.lines import Line2D

    entries = (
        [(_GREY, "before")]
        + ([(_BLUE, "after")] if has_after else [])
        + ([(_ORANGE, "rank kept")] if has_ranks else [])
    )
    return [Line2D([], [], color=colour, linewidth=3) for colour, _ in entries], [text for _, text in entries]
