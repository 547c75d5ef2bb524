"""Recipes for object detection: one whole run, other detectors, data in several layouts, and what is refused."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import DETECTION
from tiny import tiny_detection as tiny

from hf_compress.data import Scenes
from hf_compress.errors import DataError, HfCompressError, ModelError, RecipeError
from hf_compress.recipe import load_recipe, run_recipe

SIZE = 32
SCENES, SIDT = DETECTION["data"]["scenes"], DETECTION["model"]["config"]


def data(**changes: Any) -> dict[str, Any]:
    return {"name": "scenes", "scenes": copy.deepcopy(SCENES), **changes}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    output = tmp_path_factory.mktemp("runs") / "tiny"
    return output, run_recipe(tiny(), output=output)


# -- a whole run --------------------------------------------------------------------------------------------------


def test_the_folder_holds_what_was_promised(finished: tuple[Path, Any]) -> None:
    output, result = finished
    names = {path.name for path in output.iterdir()}
    assert names >= {
        "README.md", "config.json", "detections.png", "dimensions.png", "metrics.json", "model.onnx", "model.safetensors",
        "plan.json", "preprocessor_config.json", "recipe.yaml", "sparsity.png", "tradeoff.png", "widths.png",
    }  # fmt: skip
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics == result.metrics
    keys = {"map", "map_50", "params", "macs", "bytes", "latency_ms", "onnx_latency_ms"}
    assert set(metrics["dense"]) == set(metrics["compressed"]) == keys
    assert all(math.isfinite(metrics[kind][key]) for kind in ("dense", "compressed") for key in keys)
    assert metrics["reload_max_abs_diff"] == 0
    assert 0 < metrics["onnx_max_abs_diff"] <= 1e-4  # 0 would mean that nothing was compared
    history = json.loads((output / "stages" / "01-train" / "history.json").read_text())
    assert [entry["step"] for entry in history if "eval_map" in entry] == [2, 4]


def test_boxes_of_the_int8_file_are_made_in_float(finished: tuple[Path, Any]) -> None:
    import onnx
    from transformers import AutoModelForObjectDetection

    from hf_compress.export import onnx_outputs

    output, result = finished
    int8 = result.metrics["int8"]
    assert int8["argmax"] is None and int8["relative_difference"] < 0.5  # most rows of a detector are background
    assert {"map", "map_50", "latency_ms", "bytes", "images"} <= set(int8)
    graph = onnx.load(output / "model_int8.onnx").graph
    makers = {name: node for node in graph.node for name in node.output}
    assert not any(makers[output.name].op_type == "DequantizeLinear" for output in graph.output)
    model = AutoModelForObjectDetection.from_pretrained(output).eval()
    pixels = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(pixel_values=pixels).pred_boxes
    found = onnx_outputs(output / "model_int8.onnx")(pixels)["pred_boxes"]
    # a centre in 8 bits of its own would be off by up to 1/512 of the image alone, and stand on a grid of 256 places
    assert (found - expected).abs().mean() < 0.02 and len(found[..., 0].unique()) > 100


def test_a_quarter_of_every_kind_is_gone(finished: tuple[Path, Any]) -> None:
    from transformers import AutoModelForObjectDetection

    from hf_compress import Plan, find_axes
    from hf_compress.methods.dimension_kinds import kind_of

    output, result = finished
    pixels = torch.zeros(1, 3, SIZE, SIZE)
    dense = find_axes(AutoModelForObjectDetection.from_pretrained(output / "stages" / "00-start" / "model"), pixels)
    small = find_axes(AutoModelForObjectDetection.from_pretrained(output).eval(), pixels)
    assert result.metrics["compressed"]["macs"] == small.macs < dense.macs == result.metrics["dense"]["macs"]
    sizes = Plan.from_json((output / "plan.json").read_text()).sizes
    totals: dict[str, list[int]] = {}
    for axis in dense:
        if axis.is_exact:
            total = totals.setdefault(kind_of(axis, dense), [0, 0])
            total[0] += axis.size
            total[1] += sizes.get(axis.name, axis.size)
            assert small[axis.name].size == sizes.get(axis.name, axis.size)
    for kind in ("qk", "v", "mlp", "channels"):
        before, after = totals[kind]
        assert after == round(0.75 * before), kind


def test_the_metrics_are_those_of_the_saved_model_on_the_test_scenes(finished: tuple[Path, Any]) -> None:
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    from hf_compress.measurement.detection import mean_average_precision

    output, result = finished
    settings = {name: SCENES[name] for name in ("size", "items", "scale")}
    scenes = Scenes("test", SCENES["test"], **settings)
    model = AutoModelForObjectDetection.from_pretrained(output).eval()
    assert model.config.id2label == scenes.id2label
    processor = AutoImageProcessor.from_pretrained(output)
    found, truth = [], []
    for scene in scenes:
        with torch.no_grad():
            answer = model(**processor(images=scene["image"], return_tensors="pt"))
        found += processor.post_process_object_detection(answer, threshold=0.01, target_sizes=[(SIZE, SIZE)])
        boxes = torch.tensor(scene["objects"]["bbox"]).reshape(-1, 4)
        corners = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
        truth.append({"boxes": corners, "labels": torch.tensor(scene["objects"]["category"])})
    figures = mean_average_precision(found, truth)
    for name in ("map", "map_50"):  # a batch and a single image may differ in the last bit, and so in a rank
        assert figures[name] == pytest.approx(result.metrics["compressed"][name], abs=1e-3)


def test_a_pipeline_and_onnx_runtime_find_what_the_model_finds(finished: tuple[Path, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForObjectDetection, pipeline

    from hf_compress.export import onnx_outputs

    output, _ = finished
    scene = Scenes("test", 1, size=SIZE)[0]["image"]
    scene.save(tmp_path / "scene.png")
    detect = pipeline("object-detection", model=str(output), device="cpu")
    found = detect(str(tmp_path / "scene.png"), threshold=0.001)
    assert found and set(found[0]) == {"score", "label", "box"}
    model = AutoModelForObjectDetection.from_pretrained(output).eval()
    pixels = detect.image_processor(images=scene, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(pixel_values=pixels)
    onnx = onnx_outputs(output / "model.onnx")(pixels)
    assert list(onnx) == ["logits", "pred_boxes"]
    for name, tensor in onnx.items():  # float32 on both sides, in another order of summation
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-4)


def test_the_card_is_a_detectors(finished: tuple[Path, Any]) -> None:
    from huggingface_hub import ModelCard

    output, result = finished
    card = ModelCard.load(output / "README.md")
    assert card.data.pipeline_tag == "object-detection"
    assert [found.metric_value for found in card.data.eval_results] == pytest.approx(
        [result.metrics["compressed"][name] for name in ("map", "map_50")], abs=1e-6
    )
    assert "AutoModelForObjectDetection" in card.text and '"object-detection"' in card.text
    assert "classif" not in card.text.lower()


def test_the_table_shows_average_precision(finished: tuple[Path, Any]) -> None:
    from rich.console import Console

    from hf_compress.recipe.table import comparison

    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    console.print(comparison(finished[1].metrics, "title"))
    text = console.export_text()
    assert "mAP (test images)" in text and "accuracy" not in text
    assert max(map(len, text.splitlines())) <= 80


# -- other methods and detectors ----------------------------------------------------------------------------------


def test_network_slimming_of_a_detector_with_a_convolutional_backbone(tmp_path: Path) -> None:
    backbone = {
        "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic",
        "out_features": ["stage1", "stage2"],
    }  # fmt: skip
    stages = [{"stage": "network_slimming", "steps": 2, "strength": 0.01}, {"stage": "prune", "macs": 0.7}]
    config = {key: value for key, value in SIDT.items() if key != "pyramid_scales"} | {"backbone_config": backbone}
    recipe = tiny(model={"config": config}, stages=stages)
    lines: list[str] = []
    run_recipe(recipe, output=tmp_path / "out", say=lines.append)
    dense = run_recipe(recipe, output=tmp_path / "other", dry_run=True).description
    (macs,) = [line.split(" parameters, ")[1] for line in dense.splitlines() if line.startswith("model")]
    notes = json.loads((tmp_path / "out" / "stages" / "02-prune" / "done.json").read_text())
    assert notes["macs"] <= 0.7 * int(macs.split()[0].replace(",", "")) and 0 <= notes["validation_map"] <= 1


def detector(kind: str, labels: int = 10) -> Any:
    import transformers

    names: Any = {"id2label": {i: str(i) for i in range(labels)}, "label2id": {str(i): i for i in range(labels)}}
    torch.manual_seed(0)
    if kind == "yolos":
        config = transformers.YolosConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=[SIZE, SIZE],
            patch_size=8, num_detection_tokens=5, **names,
        )  # fmt: skip
        return transformers.YolosForObjectDetection(config)
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False, backbone=None, use_pretrained_backbone=False, backbone_config=backbone, d_model=16,
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
        decoder_ffn_dim=24, num_queries=5, **names,
    )  # fmt: skip
    return transformers.DetrForObjectDetection(config)


@pytest.mark.parametrize("kind", ["yolos", "detr"])
def test_pretrained_detectors_of_transformers(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForObjectDetection, DetrImageProcessor, YolosImageProcessor

    model = detector(kind)
    model.save_pretrained(tmp_path / "dense")
    processor = {"yolos": YolosImageProcessor, "detr": DetrImageProcessor}[kind]
    processor(size={"shortest_edge": SIZE, "longest_edge": 2 * SIZE}).save_pretrained(tmp_path / "dense")
    recipe = tiny(
        model={"pretrained": str(tmp_path / "dense")},
        data=data(image_size=SIZE),
        stages=[
            {"stage": "dimension_search", "steps": 2, "target": 0.25, "min_keep": 1},
            {"stage": "prune", "support": True},
            {"stage": "finetune", "steps": 1},
            {"stage": "export", "tolerance": 1e-3},
            {"stage": "report", "latency_rounds": 1},
        ],
    )
    result = run_recipe(recipe, output=tmp_path / "out")
    small = AutoModelForObjectDetection.from_pretrained(tmp_path / "out")
    assert type(small) is type(model)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert result.metrics["reload_max_abs_diff"] == 0 and set(result.metrics["dense"]) >= {"map", "map_50"}


def test_the_classes_of_a_pretrained_detector_have_to_be_those_of_the_data(tmp_path: Path) -> None:
    detector("yolos", labels=4).save_pretrained(tmp_path / "dense")
    recipe = tiny(model={"pretrained": str(tmp_path / "dense")}, data=data(image_size=SIZE), stages=["report"])
    refused(recipe, tmp_path, DataError, "4 classes", "10", "new_head")
    recipe["model"]["new_head"] = True
    recipe["stages"] = [{"stage": "train", "steps": 1}]
    run_recipe(recipe, output=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"]["9"] == "9"


# -- data ---------------------------------------------------------------------------------------------------------


def coco_folder(folder: Path, layout: str) -> Path:
    """Scenes as files in COCO's format, in one of the layouts that are in use."""
    for split, length in (("train", 8), ("test", 4)):
        scenes = Scenes(split, length, size=SIZE, items=(1, 2), scale=(0.4, 0.7))
        if layout == "roboflow":
            scenes.write_coco(folder / split).rename(folder / split / "_annotations.coco.json")
        elif layout == "coco2017":
            (folder / "annotations").mkdir(parents=True, exist_ok=True)
            written = scenes.write_coco(folder / f"{split}2017")
            shutil.move(written, folder / "annotations" / f"instances_{split}2017.json")
        else:
            scenes.write_coco(folder / split)
    return folder


