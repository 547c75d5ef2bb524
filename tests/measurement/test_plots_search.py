import matplotlib.image
import numpy as np
import pytest

from hf_compress.measurement.plots_search import plot_architecture

HISTORY = [
    {"step": 10 * (t + 1), "architecture": {"a.normal": [[0.0, 0.1 * t, 0.0], [0.0, 0.0, 5.0]], "a.reduce": [[9.0, 1.0, 0.0]] * 2}}
    for t in range(4)
]  # fmt: skip


def picture(path, **options):
    assert plot_architecture(path, HISTORY, **options) == path
    return matplotlib.image.imread(path)


def count(image, colour):
    wanted = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return int((abs(image[..., :3] - wanted) < 0.01).all(-1).sum())


def test_every_leading_operator_has_its_colour_and_none_never_leads(tmp_path):
    image = picture(tmp_path / "a.png", operators=["none", "pool", "conv"])
    assert image.shape[1] == 900  # a phone's width, as all pictures
    # edges: 3 of 4 lead with "pool" (of "reduce", where "none" has the largest weight, both), 1 with "conv"
    assert count(image, "#0072B2") > 2.5 * count(image, "#E69F00") > 5000


def test_edges_that_are_left_out_are_pale(tmp_path):
    whole = picture(tmp_path / "a.png", operators=["none", "pool", "conv"])
    pale = picture(tmp_path / "b.png", operators=["none", "pool", "conv"], kept=lambda weights: [1])
    assert count(pale, "#0072B2") < 0.7 * count(whole, "#0072B2")
    assert count(pale, "#E69F00") == count(whole, "#E69F00")


def test_what_cannot_be_drawn_is_refused(tmp_path):
    with pytest.raises(ValueError, match="architecture"):
        plot_architecture(tmp_path / "a.png", [{"step": 1, "loss": 2.0}])
    with pytest.raises(ValueError, match="9 operators"):
        plot_architecture(tmp_path / "a.png", [{"step": 1, "architecture": {"a": [[0.0] * 9]}}])
    assert not list(tmp_path.iterdir())
