"""Mean average precision: known cases, laws, and an own reading of the definition."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_compress.errors import DataError
from hf_compress.measurement.detection import DetectionEvaluation, mean_average_precision
from hf_compress.measurement.plots_detection import draw_detections
from hf_compress.models.sidt import SidtImageProcessor


def found(boxes: list, scores: list, labels: list) -> dict:
    return {"boxes": np.array(boxes, float).reshape(-1, 4), "scores": np.array(scores), "labels": np.array(labels)}


def wanted(boxes: list, labels: list, **more: list) -> dict:
    return {"boxes": np.array(boxes, float).reshape(-1, 4), "labels": np.array(labels), **more}


BOX, OTHER = [10, 10, 50, 60], [70, 70, 120, 100]


def test_perfect_and_useless_detections() -> None:
    targets = [wanted([BOX, OTHER], [0, 2]), wanted([], [])]
    perfect = mean_average_precision([found([BOX, OTHER], [0.9, 0.2], [0, 2]), found([], [], [])], targets)
    names = ("map", "map_50", "map_75", "mar_100", "map/0", "map/2")
    assert [perfect[name] for name in names] == pytest.approx([1] * 6) and "map/1" not in perfect
    for useless in (found([], [], []), found([BOX, OTHER], [0.9, 0.2], [2, 0]), found([BOX], [0.9], [1])):
        result = mean_average_precision([useless, found([], [], [])], targets, ["a", "b", "c"])
        assert result["map"] == result["map/a"] == result["map/c"] == 0


def test_half_of_the_classes_and_an_overlap_between_the_thresholds() -> None:
    shifted = [10, 10, 50, 50]  # 4/5 of BOX: found at 0.50, 0.55, ..., 0.80, so at 7 of 10 thresholds
    result = mean_average_precision([found([shifted], [0.5], [0])], [wanted([BOX, OTHER], [0, 1])])
    assert result["map/0"] == pytest.approx(0.7) and result["map"] == pytest.approx(0.35)
    assert result["map_50"] == result["map_75"] == pytest.approx(0.5)


def test_a_crowd_is_neither_found_nor_missed() -> None:
    targets = [wanted([BOX, OTHER], [0, 0], iscrowd=[0, 1])]
    assert mean_average_precision([found([BOX], [0.9], [0])], targets)["map"] == pytest.approx(1)
    assert mean_average_precision([found([OTHER, BOX], [0.95, 0.9], [0, 0])], targets)["map"] == pytest.approx(1)


def by_definition(predictions: list[dict], targets: list[dict], threshold: float) -> float:
    """Average precision of one class at one overlap, after Everingham et al. 2010 with 101 recalls as COCO has them."""
    ordered = sorted(
        ((s, i, b) for i, p in enumerate(predictions) for s, b in zip(p["scores"], p["boxes"], strict=True)),
        key=lambda item: -item[0],
    )
    taken: set[tuple[int, int]] = set()
    hits = []
    for _, image, box in ordered:
        best, chosen = threshold, None
        for number, truth in enumerate(targets[image]["boxes"]):
            sides = np.minimum(box[2:], truth[2:]) - np.maximum(box[:2], truth[:2])
            shared = float(np.prod(np.clip(sides, 0, None)))
            overlap = shared / (np.prod(box[2:] - box[:2]) + np.prod(truth[2:] - truth[:2]) - shared)
            if (image, number) not in taken and overlap >= best:
                best, chosen = overlap, (image, number)
        hits.append(chosen is not None)
        if chosen is not None:
            taken.add(chosen)
    total = sum(len(target["boxes"]) for target in targets)
    correct = np.cumsum(hits)
    recall, precision = correct / total, correct / (np.arange(len(hits)) + 1)
    reached = [precision[recall >= r - 1e-12].max(initial=0.0) for r in np.linspace(0, 1, 101)]
    return float(np.mean(reached))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_equals_the_definition(seed: int) -> None:
    draw = np.random.default_rng(seed)
    targets, predictions = [], []
    for _ in range(int(draw.integers(1, 4))):
        start = draw.uniform(0, 80, (int(draw.integers(1, 4)), 2))
        boxes = np.concatenate([start, start + draw.uniform(5, 60, start.shape)], axis=1)
        near = np.repeat(boxes, 2, axis=0) + draw.normal(0, 4, (2 * len(boxes), 4))
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        targets.append(wanted(boxes.tolist(), [0] * len(boxes)))
        predictions.append(found(near.tolist(), draw.permutation(1000)[: len(near)] / 1000, [0] * len(near)))
    # scores of different images must differ too: the order of equal ones is nobody's definition
    for image, prediction in enumerate(predictions):
        prediction["scores"] = prediction["scores"] + image * 1e-5
    result = mean_average_precision(predictions, targets)
    assert result["map_50"] == pytest.approx(by_definition(predictions, targets, 0.5), abs=1e-9)
    assert result["map_75"] == pytest.approx(by_definition(predictions, targets, 0.75), abs=1e-9)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(DataError, match="1 images and targets for 2"):
        mean_average_precision([found([], [], [])], [wanted([BOX], [0])] * 2)
    with pytest.raises(DataError, match="so there is no average precision"):
        mean_average_precision([found([BOX], [1.0], [0])], [wanted([], [])])
    with pytest.raises(DataError, match="not finite"):
        mean_average_precision([found([BOX], [np.nan], [0])], [wanted([BOX], [0])])


def test_through_trainers_batches() -> None:
    evaluation = DetectionEvaluation(SidtImageProcessor(), {0: "cat", 1: "dog"})
    boxes = torch.tensor([[[0.25, 0.5, 0.3, 0.4], [0.7, 0.5, 0.2, 0.2], [0.7, 0.5, 0.2, 0.19]]])
    logits = torch.tensor([[[3.0, -9.0], [-9.0, 2.0], [-9.0, 1.0]]])
    label = {"boxes": boxes[0, :2], "class_labels": torch.tensor([0, 1]), "orig_size": torch.tensor([50, 200])}
    kept = evaluation.detections(({"loss_ce": torch.tensor(1.0)}, logits, boxes), [label])
    assert kept.shape == (1, 100, 6) and int((kept[..., 4] >= 0).sum()) == 2
    torch.testing.assert_close(kept[0, 0, :4], torch.tensor([20.0, 15.0, 80.0, 35.0]))
    as_arrays = {name: value.numpy() for name, value in label.items()}
    result = evaluation(SimpleNamespace(predictions=[kept.numpy()], label_ids=[[as_arrays]]))
    assert [result["map"], result["map/cat"], result["map/dog"]] == pytest.approx([1, 1, 1])
    with pytest.raises(DataError, match="eval_do_concat_batches"):
        evaluation(SimpleNamespace(predictions=kept.numpy(), label_ids=[as_arrays]))
    with pytest.raises(DataError, match="preprocess_logits_for_metrics"):
        evaluation(SimpleNamespace(predictions=[(logits.numpy(), boxes.numpy())], label_ids=[[as_arrays]]))


def test_detections_are_drawn_where_they_are(tmp_path: Path) -> None:
    black = Image.new("RGB", (100, 50))
    none, one = found([], [], []), found([[20, 10, 80, 40], [0, 0, 9, 9]], [0.9, 0.1], [1, 0])
    path = draw_detections(tmp_path / "a" / "drawn.png", black, none, one, ["cat", "dog"])
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert pixels.shape[1] == 900
    coloured = (pixels.max(axis=2) - pixels.min(axis=2)) > 60
    assert not coloured[:, :450].any()  # nothing was found on the left
    rows, columns = np.nonzero(coloured[:, 450:])
    shape = (np.ptp(columns) + 1) / (np.ptp(rows) + 1)
    assert 1.5 < shape < 2.2  # the one box above the threshold is 60 x 30; its caption adds to the height
    again = draw_detections(tmp_path / "two.png", [black, black], [one, one], [none, one], threshold=0.05)
    assert Image.open(again).height > Image.open(path).height
    with pytest.raises(ValueError, match="2 images and detections for 1"):
        draw_detections(tmp_path / "b.png", [black, black], [one], [one])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "two.png"]