@pytest.mark.parametrize("layout", ["split", "roboflow", "coco2017"])
def test_local_files_in_cocos_format(layout: str, tmp_path: Path) -> None:
    from hf_compress.recipe.detection_data import load_detection_data

    section = {"name": str(coco_folder(tmp_path / "coco", layout)), "validation_share": 0.25}
    if layout == "coco2017":
        section |= {"train_split": "train2017", "test_split": "test2017"}
    found = load_detection_data(load_recipe(tiny(data=section)))
    assert [len(split) for split in found.splits().values()] == [6, 2, 4]
    assert found.label_names == [str(i) for i in range(10)] and found.native_size == (SIZE, SIZE)
    scenes = Scenes("test", 4, size=SIZE, items=(1, 2), scale=(0.4, 0.7))
    for place, scene in enumerate(scenes):
        assert found.test.objects[place]["bbox"] == scene["objects"]["bbox"]
        assert found.test.objects[place]["category"] == scene["objects"]["category"]
        assert np.array_equal(np.asarray(found.test.read([place])[0]), np.asarray(scene["image"]))


def image_folder(folder: Path, objects: list[dict[str, Any]]) -> Path:
    """What ``datasets`` reads as images with a metadata file."""
    (folder / "train").mkdir(parents=True)
    lines = []
    for number, entry in enumerate(objects):
        Image.new("RGB", (40, 30), (number, 50, 90)).save(folder / "train" / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "objects": entry}))
    (folder / "train" / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_broken_boxes_are_counted_and_do_not_reach_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    objects = [
        {"bbox": [[5.0, 5.0, 10.0, 8.0], [5.0, 5.0, -3.0, 8.0]], "category": ["cat", "dog"]},  # inverted
        {"bbox": [[2.0, 2.0, 9.0, 9.0], [3.0, 3.0, 0.0, 4.0]], "category": ["dog", "dog"]},  # empty
        {"bbox": [[90.0, 5.0, 10.0, 8.0], [30.0, 20.0, 30.0, 30.0]], "category": ["cat", "cat"]},  # outside; clipped
        *({"bbox": [[4.0, 6.0, 12.0, 9.0]], "category": ["cat"]} for _ in range(9)),
    ]
    section = {
        "name": str(image_folder(tmp_path / "data", objects)), "image_size": SIZE, "validation_share": 0.2,
        "test_share": 0.2,
    }  # fmt: skip
    stages = [{"stage": "train", "steps": 3, "training": {"per_device_train_batch_size": 8}}]
    with caplog.at_level("WARNING", "hf_compress.data.coco"):
        run_recipe(tiny(data=section, stages=stages), output=tmp_path / "out")
    messages = [record.getMessage() for record in caplog.records if record.name == "hf_compress.data.coco"]
    (message,) = [text for text in messages if "split train" in text]
    for part in ("12 boxes kept, 1 of them clipped", "1 inverted", "1 empty", "1 outside of the image"):
        assert part in message
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "cat", "1": "dog"}
    history = json.loads((tmp_path / "out" / "stages" / "01-train" / "history.json").read_text())
    assert all(math.isfinite(entry["loss"]) for entry in history if "loss" in entry)


