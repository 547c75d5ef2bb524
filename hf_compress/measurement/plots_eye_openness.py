"""Estimated against true openness: the picture of a model of eye openness."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .plots import _BLUE, _GREY, _ORANGE, _figure

_BINS = 12


def plot_degrees(path: str | Path, openness: np.ndarray, predicted: Mapping[str, np.ndarray]) -> Path:
    """Median and the middle 80 % of estimates over the true openness, in bins; one curve for each model.

    Args:
        path: the PNG to write.
        openness: [eyes], labelled.
        predicted: name of a model -> [eyes]; two at most.
    """
    if not len(openness) or not predicted:
        raise ValueError("there are no eyes or no models to draw; give at least one of each.")
    edges = np.linspace(0, 1, _BINS + 1)
    number = np.clip(np.digitize(openness, edges) - 1, 0, _BINS - 1)
    used = [i for i in range(_BINS) if (number == i).any()]
    middles = (edges[:-1] + edges[1:])[used] / 2
    with _figure(path, 4.6) as axes:
        axes.plot([0, 1], [0, 1], color=_GREY, linewidth=1, linestyle=":")
        for (name, values), colour in zip(predicted.items(), (_BLUE, _ORANGE), strict=False):
            low, median, high = np.array([np.quantile(values[number == i], [0.1, 0.5, 0.9]) for i in used]).T
            axes.fill_between(middles, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.plot(middles, median, color=colour, linewidth=2.5, label=name)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_xlabel("true openness")
        axes.set_title("estimated openness", loc="left")
        axes.legend(loc="upper left")
    return Path(path)


__all__ = ["plot_degrees"]
