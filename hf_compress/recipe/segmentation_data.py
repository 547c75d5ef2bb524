"""Images with a class for every pixel: composed scenes, or a data set with a column of images and one of masks.

A mask is a picture whose values are the numbers of classes, grey or with a palette, as in PASCAL VOC and ADE20K.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from ..data import Scenes
from ..errors import DataError
from ..measurement.segmentation import IGNORED
from .data import (
    MEMORY_LIMIT,
    RawData,
    choose_splits,
    divide,
    image_column,
    image_reader,
    load_splits,
    named_column,
    native_size,
)
from .schema import Recipe, ScenesSection

_MASK_COLUMNS = ("annotation", "annotations", "mask", "masks", "segmentation", "segmentation_mask", "label", "labels")
_MODES = ("L", "P", "1", "I", "I;16")  # of pictures with one number for each pixel


@dataclass(frozen=True)
class SegmentedSplit:
    """Images and masks that are not decoded yet.

    Attributes:
        images: places -> RGB images.
        masks: places -> masks of the same sizes, each with one number for every pixel.
        indices: int64 [n], the places that belong to the split.
        ignored: value of a mask where there is no label.
    """

    images: Callable[[Sequence[int]], list[Image.Image]]
    masks: Callable[[Sequence[int]], list[Image.Image]]
    indices: np.ndarray
    ignored: int = IGNORED

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def strata(self) -> np.ndarray:
        """What is held out in equal shares: all images alike, since an image has several classes."""
        return np.zeros(len(self), dtype=np.int64)

    def read(self, indices: Sequence[int]) -> list[Image.Image]:
        """RGB images."""
        return self.images([int(self.indices[i]) for i in indices])

    def read_masks(self, indices: Sequence[int]) -> list[Image.Image]:
        """Masks of the same sizes."""
        return self.masks([int(self.indices[i]) for i in indices])

    def take(self, chosen: np.ndarray) -> SegmentedSplit:
        """The subset at the given indices."""
        return SegmentedSplit(self.images, self.masks, self.indices[chosen], self.ignored)


class SegmentationSplit(Dataset[dict[str, Tensor]]):
    """Batches of ``pixel_values`` float32 [n, 3, height, width] and ``labels`` int64 [n, height, width].

    A mask is brought to the size that the processor gives its image, each pixel taking the nearest one's class. A data
    loader asks for a whole batch at once; use :func:`~.data.as_batch` as the collator. Mirroring depends on (seed, epoch,
    image) alone.

    Pixels without a label are :data:`IGNORED` in the batches.

    Raises:
        DataError: when the processor crops images, or a mask holds a class that there is not.
    """

    def __init__(
        self,
        raw: SegmentedSplit,
        processor: Any,
        num_labels: int,
        *,
        flip: bool = False,
        seed: int = 0,
    ):
        if getattr(processor, "do_center_crop", False):
            raise DataError(
                f"{type(processor).__name__} crops images, and masks would no longer lie on them. Save the model with an image "
                "processor that has do_center_crop false."
            )
        self.raw, self.processor, self.num_labels = raw, processor, num_labels
        self.flip, self.seed = flip, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.raw)

    def augment_for(self, epoch: int) -> None:
        """Choose the augmentation of an epoch."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        indices = [int(i) for i in indices]
        images, masks = self.raw.read(indices), self.raw.read_masks(indices)
        if self.flip:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            flipped = (torch.rand(len(self), generator=generator) < 0.5).tolist()
            images = [ImageOps.mirror(one) if flipped[i] else one for i, one in zip(indices, images, strict=True)]
            masks = [ImageOps.mirror(one) if flipped[i] else one for i, one in zip(indices, masks, strict=True)]
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
        labels = [self._labels(index, one, pixels.shape[-2:]) for index, one in zip(indices, masks, strict=True)]
        return {"pixel_values": pixels, "labels": torch.stack(labels)}

    def pixels(self, number: int) -> Tensor:
        """The first images, [up to ``number``, 3, height, width]."""
        images = self.raw.read(range(min(number, len(self))))
        return self.processor(images=images, return_tensors="pt")["pixel_values"]

    def _labels(self, index: int, mask: Image.Image, size: Any) -> Tensor:
        values, ignored = torch.from_numpy(_values(mask)), self.raw.ignored
        unknown = values[(values != ignored) & ((values < 0) | (values >= self.num_labels))]
        if len(unknown):
            raise DataError(
                f"the mask of image {index} has the class {int(unknown[0])}; there are {self.num_labels}, from 0 on. Set "
                f"data.class_names to all classes, and data.ignore_label ({ignored}) to the value of pixels without one."
            )
        resized = F.interpolate(values[None, None].float(), size=tuple(size), mode="nearest-exact")[0, 0].long()
        return resized.masked_fill(resized == ignored, IGNORED)


