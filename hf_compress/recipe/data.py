"""Labelled images for a recipe: scikit-learn's digits, a Hub data set or a local folder.

Images are read as RGB, exactly as ``transformers.pipeline`` reads a file, and go through the image processor that is
saved beside the model. A data set that fits into memory is resized once and kept as bytes; larger ones are decoded batch by
batch. Augmentation depends on (seed, epoch, image) alone and never on a global random state, so that a resumed run sees
the very same pixels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import DataError, RecipeError
from .schema import Recipe

MEMORY_LIMIT = 2 * 1024**3  # bytes of resized images that are kept in memory; above it they are decoded batch by batch
_IMAGE_COLUMNS = ("image", "img", "picture", "photo", "pixel_values")
_LABEL_COLUMNS = ("label", "labels", "target", "class", "category")


@dataclass(frozen=True)
class RawSplit:
    """Images that are not decoded yet, and their labels.

    Attributes:
        read: indices -> RGB images.
        labels: int64 [n].
    """

    read: Callable[[Sequence[int]], list[Image.Image]]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def strata(self) -> np.ndarray:
        """int64 [n]: what is held out in equal shares."""
        return self.labels

    def take(self, chosen: np.ndarray) -> RawSplit:
        """The subset at the given indices."""
        return RawSplit(lambda indices: self.read([int(chosen[i]) for i in indices]), self.labels[chosen])


class Raw(Protocol):
    """What the splits of all tasks have in common."""

    @property
    def read(self) -> Callable[[Sequence[int]], list[Image.Image]]: ...

    @property
    def strata(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def take(self: R, chosen: np.ndarray) -> R: ...


R = TypeVar("R", bound=Raw)


@dataclass(frozen=True)
class RawData(Generic[R]):
    """Three splits, the names of the classes, and the size that images have before resizing (None where it varies)."""

    train: R
    validation: R
    test: R
    label_names: list[str]
    native_size: tuple[int, int] | None

    def splits(self) -> dict[str, R]:
        return {"train": self.train, "validation": self.validation, "test": self.test}


class ImageSplit(Dataset[dict[str, Tensor]]):
    """Batches of ``pixel_values`` float32 [n, 3, height, width] and ``labels`` int64 [n].

    A data loader asks for a whole batch at once (``__getitems__``), so normalisation and augmentation are a few tensor
    operations per batch; use :func:`as_batch` as the collator.
    """

    def __init__(self, raw: RawSplit, processor: Any, *, crop_padding: int = 0, flip: bool = False, seed: int = 0):
        self.raw, self.processor = raw, processor
        self.crop_padding, self.flip, self.seed = crop_padding, flip, seed
        self.labels = torch.from_numpy(raw.labels)
        self.epoch = 0
        self._resized: Tensor | None = None
        self._normalise = _normaliser(processor, raw.read(range(min(4, len(raw)))))
        sample = self._resize([0])
        if len(raw) * sample[0].numel() * sample.element_size() <= MEMORY_LIMIT:
            parts = [self._resize(range(i, min(i + 512, len(raw)))) for i in range(0, len(raw), 512)]
            self._resized = torch.cat(parts)

    def __len__(self) -> int:
        return len(self.raw)

    def augment_for(self, epoch: int) -> None:
        """Choose the augmentation of an epoch.

        Not called ``set_epoch``: Accelerate calls a method of that name by itself, but not when it continues in the
        middle of an epoch (accelerate 1.15, ``DataLoaderShard.set_epoch`` on a ``SkipBatchSampler``).
        """
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        chosen = torch.as_tensor(indices)
        pixels = self._resized[chosen] if self._resized is not None else self._resize(indices)
        if self.crop_padding or self.flip:
            pixels = self._augment(pixels, chosen)
        return {"pixel_values": self._normalise(pixels), "labels": self.labels[chosen]}

    def pixels(self, number: int) -> Tensor:
        """The first images, [up to ``number``, 3, height, width]."""
        return self.__getitems__(range(min(number, len(self))))["pixel_values"]

    def _resize(self, indices: Sequence[int]) -> Tensor:
        images = self.raw.read(indices)
        arguments = {} if self._normalise is _as_is else {"do_rescale": False, "do_normalize": False}
        pixels = self.processor(images, return_tensors="pt", **arguments)["pixel_values"]
        if pixels.ndim != 4:
            raise DataError(f"{type(self.processor).__name__} gives {tuple(pixels.shape)}, not one image per example.")
        return pixels

    def _augment(self, pixels: Tensor, indices: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        padding, total = self.crop_padding, len(self)
        shifts = torch.randint(0, 2 * padding + 1, (2, total), generator=generator)[:, indices]
        flipped = (torch.rand(total, generator=generator) < 0.5)[indices]
        _, channels, height, width = pixels.shape
        padded = torch.nn.functional.pad(pixels, [padding] * 4)
        columns = torch.arange(width).expand(len(indices), width)
        if self.flip:
            columns = torch.where(flipped[:, None], columns.flip(1), columns)
        rows = (shifts[0][:, None] + torch.arange(height))[:, None, :, None]
        columns = (shifts[1][:, None] + columns)[:, None, None, :]
        batch = torch.arange(len(indices))[:, None, None, None]
        return padded[batch, torch.arange(channels)[None, :, None, None], rows, columns]


def as_batch(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The collator for :class:`ImageSplit`, whose batches are complete."""
    return batch


