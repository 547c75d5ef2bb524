"""Scenes: what their labels say is what their pixels show, and nothing but (seed, split, index) decides them."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import coco
from pycocotools import mask as mask_api
from torch.utils.data import DataLoader

from hf_compress.data import CocoImages, Scenes
from hf_compress.data.scenes import SPLITS, Items, load_items, run_lengths
from hf_compress.errors import DataError


def same(a: dict, b: dict) -> bool:
    pictures = all(np.array_equal(np.asarray(a[n]), np.asarray(b[n])) for n in ("image", "instances", "segmentation"))
    return pictures and a["objects"] == b["objects"] and a["image_id"] == b["image_id"]


def first(examples: list[dict]) -> dict:
    return examples[0]


@pytest.mark.parametrize("size", [48, 96, 128])
def test_boxes_and_areas_are_tight_around_what_is_visible(size: int) -> None:
    scenes = Scenes("train", 40, size=size, seed=3)
    for example in scenes:
        instances, classes = np.asarray(example["instances"]), np.asarray(example["segmentation"])
        objects = example["objects"]
        assert example["image"].size == (size, size) and example["image"].mode == "RGB"
        assert instances.max() == len(objects["bbox"]) <= 6
        assert np.array_equal(instances > 0, classes > 0)
        for place, (x, y, width, height) in enumerate(objects["bbox"]):
            mask = instances == place + 1
            inside = mask[int(y) : int(y + height), int(x) : int(x + width)]
            assert inside.sum() == mask.sum() == objects["area"][place] >= 12
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
            assert set(classes[mask]) == {objects["category"][place] + 1}
            assert 0 <= x and 0 <= y and x + width <= size and y + height <= size


def test_most_scenes_have_objects_and_their_number_varies() -> None:
    found = [len(example["objects"]["bbox"]) for example in Scenes("test", 200)]
    assert set(found) >= {1, 2, 3, 4, 5} and min(found) >= 1
    categories = [c for example in Scenes("test", 200) for c in example["objects"]["category"]]
    assert set(categories) == set(range(10))


def test_a_scene_depends_on_seed_split_and_index_alone() -> None:
    scenes = Scenes("train", 6, seed=1)
    forward = list(scenes)
    np.random.seed(0)
    again = Scenes("train", 30, seed=1)  # another length
    for index in (5, 0, 3):  # another order
        assert same(again[index], forward[index])
    assert same(scenes[-1], forward[5])
    assert not same(Scenes("train", 6, seed=2)[0], forward[0])
    assert not same(Scenes("validation", 6, seed=1)[0], forward[0])
    by_workers = list(DataLoader(scenes, batch_size=1, collate_fn=first, num_workers=2))
    assert all(same(a, b) for a, b in zip(by_workers, forward, strict=True))


def test_splits_share_no_item_and_no_background() -> None:
    parts = {split: Scenes(split, 1) for split in SPLITS}
    pixels = {
        split: {part.source.sprite(i).tobytes() for i in range(len(part.source))} for split, part in parts.items()
    }
    assert sum(len(part.source) for part in parts.values()) == 1797
    assert not pixels["train"] & pixels["test"] and not pixels["train"] & pixels["validation"]
    assert not pixels["validation"] & pixels["test"]
    widths = [part.photographs[0].width for part in parts.values()]
    assert sum(widths) == 640 and min(widths) >= 128  # bands side by side; a crop fits into each


def test_hidden_items_lose_their_label_by_the_share_that_is_seen() -> None:
    strict, loose = Scenes("train", 60, max_hidden=0.0), Scenes("train", 60, max_hidden=0.95)
    fewer = 0
    for a, b in zip(strict, loose, strict=True):
        assert np.array_equal(np.asarray(a["image"]), np.asarray(b["image"]))  # pixels stay
        kept = {tuple(box) for box in a["objects"]["bbox"]}
        assert kept <= {tuple(box) for box in b["objects"]["bbox"]}
        fewer += len(b["objects"]["bbox"]) - len(kept)
    assert fewer > 20


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 2**32))
def test_run_lengths_are_cocos(height: int, width: int, seed: int) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < 0.5
    coded = run_lengths(mask)
    assert sum(coded["counts"]) == mask.size
    assert np.array_equal(mask_api.decode(mask_api.frPyObjects(coded, height, width)).astype(bool), mask)


def test_coco_files_hold_the_same_scenes(tmp_path: Path) -> None:
    scenes = Scenes("test", 5)
    path = scenes.write_coco(tmp_path)
    read = coco.COCO(path)
    images = CocoImages(path)
    assert images.names == scenes.names and len(images) == 5
    for index, example in enumerate(scenes):
        annotations = read.loadAnns(read.getAnnIds(imgIds=[index]))
        instances = np.asarray(example["instances"])
        for place, annotation in enumerate(annotations):
            assert np.array_equal(read.annToMask(annotation).astype(bool), instances == place + 1)
        got = images[index]
        assert np.array_equal(np.asarray(got["image"]), np.asarray(example["image"]))
        for name in ("bbox", "category", "area", "iscrowd"):
            assert got["objects"][name] == example["objects"][name]
    identities = [a["id"] for a in json.loads(path.read_text())["annotations"]]
    assert len(set(identities)) == len(identities) and min(identities) > 0


@pytest.mark.parametrize("streaming", [False, True])
def test_as_a_dataset_of_datasets(streaming: bool) -> None:
    scenes = Scenes("validation", 5)
    table = scenes.as_dataset(streaming=streaming)
    assert table.features["objects"]["category"].feature.names == scenes.names
    rows = list(table)
    assert len(rows) == 5 and all(same(row, example) for row, example in zip(rows, scenes, strict=True))


def test_items_of_an_image_classification_data_set(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def table(count: int, seed: int) -> datasets.Dataset:
        grey = [Image.fromarray(rng.integers(60, 255, (28, 28), dtype=np.uint8)) for _ in range(count)]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
        return datasets.Dataset.from_dict({"image": grey, "label": [i % 2 for i in range(count)]}, features=features)

    for split, count in (("train", 40), ("test", 10)):
        table(count, count).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    counts = {split: len(load_items(tmp_path, split)) for split in SPLITS}
    assert counts == {"train": 34, "validation": 6, "test": 10}
    scenes = Scenes("test", 3, source=tmp_path)
    assert scenes.names == ["a", "b"] and scenes[0]["objects"]["bbox"]


def test_colour_pictures_stay_rectangles() -> None:
    items = Items("colour", lambda i: np.zeros((8, 6, 3), np.uint8), np.zeros(1, np.int64), ["black"])
    alpha = np.asarray(items.sprite(0))[..., 3]
    assert alpha.shape == (10, 8) and alpha[1:-1, 1:-1].min() == 255 and alpha[0].max() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "eval"}, "split='eval'"),
        ({"length": 0}, "length=0"),
        ({"size": 8}, "size=8"),
        ({"seed": -1}, "seed=-1"),
        ({"items": (3, 2)}, "items"),
        ({"items": (0, 2)}, "items"),
        ({"scale": (0.0, 0.5)}, "scale"),
        ({"scale": (0.01, 0.5)}, "scale"),
        ({"rotation": 400}, "rotation"),
        ({"max_hidden": 1.0}, "max_hidden"),
        ({"source": "./no/such/folder"}, "no/such/folder"),
    ],
)
def test_impossible_scenes_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Scenes(**arguments)
    with pytest.raises(IndexError):
        Scenes("train", 3)[3]
