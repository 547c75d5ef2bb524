"""Checkpoints of a training hold a model's own parameter names; what is saved afterwards holds the usual ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ResNetConfig, ViTConfig

from hf_compress.methods.checkpoint_names import own_names_in_checkpoints

CONFIGS = {
    "vit": ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16),
    "resnet": ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic"),
}


def saved_names(model: torch.nn.Module, folder: Path) -> set[str]:
    model.save_pretrained(folder)  # type: ignore[operator]
    return set(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("is_loaded", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_own_names_inside_and_the_usual_ones_afterwards(kind: str, is_loaded: bool, tmp_path: Path) -> None:
    model = AutoModelForImageClassification.from_config(CONFIGS[kind])
    if is_loaded:
        model.save_pretrained(tmp_path / "start")
        model = AutoModelForImageClassification.from_pretrained(tmp_path / "start")
    usual = saved_names(model, tmp_path / "before")
    with pytest.raises(RuntimeError), own_names_in_checkpoints(model):
        # what Trainer reads back by load_state_dict
        assert saved_names(model, tmp_path / "inside") == set(model.state_dict())
        raise RuntimeError
    assert saved_names(model, tmp_path / "after") == usual
    for folder in ("inside", "after"):
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / folder)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
