"""The histogram of group norms: looked at by eyes too, here for what a program can see."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_compress.measurement.plots_sparse_group import plot_group_norms


def norms(zeros: int) -> dict[str, torch.Tensor]:
    drawn = torch.rand(2, 40, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.01
    drawn[0, :zeros] = 0
    return {"conv1.weight:out": drawn[0], "conv2.weight:out": drawn[1]}


def test_zero_groups_show(tmp_path: Path) -> None:
    pictures = [Image.open(plot_group_norms(tmp_path / f"{n}.png", norms(0), norms(n))) for n in (0, 30)]
    assert all(picture.size[0] == 900 for picture in pictures)  # 6 inches at 150 dots
    pixels = [np.asarray(picture.convert("RGB")) for picture in pictures]
    orange = [int((image == (213, 94, 0)).all(-1).sum()) for image in pixels]
    assert orange[1] > 5 * orange[0]  # the legend alone, and a bar of 30


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no groups"):
        plot_group_norms(tmp_path / "none.png", {"a": torch.zeros(3)}, {"a": torch.zeros(3)})
    assert not (tmp_path / "none.png").exists()
