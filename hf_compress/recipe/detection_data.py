"""Annotated images for a recipe: composed scenes, a Hub data set, or a local folder, COCO's own layout included.

Boxes that no detector can learn from (empty, inverted, outside of the image, of an unknown class) are dropped or clipped
when the data are loaded, counted, and logged for each split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from ..data import CocoImages, DetectionCollator, Scenes
from ..data.coco import AnnotationCounts, clean_objects, image_sizes, objects_by_field
from ..data.coco import report as report_counts
from ..errors import DataError
from .data import (
    MEMORY_LIMIT,
    RawData,
    choose_splits,
    divide,
    encode,
    image_column,
    image_reader,
    load_splits,
    local_folder,
    named_column,
    native_size,
)
from .schema import Recipe, ScenesSection

_OBJECT_COLUMNS = ("objects", "annotations", "object", "labels")
_CLASS_FIELDS = ("category", "label", "category_id", "class", "labels", "categories")
_COCO_NAMES = ("annotations.json", "_annotations.coco.json")


@dataclass(frozen=True)
class AnnotatedSplit:
    """Images that are not decoded yet, and the objects in them.

    Attributes:
        read: indices -> RGB images.
        objects: per image ``bbox`` (xywh in pixels), ``category``, ``area``, ``iscrowd``, an entry for each object.
        image_ids: int64 [n].
    """

    read: Callable[[Sequence[int]], list[Image.Image]]
    objects: Sequence[Mapping[str, list[Any]]]
    image_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.image_ids)

    @property
    def strata(self) -> np.ndarray:
        """What is held out in equal shares: all images alike, since an image has objects of several classes."""
        return np.zeros(len(self), dtype=np.int64)

    def take(self, chosen: np.ndarray) -> AnnotatedSplit:
        """The subset at the given indices."""
        return AnnotatedSplit(
            lambda indices: self.read([int(chosen[i]) for i in indices]),
            [self.objects[i] for i in chosen],
            self.image_ids[chosen],
        )


class DetectionSplit(Dataset[dict[str, Any]]):
    """Batches of ``pixel_values`` float32 [n, 3, height, width], ``labels`` of the DETR kind and, where images were
    padded, ``pixel_mask``.

    A data loader asks for a whole batch at once; use :func:`~.data.as_batch` as the collator. Mirroring depends on (seed,
    epoch, image) alone.
    """

    def __init__(self, raw: AnnotatedSplit, processor: Any, num_labels: int, *, flip: bool = False, seed: int = 0):
        self.raw, self.processor, self.flip, self.seed = raw, processor, flip, seed
        self.epoch = 0
        self._collate = DetectionCollator(processor, num_labels)

    def __len__(self) -> int:
        return len(self.raw)

    def augment_for(self, epoch: int) -> None:
        """Choose the augmentation of an epoch."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        indices = [int(i) for i in indices]
        flipped = self._flipped()
        examples = []
        for index, image in zip(indices, self.raw.read(indices), strict=True):
            objects = self.raw.objects[index]
            if flipped[index]:
                boxes = [[image.width - x - width, y, width, height] for x, y, width, height in objects["bbox"]]
                image, objects = ImageOps.mirror(image), {**objects, "bbox": boxes}
            examples.append({"image": image, "image_id": int(self.raw.image_ids[index]), "objects": objects})
        return self._collate(examples)

    def pixels(self, number: int) -> Tensor:
        """The first images that come out as large as the very first one, [up to ``number``, 3, height, width]."""
        images = self.raw.read(range(min(number, len(self))))
        found = [self.processor(images=[image], return_tensors="pt")["pixel_values"] for image in images]
        return torch.cat([pixels for pixels in found if pixels.shape == found[0].shape])

    def _flipped(self) -> list[bool]:
        if not self.flip:
            return [False] * len(self)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return (torch.rand(len(self), generator=generator) < 0.5).tolist()


def load_detection_data(recipe: Recipe) -> RawData[AnnotatedSplit]:
    """Find the annotated images that a recipe names and divide them.

    Raises:
        DataError: when they cannot be loaded, have no boxes, or a split is empty.
    """
    section = recipe.data
    if section.name == "scenes":
        parts, names, chosen = _scenes(recipe, section.scenes or ScenesSection())
    else:
        folder = local_folder(recipe, section.name, "data", "name")
        files = _coco_files(folder) if folder is not None else {}
        parts, names, chosen = _from_coco(recipe, files) if files else _from_datasets(recipe)
    splits = divide(recipe, parts, chosen)
    for name, split in splits.items():
        if not any(objects["bbox"] for objects in split.objects):
            raise DataError(
                f"{recipe.where('data')}: none of the {len(split)} images of the {name} split of {section.name} has an object. "
                f"Choose another {name}_split, or a larger {name}_limit."
            )
    return RawData(**splits, label_names=names, native_size=native_size(splits["train"]))


Parts = tuple[dict[str, AnnotatedSplit], list[str], dict[str, str | None]]


def _scenes(recipe: Recipe, section: ScenesSection) -> Parts:
    settings = section.model_dump(exclude={"train", "validation", "test"})
    parts, names = {}, []
    for name in ("train", "validation", "test"):
        try:
            scenes = Scenes(name, getattr(section, name), **settings)
            parts[name] = _composed(scenes)
        except DataError as error:
            raise DataError(f"{recipe.where('data', 'scenes')}: {error}") from error
        names = scenes.names
    return parts, names, {name: name for name in parts}


