"""One run from digits to a published folder, and what happens when the command is given again."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny import save_masks, tiny

from hf_compress.data import Scenes
from hf_compress.errors import CheckpointError
from hf_compress.recipe import load_recipe, run_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
FASHION = Path(__file__).parents[3] / "shared" / "data" / "fashion_mnist"


def full() -> dict[str, Any]:
    recipe = tiny()
    recipe["stages"] = [*recipe["stages"], "export", {"stage": "report", "latency_rounds": 2}]
    return recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, list[str]]:
    output, lines = tmp_path_factory.mktemp("runs") / "tiny", []
    result = run_recipe(full(), output=output, say=lines.append)
    return output, result, lines


def test_the_folder_holds_what_was_promised(finished: tuple[Path, Any, list[str]]) -> None:
    output, result, _ = finished
    names = {path.name for path in output.iterdir()}
    assert names >= {
        "README.md", "config.json", "metrics.json", "model.onnx", "model.safetensors", "plan.json",
        "preprocessor_config.json", "recipe.yaml", "sparsity.png", "tradeoff.png", "widths.png",
    }  # fmt: skip
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics == result.metrics and not result.was_finished
    keys = {"accuracy", "params", "macs", "bytes", "latency_ms", "onnx_latency_ms"}
    assert set(metrics) == {"dense", "compressed", "reload_max_abs_diff", "onnx_max_abs_diff"}
    assert set(metrics["dense"]) == set(metrics["compressed"]) == keys
    assert all(math.isfinite(metrics[kind][key]) for kind in ("dense", "compressed") for key in keys)


def test_the_card_says_which_model_is_the_dense_one(finished: tuple[Path, Any, list[str]]) -> None:
    output, _, _ = finished
    done = json.loads((output / "stages" / "06-report" / "done.json").read_text())
    name = ("train", "network slimming")[done["dense"] - 1]
    said = f"- Dense: the model after stage {done['dense']} ({name}), the best of the full-sized ones on validation images."
    assert said in (output / "README.md").read_text(encoding="utf-8")


def test_the_metrics_are_those_of_the_saved_model(finished: tuple[Path, Any, list[str]]) -> None:
    from transformers import AutoModelForImageClassification

    from hf_compress import find_axes

    output, result, _ = finished
    small, dense = result.metrics["compressed"], result.metrics["dense"]
    model = AutoModelForImageClassification.from_pretrained(output).eval()
    axes = find_axes(model, torch.zeros(1, 3, 16, 16))
    assert small["params"] == sum(p.numel() for p in model.parameters())
    assert small["macs"] == axes.macs <= 0.5 * dense["macs"]
    assert small["bytes"] == (output / "model.safetensors").stat().st_size < dense["bytes"]
    assert result.metrics["reload_max_abs_diff"] == 0
    assert 0 < result.metrics["onnx_max_abs_diff"] <= 1e-4  # 0 would mean that nothing was compared


def test_a_pipeline_classifies_a_png_file(finished: tuple[Path, Any, list[str]], tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification, pipeline

    from hf_compress.recipe.data import ImageSplit, load_data

    output, _, _ = finished
    data = load_data(load_recipe(full()))
    data.test.read([5])[0].save(tmp_path / "digit.png")
    classify = pipeline("image-classification", model=str(output))
    found = {answer["label"]: answer["score"] for answer in classify(str(tmp_path / "digit.png"), top_k=10)}
    assert set(found) == set(data.label_names)
    model = AutoModelForImageClassification.from_pretrained(output).eval()
    pixels = ImageSplit(data.test, classify.image_processor)[5]["pixel_values"][None]
    scores = model(pixel_values=pixels).logits.softmax(-1)[0]
    # the pixels that training saw are those that a pipeline makes of a file; float32 rounding of a softmax
    assert torch.allclose(torch.tensor([found[name] for name in data.label_names]), scores, atol=1e-5)


def test_the_same_command_again_does_nothing(
    finished: tuple[Path, Any, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, result, _ = finished
    before = {
        path: path.stat().st_mtime_ns
        for path in output.rglob("*")
        if path.is_file() and not path.name.startswith(".hf_compress_run")
    }
    monkeypatch.setattr(
        "hf_compress.recipe.preparation.prepare", lambda recipe: pytest.fail("looked at data and model")
    )
    again = run_recipe(full(), output=output)
    assert again.was_finished and again.metrics == result.metrics
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_file_lost_from_the_result_comes_back(finished: tuple[Path, Any, list[str]]) -> None:
    output, _, _ = finished
    content = (output / "model.safetensors").read_bytes()
    (output / "model.safetensors").unlink()
    run_recipe(full(), output=output)
    assert (output / "model.safetensors").read_bytes() == content


CHANGES = {
    "seed=1": r"seed was 0 and is 1 \(--set seed=1\)",
    "stages.prune.macs=0.25": r"stages\.2\.macs was 0\.5 and is 0\.25 \(--set stages\.prune\.macs=0\.25\)",
    "training.weight_decay=0.1": r"training\.weight_decay was absent and is 0\.1",
    "data.crop_padding=1": r"data\.crop_padding was 2 and is 1",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_recipe_is_refused_and_the_field_named(change: str, finished: tuple[Path, Any, list[str]]) -> None:
    with pytest.raises(CheckpointError, match=CHANGES[change]) as caught:
        run_recipe(full(), [change], finished[0])
    assert "--restart" in str(caught.value) and "--output" in str(caught.value)


def test_removed_stages_are_refused(finished: tuple[Path, Any, list[str]]) -> None:
    recipe = full()
    del recipe["stages"][3]
    with pytest.raises(CheckpointError, match="stages was"):
        run_recipe(recipe, output=finished[0])


def test_stages_can_be_added_and_a_restart_leaves_other_files_alone(tmp_path: Path) -> None:
    recipe = tiny(stages=[{"stage": "train", "steps": 2}])
    run_recipe(recipe, output=tmp_path / "out")
    dense = (tmp_path / "out" / "model.safetensors").read_bytes()
    recipe["stages"].append({"stage": "prune", "ratio": 0.5})
    lines: list[str] = []
    run_recipe(recipe, output=tmp_path / "out", say=lines.append)
    assert lines[0] == "[1/2] train: finished before"
    assert len((tmp_path / "out" / "model.safetensors").read_bytes()) < len(dense)

    (tmp_path / "out" / "notes.txt").write_text("mine")
    recipe = tiny(stages=[{"stage": "train", "steps": 3}])
    run_recipe(recipe, output=tmp_path / "out", restart=True)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "out" / "plan.json").exists()  # the earlier run's
    assert len((tmp_path / "out" / "model.safetensors").read_bytes()) == len(dense)


def test_a_dry_run_writes_nothing_and_counts_the_steps_of_a_real_run(
    finished: tuple[Path, Any, list[str]], tmp_path: Path
) -> None:
    output, result, lines = finished
    dry = run_recipe(full(), output=tmp_path / "out", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    assert dry.steps == result.steps == {1: 12, 2: 12, 4: 12}
    for number in dry.steps:
        (history,) = (output / "stages").glob(f"{number:02d}-*/history.json")
        assert json.loads(history.read_text())[-1]["step"] == dry.steps[number]
    assert "12 steps" in dry.description and "36 training steps" in dry.description
    assert f"{result.metrics['dense']['params']:,} parameters" in dry.description
    assert f"{result.metrics['dense']['macs']:,} MACs" in dry.description
    assert "0.5 of the MACs" in dry.description
    assert lines[0] == "[1/6] train: 12 steps"


@pytest.mark.parametrize(
    "training",
    [
        {"gradient_accumulation_steps": 4},
        {"gradient_accumulation_steps": 5, "num_train_epochs": 1.5},
        {"dataloader_drop_last": True, "per_device_train_batch_size": 36},
        {"max_steps": 7},
    ],
)
def test_steps_are_counted_as_trainer_counts_them(training: dict[str, Any]) -> None:
    from transformers import Trainer

    from hf_compress.recipe.data import as_batch
    from hf_compress.recipe.preparation import prepare, training_arguments

    recipe = tiny(stages=[{"stage": "train", "training": training}])
    prepared = prepare(load_recipe(recipe))
    arguments = training_arguments(prepared.recipe, 0, Path("unused"))
    trainer = Trainer(prepared.model, arguments, as_batch, train_dataset=prepared.training_split(0))
    assert prepared.steps[0] == trainer.set_initial_training_values(arguments, trainer.get_train_dataloader())[-1]


def test_the_learning_rate_falls_at_the_milestones(finished: tuple[Path, Any, list[str]]) -> None:
    history = json.loads((finished[0] / "stages" / "01-train" / "history.json").read_text())
    rates = {entry["step"]: entry["learning_rate"] for entry in history if "learning_rate" in entry}
    # logged before the scheduler's step of the same number, so the fall at step 6 of 12 shows from step 7 on
    assert rates == pytest.approx({3: 0.05, 6: 0.05, 9: 0.005, 12: 0.005})


def test_a_proximal_support_is_removed_without_a_budget(tmp_path: Path) -> None:
    recipe = tiny()
    recipe["stages"][1:] = [
        {"stage": "proximal_slimming", "epochs": 3, "strength": 4.0, "coupling": 10.0, "gamma_init": 0.5},
        {"stage": "prune", "support": True, "min_keep": 2, "round_to": 2},
    ]
    run_recipe(recipe, output=tmp_path / "out")
    from safetensors.torch import load_file

    from hf_compress import Plan

    saved = load_file(tmp_path / "out" / "stages" / "02-proximal_slimming" / "scores.safetensors")
    support = {name[8:]: mask for name, mask in saved.items() if name.startswith("support/")}
    plan = Plan.from_json((tmp_path / "out" / "plan.json").read_text())
    assert any(not mask.all() for mask in support.values())  # the method has removed something
    for name, mask in support.items():
        kept = set(plan.keep.get(name, range(len(mask))))
        wanted = max(2, -(-int(mask.sum()) // 2) * 2)
        assert kept >= set(mask.nonzero().flatten().tolist()) and len(kept) == wanted


def test_two_prunes_share_one_budget_and_keep_both_plans(tmp_path: Path) -> None:
    recipe = tiny(
        stages=[
            {"stage": "prune", "macs": 0.7},
            {"stage": "finetune", "steps": 1},
            {"stage": "prune", "macs": 0.4},
            {"stage": "report", "latency_rounds": 1},
        ]
    )
    metrics = run_recipe(recipe, output=tmp_path / "out").metrics
    assert metrics is not None and metrics["compressed"]["macs"] <= 0.4 * metrics["dense"]["macs"]
    assert metrics["compressed"]["macs"] > 0.3 * metrics["dense"]["macs"]  # a share of the dense model, not 0.4 of 0.7
    assert metrics["dense"]["onnx_latency_ms"] is None and metrics["onnx_max_abs_diff"] is None
    assert (tmp_path / "out" / "plan-1.json").exists() and (tmp_path / "out" / "plan.json").exists()


def test_a_latency_budget_is_met_by_the_prediction(tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    recipe = tiny(stages=[{"stage": "train", "steps": 1}, {"stage": "prune", "latency": 0.9}])
    recipe["model"]["config"] |= {
        "embedding_size": 32,
        "hidden_sizes": [32, 64],
    }  # wide enough for time to depend on it
    recipe["data"]["image_size"] = 32
    lines: list[str] = []
    run_recipe(recipe, output=tmp_path / "out", say=lines.append)
    assert "0.9 of the time" in lines[1] and "ms for one image" in lines[1]
    before, after = (
        AutoModelForImageClassification.from_pretrained(folder)
        for folder in (tmp_path / "out" / "stages" / "01-train" / "model", tmp_path / "out")
    )
    assert sum(p.numel() for p in after.parameters()) < sum(p.numel() for p in before.parameters())


def test_a_run_of_an_older_version_is_continued(finished: tuple[Path, Any, list[str]]) -> None:
    """The marker lacks fields that came later; they have their defaults."""
    marker = finished[0] / ".hf_compress_run.json"
    content = json.loads(marker.read_text())
    del content["recipe"]["task"], content["recipe"]["data"]["box_format"]
    marker.write_text(json.dumps(content))
    assert run_recipe(full(), output=finished[0]).was_finished


def test_a_compressed_model_can_be_the_start_of_another_run(
    finished: tuple[Path, Any, list[str]], tmp_path: Path
) -> None:
    recipe = tiny(model={"pretrained": str(finished[0])}, stages=[{"stage": "prune", "macs": 0.8}])
    run_recipe(recipe, output=tmp_path / "out")
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (finished[0], tmp_path / "out")]
    assert sizes[1] < sizes[0]


def test_the_published_recipe_runs_again(finished: tuple[Path, Any, list[str]]) -> None:
    written = load_recipe(finished[0] / "recipe.yaml")
    original = load_recipe(full())
    assert written.model_dump() == original.model_dump()
    assert run_recipe(finished[0] / "recipe.yaml", output=finished[0]).was_finished


def test_torch_is_left_as_it_was(tmp_path: Path) -> None:
    before = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    run_recipe(tiny(stages=[{"stage": "prune", "ratio": 0.5}]), output=tmp_path / "out")
    assert (torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()) == before


_SMALL = "hidden_size: 48, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 96"
STAND_INS = {
    "afidaf_voc": "{model_type: afidaf, hidden_sizes: [32, 48, 64, 64, 64], image_size: 64}",
    "afidaf_coco": "{model_type: afidaf, hidden_sizes: [32, 48, 64, 64, 64], image_size: 64}",
    "sidt_cifar100": f"{{model_type: deit, image_size: 28, patch_size: 7, {_SMALL}}}",
    "sidt_coco": f"{{model_type: yolos, image_size: [64, 64], num_detection_tokens: 5, {_SMALL}}}",
}


@pytest.mark.parametrize("name", sorted(p.name for p in RECIPES.glob("*.yaml")))
def test_public_recipes_are_valid(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / name)
    assert recipe.name == Path(name).stem
    overrides: list[str] = []
    if recipe.model.pretrained is not None:  # a model of the same kind, since no Hub is assumed to be in reach
        overrides += ["model.new_head=false", "model.pretrained=null", f"model.config={STAND_INS[recipe.name]}"]
    if recipe.data.name == "rendered_eyes":
        overrides += [f"data.eyes.{split}=32" for split in ("train", "weak", "validation", "test")]
    elif recipe.data.name == "scenes":
        overrides += [f"data.scenes.{split}=16" for split in ("train", "validation", "test")]
    elif recipe.task == "object-detection":
        for split in ("train", "test"):
            Scenes(split, 12, size=64).write_coco(tmp_path / "coco" / split)
        overrides += [f"data.name={tmp_path / 'coco'}", "data.image_size=64"]
    elif recipe.task == "image-segmentation":
        values = np.arange(21, dtype=np.uint8).repeat(3).reshape(9, 7)  # every class of VOC
        masks = [Image.fromarray(values).resize((64, 64), Image.Resampling.NEAREST)] * 24
        column = recipe.data.mask_column
        assert column is not None
        overrides += [f"data.name={save_masks(tmp_path / 'masks', masks, column, size=64)}", "data.image_size=64"]
    elif recipe.data.name != "digits":
        if not FASHION.is_dir():
            pytest.skip(f"needs the data set at {FASHION}, and no Hub is assumed to be in reach")
        limits = ["data.train_limit=64", "data.validation_limit=32", "data.test_limit=32"]
        overrides += [f"data.name={FASHION}", "data.image_column=null", "data.label_column=null", *limits]
        if recipe.model.pretrained is not None:
            overrides.append("data.image_size=28")  # that of the model in its place
    result = run_recipe(RECIPES / name, overrides, tmp_path / "out", dry_run=True)
    assert sum(result.steps.values()) > 0


def test_the_recipe_given_as_data_is_not_changed(tmp_path: Path) -> None:
    recipe = full()
    before = copy.deepcopy(recipe)
    run_recipe(recipe, ["seed=3"], tmp_path / "out", dry_run=True)
    assert recipe == before
    assert yaml.safe_load(load_recipe(recipe, ["seed=3"]).as_yaml())["seed"] == 3