def test_corners_are_read_as_corners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_compress.recipe.detection_data import load_detection_data

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = image_folder(tmp_path / "data", [{"bbox": [[5.0, 6.0, 20.0, 18.0]], "label": [0]}] * 6)
    section = {"name": str(folder), "box_format": "xyxy", "validation_share": 0.2, "test_share": 0.2}
    found = load_detection_data(load_recipe(tiny(data=section)))
    assert found.train.objects[0]["bbox"] == [[5.0, 6.0, 15.0, 12.0]]


def test_a_mirrored_image_has_mirrored_boxes() -> None:
    from hf_compress.models.sidt import SidtImageProcessor
    from hf_compress.recipe.detection_data import DetectionSplit, load_detection_data

    raw = load_detection_data(load_recipe(tiny())).train
    processor = SidtImageProcessor(size={"height": SIZE, "width": SIZE})
    plain, flipped = DetectionSplit(raw, processor, 10), DetectionSplit(raw, processor, 10, flip=True, seed=1)
    kinds = set()
    for epoch in range(2):
        flipped.augment_for(epoch)
        for index in range(8):
            before, after = plain[index], flipped[index]
            is_same = torch.equal(before["pixel_values"], after["pixel_values"])
            kinds.add((epoch, is_same))
            boxes, other = before["labels"][0]["boxes"], after["labels"][0]["boxes"].clone()
            if not is_same:
                assert torch.equal(before["pixel_values"], after["pixel_values"].flip(-1))
                other[:, 0] = 1 - other[:, 0]
            assert torch.allclose(boxes, other, atol=1e-6)  # one subtraction in float32
    assert kinds == {(0, True), (0, False), (1, True), (1, False)}
    again = flipped.__getitems__([3, 5])["pixel_values"]
    assert torch.equal(again[1], flipped[5]["pixel_values"][0])  # neither order nor batch matters


