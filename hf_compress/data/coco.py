"""Annotated images in COCO's format: reading them, and refusing or repairing boxes that no detector can learn from.

An example is ``{"image": PIL image, "image_id": int, "objects": {"bbox", "category", "area", "iscrowd", ...}}``, with a
list entry per object in ``objects``; ``bbox`` is ``[x, y, width, height]`` in pixels, ``category`` counts from 0.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ..errors import DataError

logger = logging.getLogger(__name__)

BoxFormat = Literal["xywh", "xyxy"]


@dataclass
class AnnotationCounts:
    """What became of the boxes of a data set.

    Attributes:
        kept: boxes that were left, the clipped ones among them.
        clipped: boxes that reached beyond their image and were cut at its edge.
        dropped: reason -> boxes that were taken out.
    """

    kept: int = 0
    clipped: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def is_clean(self) -> bool:
        """Whether every box was fine as it was."""
        return not self.clipped and not self.dropped

    def __str__(self) -> str:
        dropped = ", ".join(f"{count} {reason}" for reason, count in self.dropped.most_common())
        return f"{self.kept} boxes kept, {self.clipped} of them clipped to the image; dropped: {dropped or 'none'}"


def clean_objects(
    objects: Mapping[str, Sequence[Any]],
    image_size: tuple[int, int],
    num_labels: int | None,
    counts: AnnotationCounts,
    box_format: BoxFormat = "xywh",
) -> dict[str, list[Any]]:
    """The objects of one image that a detector can learn from.

    Boxes are clipped to the image. Dropped are boxes that are not finite, inverted, empty or outside of the image, and
    those of an unknown class. An area that is missing or no positive number becomes that of the box.

    Args:
        objects: ``bbox`` and ``category``, and what else there is, a list entry per object in each.
        image_size: width and height in pixels.
        num_labels: number of classes; None lets every class pass.
        counts: is added to.
        box_format: of ``bbox``; the result is always xywh.

    Raises:
        DataError: when ``objects`` is no such mapping.
    """
    if not {"bbox", "category"} <= set(objects):
        raise DataError(f"objects has the fields {sorted(objects)}; bbox and category are needed.")
    total = len(objects["bbox"])
    uneven = {name: len(values) for name, values in objects.items() if len(values) != total}
    if uneven:
        raise DataError(
            f"an image has {total} boxes, but {uneven} entries of its other fields; there must be one each."
        )
    try:
        boxes = np.array(objects["bbox"], dtype=np.float64).reshape(total, 4)
        categories = np.array(objects["category"], dtype=np.float64).reshape(total)
    except (TypeError, ValueError) as error:
        raise DataError(f"boxes have to be four numbers, and categories numbers ({error}).") from error
    if box_format == "xyxy":
        with np.errstate(invalid="ignore"):
            boxes[:, 2:] -= boxes[:, :2]
    is_left = np.ones(total, dtype=bool)

    def drop(wrong: Any, reason: str) -> None:
        nonlocal is_left
        if number := int((is_left & wrong).sum()):
            counts.dropped[reason] += number
        is_left &= ~wrong

    drop(~np.isfinite(boxes).all(axis=1), "not finite")
    drop(~np.isfinite(categories) | (categories < 0) | (categories % 1 != 0), "of an unknown class")
    if num_labels is not None:
        drop(categories >= num_labels, "of an unknown class")
    drop((boxes[:, 2:] < 0).any(axis=1), "inverted")
    drop((boxes[:, 2:] == 0).any(axis=1), "empty")
    limit = np.array(image_size, dtype=np.float64)
    with np.errstate(invalid="ignore"):  # boxes that are not finite are still among them
        start = np.clip(boxes[:, :2], 0, limit)
        stop = np.clip(boxes[:, :2] + boxes[:, 2:], 0, limit)
    drop((stop <= start).any(axis=1), "outside of the image")
    clipped = np.concatenate([start, stop - start], axis=1)
    # files store boxes with a few decimals, so less than a hundredth of a pixel is rounding
    counts.clipped += int((np.abs(clipped[is_left] - boxes[is_left]) > 0.01).any(axis=1).sum())
    counts.kept += int(is_left.sum())
    chosen = np.flatnonzero(is_left).tolist()
    cleaned = {name: [values[i] for i in chosen] for name, values in objects.items()}
    cleaned["bbox"] = clipped[chosen].tolist()
    cleaned["category"] = [int(categories[i]) for i in chosen]
    areas = cleaned.get("area", [None] * len(chosen))
    cleaned["area"] = [
        area if area is not None and np.isfinite(area) and area > 0 else box[2] * box[3]
        for area, box in zip(areas, cleaned["bbox"], strict=True)
    ]
    cleaned.setdefault("iscrowd", [0] * len(chosen))
    return cleaned


def clean_annotations(
    dataset: Any,
    num_labels: int | None = None,
    *,
    box_format: BoxFormat = "xywh",
    image_column: str = "image",
    objects_column: str = "objects",
) -> Any:
    """A data set with the same images whose boxes a detector can learn from; see :func:`clean_objects`.

    What was clipped and dropped is logged, once. Images are not decoded, and their bytes are not written again.

    Args:
        dataset: a ``datasets.Dataset``.
        num_labels: number of classes; that of the data set's own class names when not given.
        box_format: of the boxes in ``dataset``; the result's are xywh.
        image_column, objects_column: names of columns. Columns ``width`` and ``height`` give the images' sizes; without
            them the files' headers are read.

    Raises:
        DataError: when a column is missing, or no box is left.
    """
    import datasets

    missing = {image_column, objects_column} - set(dataset.column_names)
    if missing:
        raise DataError(f"there is no column {sorted(missing)}; the data set has {dataset.column_names}.")
    kind = dataset.features[objects_column]
    category = kind.get("category") if isinstance(kind, dict) else None
    names = getattr(getattr(category, "feature", category), "names", None)
    num_labels = num_labels if num_labels is not None else len(names) if names else None
    counts = AnnotationCounts()
    cleaned = [
        clean_objects(objects_by_field(objects), size, num_labels, counts, box_format)
        for objects, size in zip(dataset[objects_column], image_sizes(dataset, image_column), strict=True)
    ]
    report(counts, f"the {len(dataset)} images")
    features = dict(kind) if isinstance(kind, dict) else {}
    for name, feature in (("area", datasets.Value("float32")), ("iscrowd", datasets.Value("int64"))):
        features.setdefault(name, datasets.List(feature))
    columns = list(dataset.column_names)
    table = datasets.Dataset.from_dict(
        {objects_column: cleaned}, features=datasets.Features({objects_column: features}) if kind else None
    )
    joined = datasets.concatenate_datasets([dataset.remove_columns([objects_column]), table], axis=1)
    return joined.select_columns(columns)


def report(counts: AnnotationCounts, what: str) -> None:
    """Log what was clipped and dropped.

    Raises:
        DataError: when no box is left.
    """
    if counts.kept == 0:
        raise DataError(
            f"{what} have no box that a detector could learn from ({counts}). Boxes are x, y, width, height in pixels; for "
            "corners give box_format='xyxy'."
        )
    if not counts.is_clean:
        logger.warning("%s: %s.", what, counts)


def objects_by_field(objects: Any) -> Mapping[str, Sequence[Any]]:
    """A list of objects, as some data sets have it, as lists of their fields."""
    if isinstance(objects, Mapping):
        return objects
    return {name: [o[name] for o in objects] for name in (objects[0] if objects else ("bbox", "category"))}


def image_sizes(dataset: Any, image_column: str) -> list[tuple[int, int]]:
    """Width and height of every image of a data set: from its columns of these names, else from the files' headers."""
    import datasets

    if {"width", "height"} <= set(dataset.column_names):
        return list(zip(dataset["width"], dataset["height"], strict=True))
    undecoded = dataset.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    sizes = []
    for number, example in enumerate(undecoded):
        image = example[image_column]
        try:
            with Image.open(BytesIO(image["bytes"]) if image["bytes"] else image["path"]) as opened:
                sizes.append(opened.size)
        except OSError as error:
            raise DataError(f"image {number} cannot be read ({error}).") from error
    return sizes


