"""Recipes with distill and quantize, from digits to packed checkpoints, int8 files and pictures in the card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny import tiny

from hf_compress.errors import DataError, MethodError, ModelError, RecipeError
from hf_compress.recipe import load_recipe, run_recipe
from hf_compress.recipe.schema import bits_of_training

RECIPES = Path(__file__).parents[2] / "recipes"
FASHION = Path(__file__).parents[3] / "shared" / "data" / "fashion_mnist"
TRAIN = {"stage": "train", "steps": 3}
DISTILL = {"stage": "distill", "steps": 4, "teacher_stage": "train"}
FOUR_BITS = {"weights": 4, "activations": 8, "activation_scheme": "static", "calibration_images": 32}
EXPORT = {"stage": "export", "int8": True, "calibration_images": 32, "min_agreement": 0.1}
REPORT = {"stage": "report", "latency_rounds": 1}


def recipe(*stages: Any, **changes: Any) -> dict[str, Any]:
    return {**tiny(**changes), "stages": [json.loads(json.dumps(stage)) for stage in stages]}


def quantized(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["quantization"]


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, list[str]]:
    output, said = tmp_path_factory.mktemp("distilled") / "run", []
    stages = (TRAIN, {**DISTILL, "student": "start", "quantize": FOUR_BITS}, EXPORT, REPORT)
    return output, run_recipe(recipe(*stages), output=output, say=said.append), said


def test_a_quantized_student_of_an_earlier_stage(distilled: tuple[Path, Any, list[str]]) -> None:
    output, result, _ = distilled
    metrics = result.metrics
    assert (metrics["dense"]["weights_bits"], metrics["compressed"]["weights_bits"]) == (32, 4)
    assert (metrics["dense"]["activations_bits"], metrics["compressed"]["activations_bits"]) == (32, 8)
    assert metrics["reload_max_abs_diff"] == 0 and metrics["onnx_max_abs_diff"] <= 1e-4
    assert metrics["compressed"]["bytes"] == (output / "model.safetensors").stat().st_size
    assert metrics["compressed"]["bytes"] < 0.6 * metrics["dense"]["bytes"]  # a third of these few weights is float
    assert metrics["int8"]["images"] == 32 and 0.1 <= metrics["int8"]["argmax"] <= 1
    # where the classes agree for a share of the images, accuracies cannot be further apart than the rest
    apart = abs(metrics["int8"]["accuracy"] - metrics["compressed"]["accuracy"])
    assert apart <= 1 - metrics["int8"]["argmax"] + 1e-9
    assert metrics["int8"]["latency_ms"] > 0 and metrics["int8"]["bytes"] == (output / "model_int8.onnx").stat().st_size
    assert quantized(output)["weights"] == 4 and quantized(output)["format"] == "packed"
    with safe_open(output / "model.safetensors", "pt") as tensors:
        assert any(name.endswith("hf_compress_codes") for name in tensors.keys())  # no mapping
    # the float teacher is what the small model is compared with, not the student of a training stage
    assert json.loads((output / "stages" / "04-report" / "done.json").read_text())["dense"] == 1


def test_its_card_shows_the_parts_of_the_loss_and_the_affinities(distilled: tuple[Path, Any, list[str]]) -> None:
    output, _, said = distilled
    card = (output / "README.md").read_text(encoding="utf-8")
    for picture in ("loss_parts.png", "affinities.png"):
        assert picture in card and (output / picture).read_bytes()[:4] == b"\x89PNG"
    assert "model_int8.onnx" in card and "Bits of weights" in card and "of the bytes" in card
    history = json.loads((output / "stages" / "02-distill" / "history.json").read_text())
    parts = [entry for entry in history if "kd_loss" in entry]
    assert parts and all({"affinity_loss", "affinity/1", "affinity/2"} <= entry.keys() for entry in parts)
    assert all(entry["loss"] == pytest.approx(entry["kd_loss"] + entry["affinity_loss"], rel=1e-5) for entry in parts)
    assert said[:2] == ["[1/4] train: 3 steps", "[2/4] distill: 4 steps"]


def test_pruned_quantized_and_then_trained_in_the_same_bits(tmp_path: Path) -> None:
    stages = (
        TRAIN,
        {"stage": "prune", "macs": 0.5},
        {"stage": "quantize", "weights": 2},
        {**DISTILL, "label_weight": 0.3},
    )
    run_recipe(recipe(*stages, {"stage": "finetune", "steps": 2}), output=tmp_path / "run")
    stages_folder = tmp_path / "run" / "stages"
    for folder in ("03-quantize", "04-distill", "05-finetune"):
        held = quantized(stages_folder / folder / "model")
        assert (held["weights"], held["format"], held["scale"]) == (2, "packed", "least_squares")
    weights = [(stages_folder / f / "model" / "model.safetensors").read_bytes() for f in ("03-quantize", "05-finetune")]
    assert weights[0] != weights[1] and len(weights[0]) == len(weights[1])
    notes = json.loads((stages_folder / "03-quantize" / "done.json").read_text())
    assert 0 < len(weights[0]) - notes["bytes"] < 10_000  # the header of the file


def test_a_teacher_of_its_own_path_with_other_widths(tmp_path: Path) -> None:
    wide = {**tiny()["model"]["config"], "hidden_sizes": [12, 24]}
    run_recipe(recipe(TRAIN, model={"config": wide}), output=tmp_path / "teacher")
    stage = {
        **DISTILL,
        "teacher_stage": None,
        "teacher": str(tmp_path / "teacher"),
        "adaptors": True,
        "features": [1, [2, 2]],
    }
    result = run_recipe(recipe(stage), output=tmp_path / "run")
    assert result.steps == {1: 4}
    with safe_open(tmp_path / "run" / "model.safetensors", "pt") as tensors:
        assert not any("adaptors" in name for name in tensors.keys())
    other = recipe(stage)
    other["data"]["image_mean"] = [0.1, 0.2, 0.3]
    with pytest.raises(DataError, match=r"stages\.0: .*image_mean.*data\.image_mean"):
        run_recipe(other, output=tmp_path / "other")


@pytest.mark.slow
@pytest.mark.multi_process
def test_a_killed_distillation_ends_in_the_same_weights(tmp_path: Path) -> None:
    import multiprocessing
    import signal

    from tiny import run_and_die

    context = multiprocessing.get_context("spawn")
    stages = (TRAIN, {**DISTILL, "epochs": 2, "quantize": {"weights": 4}, "adaptors": True})
    del stages[1]["steps"]
    for output, place, code in (
        ("whole", "none", 0), ("killed", "step:distill:6", -signal.SIGKILL), ("killed", "none", 0)
    ):  # fmt: skip
        process = context.Process(target=run_and_die, args=(recipe(*stages), tmp_path / output, place))
        process.start()
        process.join()
        assert process.exitcode == code
    whole, killed = ((tmp_path / output / "model.safetensors").read_bytes() for output in ("whole", "killed"))
    assert whole == killed


def test_bits_reach_the_stages_behind_them() -> None:
    loaded = load_recipe(recipe(TRAIN, {"stage": "quantize", "weights": "binary"}, {"stage": "finetune", "steps": 1}))
    assert bits_of_training(loaded, 0) is None
    found = bits_of_training(loaded, 2)
    assert found is not None and found[0].weights == "binary" and found[0].callback(found[1]).scale == "least_squares"
    loaded = load_recipe(recipe(TRAIN, {**DISTILL, "quantize": {"weights": 4}}, {"stage": "train", "steps": 1}))
    found = bits_of_training(loaded, 2)
    assert found is not None and found[0].callback(found[1]).scale == "learned"


QUANTIZE = {"stage": "quantize", "weights": 4}
REFUSED = {
    "bits": ([{"stage": "quantize", "weights": 9}], RecipeError, ["stages.0", "weights=9", "1 to 8"]),
    "no bits": ([{"stage": "quantize"}], RecipeError, ["stages.0", "weights="]),
    "a scheme": (
        [{"stage": "quantize", "activations": 8, "activation_scheme": "statik"}], RecipeError, ["statik", "clipped_relu"],
    ),
    "a misspelt field": ([{"stage": "quantize", "weigths": 4}], RecipeError, ["weigths", "Did you mean 'weights'"]),
    "a misspelt field inside": (
        [TRAIN, {**DISTILL, "quantize": {"weigths": 4}}], RecipeError, ["stages.1.quantize.weigths", "'weights'"],
    ),
    "bits inside": ([TRAIN, {**DISTILL, "quantize": {"weights": 0}}], RecipeError, ["stages.1.quantize", "weights=0"]),
    "a pattern": ([{**QUANTIZE, "skip": ["nothing.*"]}], MethodError, ["stages.0", "nothing.*", "resnet."]),
    "calibration images": ([{**QUANTIZE, "calibration_images": 0}], RecipeError, ["calibration_images", "greater than 0"]),
    "twice": ([QUANTIZE, QUANTIZE], RecipeError, ["stages.1", "stage 0 (quantize) quantizes the model already"]),
    "twice, inside": (
        [TRAIN, QUANTIZE, {**DISTILL, "quantize": {"weights": 4}}], RecipeError, ["stages.2", "stage 1 (quantize)"],
    ),
    "pruned afterwards": (
        [QUANTIZE, {"stage": "prune", "macs": 0.5}], RecipeError, ["stages.1", "prune needs float weights", "Move it before"],
    ),
    "no teacher": ([TRAIN, {"stage": "distill", "steps": 1}], RecipeError, ["stages.1", "`teacher`", "`teacher_stage`"]),
    "two teachers": ([TRAIN, {**DISTILL, "teacher": "x"}], RecipeError, ["exactly one"]),
    "a stage that is not there": (
        [TRAIN, {**DISTILL, "teacher_stage": "prune"}], RecipeError, ["stages.1.teacher_stage", "'prune'", "0 (train)"],
    ),
    "a later stage": ([DISTILL, TRAIN], RecipeError, ["stages.0.teacher_stage", "Possible: none"]),
    "start behind pruning": (
        [TRAIN, {"stage": "prune", "macs": 0.5}, {**DISTILL, "student": "start"}], RecipeError, ["`start` would undo"],
    ),
    "a folder that is not there": (
        [{"stage": "distill", "steps": 1, "teacher": "./nowhere"}], RecipeError, ["stages.0.teacher", "no folder"],
    ),
    "features": ([TRAIN, {**DISTILL, "features": ["resnet.stage"]}], MethodError, ["stages.1", "'resnet.stage'", "resnet.encoder"]),
    "a state": ([TRAIN, {**DISTILL, "features": [7]}], MethodError, ["stages.1", "3 hidden_states"]),
    "weights of nothing": ([TRAIN, {**DISTILL, "kd_weight": 0, "affinity_weight": 0}], MethodError, ["stages.1", "all 0"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_training(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.Trainer.train", lambda *a, **k: pytest.fail("training began"))
    stages, kind, words = REFUSED[case]
    with pytest.raises(kind) as caught:
        run_recipe(recipe(*stages), output=tmp_path / "run")
    assert [word for word in words if word not in str(caught.value)] == [], caught.value
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_other_classes_or_without_finite_weights(tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    for classes, value, kind, words in (
        (7, 0.0, MethodError, ["stages.0", "10 classes", "7"]),
        (10, float("nan"), ModelError, ["stages.0", "teacher's", "classifier.1.weight"]),
    ):
        config = ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=classes
        )
        model = ResNetForImageClassification(config)
        with torch.no_grad():
            model.classifier[1].weight[0, 0] += value
        model.save_pretrained(tmp_path / "teacher")
        stage = {"stage": "distill", "steps": 1, "teacher": str(tmp_path / "teacher")}
        with pytest.raises(kind) as caught:
            run_recipe(recipe(stage), output=tmp_path / "run")
        assert [word for word in words if word not in str(caught.value)] == [], caught.value


def test_names_that_an_earlier_stage_makes_are_not_looked_for_too_early(tmp_path: Path) -> None:
    factorize = {"stage": "factorize", "params": 0.9, "calibration_images": 0}
    stages = [TRAIN, factorize, {"stage": "quantize", "weights": 4, "skip": ["*.convolution.0"]}]
    assert run_recipe(recipe(*stages), output=tmp_path / "run", dry_run=True).steps
    stages = [
        TRAIN,
        factorize,
        {**DISTILL, "features": [["resnet.encoder.stages.0.layers.0.layer.1.convolution.0", 1]]},
    ]
    assert run_recipe(recipe(*stages), output=tmp_path / "run", dry_run=True).steps
    with pytest.raises(MethodError, match=r"\*\.convolution\.0"):
        run_recipe(
            recipe(TRAIN, stages[2] | {"features": None}, {**QUANTIZE, "skip": ["*.convolution.0"]}), output=tmp_path
        )


@pytest.mark.parametrize("task", ["object-detection", "image-segmentation", "eye-openness"])
def test_other_tasks_distil_too(task: str, tmp_path: Path) -> None:
    """Without labels, under the model of an earlier stage, in four bits."""
    from test_eye_openness_recipe import recipe as eyes
    from test_segmentation_recipe import tiny as tiny_segmentation
    from tiny import tiny_detection

    make = {"object-detection": tiny_detection, "image-segmentation": tiny_segmentation, "eye-openness": eyes}[task]
    stages = [
        {"stage": "train", "steps": 2},
        {"stage": "prune", "macs": 0.7},
        {"stage": "quantize", "weights": 4},
        {"stage": "distill", "steps": 3, "teacher_stage": "train", "training": {"logging_steps": 1}},
        {"stage": "report", "latency_rounds": 1},
    ]
    result = run_recipe(make(stages=stages), output=tmp_path / "run")
    assert result.metrics is not None and result.metrics["compressed"]["weights_bits"] == 4
    assert result.metrics["reload_max_abs_diff"] == 0
    (folder,) = (tmp_path / "run" / "stages").glob("*-distill")
    history = [entry for entry in json.loads((folder / "history.json").read_text()) if "kd_loss" in entry]
    assert len(history) == 3 and all(entry["affinity_loss"] > 0 for entry in history)
    assert all(("box_loss" in entry) == (task == "object-detection") for entry in history)
    for entry in history:
        parts = [entry[name] for name in ("kd_loss", "affinity_loss", "box_loss") if name in entry]
        assert entry["loss"] == pytest.approx(sum(parts), rel=1e-4)


@pytest.mark.parametrize("data", ["cifar10", "cifar100"])
def test_the_papers_recipes_are_valid(data: str, tmp_path: Path) -> None:
    if not FASHION.is_dir():
        pytest.skip(f"needs the data set at {FASHION}, and no Hub is assumed to be in reach")
    from hf_compress.models.wide_resnet import WideResNetConfig, WideResNetForImageClassification

    shared = [f"data.name={FASHION}", "data.image_column=null", "data.label_column=null", "model.config.depth=10"]
    shared += ["data.train_limit=64", "data.validation_limit=32", "data.test_limit=32"]
    plan = run_recipe(RECIPES / "papers" / f"faqd_{data}_teacher.yaml", shared, tmp_path / "out", dry_run=True)
    assert plan.steps == {1: 200}  # one batch of at most 100 images in an epoch
    teacher = WideResNetForImageClassification(WideResNetConfig(depth=10, widen_factor=2, num_labels=10))
    teacher.save_pretrained(tmp_path / "teacher")
    teaching = [*shared, f"stages.distill.teacher={tmp_path / 'teacher'}"]
    plan = run_recipe(RECIPES / "papers" / f"faqd_{data}.yaml", teaching, tmp_path / "out", dry_run=True)
    assert plan.steps == {1: 200}
