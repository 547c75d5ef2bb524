"""Masks and kernels of AFIDAF's Fourier filters, read from a model and drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from families import perturb
from PIL import Image

from hf_compress.errors import ModelError
from hf_compress.measurement.plots_afidaf import fourier_masks, plot_fourier_masks
from hf_compress.models.afidaf import AfidafConfig, AfidafForImageClassification

WIDTHS = {
    "hidden_sizes": [8, 8, 16, 16, 16],
    "depths": [1, 1, 0],
    "stem_channels": 8,
    "expand_ratio": 1,
    "num_labels": 3,
}


def test_the_kernel_is_what_the_filter_convolves_with() -> None:
    model = perturb(AfidafForImageClassification(AfidafConfig(**WIDTHS)))
    x = torch.randn(1, 3, 56, 72)
    masks = fourier_masks(model, x)
    (name, (mask, kernel)), *others = masks.items()
    assert mask.shape == (16, 7, 5) and kernel.shape == (16, 7, 9) and len(others) == 1
    seen: list[torch.Tensor] = []
    module = model.get_submodule(name)
    handle = module.register_forward_hook(lambda _, inputs, output: seen.extend((inputs[0], output)))
    with torch.no_grad():
        model(x)
    handle.remove()
    added = torch.zeros_like(seen[0])
    for i in range(7):
        for j in range(9):
            added += kernel[:, i, j, None, None] * torch.roll(seen[0], (i, j), (2, 3))
    torch.testing.assert_close(seen[1] - seen[0], added, rtol=1e-4, atol=1e-5)  # float32, sums of 63


def test_picture(tmp_path: Path) -> None:
    model = perturb(AfidafForImageClassification(AfidafConfig(**WIDTHS)))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    path = plot_fourier_masks(tmp_path / "masks.png", model, torch.randn(1, 3, 64, 64), image)
    with Image.open(path) as picture:
        assert picture.size == (900, 960) and len(np.unique(np.asarray(picture.convert("L")))) > 50
    assert [p.name for p in tmp_path.iterdir()] == ["masks.png"]
    with pytest.raises(ModelError, match="no Fourier filter 'elsewhere'"):
        plot_fourier_masks(tmp_path / "no.png", model, torch.randn(1, 3, 64, 64), image, "elsewhere")
    with pytest.raises(ModelError, match="use_fourier_filter"):
        fourier_masks(
            AfidafForImageClassification(AfidafConfig(**WIDTHS, use_fourier_filter=False)), torch.randn(1, 3, 64, 64)
        )