class CocoImages(Dataset):
    """A map-style data set of images with an annotation file in COCO's format.

    Category ids become consecutive numbers in their order; ``names`` holds their names. Boxes are cleaned (see
    :func:`clean_objects`) and what that changed is logged when the file is read.

    Args:
        annotations: the JSON file.
        images: the folder that its ``file_name``s are relative to; that of the file when not given.

    Raises:
        DataError: when the file is no such file, or no box is left.
    """

    def __init__(self, annotations: str | Path, images: str | Path | None = None):
        self.folder = Path(images) if images is not None else Path(annotations).parent
        try:
            content = json.loads(Path(annotations).read_text())
            categories = {int(c["id"]): str(c["name"]) for c in content["categories"]}
            entries = {int(image["id"]): image for image in content["images"]}
            found: dict[int, dict[str, list[Any]]] = {
                identity: {"bbox": [], "category": [], "area": [], "iscrowd": []} for identity in entries
            }
            place = {identity: number for number, identity in enumerate(sorted(categories))}
            for annotation in content["annotations"]:
                objects = found[int(annotation["image_id"])]
                objects["bbox"].append(annotation["bbox"])
                objects["category"].append(place.get(annotation["category_id"], -1))
                objects["area"].append(annotation.get("area"))
                objects["iscrowd"].append(int(annotation.get("iscrowd", 0)))
            sizes = {identity: (int(e["width"]), int(e["height"])) for identity, e in entries.items()}
            self.files = {identity: str(e["file_name"]) for identity, e in entries.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{annotations} cannot be read as COCO annotations ({type(error).__name__}: {error}). It is JSON with "
                "images (id, file_name, width, height), categories (id, name) and annotations (image_id, category_id, bbox)."
            ) from error
        self.names = [categories[identity] for identity in sorted(categories)]
        counts = AnnotationCounts()
        self.objects = {
            identity: clean_objects(objects, sizes[identity], len(self.names), counts)
            for identity, objects in found.items()
        }
        report(counts, str(annotations))
        self.identities = sorted(entries)

    @property
    def id2label(self) -> dict[int, str]:
        """As a model's configuration takes it."""
        return dict(enumerate(self.names))

    def __len__(self) -> int:
        return len(self.identities)

    def __getitem__(self, index: int) -> dict[str, Any]:
        identity = self.identities[index]
        path = self.folder / self.files[identity]
        try:
            with Image.open(path) as image:
                pixels = image.convert("RGB")
        except OSError as error:
            raise DataError(f"the image {path} cannot be read ({error}).") from error
        return {"image": pixels, "image_id": identity, "objects": self.objects[identity]}


__all__ = ["AnnotationCounts", "CocoImages", "clean_annotations", "clean_objects"]
