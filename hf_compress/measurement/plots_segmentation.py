"""Masks drawn over their image, of the data and of two models side by side: the picture of a segmenter's model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .plots import _GREY, _WIDTH, _figure
from .segmentation import IGNORED

_HEADING, _LEGEND = 0.45, 0.5  # inches
_MOST_NAMED = 10  # classes in the legend


def draw_masks(
    path: str | Path,
    images: Sequence[Any],
    masks: Mapping[str, Sequence[Any]],
    class_names: Sequence[str] | None = None,
    ignored: int = IGNORED,
) -> Path:
    """Draw images, and over copies of each the masks of several origins; class 0 is left clear.

    Args:
        path: the PNG to write.
        images: PIL images; one row for each.
        masks: title of a column -> a mask for every image, integers [height, width] of the image's size.
        class_names: for the legend, which shows the classes with the most pixels.
        ignored: class of pixels that are shown in grey.

    Raises:
        ValueError: when there is no image, or not one mask of its size for each.
    """
    images = [image.convert("RGB") for image in images]
    columns = {title: [np.asarray(mask, dtype=np.int64) for mask in found] for title, found in masks.items()}
    if not images or any(len(found) != len(images) for found in columns.values()):
        counts = ", ".join(f"{len(found)} of {title}" for title, found in columns.items())
        raise ValueError(f"there are {len(images)} images and masks for {counts}; give one of each for every image.")
    for found in columns.values():
        for image, mask in zip(images, found, strict=True):
            if mask.shape != (image.height, image.width):
                raise ValueError(
                    f"a mask of {mask.shape} does not fit an image of {(image.height, image.width)} pixels."
                )
    totals = np.bincount(np.concatenate([mask.ravel() for found in columns.values() for mask in found]), minlength=256)
    named = [int(c) for c in totals.argsort(kind="stable")[::-1] if totals[c] and c not in (0, ignored)][:_MOST_NAMED]
    width = _WIDTH / (1 + len(columns))
    height = _HEADING + _LEGEND + sum(width * image.height / image.width for image in images)
    with _figure(path, height) as frame:
        import matplotlib

        figure = frame.figure
        frame.remove()
        colours = matplotlib.colormaps["tab20"](np.arange(256) % 20)
        colours[:, 3] = 0.65
        colours[0] = 0.0
        colours[ignored if ignored < 256 else 255] = (0.5, 0.5, 0.5, 0.6)
        grid = figure.subplots(len(images), 1 + len(columns), squeeze=False)
        for number, (row, image) in enumerate(zip(grid, images, strict=True)):
            for axes, title in zip(row, ["image", *columns], strict=True):
                axes.imshow(np.asarray(image), interpolation="nearest")
                if title != "image":
                    axes.imshow(colours[columns[title][number] % 256], interpolation="nearest")
                axes.set_axis_off()
                if not number:
                    axes.set_title(title, color=_GREY)
        handles = [matplotlib.patches.Patch(color=colours[c], label=_name(class_names, c)) for c in named]
        if handles:
            figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)), frameon=False)
    return Path(path)


def _name(class_names: Sequence[str] | None, label: int) -> str:
    return class_names[label] if class_names is not None and label < len(class_names) else str(label)


__all__ = ["draw_masks"]
