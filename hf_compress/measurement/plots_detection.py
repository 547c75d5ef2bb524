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
    dense: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    searched: Mapping[str, Any] | Sequence[Mapping[str, Any]],
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
        shown = []
        for row, one, *found in zip(grid, images, left, right, strict=True):
            detections: Any
            for axes, detections, colour in zip(row, found, (_ORANGE, _BLUE), strict=True):
                axes.imshow(np.asarray(one.convert("RGB")), interpolation="nearest")
                axes.set_axis_off()
                columns = (np.asarray(detections[name]) for name in ("boxes", "scores", "labels"))
                entries = [entry for entry in zip(*columns, strict=True) if entry[1] >= threshold]
                entries.sort(key=lambda entry: -entry[1])  # the best first
                _draw_boxes(axes, entries, colour)
                shown.append((axes, entries, colour))
        for axes, title in zip(grid[0], titles, strict=True):
            axes.set_title(title, color=_GREY)
        figure.draw_without_rendering()  # the layout moves the axes, and with them every pixel position
        figure.set_layout_engine("none")
        for axes, entries, colour in shown:
            _draw_labels(axes, entries, class_names, colour)
    return Path(path)


Entry = tuple[Any, float, int]  # box, score, class


def _draw_boxes(axes: Any, entries: Sequence[Entry], colour: str) -> None:
    from matplotlib.patches import Rectangle

    for (x1, y1, x2, y2), _, _ in reversed(entries):
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=2))


def _draw_labels(axes: Any, entries: Sequence[Entry], class_names: Any, colour: str) -> None:
    """Class and score of each box, above it or below; left out where better ones have taken both places."""
    frame = axes.get_window_extent()
    box_style = {"facecolor": colour, "edgecolor": "none", "pad": 1}
    taken: list[Any] = []
    for (x1, y1, _, y2), score, label in entries:
        name = class_names[int(label)] if class_names is not None else int(label)
        text = axes.text(
            0, 0, f"{name} {100 * score:.0f}", color="white", fontsize=13, ha="left", bbox=box_style, clip_on=False
        )
        for y, side in ((y1, "bottom"), (y2, "top")):
            text.set(position=(x1, y), va=side)
            found = text.get_window_extent()
            # moved into the image where it would reach beyond it
            dx = min(0.0, frame.x1 - found.x1) or max(0.0, frame.x0 - found.x0)
            dy = min(0.0, frame.y1 - found.y1) or max(0.0, frame.y0 - found.y0)
            pixel_x, pixel_y = axes.transData.transform((x1, y))
            text.set_position(axes.transData.inverted().transform((pixel_x + dx, pixel_y + dy)))
            found = text.get_window_extent()
            if not any(found.overlaps(other) for other in taken):
                taken.append(found)
                break
        else:
            text.remove()


__all__ = ["draw_detections"]