# -- what is refused ----------------------------------------------------------------------------------------------


def refused(recipe: dict[str, Any], folder: Path, kind: type[HfCompressError], *words: str) -> None:
    with pytest.raises(kind) as caught:
        run_recipe(recipe, output=folder / "out")
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message
    assert not (folder / "out").exists()


RESNET = {"model_type": "resnet", "hidden_sizes": [8], "depths": [1], "embedding_size": 8, "layer_type": "basic"}
REFUSED: dict[str, tuple[dict[str, Any], type[HfCompressError], tuple[str, ...]]] = {
    "a task's name": ({"task": "object-detektion"}, RecipeError, ("task", "Did you mean 'object-detection'")),
    "no task": ({"task": "image-classification"}, RecipeError, ("data.name", "object-detection", "Set task")),
    "labels": ({"data": {"name": "digits"}}, RecipeError, ("data.name", "image-classification")),
    "crops": ({"data": data(crop_padding=2)}, RecipeError, ("data.crop_padding", "objects out of the image")),
    "two sources": ({"data": data(name="some/where")}, RecipeError, ("data.scenes", "name: scenes")),
    "a field of scenes": ({"data": {"name": "scenes", "scenes": {"itmes": [1, 2]}}}, RecipeError, ("scenes.itmes", "'items'")),
    "sizes of scenes": ({"data": {"name": "scenes", "scenes": {"size": 8}}}, DataError, ("data.scenes", "size=8")),
    "a classifier": ({"model": {"config": RESNET}}, RecipeError, ("model_type", "no model for object detection", "yolos")),
    "a number of classes": ({"model": {"config": {**SIDT, "num_labels": 3}}}, DataError, ("num_labels", "3 classes", "10")),
    "an impossible model": ({"model": {"config": {**SIDT, "head_layers": -1}}}, ModelError, ("head_layers=-1",)),
    "the box format": ({"data": data(box_format="xyhw")}, RecipeError, ("box_format", "'xywh'")),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_training(case: str, tmp_path: Path) -> None:
    changes, kind, words = REFUSED[case]
    refused(tiny(**changes), tmp_path, kind, *words)


def test_detection_fields_are_not_for_classifiers(tmp_path: Path) -> None:
    recipe = {
        "name": "c", "model": {"config": RESNET}, "data": {"name": "digits", "box_format": "xyxy", "objects_column": "o"},
        "stages": [{"stage": "train", "steps": 1}],
    }  # fmt: skip
    refused(recipe, tmp_path, RecipeError, "data.box_format", "data.objects_column", "image-classification")


@pytest.mark.parametrize(
    ("objects", "words"),
    [
        ({"bbox": [[5.0, 5.0, -1.0, 8.0]], "category": [0]}, ("no box", "xyxy")),
        ({"bbox": [[5.0, 5.0, 4.0]], "category": [0]}, ("four numbers",)),
        ({"bbox": [[5.0, 5.0, 4.0, 4.0]], "name": ["cat"]}, ("bbox", "category", "objects_column")),
        ({"bbox": [[5.0, 5.0, 4.0, 4.0]] * 2, "category": [0]}, ("2 boxes",)),
        ({"bbox": [[5.0, 5.0, 4.0, 4.0]], "category": [7]}, ("integer labels",)),
    ],
)
def test_annotations_without_a_usable_box(
    objects: dict[str, Any], words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = image_folder(tmp_path / "data", [objects] * 8)
    refused(tiny(data={"name": str(folder), "image_size": SIZE}), tmp_path, DataError, "field data", *words)


def test_a_column_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = image_folder(tmp_path / "data", [{"bbox": [[5.0, 5.0, 4.0, 4.0]], "category": [0]}] * 8)
    section = {"name": str(folder), "objects_column": "things"}
    refused(tiny(data=section), tmp_path, DataError, "data.objects_column", "things", "objects")
