"""What a student learned from its teacher: the parts of the loss over the steps, and both models' affinities on one image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .plots import _BLUE, _GREY, _ORANGE, _figure, _ticker

_PARTS = {"kd_loss": ("logits", _BLUE), "affinity_loss": ("affinity", _ORANGE), "label_loss": ("labels", "#009E73")}


def plot_loss_parts(path: str | Path, history: Iterable[Mapping[str, Any]]) -> Path:
    """Every part of the loss of distillation, with its weight, and their sum, over the training steps.

    Args:
        path: the PNG to write.
        history: ``trainer.state.log_history`` of a run with ``DistillationCallback``; entries with ``step`` and at least one
            of ``kd_loss``, ``affinity_loss`` and ``label_loss`` are drawn.
    """
    entries = [entry for entry in history if "step" in entry and any(name in entry for name in _PARTS)]
    if not entries:
        raise ValueError("no entry of the history has `kd_loss` or `affinity_loss`; was DistillationCallback there?")
    names = [name for name in _PARTS if any(name in entry for entry in entries)]
    with _figure(path, 4.6) as axes:
        marker = "o" if len(entries) == 1 else None
        steps = [entry["step"] for entry in entries]
        if len(names) > 1:
            total = [sum(entry.get(name, 0.0) for name in names) for entry in entries]
            axes.plot(steps, total, color=_GREY, linewidth=2, linestyle="--", marker=marker, label="sum")
        for name in names:
            label, colour = _PARTS[name]
            found = [entry for entry in entries if name in entry]
            values = [entry[name] for entry in found]
            axes.plot([entry["step"] for entry in found], values, color=colour, linewidth=3, marker=marker, label=label)
        if all(entry[name] > 0 for entry in entries for name in names if name in entry):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(_ticker().LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.minorticks_off()
        axes.xaxis.set_major_locator(_ticker().MaxNLocator(4, integer=True))
        axes.grid(axis="y", color="#E3E3E3")
        axes.set_axisbelow(True)
        axes.set_xlabel("training step")
        axes.set_title("parts of the loss", loc="left")
        axes.figure.legend(loc="outside lower center", ncols=4, handlelength=1.5, columnspacing=1.2)
    return Path(path)


def plot_affinities(path: str | Path, image: Any, teacher: Tensor, student: Tensor) -> Path:
    """An image, and which of its pixels have alike features: to the teacher, to the student, and the difference.

    Args:
        path: the PNG to write.
        image: as people see it, a PIL image or an array.
        teacher, student: cosines, float [n, n], as ``FeatureAffinityDistillation.affinities`` gives them; row and column i
            are pixel i of the feature map, row by row.
    """
    pixels = teacher.shape[0]
    if teacher.shape != student.shape or teacher.dim() != 2 or teacher.shape[1] != pixels:
        raise ValueError(f"two square matrices are needed, not {list(teacher.shape)} and {list(student.shape)}.")
    panels = (("teacher", teacher), ("student", student), ("difference", student - teacher))
    with _figure(path, 5.4) as frame:
        figure = frame.figure
        frame.remove()
        grid = figure.add_gridspec(2, 3, height_ratios=[2.5, 2.3])
        top = figure.add_subplot(grid[0, :])
        top.imshow(image)
        top.set_title("image", color=_GREY, fontsize=12)
        top.set_axis_off()
        drawn = None
        below = []
        for column, (title, values) in enumerate(panels):
            axes = figure.add_subplot(grid[1, column])
            drawn = axes.imshow(values.cpu().float().numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
            axes.set_title(title, color=_GREY, fontsize=12)
            axes.set_xticks([])
            axes.set_yticks([])
            below.append(axes)
        below[0].set_ylabel(f"{pixels} pixels", color=_GREY, fontsize=12)
        bar = figure.colorbar(drawn, ax=below, location="bottom", fraction=0.06, pad=0.06, aspect=40)
        bar.set_ticks([-1, 0, 1])
        bar.set_label("cosine of two pixels' features", fontsize=12)
        bar.outline.set_visible(False)
    return Path(path)


__all__ = ["plot_affinities", "plot_loss_parts"]
