"""How large the groups of weights are, before and after training with sparse groups."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .plots import _BLUE, _GREY, _ORANGE, _PALE, _figure

_BINS = 24
_DECADES = 4  # below the largest group; smaller ones that are not zero are in the leftmost bin


def plot_group_norms(path: str | Path, before: Mapping[str, Any], after: Mapping[str, Any]) -> Path:
    """Histogram of the groups' norms on a logarithmic scale, before and after, with the groups that are zero apart.

    Args:
        path: the PNG to write.
        before: axis -> norm of the group of every index, at least 0, of the model before the training.
        after: the same axes after it. A zero is an index that surgery can remove.

    Raises:
        ValueError: when there are no groups, or all of them are zero.
    """
    import numpy as np

    old, new = (np.concatenate([np.asarray(part, float) for part in norms.values()]) for norms in (before, after))
    largest = max(old.max(initial=0.0), new.max(initial=0.0))
    if largest <= 0:
        raise ValueError("there are no groups to draw, or all of them are zero.")
    edges = np.linspace(-_DECADES, 0, _BINS + 1)
    width = edges[1] - edges[0]
    zero_at = edges[0] - 3 * width  # apart from the rest, since a logarithm has no place for it
    with _figure(path, 4.2) as axes:
        for values, colour, filled, label in ((old, _PALE, True, "before"), (new, _BLUE, False, "after")):
            places = np.log10(values[values > 0] / largest).clip(edges[0], None)
            counts, _ = np.histogram(places, edges)
            if filled:
                axes.stairs(counts, edges, fill=True, color=colour, label=label)
            else:
                axes.stairs(counts, edges, color=colour, linewidth=2.5, label=label)
        zeros = int((new == 0).sum())
        axes.bar(zero_at, zeros, width=1.6 * width, color=_ORANGE, label="zero after")
        axes.text(zero_at, zeros, f"{zeros} of {new.size}", ha="left" if zeros else "center", va="bottom", color=_GREY)
        axes.set_xticks([zero_at, *range(-_DECADES, 1)], ["0", *(f"$10^{{{d}}}$" for d in range(-_DECADES, 0)), "1"])
        axes.set_xlabel("norm of a group, largest = 1")
        axes.set_ylabel("groups")
        axes.figure.legend(loc="outside upper center", ncols=3)
    return Path(path)