def _as_is(pixels: Tensor) -> Tensor:
    return pixels


def _normaliser(processor: Any, images: list[Image.Image]) -> Callable[[Tensor], Tensor]:
    """Rescaling and normalisation as a function of resized bytes; the identity where a processor works differently.

    Storing bytes takes a quarter of the memory. That it gives what the processor gives is checked on some images.
    """
    expected = processor(images, return_tensors="pt")["pixel_values"]
    try:
        raw = processor(images, return_tensors="pt", do_rescale=False, do_normalize=False)["pixel_values"]
        scale = float(processor.rescale_factor) if processor.do_rescale else 1.0
        mean, std = torch.zeros(1), torch.ones(1)
        if processor.do_normalize:
            mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
        mean, std = mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)
    except (AttributeError, TypeError, ValueError):
        return _as_is

    def normalise(pixels: Tensor) -> Tensor:
        return (pixels * scale - mean) / std

    if raw.dtype != torch.uint8 or not torch.allclose(normalise(raw), expected, atol=1e-5):  # float32 rounding
        return _as_is
    return normalise


def load_data(recipe: Recipe) -> RawData[RawSplit]:
    """Find the labelled images that a recipe names and divide them.

    Raises:
        DataError: when they cannot be loaded, have no labels, or a split is empty.
    """
    section = recipe.data
    if section.name == "digits":
        parts, names = {"all": _digits()}, [str(digit) for digit in range(10)]
        chosen = {"train": "all", "validation": None, "test": None}
    else:
        parts, names, chosen = _from_datasets(recipe)
    splits = divide(recipe, parts, chosen)
    for name, split in splits.items():
        if split.labels.min() < 0:
            raise DataError(
                f"{recipe.where('data')}: {int((split.labels < 0).sum())} of {len(split)} images of the {name} split of "
                f"{section.name} have no label. Choose a labelled split with {name}_split."
            )
    return RawData(**splits, label_names=names, native_size=native_size(splits["train"]))


def native_size(split: Raw) -> tuple[int, int] | None:
    """Height and width of the images, None where they differ."""
    probe = split.read(range(min(16, len(split))))
    sizes = {(image.height, image.width) for image in probe}
    return sizes.pop() if len(sizes) == 1 else None


def _digits() -> RawSplit:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8], values 0..16
    return RawSplit(
        lambda indices: [Image.fromarray(pixels[i]).convert("RGB") for i in indices], digits.target.astype(np.int64)
    )


def divide(recipe: Recipe, parts: Mapping[str, R], chosen: Mapping[str, str | None]) -> dict[str, R]:
    """The three splits: those that there are, the others held out of the training images, each within its limit.

    Args:
        parts: name of a split of the data -> the split.
        chosen: train, validation and test -> name of a split of the data, or None.

    Raises:
        DataError: when a split is left without images.
    """
    section = recipe.data
    draw = np.random.default_rng(section.split_seed)
    splits = {name: parts[source] for name, source in chosen.items() if source is not None}
    for name, share in (("test", section.test_share), ("validation", section.validation_share)):
        if name not in splits:
            held_out = _hold_out(splits["train"].strata, share, draw)
            rest = np.setdiff1d(np.arange(len(splits["train"])), held_out)
            splits[name], splits["train"] = splits["train"].take(held_out), splits["train"].take(rest)
    for name in ("train", "validation", "test"):
        limit = getattr(section, f"{name}_limit")
        if limit is not None and limit < len(splits[name]):
            splits[name] = splits[name].take(np.sort(draw.permutation(len(splits[name]))[:limit]))
    for name, split in splits.items():
        if not len(split):
            share_or_split = f"; {name}_share or {name}_split chooses it" if name != "train" else ""
            raise DataError(f"{recipe.where('data')}: the {name} split of {section.name} is empty{share_or_split}.")
    return splits