def _values(mask: Image.Image) -> np.ndarray:
    """The numbers of a mask, int64 [height, width]."""
    if mask.mode not in _MODES:
        raise DataError(
            f"a mask is a picture with one number for each pixel, the number of its class; found one of mode {mask.mode}. Set data.mask_column to the column of such pictures."
        )
    return np.array(mask, dtype=np.int64)


def load_segmentation_data(recipe: Recipe) -> RawData[SegmentedSplit]:
    """Find the images and masks that a recipe names and divide them.

    Raises:
        DataError: when they cannot be loaded, have no masks, or a split is empty.
    """
    section = recipe.data
    if section.name == "scenes":
        parts, names = _scenes(recipe, section.scenes or ScenesSection())
        splits = divide(recipe, parts, {name: name for name in parts})
    else:
        splits, names = _from_datasets(recipe)
    for name, split in splits.items():
        image, mask = split.read([0])[0], split.read_masks([0])[0]
        if image.size != mask.size:
            raise DataError(
                f"{recipe.where('data')}: the first image of the {name} split has {image.size[0]} x {image.size[1]} pixels and "
                f"its mask {mask.size[0]} x {mask.size[1]}. Set data.image_column and data.mask_column."
            )
        try:
            _values(mask)
        except DataError as error:
            raise DataError(f"{recipe.where('data')}: {error}") from error
    return RawData(**splits, label_names=names, native_size=native_size(splits["train"]))


def _scenes(recipe: Recipe, section: ScenesSection) -> tuple[dict[str, SegmentedSplit], list[str]]:
    settings = section.model_dump(exclude={"train", "validation", "test"})
    parts, names = {}, []
    for name in ("train", "validation", "test"):
        try:
            scenes = Scenes(name, getattr(section, name), **settings)
        except DataError as error:
            raise DataError(f"{recipe.where('data', 'scenes')}: {error}") from error
        parts[name] = _composed(scenes)
        names = ["background", *scenes.names]
    return parts, names


def _composed(scenes: Scenes) -> SegmentedSplit:
    """Scenes, kept as pixels once they are composed, where that is possible."""
    is_kept = len(scenes) * scenes.size**2 * 4 <= MEMORY_LIMIT
    kept: dict[int, tuple[Image.Image, Image.Image]] = {}

    def pair(index: int) -> tuple[Image.Image, Image.Image]:
        if index in kept:
            return kept[index]
        scene = scenes[index]
        found = scene["image"], scene["segmentation"]
        if is_kept:
            kept[index] = found
        return found

    return SegmentedSplit(
        lambda indices: [pair(int(i))[0] for i in indices],
        lambda indices: [pair(int(i))[1] for i in indices],
        np.arange(len(scenes)),
    )


def _from_datasets(recipe: Recipe) -> tuple[dict[str, SegmentedSplit], list[str]]:
    loaded = load_splits(recipe)
    chosen = choose_splits(recipe, list(loaded))
    used = sorted({name for name in chosen.values() if name})
    features = loaded[used[0]].features
    column = _mask_column(recipe, features)
    pictures = image_column(recipe, {name: kind for name, kind in features.items() if name != column})
    parts = {
        name: SegmentedSplit(
            image_reader(recipe, loaded[name], name, pictures),
            image_reader(recipe, loaded[name], name, column, mode=None),
            np.arange(len(loaded[name])),
            recipe.data.ignore_label,
        )
        for name in used
    }
    splits = divide(recipe, parts, chosen)
    names = recipe.data.class_names
    return splits, list(names) if names else _numbered(recipe, splits["train"])


def _numbered(recipe: Recipe, split: SegmentedSplit) -> list[str]:
    """Classes by number, up to the highest in the training masks; all of them are read for it."""
    highest = 0
    for index in range(len(split)):
        values = _values(split.read_masks([index])[0])
        highest = max(highest, int(values[values != split.ignored].max(initial=0)))
    if highest >= IGNORED:
        raise DataError(
            f"{recipe.where('data')}: the masks of {recipe.data.name} go up to {highest}; classes are numbered from 0 to "
            f"{IGNORED - 1} at most. Set data.ignore_label to the value of pixels without a class."
        )
    return [str(number) for number in range(highest + 1)]


def _mask_column(recipe: Recipe, features: Any) -> str:
    import datasets

    if recipe.data.mask_column is not None:
        return named_column(recipe, features, "mask_column")
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    found = [name for name in _MASK_COLUMNS if name in images]
    if len(found) != 1:
        shown = ", ".join(images) or "none"
        raise DataError(
            f"{recipe.where('data')}: {recipe.data.name}: which column holds the masks is not clear; the columns of pictures "
            f"are {shown}. Set data.mask_column."
        )
    return found[0]


__all__ = ["SegmentationSplit", "SegmentedSplit", "load_segmentation_data"]
