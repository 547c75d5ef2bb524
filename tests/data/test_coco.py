"""Annotations that no detector can learn from are clipped, or dropped and counted; none of them reaches a loss."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_compress.data import AnnotationCounts, CocoImages, clean_annotations, clean_objects, detection_collator
from hf_compress.errors import DataError
from hf_compress.models.sidt import SidtImageProcessor

_NUMBER = st.one_of(st.floats(-50, 150), st.sampled_from([math.nan, math.inf, -math.inf, 0.0]))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.tuples(_NUMBER, _NUMBER, _NUMBER, _NUMBER), st.integers(-2, 7)), max_size=8))
def test_what_is_left_lies_in_the_image_and_every_box_is_counted(objects: list) -> None:
    boxes, categories = [list(box) for box, _ in objects], [category for _, category in objects]
    counts = AnnotationCounts()
    found = clean_objects({"bbox": boxes, "category": categories}, (100, 80), 5, counts)
    assert counts.kept == len(found["bbox"]) == len(found["area"]) == len(found["iscrowd"])
    assert counts.kept + sum(counts.dropped.values()) == len(boxes)
    for (x, y, width, height), category, area in zip(found["bbox"], found["category"], found["area"], strict=True):
        assert 0 <= x and 0 <= y and x + width <= 100 + 1e-9 and y + height <= 80 + 1e-9
        assert width > 0 and height > 0 and 0 <= category < 5 and area == width * height
    again = AnnotationCounts()  # cleaning twice is cleaning once
    assert clean_objects(found, (100, 80), 5, again) == found and again.is_clean


@pytest.mark.parametrize(
    ("box", "category", "reason"),
    [
        ([0, 0, math.nan, 3], 0, "not finite"),
        ([0, 0, math.inf, 3], 0, "not finite"),
        ([0, 0, 3, 0], 0, "empty"),
        ([9, 9, -3, 3], 0, "inverted"),
        ([20, 2, 3, 3], 0, "outside of the image"),
        ([-5, 2, 5, 3], 0, "outside of the image"),
        ([2, 2, 3, 3], 2, "of an unknown class"),
        ([2, 2, 3, 3], -1, "of an unknown class"),
    ],
)
def test_reasons(box: list, category: int, reason: str) -> None:
    counts = AnnotationCounts()
    clean_objects({"bbox": [box], "category": [category]}, (10, 10), 2, counts)
    assert dict(counts.dropped) == {reason: 1} and reason in str(counts)


def test_clipping_and_corners() -> None:
    counts = AnnotationCounts()
    objects = {"bbox": [[-2.0, 3.0, 6.0, 20.0]], "category": [0], "area": [math.nan], "id": [7]}
    found = clean_objects(objects, (10, 10), 2, counts)
    assert found["bbox"] == [[0.0, 3.0, 4.0, 7.0]] and found["area"] == [28.0] and found["id"] == [7]
    assert counts.clipped == 1
    corners = clean_objects({"bbox": [[1, 2, 4, 8]], "category": [0]}, (10, 10), 2, counts, "xyxy")
    assert corners["bbox"] == [[1.0, 2.0, 3.0, 6.0]]


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ({"bbox": []}, "category"),
        ({"bbox": [[0, 0, 1, 1]], "category": []}, "1 boxes"),
        ({"bbox": [[0, 0, 1]], "category": [0]}, "four numbers"),
        ({"bbox": [["a", 0, 1, 1]], "category": [0]}, "numbers"),
    ],
)
def test_what_is_no_annotation_is_refused(objects: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        clean_objects(objects, (10, 10), 2, AnnotationCounts())


def table(boxes: list[list[list[float]]], sizes: bool = False) -> datasets.Dataset:
    columns = {
        "image": [Image.new("RGB", (20, 10)) for _ in boxes],
        "objects": [{"bbox": b, "category": [0] * len(b)} for b in boxes],
    }
    features = {
        "image": datasets.Image(),
        "objects": {
            "bbox": datasets.List(datasets.List(datasets.Value("float32"), length=4)),
            "category": datasets.List(datasets.ClassLabel(names=["thing"])),
        },
    }
    if sizes:
        columns |= {"width": [20] * len(boxes), "height": [10] * len(boxes)}
        features |= {"width": datasets.Value("int64"), "height": datasets.Value("int64")}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@pytest.mark.parametrize("sizes", [False, True])
def test_a_data_set_is_cleaned_and_logged_once(sizes: bool, caplog: pytest.LogCaptureFixture) -> None:
    dirty = table([[[1, 1, 4, 4], [0, 0, 0, 5]], [[15, 5, 50, 50]], []], sizes)
    with caplog.at_level(logging.WARNING, logger="hf_compress"):
        clean = clean_annotations(dirty)
    assert len(caplog.records) == 1 and "2 boxes kept, 1 of them clipped" in caplog.text and "1 empty" in caplog.text
    assert clean[1]["objects"]["bbox"] == [[15, 5, 5, 5]] and clean[2]["objects"]["bbox"] == []
    assert clean.features["objects"]["category"].feature.names == ["thing"]
    assert clean.column_names == dirty.column_names and clean[0]["image"].size == (20, 10)


def test_a_data_set_without_any_box_is_refused() -> None:
    with pytest.raises(DataError, match=r"no box.*2 inverted.*xyxy"):
        clean_annotations(table([[[9, 9, -3, 3]], [[9, 9, -3, 3]]]))
    with pytest.raises(DataError, match="column"):
        clean_annotations(table([[[1, 1, 4, 4]]]), objects_column="boxes")


def write(folder: Path, **changes: object) -> Path:
    Image.new("RGB", (20, 10)).save(folder / "a.png")
    content = {
        "images": [{"id": 4, "file_name": "a.png", "width": 20, "height": 10}],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}],
        "annotations": [
            {"id": 1, "image_id": 4, "category_id": 90, "bbox": [1, 1, 4, 4], "area": 10, "iscrowd": 0},
            {"id": 2, "image_id": 4, "category_id": 17, "bbox": [1, 1, 4, 4]},
        ],
    }
    path = folder / "annotations.json"
    path.write_text(json.dumps({**content, **changes}))
    return path


def test_category_ids_become_consecutive(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_compress"):
        coco = CocoImages(write(tmp_path))
    assert coco.id2label == {0: "person", 1: "toothbrush"} and "1 of an unknown class" in caplog.text
    assert coco[0]["image_id"] == 4 and coco[0]["objects"]["category"] == [1] and coco[0]["objects"]["area"] == [10]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": []}, "KeyError"),
        ({"categories": None}, "categories"),
        ({"annotations": []}, "no box"),
        ({"annotations": [{"image_id": 4}]}, "bbox"),
        ({"images": [{"id": 4, "file_name": "a.png"}]}, "width"),
    ],
)
def test_a_broken_file_is_refused(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        CocoImages(write(tmp_path, **changes))
    with pytest.raises(DataError, match="cannot be read"):
        CocoImages(tmp_path / "nothing.json")


def test_the_collator_lets_nothing_broken_through(caplog: pytest.LogCaptureFixture) -> None:
    collate = detection_collator(SidtImageProcessor(size={"height": 32, "width": 32}), num_labels=2)
    picture = Image.fromarray(np.zeros((40, 80, 3), np.uint8))
    boxes = [[8.0, 4.0, 40.0, 20.0], [math.nan, 0.0, 1.0, 1.0], [0.0, 0.0, 5.0, 0.0]]
    examples = [
        {"image": picture, "image_id": 3, "objects": {"bbox": boxes, "category": [1, 0, 0]}},
        {"image": picture.convert("L"), "image_id": 4, "objects": {"bbox": [], "category": []}},
    ]
    with caplog.at_level(logging.WARNING, logger="hf_compress"):
        batch = collate(examples)
        collate(examples)
    assert len(caplog.records) == 1 and collate.counts.kept == 2 and sum(collate.counts.dropped.values()) == 4
    assert batch["pixel_values"].shape == (2, 3, 32, 32) and "pixel_mask" not in batch
    first, second = batch["labels"]
    torch.testing.assert_close(first["boxes"], torch.tensor([[0.35, 0.35, 0.5, 0.5]]))
    assert first["class_labels"].tolist() == [1] and first["orig_size"].tolist() == [40, 80]
    assert second["boxes"].shape == (0, 4)
