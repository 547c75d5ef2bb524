"""Recipes for semantic segmentation: one whole run, data in several layouts, and what is refused."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import save_masks
from tiny import tiny as tiny_classification

from hf_compress.data import Scenes
from hf_compress.errors import DataError, RecipeError
from hf_compress.measurement.plots_segmentation import draw_masks
from hf_compress.measurement.segmentation import (
    IGNORED,
    SegmentationEvaluation,
    confusion_matrices,
    segmentation_figures,
)
from hf_compress.recipe import load_recipe, run_recipe
from hf_compress.recipe.segmentation_data import load_segmentation_data
from hf_compress.recipe.tasks import TASKS

SCENES = {"size": 32, "items": [1, 2], "scale": [0.4, 0.7], "train": 24, "validation": 8, "test": 12}
AFIDAF = {
    "model_type": "afidaf", "stem_channels": 8, "hidden_sizes": [8, 8, 16, 16, 16], "depths": [1, 0, 1], "expand_ratio": 1,
    "aspp_channels": 8, "aspp_rates": [1],
}  # fmt: skip


def tiny(**changes: Any) -> dict[str, Any]:
    recipe = {
        "name": "tiny",
        "task": "image-segmentation",
        "model": {"config": copy.deepcopy(AFIDAF)},
        "data": {"name": "scenes", "scenes": copy.deepcopy(SCENES), "horizontal_flip": True},
        "training": {"per_device_train_batch_size": 8, "learning_rate": 0.01, "disable_tqdm": True},
        "stages": [
            {"stage": "train", "steps": 6, "training": {"eval_strategy": "steps", "eval_steps": 3}},
            {
                "stage": "network_slimming",
                "steps": 3,
                "strength": 0.001,
                "training": {"logging_strategy": "steps", "logging_steps": 1},
            },
            {"stage": "prune", "macs": 0.8},
            {"stage": "finetune", "steps": 2},
            {"stage": "export", "int8": True, "calibration_images": 16, "min_agreement": 0.5},
            {"stage": "report", "latency_rounds": 1},
        ],
    }
    return {**recipe, **changes}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    output = tmp_path_factory.mktemp("runs") / "tiny"
    return output, run_recipe(tiny(), output=output)


# -- a whole run --------------------------------------------------------------------------------------------------


def test_the_int8_file_is_measured(finished: tuple[Path, Any]) -> None:
    output, result = finished
    int8 = result.metrics["int8"]
    assert 0.5 <= int8["argmax"] <= 1  # of pixels
    # rounding to 8 bits moves few of the pixels of this network, which has hardly been trained
    assert int8["pixel_accuracy"] == pytest.approx(result.metrics["compressed"]["pixel_accuracy"], abs=0.2)
    assert (output / "model_int8.onnx").exists()


def test_the_folder_holds_what_was_promised(finished: tuple[Path, Any]) -> None:
    output, result = finished
    names = {path.name for path in output.iterdir()}
    assert names >= {
        "README.md", "config.json", "masks.png", "metrics.json", "model.onnx", "model.safetensors", "plan.json",
        "preprocessor_config.json", "recipe.yaml", "sparsity.png", "tradeoff.png", "widths.png",
    }  # fmt: skip
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics == result.metrics
    keys = {"mean_iou", "pixel_accuracy", "params", "macs", "bytes", "latency_ms", "onnx_latency_ms"}
    assert set(metrics["dense"]) == set(metrics["compressed"]) == keys
    assert all(math.isfinite(metrics[kind][key]) for kind in ("dense", "compressed") for key in keys)
    assert metrics["compressed"]["macs"] <= 0.8 * metrics["dense"]["macs"]
    assert metrics["reload_max_abs_diff"] == 0
    assert 0 < metrics["onnx_max_abs_diff"] <= 1e-4  # 0 would mean that nothing was compared
    history = json.loads((output / "stages" / "01-train" / "history.json").read_text())
    assert [entry["step"] for entry in history if "eval_mean_iou" in entry] == [3, 6]
    notes = json.loads((output / "stages" / "01-train" / "done.json").read_text())
    last = [entry["eval_mean_iou"] for entry in history if "eval_mean_iou" in entry][-1]
    assert last == pytest.approx(notes["validation_mean_iou"], abs=1e-6)  # Trainer's figure and ours


def test_the_metrics_are_those_of_the_saved_model_on_the_test_scenes(finished: tuple[Path, Any]) -> None:
    from sklearn.metrics import jaccard_score
    from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

    output, result = finished
    scenes = Scenes("test", SCENES["test"], **{name: SCENES[name] for name in ("size", "items", "scale")})
    model = AutoModelForSemanticSegmentation.from_pretrained(output).eval()
    assert model.config.id2label == dict(enumerate(["background", *scenes.names]))
    processor = AutoImageProcessor.from_pretrained(output)
    truth, found = [], []
    for scene in scenes:
        with torch.no_grad():
            answer = model(**processor(images=scene["image"], return_tensors="pt"))
        found.append(processor.post_process_semantic_segmentation(answer, target_sizes=[(32, 32)])[0].numpy().ravel())
        truth.append(np.asarray(scene["segmentation"]).ravel())
    truth, found = np.concatenate(truth), np.concatenate(found)
    present = sorted({*truth.tolist(), *found.tolist()})
    expected = jaccard_score(truth, found, labels=present, average="macro")
    # a batch and a single image may differ in the last bit, and so in a pixel
    assert result.metrics["compressed"]["mean_iou"] == pytest.approx(expected, abs=2e-3)
    assert result.metrics["compressed"]["pixel_accuracy"] == pytest.approx(np.mean(truth == found), abs=2e-3)


def test_a_pipeline_and_the_card(finished: tuple[Path, Any], tmp_path: Path) -> None:
    from huggingface_hub import ModelCard
    from rich.console import Console
    from transformers import pipeline

    from hf_compress.recipe.table import comparison

    output, result = finished
    Scenes("test", 1, size=32)[0]["image"].save(tmp_path / "scene.png")
    segment = pipeline("image-segmentation", model=str(output), device="cpu")
    found = segment(str(tmp_path / "scene.png"), subtask="semantic")
    assert found and all(entry["mask"].size == (32, 32) for entry in found)
    card = ModelCard.load(output / "README.md")
    assert card.data.pipeline_tag == "image-segmentation" and "masks.png" in card.text
    assert "AutoModelForSemanticSegmentation" in card.text and "classif" not in card.text.lower()
    assert [entry.metric_value for entry in card.data.eval_results] == pytest.approx(
        [result.metrics["compressed"][name] for name in ("mean_iou", "pixel_accuracy")], abs=1e-6
    )
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    console.print(comparison(result.metrics, "title"))
    assert "mIoU (test images)" in console.export_text()


def test_training_learns_the_masks() -> None:
    """Steps on one batch: the images and masks that training sees belong together."""
    from transformers import AutoModelForSemanticSegmentation

    from hf_compress.models.afidaf import AfidafConfig

    recipe = load_recipe(tiny())
    task = TASKS["image-segmentation"]
    data = task.load_data(recipe)
    config = AfidafConfig(**{k: v for k, v in AFIDAF.items() if k != "model_type"}, num_labels=len(data.label_names))
    torch.manual_seed(0)
    model = AutoModelForSemanticSegmentation.from_config(config)
    split = task.training_split(recipe, task.new_processor(model, size={"height": 64, "width": 64}), data, 0)
    batch = split.__getitems__(range(8))
    assert batch["pixel_values"].shape == (8, 3, 64, 64) and batch["labels"].shape == (8, 64, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(25):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_mirrored_images_have_mirrored_masks() -> None:
    recipe = load_recipe(tiny())
    task = TASKS["image-segmentation"]
    data = task.load_data(recipe)

    def processor(images: Any, return_tensors: str) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) for one in images])}

    plain = task.split(data.train, processor, data).__getitems__(range(24))
    split = task.training_split(recipe, processor, data, 0)
    mirrored = split.__getitems__(range(24))
    changed = [not torch.equal(a, b) for a, b in zip(plain["pixel_values"], mirrored["pixel_values"], strict=True)]
    assert 0 < sum(changed) < 24
    for index, is_changed in enumerate(changed):
        for name in ("pixel_values", "labels"):
            expected = plain[name][index].flip(-1) if is_changed else plain[name][index]
            assert torch.equal(mirrored[name][index], expected)
    split.augment_for(1)
    assert not torch.equal(split.__getitems__(range(24))["labels"], mirrored["labels"])


# -- figures ------------------------------------------------------------------------------------------------------


def test_figures_by_hand() -> None:
    labels = torch.tensor([[[0, 0, 1, 255]], [[2, 2, 2, 2]]])
    found = torch.tensor([[[0, 1, 1, 1]], [[2, 2, 2, 3]]])
    logits = torch.nn.functional.one_hot(found, 5).permute(0, 3, 1, 2).float()
    counts = confusion_matrices(logits, labels)
    assert counts.shape == (2, 5, 5) and counts.sum() == 7  # one pixel is not counted
    figures = segmentation_figures(counts.sum(0))
    # 0: 1 of 2; 1: 1 of 2; 2: 3 of 4; 3: 0 of 1; class 4 is nowhere
    assert figures["mean_iou"] == pytest.approx((1 / 2 + 1 / 2 + 3 / 4 + 0) / 4)
    assert figures["pixel_accuracy"] == pytest.approx(5 / 7)
    with pytest.raises(DataError, match="no pixel has a label"):
        segmentation_figures(np.zeros((3, 3)))
    evaluation = SegmentationEvaluation()

    class Prediction:
        def __init__(self, predictions: Any):
            self.predictions = predictions

    assert evaluation(Prediction(evaluation.confusion((logits[:1],), labels[:1]).numpy()), compute_result=False) == {}
    assert evaluation(Prediction(evaluation.confusion(logits[1:], labels[1:])), compute_result=True) == figures
    assert evaluation(Prediction(counts.numpy()), compute_result=True) == figures  # nothing is left of the run before


def test_logits_are_brought_to_the_size_of_the_masks() -> None:
    logits = torch.tensor([[[[2.0, 0.0]], [[0.0, 2.0]]]])
    counts = confusion_matrices(logits, torch.tensor([[[0] * 4 + [1] * 4]]))
    assert counts[0].tolist() == [[4, 0], [0, 4]]


def test_pictures_of_masks(tmp_path: Path) -> None:
    scenes = Scenes("test", 2, size=40)
    images = [scene["image"] for scene in scenes]
    masks = [np.array(scene["segmentation"]) for scene in scenes]
    masks[1][:5] = IGNORED
    path = draw_masks(tmp_path / "a.png", images, {"data": masks, "model": masks}, ["background", *scenes.names])
    assert Image.open(path).size[0] > 500
    plain = draw_masks(tmp_path / "b.png", images, {"data": [np.zeros((40, 40), int)] * 2})
    assert path.read_bytes() != plain.read_bytes()
    with pytest.raises(ValueError, match="one of each for every image"):
        draw_masks(tmp_path / "c.png", images, {"data": masks[:1]})
    with pytest.raises(ValueError, match="does not fit"):
        draw_masks(tmp_path / "c.png", images, {"data": [mask[:3] for mask in masks]})


# -- data sets ----------------------------------------------------------------------------------------------------


def masks_of(values: list[np.ndarray], mode: str = "L") -> list[Image.Image]:
    made = []
    for value in values:
        image = Image.fromarray(value.astype(np.uint8))
        if mode == "P":
            image.putpalette([channel for i in range(256) for channel in (i, 255 - i, i)])
        made.append(image if mode in ("L", "P") else image.convert(mode))
    return made


@pytest.mark.parametrize("mode", ["L", "P"])
def test_a_data_set_with_masks(tmp_path: Path, mode: str) -> None:
    draw = np.random.default_rng(1)
    values = [draw.integers(0, 4, (20, 20)) for _ in range(12)]
    values[3][:2] = 255
    folder = save_masks(tmp_path / "data", masks_of(values, mode))
    recipe = load_recipe(tiny(data={"name": str(folder), "image_size": 40}))
    data = load_segmentation_data(recipe)
    assert data.label_names == ["0", "1", "2", "3"] and data.native_size == (20, 20)
    assert {name: len(split) for name, split in data.splits().items()} == {"train": 9, "validation": 1, "test": 2}
    task = TASKS["image-segmentation"]

    def processor(images: Any, return_tensors: str) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.zeros(len(images), 3, 40, 40)}

    for split in data.splits().values():
        found = task.split(split, processor, data).__getitems__(range(len(split)))["labels"]
        for place, labels in zip(split.indices, found, strict=True):
            assert torch.equal(labels[::2, ::2], torch.from_numpy(values[place]))  # twice as large, nearest
            assert torch.equal(labels[1::2, 1::2], torch.from_numpy(values[place]))


def test_names_and_values_without_a_label(tmp_path: Path) -> None:
    values = [np.array([[0, 1], [2, 9]]) for _ in range(10)]
    folder = save_masks(tmp_path / "data", masks_of(values), "seg", 2)
    section = {"name": str(folder), "mask_column": "seg", "class_names": ["a", "b", "c"], "ignore_label": 9}
    data = load_segmentation_data(load_recipe(tiny(data=section)))
    assert data.label_names == ["a", "b", "c"]

    class Processor:
        do_center_crop = False

        def __call__(self, images: Any, return_tensors: str) -> dict[str, torch.Tensor]:
            return {"pixel_values": torch.zeros(len(images), 3, 2, 2)}

    split = TASKS["image-segmentation"].split(data.train, Processor(), data)
    assert split[0]["labels"].tolist() == [[0, 1], [2, IGNORED]]
    data = load_segmentation_data(load_recipe(tiny(data={**section, "ignore_label": 255})))
    with pytest.raises(DataError, match=r"has the class 9; there are 3, from 0 on\. Set"):
        TASKS["image-segmentation"].split(data.train, Processor(), data)[0]
    Processor.do_center_crop = True
    with pytest.raises(DataError, match="crops images, and masks would no longer lie on them"):
        TASKS["image-segmentation"].split(data.train, Processor(), data)


def test_data_that_are_refused(tmp_path: Path) -> None:
    flat = [np.zeros((20, 20)) for _ in range(10)]
    colour = save_masks(tmp_path / "colour", masks_of(flat, "RGB"))
    with pytest.raises(DataError, match="found one of mode RGB"):
        load_segmentation_data(load_recipe(tiny(data={"name": str(colour), "class_names": ["a", "b"]})))
    small = save_masks(tmp_path / "small", masks_of([mask[:10] for mask in flat]))
    with pytest.raises(DataError, match="has 20 x 20 pixels and its mask 20 x 10"):
        load_segmentation_data(load_recipe(tiny(data={"name": str(small)})))
    unnamed = save_masks(tmp_path / "unnamed", masks_of(flat), "other")
    with pytest.raises(
        DataError, match="which column holds the masks is not clear; the columns of pictures are image, o"
    ):
        load_segmentation_data(load_recipe(tiny(data={"name": str(unnamed)})))
    high = save_masks(tmp_path / "high", masks_of([mask + 255 for mask in flat]))
    with pytest.raises(DataError, match="go up to 255"):
        load_segmentation_data(load_recipe(tiny(data={"name": str(high), "ignore_label": 0})))
    with pytest.raises(DataError, match="there is no column 'no'"):
        load_segmentation_data(load_recipe(tiny(data={"name": str(high), "mask_column": "no"})))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"name": "digits"}}, "'digits' is for image-classification"),
        (
            {"data": {"name": "scenes", "crop_padding": 2}},
            "is not for image-segmentation: images and masks are resized",
        ),
        ({"data": {"name": "scenes", "label_column": "label"}}, "classes are in mask_column"),
        ({"data": {"name": "scenes", "box_format": "xyxy"}}, "there are no boxes"),
        ({"data": {"name": "scenes", "class_names": ["a", "b"]}}, "scenes know their own classes and masks"),
        ({"data": {"name": "elsewhere", "scenes": {}}}, "other data are named"),
        ({"data": {"name": "elsewhere", "ignore_label": -1}}, "greater than or equal to 0"),
        ({"data": {"name": "elsewhere", "class_names": ["a"]}}, "at least 2"),
    ],
)
def test_fields_that_mean_nothing(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(tiny(**changes))


def test_masks_are_not_for_other_tasks() -> None:
    for task, name in (("image-classification", "elsewhere"), ("object-detection", "scenes")):
        with pytest.raises(RecipeError, match=f"is not for {task}: there are no masks"):
            load_recipe(tiny_classification(task=task, data={"name": name, "mask_column": "mask"}))


@pytest.mark.parametrize("kind", ["afidaf classifier", pytest.param("segformer", marks=pytest.mark.slow)])
def test_other_models(tmp_path: Path, kind: str) -> None:
    """The trunk of a trained classifier under a new head; a segmenter of transformers, with its own processor."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

    from hf_compress.models.afidaf import AfidafConfig, AfidafForImageClassification, AfidafImageProcessor

    torch.manual_seed(0)
    if kind == "segformer":
        sizes: dict[str, Any] = {"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "num_attention_heads": [1, 1, 2, 2]}
        model: Any = SegformerForSemanticSegmentation(SegformerConfig(**sizes, decoder_hidden_size=8, num_labels=11))
        processor: Any = SegformerImageProcessor(size={"height": 64, "width": 64})
    else:
        settings = {name: value for name, value in AFIDAF.items() if name != "model_type"}
        model = AfidafForImageClassification(AfidafConfig(**settings, num_labels=3))
        processor = AfidafImageProcessor(size={"height": 64, "width": 64})
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    section = {"pretrained": str(tmp_path / "model"), "new_head": True}
    recipe = tiny(model=section, stages=[{"stage": "train", "steps": 2}, {"stage": "prune", "macs": 0.9}])
    run_recipe(recipe, output=tmp_path / "out")
    from transformers import AutoModelForSemanticSegmentation

    again = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "out")
    assert again.config.num_labels == 11
    notes = json.loads((tmp_path / "out" / "stages" / "02-prune" / "done.json").read_text())
    assert 0 <= notes["validation_mean_iou"] <= 1
    if kind != "segformer":
        trunk = {n: p for n, p in model.state_dict().items() if n.startswith("afidaf.encoder") and n.endswith("weight")}
        start = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "out" / "stages" / "00-start" / "model")
        assert trunk and all(torch.equal(start.state_dict()[name], value) for name, value in trunk.items())