def _composed(scenes: Scenes) -> AnnotatedSplit:
    """Scenes, composed once for their objects, and kept as pixels where that is possible."""
    is_kept = len(scenes) * scenes.size**2 * 3 <= MEMORY_LIMIT
    kept: list[Image.Image] = []
    objects = []
    for scene in scenes:
        objects.append({name: list(values) for name, values in scene["objects"].items() if name != "id"})
        if is_kept:
            kept.append(scene["image"])
    return AnnotatedSplit(
        lambda indices: [kept[i] if is_kept else scenes[int(i)]["image"] for i in indices],
        objects,
        np.arange(len(scenes)),
    )


def _coco_files(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Split -> annotation file and image folder, in the layouts that COCO's own files and exports of them have."""
    found: dict[str, tuple[Path, Path]] = {}
    for name in _COCO_NAMES:
        if (folder / name).is_file():
            found["train"] = (folder / name, folder)
        found |= {file.parent.name: (file, file.parent) for file in sorted(folder.glob(f"*/{name}"))}
    for file in sorted((folder / "annotations").glob("instances_*.json")):
        split = file.stem.removeprefix("instances_")
        found[split] = (file, folder / split)
    return found


def _from_coco(recipe: Recipe, files: Mapping[str, tuple[Path, Path]]) -> Parts:
    chosen = choose_splits(recipe, list(files))
    parts, names = {}, {}
    for split in sorted({name for name in chosen.values() if name}):
        try:
            images = CocoImages(*files[split])
        except DataError as error:
            raise DataError(f"{recipe.where('data', 'name')}: {error}") from error
        names[split] = images.names
        parts[split] = _of_files(images)
    first, *others = names
    for other in others:
        if names[other] != names[first]:
            raise DataError(
                f"{recipe.where('data', 'name')}: the splits do not have the same classes: {first} has {len(names[first])} "
                f"({', '.join(names[first][:3])}, ...), {other} has {len(names[other])} ({', '.join(names[other][:3])}, ...)."
            )
    return parts, names[first], chosen


def _of_files(images: CocoImages) -> AnnotatedSplit:
    return AnnotatedSplit(
        lambda indices: [images[int(i)]["image"] for i in indices],
        [images.objects[identity] for identity in images.identities],
        np.array(images.identities, dtype=np.int64),
    )


def _from_datasets(recipe: Recipe) -> Parts:
    loaded = load_splits(recipe)
    chosen = choose_splits(recipe, list(loaded))
    used = sorted({name for name in chosen.values() if name})
    features = loaded[used[0]].features
    pictures = image_column(recipe, features)
    column = _objects_column(recipe, features)
    found = {name: [objects_by_field(objects) for objects in loaded[name].with_format(None)[column]] for name in used}
    first = next((objects for part in found.values() for objects in part if objects), {})
    field = next((name for name in _CLASS_FIELDS if name in first), None)
    if field is None or "bbox" not in first:
        raise DataError(
            f"{recipe.where('data')}: the column {column!r} of {recipe.data.name} has the fields {', '.join(first) or 'none'}; "
            f"bbox and one of {', '.join(_CLASS_FIELDS)} are needed. Set data.objects_column."
        )
    classes = {name: [value for objects in part for value in objects.get(field, ())] for name, part in found.items()}
    names, codes = encode(recipe, _feature_of(features[column], field), classes)
    parts = {}
    for name in used:
        try:
            cleaned = _cleaned(recipe, name, found[name], field, codes[name], image_sizes(loaded[name], pictures))
        except DataError as error:
            raise DataError(f"{recipe.where('data')}: {error}") from error
        parts[name] = AnnotatedSplit(
            image_reader(recipe, loaded[name], name, pictures), cleaned, np.arange(len(cleaned))
        )
    return parts, names, chosen


def _cleaned(
    recipe: Recipe,
    split: str,
    found: Sequence[Mapping[str, Sequence[Any]]],
    field: str,
    codes: np.ndarray,
    sizes: Sequence[tuple[int, int]],
) -> list[dict[str, list[Any]]]:
    """The objects of every image that a detector can learn from; what was dropped is logged.

    Args:
        field: of ``found`` that holds the classes.
        codes: the classes of all objects, image by image, as numbers.
    """
    counts, start, cleaned = AnnotationCounts(), 0, []
    for objects, size in zip(found, sizes, strict=True):
        stop = start + len(objects.get(field, ()))
        others = {name: objects[name] for name in ("area", "iscrowd") if name in objects}
        coded = {"bbox": objects.get("bbox", ()), "category": codes[start:stop].tolist(), **others}
        cleaned.append(clean_objects(coded, size, None, counts, recipe.data.box_format))
        start = stop
    report_counts(counts, f"{recipe.data.name}, split {split}")
    return cleaned


def _objects_column(recipe: Recipe, features: Any) -> str:
    if recipe.data.objects_column is not None:
        return named_column(recipe, features, "objects_column")
    found = next((name for name in _OBJECT_COLUMNS if name in features), None)
    if found is None:
        raise DataError(
            f"{recipe.where('data')}: {recipe.data.name} has no column with objects ({', '.join(features)}). Set "
            "data.objects_column to the one whose entries have bbox and category."
        )
    return found


def _feature_of(kind: Any, field: str) -> Any:
    """The type of a field of the objects, which may be a list of dictionaries or a dictionary of lists."""
    kind = getattr(kind, "feature", kind)
    inner = kind[field] if isinstance(kind, Mapping) else None
    return getattr(inner, "feature", inner)