def _hold_out(labels: np.ndarray, share: float, draw: np.random.Generator) -> np.ndarray:
    """The same share of every class."""
    found = []
    for label in np.unique(labels):
        members = draw.permutation(np.flatnonzero(labels == label))
        found.append(members[: round(share * len(members))])
    return np.sort(np.concatenate(found)) if found else np.zeros(0, dtype=np.int64)


def _from_datasets(recipe: Recipe) -> tuple[dict[str, RawSplit], list[str], dict[str, str | None]]:
    loaded = load_splits(recipe)
    chosen = choose_splits(recipe, list(loaded))
    used = sorted({name for name in chosen.values() if name})
    for name in used:
        if not len(loaded[name]):
            where = recipe.where("data", "name")
            raise DataError(f"{where}: the split {name!r} of {recipe.data.name} is empty.")
    features = loaded[used[0]].features
    pictures = image_column(recipe, features)
    label_column = _label_column(recipe, features, pictures)
    columns = {name: loaded[name].with_format(None)[label_column] for name in used}
    names, labels = encode(recipe, features[label_column], columns)
    parts = {name: RawSplit(image_reader(recipe, loaded[name], name, pictures), labels[name]) for name in used}
    return parts, names, chosen


def load_splits(recipe: Recipe) -> Any:
    """What ``datasets`` finds under the recipe's name: name of a split -> its table.

    Raises:
        DataError: when nothing can be loaded.
    """
    import datasets

    section = recipe.data
    where = recipe.where("data", "name")
    place = local_folder(recipe, section.name, "data", "name")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return datasets.load_dataset(str(place or section.name), section.subset)
    except Exception as error:  # the errors of datasets, huggingface_hub and the network share no base class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        builtin, example = {
            "object-detection": ("scenes", "detection-datasets/coco"),
            "image-segmentation": ("scenes", "zhoubolei/scene_parse_150"),
        }.get(recipe.task, ("digits", "zalando-datasets/fashion_mnist"))
        raise DataError(
            f"{where}: {section.name!r} could not be loaded ({reason}). Possible: {builtin}, a local folder, or a Hub id "
            f"such as {example}."
        ) from error


def local_folder(recipe: Recipe, name: str, *field: str | int) -> Path | None:
    """The folder that a name means, relative to the working directory or to the recipe's file; None for a Hub id.

    Raises:
        RecipeError: when the name can only be a folder, and there is none.
    """
    places = [Path(name).expanduser()]
    if recipe.folder is not None and not places[0].is_absolute():
        places.append(recipe.folder / name)
    for place in places:
        if place.is_dir():
            return place
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        tried = " and ".join(str(place.resolve()) for place in places)
        raise RecipeError(f"{recipe.where(*field)}: there is no folder {name!r} (looked at {tried}).")
    return None


def choose_splits(recipe: Recipe, available: list[str]) -> dict[str, str | None]:
    """train, validation and test -> which of the available splits it is; None for one that is to be held out.

    Raises:
        DataError: when a split that the recipe names is not there, or none can be the training split.
    """
    section = recipe.data
    known = {
        "train": ("train", "training"),
        "validation": ("validation", "valid", "val", "dev"),
        "test": ("test", "testing"),
    }
    chosen: dict[str, str | None] = {}
    for name, usual in known.items():
        wanted = getattr(section, f"{name}_split")
        if wanted is not None and wanted not in available:
            raise DataError(
                f"{recipe.where('data', f'{name}_split')}: {section.name} has no split {wanted!r}. "
                f"Possible: {', '.join(available)}."
            )
        chosen[name] = wanted or next((candidate for candidate in usual if candidate in available), None)
    if chosen["train"] is None:
        if len(available) != 1:
            raise DataError(
                f"{recipe.where('data')}: {section.name} has no split called train. Set data.train_split to one of: "
                f"{', '.join(available)}."
            )
        chosen["train"] = available[0]
    if chosen["test"] is None and chosen["validation"] is not None and section.validation_split is None:
        # a public data set without test labels: its validation split is what results are reported on
        chosen["test"], chosen["validation"] = chosen["validation"], None
    for name in ("validation", "test"):
        if chosen[name] is not None and chosen[name] == chosen["train"]:
            raise DataError(
                f"{recipe.where('data', f'{name}_split')}: {chosen[name]!r} is the training split as well. Leave "
                f"{name}_split out to hold out {name}_share of it."
            )
    return chosen


