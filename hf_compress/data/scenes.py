"""Labelled scenes for detection and segmentation, composed from real images without any download.

A scene is a crop of a real photograph (the two that scikit-learn ships) with 1 to 6 items of an image classification
data set (scikit-learn's digits, Fashion-MNIST, ...) on it: scaled, rotated, coloured, partly hiding one another. Every
pixel's item is known, so boxes and masks are exact. Scene ``i`` depends on ``(seed, split, i)`` alone, never on order,
worker or a global random state. Splits share no item and no piece of background.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ..errors import DataError

SPLITS = ("train", "validation", "test")
_SHARES = {"train": (0.0, 0.7), "validation": (0.7, 0.85), "test": (0.85, 1.0)}  # of a source without splits
_BANDS = {"train": (0.0, 0.6), "validation": (0.6, 0.8), "test": (0.8, 1.0)}  # of a photograph's width
_CROP = (64, 128)  # side of a background crop in pixels of the photograph; every band is at least 128 wide
_SMALLEST = 12  # visible pixels; fewer are no item that anyone could name


class Items:
    """Labelled pictures of single things, to be put into scenes.

    A grey picture is cut out along its brightness, as fits digits and Fashion-MNIST, which are bright on black; a colour
    picture stays a rectangle.

    Args:
        name: for messages.
        read: index -> uint8 [height, width] or [height, width, 3].
        labels: int64 [items].
        names: the name of every class.
    """

    def __init__(self, name: str, read: Callable[[int], np.ndarray], labels: np.ndarray, names: Sequence[str]):
        self.name, self.read, self.labels, self.names = name, read, labels, list(names)
        self._kept: dict[int, Image.Image] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def sprite(self, index: int) -> Image.Image:
        """RGBA picture of an item; alpha is what belongs to it."""
        if index not in self._kept:
            pixels = self.read(index)
            if pixels.ndim == 2:
                alpha = np.minimum(pixels.astype(np.uint16) * 4, 255).astype(np.uint8)
                pixels = np.repeat(pixels[..., None], 3, axis=2)
            else:
                alpha = np.full(pixels.shape[:2], 255, dtype=np.uint8)
            # a clear border, so that a rotated edge is as smooth as the others
            rgba = np.pad(np.dstack([pixels, alpha]), ((1, 1), (1, 1), (0, 0)))
            if rgba.size > 2**20:  # large pictures are read again instead of kept
                return Image.fromarray(rgba)
            self._kept[index] = Image.fromarray(rgba)
        return self._kept[index]


def load_items(source: str | Path, split: str) -> Items:
    """The items of one split.

    Args:
        source: ``digits``, or what ``datasets.load_dataset`` takes: a folder or a Hub id with images and classes.
        split: train, validation or test. Where the source has a test split it is used, and the last 15 % of the shuffled
            training images are the validation split; else shuffled images are shared 70 : 15 : 15.

    Raises:
        DataError: when the source cannot be read, or has no images with classes.
    """
    if source == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = (digits.images * (255 / 16)).astype(np.uint8)
        chosen = _share(len(pixels), *_SHARES[split])
        names = [str(name) for name in digits.target_names]
        return Items("digits", lambda i: pixels[chosen[i]], digits.target[chosen].astype(np.int64), names)
    import datasets

    try:
        loaded = datasets.load_dataset(str(source))
    except Exception as error:  # datasets, the Hub and the network share no base class
        raise DataError(
            f"source={str(source)!r} could not be loaded ({type(error).__name__}: {error}). Possible: 'digits', or a "
            "folder or Hub id of an image classification data set, such as zalando-datasets/fashion_mnist."
        ) from error
    train, held_out = loaded.get("train", next(iter(loaded.values()))), loaded.get("test")
    if held_out is None:
        table, chosen = train, _share(len(train), *_SHARES[split])
    elif split == "test":
        table, chosen = held_out, np.arange(len(held_out))
    else:
        table, chosen = train, _share(len(train), *((0.0, 0.85) if split == "train" else (0.85, 1.0)))
    images = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    classes = [name for name, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)]
    if not images or not classes or not len(chosen):
        raise DataError(
            f"source={str(source)!r} has {len(chosen)} items in {split}, the image columns {images} and the class "
            f"columns {classes} of {list(table.features)}; at least one of each is needed."
        )
    labels = np.asarray(table.with_format(None)[classes[0]], dtype=np.int64)[chosen]
    column = table.select_columns([images[0]])

    def read(index: int) -> np.ndarray:
        image = column[int(chosen[index])][images[0]]
        return np.asarray(image if image.mode == "L" else image.convert("RGB"))

    return Items(str(source), read, labels, table.features[classes[0]].names)


def _share(count: int, start: float, stop: float) -> np.ndarray:
    """A share of ``range(count)`` in one fixed random order."""
    return np.random.default_rng(0).permutation(count)[int(start * count) : int(stop * count)]


class Scenes(Dataset):
    """A map-style data set of scenes, made when they are asked for.

    An example is ``{"image": PIL RGB [size, size], "image_id": index, "objects": {"id", "bbox", "category", "area",
    "iscrowd"}, "instances": PIL grey, "segmentation": PIL grey}``. ``objects`` has one list entry per item: ``bbox`` is
    COCO's ``[x, y, width, height]`` in pixels, tight around what is visible; ``area`` counts visible pixels. A pixel of
    ``instances`` is 1 + the place of its item in these lists, one of ``segmentation`` is 1 + its class; 0 is background.

    Args:
        split: train, validation or test.
        length: number of scenes.
        source: where items come from; see :func:`load_items`.
        size: height and width in pixels.
        seed: another seed gives other scenes of the same items and photographs.
        items: fewest and most items that are put into a scene.
        scale: smallest and largest longer side of an item before it is rotated, as a share of ``size``.
        rotation: items are turned by up to so many degrees either way.
        max_hidden: an item of which a larger share is hidden (by later items or beyond the edge) has no label.

    Raises:
        DataError: when an argument is out of range, or the source cannot be read.
    """

    def __init__(
        self,
        split: str = "train",
        length: int = 1000,
        *,
        source: str | Path = "digits",
        size: int = 128,
        seed: int = 0,
        items: tuple[int, int] = (1, 6),
        scale: tuple[float, float] = (0.2, 0.5),
        rotation: float = 30.0,
        max_hidden: float = 0.6,
    ):
        possible = {
            f"split={split!r}": (split in SPLITS, "train, validation or test"),
            f"length={length}": (length >= 1, "at least 1"),
            f"size={size}": (32 <= size <= 4096, "32 to 4096"),
            f"seed={seed}": (isinstance(seed, int) and seed >= 0, "an integer, 0 or more"),
            f"items={items}": (1 <= items[0] <= items[1] <= 250, "(fewest, most), from 1 to 250"),
            f"scale={scale}": (0 < scale[0] <= scale[1] <= 1 and scale[0] * size >= 6, "from 6 pixels to 1"),
            f"rotation={rotation}": (0 <= rotation <= 180, "0 to 180 degrees"),
            f"max_hidden={max_hidden}": (0 <= max_hidden < 1, "0 <= max_hidden < 1"),
        }
        for received, (is_possible, what) in possible.items():
            if not is_possible:
                raise DataError(f"{received} is not possible for scenes; give {what}.")
        self.split, self.length, self.size, self.seed = split, length, size, seed
        self.items, self.scale, self.rotation, self.max_hidden = items, scale, rotation, max_hidden
        self.source = load_items(source, split)
        self.photographs = _photographs(split)

    @property
    def names(self) -> list[str]:
        """The name of every class."""
        return self.source.names

    @property
    def id2label(self) -> dict[int, str]:
        """As a model's configuration takes it."""
        return dict(enumerate(self.names))

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = int(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"there is no scene {index}; there are {len(self)}.")
        index %= len(self)
        draw = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
        canvas = self._background(draw)
        owner = np.zeros((self.size, self.size), dtype=np.uint8)  # 1 + number of the item on top
        labels, whole = [], []
        for number in range(int(draw.integers(self.items[0], self.items[1] + 1))):
            chosen = int(draw.integers(len(self.source)))
            labels.append(int(self.source.labels[chosen]))
            whole.append(self._place(draw, self.source.sprite(chosen), canvas, owner, number + 1))
        # Hidden items keep their pixels and lose their label, as a barely visible thing in a photograph does. The last
        # item can be hidden by the edge alone, so with the usual max_hidden hardly any scene is left without a label.
        visible = np.bincount(owner.ravel(), minlength=len(labels) + 1)[1:]
        shown = [
            number
            for number, (pixels, all_pixels) in enumerate(zip(visible, whole, strict=True))
            if pixels >= max(_SMALLEST, (1 - self.max_hidden) * all_pixels)
        ]
        return self._example(index, canvas, owner, labels, shown)

    def _background(self, draw: np.random.Generator) -> np.ndarray:
        photograph = self.photographs[int(draw.integers(len(self.photographs)))]
        side = int(draw.integers(_CROP[0], _CROP[1] + 1))
        x = int(draw.integers(photograph.width - side + 1))
        y = int(draw.integers(photograph.height - side + 1))
        crop = photograph.resize((self.size, self.size), Image.Resampling.BILINEAR, (x, y, x + side, y + side))
        pixels = np.asarray(crop)
        return np.array(pixels[:, ::-1] if draw.random() < 0.5 else pixels)

    def _place(
        self, draw: np.random.Generator, sprite: Image.Image, canvas: np.ndarray, owner: np.ndarray, number: int
    ) -> int:
        """Paint one item; returns its pixels, those beyond the edge included."""
        side = draw.uniform(*self.scale) * self.size
        angle = np.deg2rad(draw.uniform(-self.rotation, self.rotation))
        zoom = side / max(sprite.size)
        cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
        width = int(np.ceil((abs(cos) * sprite.width + abs(sin) * sprite.height) * zoom**2))
        height = int(np.ceil((abs(sin) * sprite.width + abs(cos) * sprite.height) * zoom**2))
        # PIL maps output to input: rotate about the two centres
        shift_x = sprite.width / 2 - cos * width / 2 - sin * height / 2
        shift_y = sprite.height / 2 + sin * width / 2 - cos * height / 2
        drawn = sprite.transform(
            (width, height),
            Image.Transform.AFFINE,
            (cos, sin, shift_x, -sin, cos, shift_y),
            Image.Resampling.BILINEAR,
        )
        tint = draw.uniform(0.35, 1.0, size=3)
        tint[draw.integers(3)] = 1.0
        # up to a fifth of an item may lie beyond the edge
        left = int(draw.integers(-width // 5, max(self.size - width + width // 5, 1 - width // 5) + 1))
        top = int(draw.integers(-height // 5, max(self.size - height + height // 5, 1 - height // 5) + 1))
        pixels = np.asarray(drawn)
        is_item = pixels[..., 3] >= 128
        total = int(is_item.sum())
        rows = slice(max(0, -top), min(height, self.size - top))
        columns = slice(max(0, -left), min(width, self.size - left))
        to = (slice(top + rows.start, top + rows.stop), slice(left + columns.start, left + columns.stop))
        alpha = pixels[rows, columns, 3:].astype(np.float32) / 255
        colour = (0.2 + 0.8 / 255 * pixels[rows, columns, :3].astype(np.float32)) * (255 * tint.astype(np.float32))
        canvas[to] = (canvas[to] * (1 - alpha) + colour * alpha).astype(np.uint8)
        owner[to][is_item[rows, columns]] = number
        return total

    def _example(
        self, index: int, canvas: np.ndarray, owner: np.ndarray, labels: list[int], shown: list[int]
    ) -> dict[str, Any]:
        objects: dict[str, list[Any]] = {"id": [], "bbox": [], "category": [], "area": [], "iscrowd": []}
        to_instance = np.zeros(len(labels) + 1, dtype=np.uint8)
        to_class = np.zeros(len(labels) + 1, dtype=np.uint8)
        for place, number in enumerate(shown):
            mask = owner == number + 1
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            x, y = int(columns[0]), int(rows[0])
            objects["id"].append(index * self.items[1] + place + 1)  # pycocotools takes an id of 0 for no match
            objects["bbox"].append([float(x), float(y), float(columns[-1] + 1 - x), float(rows[-1] + 1 - y)])
            objects["category"].append(labels[number])
            objects["area"].append(int(mask.sum()))
            objects["iscrowd"].append(0)
            to_instance[number + 1], to_class[number + 1] = place + 1, labels[number] + 1
        return {
            "image": Image.fromarray(canvas),
            "image_id": index,
            "objects": objects,
            "instances": Image.fromarray(to_instance[owner]),
            "segmentation": Image.fromarray(to_class[owner]),
        }

    def as_dataset(self, streaming: bool = False) -> Any:
        """The same scenes as a ``datasets.Dataset`` (written once, into datasets' cache), or as an ``IterableDataset``."""
        import datasets

        number = datasets.Value("int64")
        features = datasets.Features(
            {
                "image": datasets.Image(),
                "image_id": number,
                "objects": {
                    "id": datasets.List(number),
                    "bbox": datasets.List(datasets.List(datasets.Value("float32"), length=4)),
                    "category": datasets.List(datasets.ClassLabel(names=self.names)),
                    "area": datasets.List(number),
                    "iscrowd": datasets.List(number),
                },
                "instances": datasets.Image(),
                "segmentation": datasets.Image(),
            }
        )
        if not streaming:
            columns: dict[str, list[Any]] = {name: [] for name in features}
            for example in self:
                for name, value in example.items():
                    columns[name].append(value)
            return datasets.Dataset.from_dict(columns, features=features)
        shards = np.array_split(np.arange(len(self)), min(len(self), 64))  # shards are what loader workers share out
        return datasets.IterableDataset.from_generator(
            _generate, features=features, gen_kwargs={"scenes": [self] * len(shards), "indices": shards}
        )

    def write_coco(self, folder: str | Path) -> Path:
        """Write the scenes as PNG files with ``annotations.json`` in COCO's format, masks run-length coded.

        Returns:
            The path of ``annotations.json``, which is written last.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        images, annotations = [], []
        for example in self:
            name = f"{example['image_id']:06d}.png"
            example["image"].save(folder / name)
            images.append({"id": example["image_id"], "file_name": name, "height": self.size, "width": self.size})
            instances, objects = np.asarray(example["instances"]), example["objects"]
            for place, identity in enumerate(objects["id"]):
                annotations.append(
                    {
                        "id": identity,
                        "image_id": example["image_id"],
                        "category_id": objects["category"][place],
                        "bbox": objects["bbox"][place],
                        "area": objects["area"][place],
                        "iscrowd": objects["iscrowd"][place],
                        "segmentation": run_lengths(instances == place + 1),
                    }
                )
        categories = [{"id": number, "name": name} for number, name in self.id2label.items()]
        target, partial = folder / "annotations.json", folder / ".annotations.json.partial"
        partial.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
        os.replace(partial, target)
        return target


def run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
    """COCO's uncompressed run lengths of a mask: column by column, the first run counts zeros.

    Args:
        mask: bool [height, width].
    """
    flat = np.concatenate([[False], mask.ravel(order="F"), [not mask[-1, -1]]])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return {"size": list(mask.shape), "counts": np.diff(changes, prepend=0).tolist()}


def _generate(scenes: list[Scenes], indices: list[np.ndarray]) -> Iterator[dict[str, Any]]:
    for part, numbers in zip(scenes, indices, strict=True):
        yield from (part[int(number)] for number in numbers)


def _photographs(split: str) -> list[Image.Image]:
    """The part of scikit-learn's two photographs that belongs to a split."""
    from sklearn.datasets import load_sample_image

    start, stop = _BANDS[split]
    whole = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    return [Image.fromarray(p[:, int(start * p.shape[1]) : int(stop * p.shape[1])].copy()) for p in whole]


__all__ = ["SPLITS", "Items", "Scenes", "load_items", "run_lengths"]
