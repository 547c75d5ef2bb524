"""The stage that puts filters in place of attention: a whole run, other budgets, and what is refused before it starts."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny

from hf_compress.errors import BudgetError, HfCompressError, MethodError, RecipeError
from hf_compress.recipe import load_recipe, run_recipe
from hf_compress.surgery.filtered import filtered_in

VIT = {
    "model_type": "vit", "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24,
    "image_size": 32, "patch_size": 2,
}  # fmt: skip
REPLACE = {
    "stage": "replace_attention", "layers": "auto", "count": 2, "calibration_images": 48, "match_steps": 4,
}  # fmt: skip
DATA = {"name": "digits", "image_size": 32, "train_limit": 64, "validation_limit": 16, "test_limit": 16}


def recipe(stages: list[Any] | None = None, model: dict[str, Any] | None = None, **replace: Any) -> dict[str, Any]:
    usual = [
        {"stage": "train", "steps": 3},
        {**REPLACE, **replace},
        {"stage": "finetune", "steps": 2},
        {"stage": "prune", "macs": 0.7},
        "export",
        {"stage": "report", "latency_rounds": 1},
    ]
    training = {"per_device_train_batch_size": 16, "learning_rate": 0.001}
    config = {"config": copy.deepcopy(VIT) if model is None else model}
    return tiny(model=config, data=dict(DATA), training=training, stages=usual if stages is None else stages)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, list[str]]:
    output = tmp_path_factory.mktemp("runs") / "tiny"
    lines: list[str] = []
    return output, run_recipe(recipe(), output=output, say=lines.append), lines


def test_a_whole_run(finished: tuple[Path, Any, list[str]]) -> None:
    from transformers import AutoModelForImageClassification

    output, result, lines = finished
    assert any("replace_attention: filters in place of 2 of 3 attention blocks" in line for line in lines)
    assert {path.name for path in output.iterdir()} >= {"attention.json", "filters.png", "plan.json", "README.md"}
    rows = json.loads((output / "attention.json").read_text())
    replaced = [row["name"] for row in rows if row["filter"] == "afidaf"]
    assert len(rows) == 3 and len(replaced) == 2
    assert sorted(row["loss_increase"] for row in rows)[:2] == sorted(
        row["loss_increase"] for row in rows if row["filter"]
    )
    assert all(row["error"] > 0 and row["macs"] > row["filter_macs"] and row["grid"] == [16, 16] for row in rows)
    model = AutoModelForImageClassification.from_pretrained(output)
    assert [name for name, _ in filtered_in(model)] == replaced
    assert result.metrics["reload_max_abs_diff"] == 0 and 0 < result.metrics["onnx_max_abs_diff"] <= 1e-4
    # a share of the dense model, though filters have saved some of it before
    assert result.metrics["compressed"]["macs"] <= 0.7 * result.metrics["dense"]["macs"]
    notes = json.loads((output / "stages" / "02-replace_attention" / "done.json").read_text())
    assert notes["replaced"] == 2 and notes["macs"] < result.metrics["dense"]["macs"]
    card = (output / "README.md").read_text()
    assert "filters.png" in card and "replace attention" in card


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": "auto", "count": None}, "needs exactly one of `count`, `macs` and `latency`; found none"),
        ({"layers": "auto", "macs": 0.5}, "found count and macs"),
        ({"layers": "all"}, "`count` chooses layers, so it needs `layers: auto`"),
        ({"filter": "linear"}, "filter"),
        ({"match_steps": -1}, "greater than or equal to 0"),
        ({"layers": []}, "at least 1"),
    ],
)
def test_fields_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe(**changes))


def test_filters_come_before_pruning() -> None:
    stages = [{"stage": "factorize", "macs": 0.8}, {"stage": "replace_attention"}]
    with pytest.raises(RecipeError, match="Move replace_attention before factorize"):
        load_recipe(recipe(stages))


@pytest.mark.parametrize(
    ("changes", "model", "kind", "message"),
    [
        ({"count": 9}, None, BudgetError, "count=9: the model has 3 attention blocks"),
        ({"layers": ["decoder"], "count": None}, None, MethodError, "'decoder' matches nothing"),
        ({"count": None, "macs": 0.01}, None, BudgetError, "cannot be reached by replacing attention alone"),
        (
            {},
            {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
            HfCompressError,
            "has no attention block that a filter can stand in for",
        ),
    ],
)
def test_what_does_not_fit_is_found_before_training(
    tmp_path: Path, changes: dict[str, Any], model: dict[str, Any] | None, kind: type, message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        run_recipe(recipe(model=model, **changes), output=tmp_path / "out", dry_run=True)
    assert "stages[1]" in str(caught.value) or "stages.1" in str(caught.value)


def test_a_share_of_macs_is_of_the_dense_model(tmp_path: Path) -> None:
    stages = [
        {"stage": "replace_attention", "layers": "auto", "macs": 0.8, "match_steps": 0},
        {"stage": "prune", "macs": 0.6},
    ]
    description = run_recipe(recipe(stages), output=tmp_path / "out", dry_run=True).description
    assert "filters in place of" in description
    dense = int(description.split(" parameters, ")[1].split(" MACs")[0].replace(",", ""))
    (pruned,) = [line for line in description.splitlines() if "prune" in line]
    assert int(pruned.split("to about ")[1].split(" MACs")[0].replace(",", "")) <= 0.6 * dense


def test_a_recipe_that_replaces_alone(tmp_path: Path) -> None:
    """The budget is tried before training, and the stage runs, where no other stage needs the model's axes."""
    stages = [{"stage": "replace_attention", "layers": "auto", "count": 1, "calibration_images": 8, "match_steps": 1}]
    tried = run_recipe(recipe(stages), output=tmp_path / "tried", dry_run=True)
    assert "filters in place of 1 of" in tried.description
    run_recipe(recipe(stages), output=tmp_path / "out")
    notes = json.loads((tmp_path / "out" / "stages" / "01-replace_attention" / "done.json").read_text())
    assert notes["replaced"] == 1