def named_column(recipe: Recipe, features: Any, field: str) -> str:
    """The column that a field of ``data`` names.

    Raises:
        DataError: when there is none of this name.
    """
    name: str = getattr(recipe.data, field)
    if name not in features:
        raise DataError(f"{recipe.where('data', field)}: there is no column {name!r}. Columns: {', '.join(features)}.")
    return name


def image_column(recipe: Recipe, features: Any) -> str:
    """The column with the images: the one that the recipe names, else found by its type.

    Raises:
        DataError: when there is none, or one of several would have to be guessed.
    """
    import datasets

    if recipe.data.image_column is not None:
        return named_column(recipe, features, "image_column")
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    preferred = [name for name in images if name in _IMAGE_COLUMNS] or images
    if len(preferred) == 1:
        return preferred[0]
    found = f"several hold images: {', '.join(images)}" if images else f"none holds images ({', '.join(features)})"
    raise DataError(f"{recipe.where('data')}: of the columns of {recipe.data.name}, {found}. Set data.image_column.")


def _label_column(recipe: Recipe, features: Any, image_column: str) -> str:
    import datasets

    if recipe.data.label_column is not None:
        return named_column(recipe, features, "label_column")
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    usual = [name for name in features if name in _LABEL_COLUMNS and name != image_column]
    preferred = [name for name in usual if name in classes] or (classes if len(classes) == 1 else []) or usual
    if len(preferred) == 1:
        return preferred[0]
    found = f"several could be the labels: {', '.join(classes or usual)}" if classes or usual else "there are no labels"
    raise DataError(
        f"{recipe.where('data')}: {recipe.data.name}: {found}. Columns: {', '.join(features)}. Set data.label_column."
    )


def encode(recipe: Recipe, feature: Any, columns: Mapping[str, Any]) -> tuple[list[str], dict[str, np.ndarray]]:
    """Class names and, per split, int64 labels with -1 where a label is missing.

    Args:
        feature: the labels' type in the data set.
        columns: name of a split -> its labels: classes, integers or texts.

    Raises:
        DataError: for labels of another type, and integers with gaps.
    """
    import datasets

    values = {name: list(column) for name, column in columns.items()}
    if isinstance(feature, datasets.ClassLabel):
        names = list(feature.names)
        code: Callable[[Any], int] = int
    else:
        present = sorted({value for column in values.values() for value in column if value is not None}, key=str)
        if all(isinstance(value, (int, np.integer)) for value in present):
            numbers = sorted(int(value) for value in present if value >= 0)
            if numbers != list(range(len(numbers))):
                shown = ", ".join(map(str, numbers[:5]))
                raise DataError(
                    f"{recipe.where('data')}: integer labels have to be 0 to {len(numbers) - 1} for {len(numbers)} "
                    f"classes; found {shown}, ... up to {numbers[-1] if numbers else 'none'}."
                )
            names, code = [str(number) for number in numbers], int
        elif all(isinstance(value, str) for value in present):
            names = present
            code = {name: index for index, name in enumerate(names)}.__getitem__
        else:
            raise DataError(
                f"{recipe.where('data')}: labels have to be classes, integers or texts; found {type(present[0]).__name__}."
            )
    coded = {
        name: np.array([-1 if value is None else code(value) for value in column], dtype=np.int64)
        for name, column in values.items()
    }
    return names, coded


def image_reader(
    recipe: Recipe, dataset: Any, split: str, column: str, mode: str | None = "RGB"
) -> Callable[[Sequence[int]], list[Image.Image]]:
    """A function that decodes images of a split, given their places, in a mode of PIL or as they are."""
    images = dataset.select_columns([column])

    def read(indices: Sequence[int]) -> list[Image.Image]:
        try:
            found = images[[int(i) for i in indices]][column]
            return [image if mode is None else image.convert(mode) for image in found]
        except Exception as error:  # PIL raises many kinds for a damaged file
            raise DataError(
                f"{recipe.where('data')}: an image of the {split} split between numbers {min(indices)} and "
                f"{max(indices)} cannot be decoded ({type(error).__name__}: {error})."
            ) from error

    return read
