"""The pictures: written whole or not at all, and nothing in them too small, cut off or on top of something else."""

import math
import random

import pytest
from matplotlib.text import Text
from PIL import Image

from hf_compress.measurement import TradeoffPoint, plot_sparsity, plot_tradeoff, plot_widths, plots
from hf_compress.measurement.plots import plot_dimensions, short_names


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, so that a test can ask where their texts are."""
    figures = []
    leave = plots._figure.__exit__

    def remember(self, *args):
        figures.append(self.figure)
        leave(self, *args)

    monkeypatch.setattr(plots._figure, "__exit__", remember)
    return figures


def check_readable(path, figure):
    image = Image.open(path)
    assert image.format == "PNG" and image.width == 900
    renderer = figure.canvas.get_renderer()
    both = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    undrawn = {tick.label1 for axis in both for tick in axis.get_major_ticks()}
    undrawn -= {tick.label1 for axis in both for tick in axis._update_ticks()}  # outside the limits
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and t not in undrawn]
    boxes = [(t, t.get_window_extent(renderer)) for t in texts]
    boxes = [(t, box) for t, box in boxes if box.width > 0]
    assert len(boxes) > 2
    for number, (text, box) in enumerate(boxes):
        # shown at 360 CSS pixels of 1/96 inch, a 6 inch picture shrinks to 3.75 inches
        assert text.get_fontsize() * 3.75 / 6 >= 8, text
        assert box.x0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y0 >= -1 and box.y1 <= figure.bbox.y1 + 1, text
        for other, other_box in boxes[:number]:
            assert text is other or not box.padded(-2).overlaps(other_box.padded(-2)), (text, other)


KINDS = ("heads", "qk", "v", "mlp")


@pytest.mark.parametrize("depth", [1, 4, 12, 24])
@pytest.mark.parametrize("changed", [("mlp",), KINDS])
def test_dimensions_of_every_layer(depth, changed, tmp_path, drawn):
    names = vit_names(depth)[1:]
    kinds = {name: KINDS[number % 4] for number, name in enumerate(names)}
    dense = {"heads": 6, "qk": 64, "v": 64, "mlp": 1536}
    before = {name: dense[kinds[name]] for name in names}
    draw = random.Random(depth)
    after = {name: max(1, int(draw.uniform(0.1, 0.9) * before[name])) for name in names if kinds[name] in changed}
    path = plot_dimensions(tmp_path / "dimensions.png", before, after, kinds)
    check_readable(path, drawn[-1])
    assert len(drawn[-1].axes) == len(changed)  # kinds that did not change are left out
    for axes, kind in zip(drawn[-1].axes, changed, strict=True):
        heights = [bar.get_height() for bar in axes.patches]
        assert heights[:depth] == [dense[kind]] * depth
        assert heights[depth:] == [after[name] for name in names if kinds[name] == kind]
    with pytest.raises(ValueError, match="no axis changed"):
        plot_dimensions(tmp_path / "dimensions.png", before, {}, kinds)


def resnet_names(depths):
    return [
        f"resnet.encoder.stages.{stage}.layers.{block}.layer.{layer}.convolution"
        for stage, depth in enumerate(depths)
        for block in range(depth)
        for layer in (0, 1)
    ]


def vit_names(depth):
    kinds = ("attention.q_proj:heads", "attention.q_proj:head_dim", "attention.v_proj:value_dim", "mlp.fc1")
    return ["vit.embeddings.cls_token", *(f"vit.layers.{layer}.{kind}" for layer in range(depth) for kind in kinds)]


@pytest.mark.parametrize("number", [1, 2, 5, 24, 25, 60, 200])
def test_widths(number, tmp_path, drawn):
    draw = random.Random(number)
    before = {name: draw.choice([3, 64, 2048]) for name in resnet_names([3, 8, 36, 60])[:number]}
    after = {name: draw.randint(1, size) for name, size in before.items()}
    path = plot_widths(tmp_path / "w.png", before, after)
    check_readable(path, drawn[0])
    assert Image.open(path).height < 1700  # at most about two screens of a phone
    assert [p.name for p in tmp_path.iterdir()] == ["w.png"]


def test_widths_by_kind(tmp_path, drawn):
    before = {name: 768 if name.endswith("fc1") else 3 if name.endswith("heads") else 64 for name in vit_names(12)}
    path = plot_widths(tmp_path / "w.png", before, {name: size // 2 for name, size in before.items()})
    check_readable(path, drawn[0])
    words = {text.get_text() for text in drawn[0].findobj(Text)}
    assert {"heads", "head_dim", "value_dim", "fc1"} <= words


def test_bars_say_both_widths(tmp_path, drawn):
    plot_widths(tmp_path / "w.png", {"a": 16, "b": 32}, {"a": 5})
    words = {text.get_text() for text in drawn[0].findobj(Text)}
    assert {"5 / 16", "32 / 32", "a", "b"} <= words


@pytest.mark.parametrize("number", [0, 1, 40])
def test_sparsity(number, tmp_path, drawn):
    def entry(step):
        share = 0.7 / (1 + math.exp(-(step - 500) / 80))
        return {"step": step, "loss": 1.0, "sparsity": share} | {f"sparsity/{i}": share for i in range(number)}

    history = [entry(step) for step in range(10, 1000, 10)] + [{"step": 1000, "eval_loss": 1.0}]
    check_readable(plot_sparsity(tmp_path / "s.png", history), drawn[0])
    (line,) = [line for line in drawn[0].axes[0].lines if line.get_linewidth() > 3]
    assert line.get_ydata()[-1] == pytest.approx(100 * history[-2]["sparsity"])
    check_readable(plot_sparsity(tmp_path / "one.png", history[:1]), drawn[1])


def scatters():
    draw = random.Random(0)
    yield [("dense", 4.1e6, 0.975)]
    yield [("dense", 4.1e6, 0.975), ("pruned", 2.0e6, 0.61), ("compressed", 2.0e6, 0.972)]
    yield [
        ("dense", 4.1e9, 0.975),
        ("network slimming", 4.1e9, 0.973),
        ("pruned", 2e9, 0.971),
        ("fine-tuned", 2e9, 0.974),
    ]
    yield [("dense", 900, 1.0), ("compressed", 450, 1.0)]
    for _ in range(4):
        yield [(f"stage {i}", draw.uniform(1, 9) * 1e8, draw.random()) for i in range(5)]


@pytest.mark.parametrize("points", list(scatters()))
def test_tradeoff(points, tmp_path, drawn):
    check_readable(plot_tradeoff(tmp_path / "t.png", [TradeoffPoint(*point) for point in points]), drawn[0])
    words = {text.get_text().replace("\n", " ") for text in drawn[0].findobj(Text)}
    assert {label for label, _, _ in points} <= words


def test_nothing_to_draw_is_an_error_and_leaves_no_file(tmp_path):
    for draw, empty in ((plot_sparsity, [{"step": 1, "loss": 2.0}]), (plot_tradeoff, [])):
        with pytest.raises(ValueError):
            draw(tmp_path / "x.png", empty)
    with pytest.raises(ValueError):
        plot_widths(tmp_path / "x.png", {}, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("names", [resnet_names([3, 4, 6, 3]), vit_names(12), ["a"], ["x.1", "x.2"], []])
def test_short_names_stay_different(names):
    short = short_names(names)
    assert list(short) == list(names)
    assert len(set(short.values())) == len(names) and all(short.values())
    assert all(len(text) <= 24 for text in short.values())


def test_short_names_keep_what_is_short_and_cut_what_must_be():
    assert (
        short_names(resnet_names([1, 1]))["resnet.encoder.stages.1.layers.0.layer.1.convolution"]
        == "stages.1.0.layer.1"
    )
    assert short_names(["encoder.conv1", "encoder.conv2"]) == {n: n for n in ("encoder.conv1", "encoder.conv2")}
    (cut,) = short_names(["w" * 60]).values()
    assert len(cut) == 24 and "…" in cut
