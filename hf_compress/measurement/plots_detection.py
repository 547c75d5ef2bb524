"""Detections drawn on their image, of two models side by side: the picture of a detector's model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .plots import _BLUE, _GREY, _ORANGE, _figure

_HEADING = 0.45  # inches above a picture


def draw_detections(
    path: str | Path,
    image: Any,
    dense: Mapping[str, Any],
    searched: Mapping[str, Any],
    class_names: Sequence[str] | Mapping[int, str] | None = None,
    threshold: float = 0.5,
    titles: tuple[str, str] = ("dense", "searched"),
) -> Path:
    """Draw what two models find in the same images, the dense one on the left.

    Args:
        path: the PNG to write.
        image: a PIL image; or several, which are drawn below one another, with as many ``dense`` and ``searched``.
        dense, searched: ``boxes`` [n, 4] as x1, y1, x2, y2 in pixels, ``scores`` [n] and ``labels`` [n], as
            ``post_process_object_detection`` returns them.
        class_names: names of the classes; their numbers are drawn without it.
        threshold: detections with a lower score are left out.
        titles: above the two columns.

    Returns:
        ``path``.
    """
    images = list(image) if isinstance(image, (list, tuple)) else [image]
    left = list(dense) if isinstance(dense, (list, tuple)) else [dense]
    right = list(searched) if isinstance(searched, (list, tuple)) else [searched]
    if not images or not len(images) == len(left) == len(right):
        raise ValueError(
            f"there are {len(images)} images and detections for {len(left)} and {len(right)}; give one of each for every "
            "image."
        )
    height = _HEADING + 3.0 * sum(one.height / one.width for one in images)
    with _figure(path, height) as frame:
        figure = frame.figure
        frame.remove()
        grid = figure.subplots(len(images), 2, squeeze=False)
        for row, one, *found in zip(grid, images, left, right, strict=True):
            for axes, detections, colour in zip(row, found, (_ORANGE, _BLUE), strict=True):
                axes.imshow(np.asarray(one.convert("RGB")), interpolation="nearest")
                axes.set_axis_off()
                _draw(axes, detections, class_names, threshold, colour, one.size)
        for axes, title in zip(grid[0], titles, strict=True):
            axes.set_title(title, color=_GREY)
    return Path(path)


def _draw(
    axes: Any, found: Mapping[str, Any], class_names: Any, threshold: float, colour: str, size: tuple[int, int]
) -> None:
    from matplotlib.patches import Rectangle

    width, height = size
    entries = list(zip(*(np.asarray(found[name]) for name in ("boxes", "scores", "labels")), strict=True))
    for (x1, y1, x2, y2), score, label in sorted(entries, key=lambda entry: entry[1]):  # the best on top
        if score < threshold:
            continue
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=2))
        text = f"{class_names[int(label)] if class_names is not None else int(label)} {100 * score:.0f}"
        axes.text(
            min(max(x1, 0), 0.6 * width),
            max(y1, 0.07 * height),
            text,
            color="white",
            fontsize=8.5,
            va="bottom",
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 1},
        )


__all__ = ["draw_detections"]
