"""Recipes with trained rank pruning, factorize, sparse groups and growing regularisation, from digits to a reloaded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny

import hf_compress
from hf_compress.errors import HfCompressError
from hf_compress.recipe import load_recipe, run_recipe


def recipe(*stages: Any) -> dict[str, Any]:
    return {**tiny(), "stages": [*stages, "export", {"stage": "report", "latency_rounds": 2}]}


def test_low_rank_then_slimming_then_pruning(tmp_path: Path) -> None:
    result = run_recipe(
        recipe(
            {"stage": "trained_rank_pruning", "steps": 6, "period": 2, "energy": 0.05, "nuclear": 0.001},
            {"stage": "factorize", "macs": 0.8, "calibration_images": 64},
            {"stage": "network_slimming", "steps": 4, "strength": 0.01},
            {"stage": "prune", "macs": 0.5},
            {"stage": "finetune", "steps": 2},
        ),
        output=tmp_path / "run",
        say=lambda line: None,
    )
    metrics = result.metrics
    assert metrics["compressed"]["macs"] <= 0.5 * metrics["dense"]["macs"]
    assert metrics["reload_max_abs_diff"] == 0
    assert metrics["onnx_max_abs_diff"] <= 1e-4  # what export_onnx promises
    made = {path.name for path in (tmp_path / "run").iterdir()}
    assert made >= {"ranks.png", "spectra.png", "ranks.json", "widths.png", "README.md"}
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "ranks.png" in card and "spectra.png" in card
    ranks = json.loads((tmp_path / "run" / "ranks.json").read_text(encoding="utf-8"))
    assert ranks and all(0 < rank < full for _, rank, full in ranks.values())


def test_zero_groups_go(tmp_path: Path) -> None:
    # a strength that makes all groups zero: every axis keeps its last unit, and the model still runs
    result = run_recipe(
        recipe(
            {"stage": "sparse_group", "steps": 6, "strength": 10.0, "split": 5.0},
            {"stage": "prune", "support": True},
            {"stage": "finetune", "steps": 2},
        ),
        output=tmp_path / "run",
        say=lambda line: None,
    )
    assert result.metrics["compressed"]["macs"] < 0.5 * result.metrics["dense"]["macs"]
    assert result.metrics["reload_max_abs_diff"] == 0
    assert "group_norms.png" in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")


def test_what_the_target_of_growing_regularisation_names_goes(tmp_path: Path) -> None:
    result = run_recipe(
        recipe(
            {"stage": "growing_regularization", "steps": 6, "target": {"macs": 0.5}, "refresh": 2},
            {"stage": "prune", "support": True},
            {"stage": "finetune", "steps": 2},
        ),
        output=tmp_path / "run",
        say=lambda line: None,
    )
    metrics = result.metrics
    assert 0.4 * metrics["dense"]["macs"] < metrics["compressed"]["macs"] <= 0.5 * metrics["dense"]["macs"]
    assert metrics["reload_max_abs_diff"] == 0


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"stage": "factorize", "macs": 0.001}, "stages"),
        ({"stage": "factorize"}, "macs"),
        ({"stage": "factorize", "energy": 1.5}, "energy"),
        ({"stage": "factorize", "energy": 0.1, "targets": ["nothing.*"]}, "nothing"),
        ({"stage": "trained_rank_pruning", "steps": 2, "targets": ["nothing.*"]}, "nothing"),
        ({"stage": "trained_rank_pruning", "steps": 2, "period": 0}, "period"),
        ({"stage": "sparse_group", "steps": 2, "element": "l7"}, "l7"),
        ({"stage": "growing_regularization", "steps": 2, "target": {"macs": 0.001}}, "cannot be reached"),
        ({"stage": "growing_regularization", "steps": 2, "target": {"latency": 0.5}}, "name macs, params or both"),
        ({"stage": "growing_regularization", "steps": 2, "target": 0.5, "hold": 0.1}, "warmup"),
        ({"stage": "growing_regularization", "steps": 2}, "target"),
    ],
)
def test_what_cannot_work_is_refused_before_training(stage: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(HfCompressError, match=words):
        run_recipe(recipe(stage), output=tmp_path / "run", say=lambda line: None)
    assert not (tmp_path / "run" / "stages").exists()  # nothing was begun


def test_support_does_not_reach_over_a_factorisation() -> None:
    with pytest.raises(HfCompressError, match="factorize in between"):
        load_recipe(
            recipe(
                {"stage": "sparse_group", "steps": 2},
                {"stage": "factorize", "macs": 0.8},
                {"stage": "prune", "support": True},
            )
        )


def test_the_names_are_public() -> None:
    for name in (
        "factorize",
        "GrowingRegularizationCallback",
        "SparseGroupCallback",
        "TrainedRankPruningCallback",
        "quantize",
        "LatencyTable",
        "Scenes",
    ):
        assert callable(getattr(hf_compress, name))
