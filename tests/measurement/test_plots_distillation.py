"""The pictures of distillation are written, whatever parts a loss has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hf_compress.measurement.plots_distillation import plot_affinities, plot_loss_parts


@pytest.mark.parametrize("parts", [{"kd_loss": 2.0}, {"kd_loss": 1.0, "affinity_loss": 0.1, "label_loss": 0.0}])
@pytest.mark.parametrize("steps", [1, 20])
def test_parts_of_the_loss(parts: dict[str, float], steps: int, tmp_path: Path) -> None:
    history = [{"step": 5 * i, "loss": 3.0, **{k: v / (i + 1) for k, v in parts.items()}} for i in range(steps)]
    path = plot_loss_parts(tmp_path / "parts.png", [*history, {"step": 9, "eval_loss": 1.0}, {"train_loss": 2.0}])
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    assert not list(tmp_path.glob(".*"))


def test_affinities(tmp_path: Path) -> None:
    image = np.zeros((12, 20, 3), dtype=np.uint8)
    teacher = torch.eye(30)
    first = plot_affinities(tmp_path / "same.png", image, teacher, teacher)
    second = plot_affinities(tmp_path / "other.png", image, teacher, -teacher)
    assert first.read_bytes().startswith(b"\x89PNG") and first.read_bytes() != second.read_bytes()


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="DistillationCallback"):
        plot_loss_parts(tmp_path / "no.png", [{"step": 1, "loss": 2.0}])
    with pytest.raises(ValueError, match=r"square.*\[3, 4\]"):
        plot_affinities(tmp_path / "no.png", np.zeros((2, 2)), torch.zeros(3, 4), torch.zeros(3, 4))
    assert not list(tmp_path.iterdir())
