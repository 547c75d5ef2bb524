"""Pictures of cells: written whole or not at all, and refused with a reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_compress.errors import ModelError
from hf_compress.measurement.plots_cells import plot_cells, plot_genotype_history, plot_operator_weights
from hf_compress.models.darts.genotype_darts import DARTS_V2, OPERATORS, random_genotype
from hf_compress.recipe.report import _draw_cells


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.size[0] == 900
        return np.asarray(picture.convert("RGB"))


def has(image: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool((image == colour).all(-1).any())


BLUE, ORANGE, GREEN = (0, 114, 178), (213, 94, 0), (0, 158, 115)


def test_an_operator_is_drawn_where_it_is_used_and_nowhere_else(tmp_path: Path) -> None:
    image = pixels(plot_cells(tmp_path / "cells.png", DARTS_V2))
    assert has(image, BLUE) and has(image, ORANGE) and has(image, GREEN)
    skips = random_genotype(3, ["skip_connect"], seed=0)
    image = pixels(plot_cells(tmp_path / "skips.png", {"normal": skips["normal"]}))
    assert not any(has(image, colour) for colour in (BLUE, ORANGE, GREEN))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cells.png", "skips.png"]
    for wrong in ({}, {"normal": [[["conv", 0]]]}):
        with pytest.raises(ModelError):
            plot_cells(tmp_path / "no.png", wrong)
    assert not (tmp_path / "no.png").exists()


def test_operator_weights(tmp_path: Path) -> None:
    weights = {kind: torch.rand(14, 8).softmax(1) for kind in ("normal", "reduce")}
    image = pixels(plot_operator_weights(tmp_path / "weights.png", weights, OPERATORS))
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 100
    with pytest.raises(ModelError, match="13 rows"):
        plot_operator_weights(tmp_path / "no.png", {"normal": torch.rand(13, 8)}, OPERATORS)
    with pytest.raises(ModelError, match="at least one"):
        plot_operator_weights(tmp_path / "no.png", {}, OPERATORS)


def test_history_of_genotypes(tmp_path: Path) -> None:
    history = [random_genotype(2, ["sep_conv_5x5", "max_pool_3x3"], seed=seed) for seed in range(5)]
    image = pixels(plot_genotype_history(tmp_path / "history.png", history))
    assert has(image, BLUE) and has(image, GREEN) and not has(image, ORANGE)
    for wrong in ([], [DARTS_V2, {"normal": DARTS_V2["normal"]}], [random_genotype(2), random_genotype(3)]):
        with pytest.raises(ModelError, match="all must have the same"):
            plot_genotype_history(tmp_path / "no.png", wrong)


def test_the_card_shows_the_cells_of_a_model_that_has_some(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    assert _draw_cells(tmp_path, tmp_path) == {} and not (tmp_path / "cells.png").exists()
    from hf_compress.models.darts import DartsConfig

    DartsConfig().save_pretrained(tmp_path)
    assert list(_draw_cells(tmp_path, tmp_path)) == ["cells.png"]
    assert has(pixels(tmp_path / "cells.png"), BLUE)
