"""The pictures of singular values and ranks are written, whatever the number of layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_compress.measurement.plots_low_rank import plot_ranks, plot_spectra


@pytest.mark.parametrize("layers", [1, 2, 12, 40])
def test_pictures_are_written(layers: int, tmp_path: Path) -> None:
    before = {f"encoder.{i}.mlp": torch.logspace(0, -5, 8 + i) for i in range(layers)}
    after = {name: values**2 for name, values in before.items()}
    ranks = dict.fromkeys(before, 4)
    for path in (
        plot_spectra(tmp_path / "before.png", before),
        plot_spectra(tmp_path / "both.png", before, after, ranks),
        plot_ranks(tmp_path / "ranks.png", {name: len(values) for name, values in before.items()}, ranks),
    ):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    assert (tmp_path / "both.png").read_bytes() != (tmp_path / "before.png").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no layers"):
        plot_spectra(tmp_path / "no.png", {})


def test_a_layer_of_zeros_is_drawn(tmp_path: Path) -> None:
    assert plot_spectra(tmp_path / "zeros.png", {"a": torch.zeros(5)}).exists()
