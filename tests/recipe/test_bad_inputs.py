"""Whatever is wrong is said before any training, in one error that names the thing and the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny

from hf_compress.errors import (
    BudgetError,
    CheckpointError,
    DataError,
    HfCompressError,
    HubError,
    ModelError,
    NothingToShrinkError,
    RecipeError,
)
from hf_compress.recipe import load_recipe, run_recipe


@pytest.fixture(autouse=True)
def _no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr("transformers.Trainer.train", refuse)


def failing(
    recipe: Any, output: Path, kind: type[HfCompressError], *words: str, overrides: tuple[str, ...] = ()
) -> None:
    """Run, expect one error that holds all words, and no trace of a run."""
    with pytest.raises(kind) as caught:
        run_recipe(recipe, overrides, output)
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message
    assert not output.exists()


def pretrained(folder: Path, **settings: Any) -> Any:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        **{"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 10}
        | settings
    )
    model = ResNetForImageClassification(config)
    model.save_pretrained(folder)
    return model


def test_nothing_to_shrink(tmp_path: Path) -> None:
    # a ViT has no BatchNorm and no layer scale, so slimming has nothing to act on
    vit = {
        "model_type": "vit",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "patch_size": 8,
    }
    recipe = tiny(model={"config": vit})
    failing(recipe, tmp_path / "out", NothingToShrinkError, "stages.1", "scale", "magnitude")


def test_budget_out_of_reach_names_the_lowest(tmp_path: Path) -> None:
    recipe = tiny()
    recipe["stages"][2] = {"stage": "prune", "macs": 0.0001}
    failing(recipe, tmp_path / "out", BudgetError, "stages.2", "smallest model", "macs >= 0.")


def test_budget_out_of_reach_with_the_axes_that_slimming_scores(tmp_path: Path) -> None:
    recipe = tiny()
    recipe["stages"][2] = {"stage": "prune", "params": 100, "min_keep": 8}
    failing(recipe, tmp_path / "out", BudgetError, "stages.2", "params", "min_keep")


def test_a_latency_out_of_reach_is_said_before_training(tmp_path: Path) -> None:
    recipe = tiny()
    recipe["stages"][2] = {"stage": "prune", "latency": 1e-6}
    failing(recipe, tmp_path / "out", BudgetError, "stages.2", "latency")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pretrained_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    model = pretrained(tmp_path / "model")
    with torch.no_grad():
        model.classifier[1].weight[3, 3] = value
    model.save_pretrained(tmp_path / "model")
    recipe = tiny(model={"pretrained": str(tmp_path / "model")})
    failing(recipe, tmp_path / "out", ModelError, "model.pretrained", "classifier.1.weight", "diverged", "checkpoint")


def test_images_of_a_wrong_size(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=24, patch_size=8,
        num_labels=10,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    recipe = tiny(model={"pretrained": str(tmp_path / "model")}, stages=[{"stage": "prune", "macs": 0.5}])
    failing(recipe, tmp_path / "out", DataError, "data.image_size", "3x16x16", "data.image_size: 24")


def test_images_with_a_wrong_number_of_channels(tmp_path: Path) -> None:
    pretrained(tmp_path / "model", num_channels=1)
    recipe = tiny(model={"pretrained": str(tmp_path / "model")})
    failing(recipe, tmp_path / "out", DataError, "field model", "1 channel", "RGB", "num_channels 3")
    recipe = tiny()
    recipe["model"]["config"]["num_channels"] = 1
    failing(recipe, tmp_path / "out", DataError, "1 channel", "RGB")


def test_class_counts_that_do_not_match(tmp_path: Path) -> None:
    pretrained(tmp_path / "model", num_labels=7)
    recipe = tiny(model={"pretrained": str(tmp_path / "model")})
    failing(recipe, tmp_path / "out", DataError, "model.pretrained", "7 classes", "digits has 10", "new_head")
    recipe = tiny()
    recipe["model"]["config"]["num_labels"] = 7
    failing(recipe, tmp_path / "out", DataError, "num_labels", "7 classes", "digits has 10", "Leave num_labels out")


def test_a_new_head_takes_any_class_count(tmp_path: Path) -> None:
    pretrained(tmp_path / "model", num_labels=7)
    recipe = tiny(model={"pretrained": str(tmp_path / "model"), "new_head": True})
    result = run_recipe(recipe, output=tmp_path / "out", dry_run=True)
    assert "10 classes" in result.description


def test_a_foreign_output_folder_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for restart in (False, True):
        with pytest.raises(CheckpointError, match=r"thesis\.tex.*another --output"):
            run_recipe(tiny(), output=out, restart=restart)
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]


def test_an_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        run_recipe(tiny(), output=tmp_path / "out")


BROKEN_FILES = {
    "tab": ("name: a\n\tmodel: b\n", ["line 2", "not readable as YAML"]),
    "open bracket": ("name: [a\n", ["line 2", "not readable as YAML"]),
    "a list": ("- name: a\n", ["found a list"]),
    "empty": ("", ["an empty file"]),
    "twice": ("name: a\nseed: 1\nseed: 2\n", ["line 3", "field seed", "line 2"]),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_unreadable_recipes(case: str, tmp_path: Path) -> None:
    text, words = BROKEN_FILES[case]
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    failing(path, tmp_path / "out", RecipeError, "recipe.yaml", *words)


def test_a_recipe_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_bytes(b"\xff\xfe\x00")
    failing(tmp_path / "quickstart.yaml", tmp_path / "out", RecipeError, "cannot be read as text")
    failing(tmp_path / "quikstart.yaml", tmp_path / "out", RecipeError, "no such file", "'quickstart.yaml'")


FIELDS = {
    "epoch: 3": ("field stages.0.epoch", "unknown field", "Did you mean 'epochs'?"),
    "epochs: 0": ("field stages.0.epochs", "greater than 0", "0"),
    "epochs: 2\n    steps: 3": ("field stages.0", "not both"),
    "training: {learning_rat: 0.1}": ("stages.0.training.learning_rat", "Did you mean 'learning_rate'?"),
    "training: {seed: 3}": ("stages.0.training.seed", "recipe's `seed`"),
    "training: {num_train_epochs: many}": ("stages.0.training.num_train_epochs", "many"),
    "training: {optim: sgdd}": ("stages.0.training", "sgdd"),
    "training: {lr_scheduler_type: cosin}": ("stages.0.training", "cosin"),
}


@pytest.mark.parametrize("text", FIELDS)
def test_fields_that_do_not_fit_are_named_with_their_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    head = "name: a\nmodel:\n  config: {model_type: resnet}\ndata: {name: digits, image_size: 16}\nstages:\n"
    path.write_text(f"{head}  - stage: train\n    {text}\n")
    lines = ("line 6", "line 7")  # of the stage, or of the field in it
    with pytest.raises(RecipeError) as caught:
        run_recipe(path, output=tmp_path / "out")
    message = str(caught.value)
    assert any(line in message for line in lines), message
    assert [word for word in FIELDS[text] if word not in message] == [], message


MODELS = {
    "model_type: resnett": ("model_type", "Did you mean 'resnet'?"),
    "model_type: bert": ("model_type", "image classification"),
    "model_type: resnet, hiden_sizes: [8]": ("hiden_sizes", "Did you mean 'hidden_sizes'?"),
    "model_type: resnet, layer_type: basics": ("model.config", "layer_type"),
}


@pytest.mark.parametrize("text", MODELS)
def test_models_that_cannot_be_built(text: str, tmp_path: Path) -> None:
    import yaml

    failing(tiny(model={"config": yaml.safe_load(f"{{{text}}}")}), tmp_path / "out", HfCompressError, *MODELS[text])


def test_a_pretrained_folder_that_is_not_there(tmp_path: Path) -> None:
    failing(tiny(model={"pretrained": "./nowhere"}), tmp_path / "out", HfCompressError, "model.pretrained", "no folder")


def test_a_pretrained_checkpoint_without_its_classifier(tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=10)
    ResNetModel(config).save_pretrained(tmp_path / "model")
    recipe = tiny(model={"pretrained": str(tmp_path / "model")})
    failing(recipe, tmp_path / "out", ModelError, "classifier.1.weight", "new_head")


def test_data_that_is_not_there(tmp_path: Path) -> None:
    failing(tiny(data={"name": "./nowhere"}), tmp_path / "out", HfCompressError, "data.name", "no folder")


def test_methods_with_impossible_numbers(tmp_path: Path) -> None:
    recipe = tiny()
    recipe["stages"][1] |= {"penalty": "l3"}
    failing(recipe, tmp_path / "out", RecipeError, "stages.1", "l3", "transformed_l1")
    recipe["stages"][1] |= {"penalty": "lp", "parameters": {"q": 0.5}}
    failing(recipe, tmp_path / "out", RecipeError, "stages.1", "q")


def test_pushing_without_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    recipe = tiny()
    recipe["stages"] += [{"stage": "push", "repo": "someone/something"}]
    failing(recipe, tmp_path / "out", HubError, "stages.4", "token", "HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: True)
    failing(recipe, tmp_path / "out", HubError, "HF_HUB_OFFLINE")


def test_exporting_without_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name == "onnxruntime" else find_spec(name, *a)
    )
    recipe = tiny()
    recipe["stages"] += ["export"]
    failing(recipe, tmp_path / "out", RecipeError, "stages.4", "onnxruntime", "pip install")


STAGES = {
    "export, finetune": ("changes the model after export",),
    "train, train, export, export": ("one export stage",),
    "report, export": ("export comes before report",),
}


@pytest.mark.parametrize("names", STAGES)
def test_stages_in_an_order_that_cannot_work(names: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(tiny(stages=names.split(", ")))
    assert [word for word in STAGES[names] if word not in str(caught.value)] == []
