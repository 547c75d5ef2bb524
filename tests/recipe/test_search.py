"""Recipes that search: cells, and then the network that they chose; and widths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny import tiny

from hf_compress.errors import HfCompressError
from hf_compress.recipe import load_recipe, run_recipe
from hf_compress.recipe.preparation import prepare

SUPERNET = {"model_type": "darts_supernet", "num_cells": 3, "width": 4, "nodes": 2, "stem_multiplier": 1}
SEARCH = {"stage": "architecture_search", "steps": 4, "architecture_lr": 0.1, "training": {"save_steps": 2}}


def cells(*stages: Any, **config: Any) -> dict[str, Any]:
    return {**tiny(), "model": {"config": {**SUPERNET, **config}}, "stages": list(stages)}


def quietly(recipe: dict[str, Any], output: Path) -> Any:
    return run_recipe(recipe, output=output, say=lambda line: None)


def test_cells_are_searched_derived_trained_and_reported(tmp_path: Path) -> None:
    output = tmp_path / "run"
    result = quietly(
        cells(
            {"stage": "train", "steps": 2},
            {**SEARCH, "training": {"logging_steps": 1}},
            {"stage": "derive", "config": {"width": 6, "auxiliary_weight": 0.4}},
            {"stage": "train", "steps": 3},
            {"stage": "report", "latency_rounds": 1},
        ),
        output,
    )
    assert result.steps == {1: 2, 2: 4, 4: 3}
    metrics = result.metrics
    assert metrics["reload_max_abs_diff"] == 0
    model = transformers.AutoModelForImageClassification.from_pretrained(output)
    assert model.config.model_type == "darts" and model.config.width == 6
    assert model.config.genotype == json.loads((output / "genotype.json").read_text(encoding="utf-8"))
    card = (output / "README.md").read_text(encoding="utf-8")
    assert (
        "architecture.png" in card
        and "cells.png" in card
        and "supernet" in card
        and (output / "architecture.png").stat().st_size > 5000
    )


def test_widths_are_searched_and_cut(tmp_path: Path) -> None:
    result = quietly(
        {
            **tiny(),
            "stages": [
                {
                    "stage": "width_search",
                    "epochs": 2,
                    "target": 0.4,
                    "architecture_lr": 0.5,
                    "training": {"save_steps": 2},
                },
                {"stage": "prune", "support": True},
                {"stage": "finetune", "steps": 2},
                {"stage": "report", "latency_rounds": 1},
            ],
        },
        tmp_path / "run",
    )
    # 96 images, 48 of them in the training half, batches of 16
    assert result.steps == {1: 6, 3: 2}
    assert result.metrics["compressed"]["macs"] < 0.8 * result.metrics["dense"]["macs"]
    assert result.metrics["reload_max_abs_diff"] == 0
    assert (tmp_path / "run" / "sparsity.png").exists()


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({**tiny(), "stages": [{"stage": "architecture_search", "steps": 2}]}, "architecture_parameters"),
        (cells({"stage": "architecture_search", "steps": 2, "split": 0.001}), "half empty"),
        (cells({"stage": "architecture_search", "steps": 2, "split": 1.0}), "split"),
        (cells({"stage": "architecture_search", "steps": 2, "method": "rart"}), "Did you mean 'rarts'"),
        (cells({"stage": "architecture_search", "steps": 2, "coupling": -1}), "coupling"),
        (cells(SEARCH, operators=["sep_conv_9x9"]), "sep_conv_9x9"),
        (cells(SEARCH, {"stage": "derive", "config": {"width": 0}}), "width"),
        (cells(SEARCH, {"stage": "derive", "config": {"depth": "x"}}), "depth"),
        (cells({"stage": "derive"}), "needs an architecture_search stage"),
        (cells(SEARCH, "derive", {"stage": "prune", "macs": 0.5}), "another recipe"),
        ({**tiny(), "stages": [{"stage": "width_search", "steps": 2, "kinds": ["heads"]}]}, "heads"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_work_is_refused_before_anything_is_written(recipe: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(HfCompressError, match=words):
        prepare(load_recipe(recipe))
