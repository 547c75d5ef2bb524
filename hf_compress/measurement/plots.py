"""Pictures for a model card, readable on a phone: widths, dimensions, sparsity during training, accuracy against MACs.

A picture is 6 inches wide at 150 dots per inch, so a phone shows it at 360 CSS pixels, 0.63 of its nominal size: 13.5 pt
here are 8.4 pt there. Colours are blue and orange of the Okabe-Ito palette, which all kinds of colour vision tell apart.
"""

from __future__ import annotations

import os
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BLUE, _ORANGE, _GREY, _PALE = "#0072B2", "#D55E00", "#595959", "#C4CCD4"
_STYLE: dict[Any, Any] = {
    "font.size": 13.5,
    "axes.titlesize": 15,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GREY,
    "legend.frameon": False,
}
_WIDTH = 6.0  # inches
_MOST_BARS = 24  # more axes than this are drawn as one outline


@dataclass(frozen=True)
class TradeoffPoint:
    """One model in the accuracy-against-MACs picture.

    Attributes:
        label: for example "dense", "pruned", "fine-tuned".
        macs: multiply-accumulates of one example.
        accuracy: share of test images that are right, or another figure from 0 to 1.
    """

    label: str
    macs: float
    accuracy: float


def plot_widths(path: str | Path, before: Mapping[str, int], after: Mapping[str, int]) -> Path:
    """Width of every axis before and after; up to 24 axes as named bars, more as one outline in forward order.

    Args:
        path: the PNG to write.
        before: axis name -> size.
        after: axis name -> size kept; a missing axis kept its size.
    """
    kept = {name: after.get(name, size) for name, size in before.items()}
    if not before:
        raise ValueError("there are no axes to draw; give at least one.")
    with _figure(path, 1.5 + 0.36 * len(before) if len(before) <= _MOST_BARS else 4.4) as axes:
        if len(before) <= _MOST_BARS:
            _bars(axes, before, kept)
        else:
            _outline(axes, before, kept)
    return Path(path)


def _bars(axes: Any, before: Mapping[str, int], kept: Mapping[str, int]) -> None:
    rows = range(len(before))
    axes.barh(rows, before.values(), color=_PALE, height=0.72, label="before")
    axes.barh(rows, kept.values(), color=_BLUE, height=0.72, label="after")
    widest = max(before.values())
    for row, (name, size) in enumerate(before.items()):
        axes.text(size + 0.02 * widest, row, f"{kept[name]} / {size}", va="center", color=_GREY)
    axes.set_yticks(rows, short_names(before).values())
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.28 * widest)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.margins(y=0.01)
    axes.figure.legend(loc="outside upper center", ncols=2)


def _outline(axes: Any, before: Mapping[str, int], kept: Mapping[str, int]) -> None:
    kinds: dict[str, list[str]] = {}
    for name in before:
        kinds.setdefault(_kind(name), []).append(name)
    start = 0
    for number, (kind, names) in enumerate(kinds.items()):
        edges = range(start, start + len(names) + 1)
        first = number == 0
        axes.stairs([before[n] for n in names], edges, fill=True, color=_PALE, label="before" if first else None)
        axes.stairs([kept[n] for n in names], edges, fill=True, color=_BLUE, label="after" if first else None)
        axes.axvline(start, color="white", linewidth=2)
        if len(names) / len(before) > 0.19:  # narrower ones have no room for a word
            label = kind.replace(":", ".").rsplit(".", 1)[-1][:12]
            axes.text(start + len(names) / 2, -0.02, label, ha="center", va="top", transform=axes.get_xaxis_transform())
        start += len(names)
    widest = max(before.values())
    axes.set_yscale(
        "function", functions=(_root, _square)
    )  # as a linear scale, it starts at zero; narrow axes stay visible
    axes.set_ylim(0, 1.05 * widest)
    axes.set_yticks(sorted({widest, *(widest // d for d in (2, 4, 16, 64) if widest // d)} - {0}))
    axes.minorticks_off()
    axes.set_xlim(0, len(before))
    axes.set_xticks([])
    axes.set_xlabel(f"{len(before)} axes by kind, from input to output", labelpad=26)
    axes.set_title("width (root scale)", loc="left")
    axes.figure.legend(loc="outside upper right", ncols=2)


def _kind(name: str) -> str:
    """What an axis is, whichever layer it is in: its name without numbers."""
    return ".".join(word for word in name.split(".") if not word.isdigit())


def _root(values: Any) -> Any:
    return values.clip(0) ** 0.5


def _square(values: Any) -> Any:
    return values**2


def plot_dimensions(
    path: str | Path, before: Mapping[str, int], after: Mapping[str, int], kinds: Mapping[str, str]
) -> Path:
    """Dimensions of every layer before and after, a panel for each kind of dimension that changed.

    Args:
        path: the PNG to write.
        before: axis name -> size, from input to output.
        after: axis name -> size kept; a missing axis kept its size.
        kinds: axis name -> kind; see :data:`hf_compress.methods.dimension_kinds.KINDS`.
    """
    panels: dict[str, list[tuple[int, int]]] = {kind: [] for kind in _KINDS}
    for name, size in before.items():
        panels[kinds[name]].append((size, after.get(name, size)))
    panels = {kind: pairs for kind, pairs in panels.items() if any(left < size for size, left in pairs)}
    if not panels:
        raise ValueError("no axis changed its size, so there is nothing to draw.")
    with _figure(path, 0.9 + 2.1 * len(panels)) as frame:
        figure = frame.figure
        frame.remove()
        for axes, (kind, pairs) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
            _panel(axes, _KINDS[kind], pairs)
        axes.set_xlabel("layer, from input to output")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return Path(path)


_KINDS = {
    "residual": "residual stream",
    "heads": "attention heads",
    "qk": "queries and keys, a head",
    "v": "values, a head",
    "mlp": "hidden units of the MLP",
    "channels": "channels, or groups of them",
}


def _panel(axes: Any, title: str, pairs: Sequence[tuple[int, int]]) -> None:
    places = range(1, len(pairs) + 1)
    widest = max(size for size, _ in pairs)
    axes.bar(places, [size for size, _ in pairs], color=_PALE, width=0.8, label="before")
    axes.bar(places, [left for _, left in pairs], color=_BLUE, width=0.8, label="after")
    if len(pairs) * (len(str(widest)) + 0.6) <= 44:  # characters, and gaps between them, that the width has room for
        for place, (size, left) in zip(places, pairs, strict=True):
            axes.text(place, size + 0.02 * widest, str(left), ha="center", va="bottom", fontsize=13, color=_BLUE)
        axes.set_xticks(places)
    else:
        axes.xaxis.set_major_locator(_ticker().MaxNLocator(8, integer=True))
    axes.set_ylim(0, 1.22 * widest)
    axes.set_yticks([0, widest])
    axes.set_xlim(0.4, max(len(pairs), 4) + 0.6)
    axes.set_title(
        f"{title}: {sum(left for _, left in pairs)} of {sum(size for size, _ in pairs)}", loc="left", fontsize=13.5
    )
    axes.tick_params(axis="x", length=0)


def plot_sparsity(path: str | Path, history: Iterable[Mapping[str, Any]]) -> Path:
    """Share of indices that have vanished, over the training steps: all axes together, and each one faintly.

    What counts is a method's own: scales, scores or weights.

    Args:
        path: the PNG to write.
        history: ``trainer.state.log_history`` of a run with a slimming callback; entries with ``step`` and ``sparsity``
            are drawn, ``sparsity/<axis>`` too.
    """
    entries = [entry for entry in history if "step" in entry and "sparsity" in entry]
    if not entries:
        raise ValueError(
            "no entry of the history has `step` and `sparsity`; was a slimming callback among the callbacks?"
        )
    names = sorted({key for entry in entries for key in entry if key.startswith("sparsity/")})
    with _figure(path, 4.2) as axes:
        for number, name in enumerate(names):
            found = [entry for entry in entries if name in entry]
            label = "single axes" if number == 0 else None
            axes.plot(*_curve(found, name), color=_GREY, alpha=0.35, linewidth=1, label=label)
        marker = "o" if len(entries) == 1 else None
        axes.plot(*_curve(entries, "sparsity"), color=_ORANGE, linewidth=3.5, marker=marker, label="all axes together")
        axes.set_ylim(-1, 101)
        axes.set_yticks([0, 25, 50, 75, 100])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f} %")
        axes.xaxis.set_major_locator(_ticker().MaxNLocator(4, integer=True))
        axes.grid(axis="y", color="#E3E3E3")
        axes.set_axisbelow(True)
        axes.set_xlabel("training step")
        axes.set_title("indices close to zero", loc="left")
        if names:
            axes.figure.legend(loc="outside lower center", ncols=2)
    return Path(path)


def _curve(entries: Sequence[Mapping[str, Any]], key: str) -> tuple[list[Any], list[float]]:
    return [entry["step"] for entry in entries], [100 * entry[key] for entry in entries]


def plot_tradeoff(path: str | Path, points: Sequence[TradeoffPoint], measure: str = "accuracy") -> Path:
    """Accuracy against MACs, every model labelled; a line joins them in the given order.

    Args:
        path: the PNG to write.
        points: at least one; the first is drawn in orange as the dense model.
        measure: what the points' ``accuracy`` is.
    """
    if not points:
        raise ValueError("there are no points to draw; give at least one.")
    scales = ((1e9, "billion "), (1e6, "million "), (1e3, "thousand "), (1.0, ""))
    divisor, unit = next((d, u) for d, u in scales if points[0].macs >= d or d == 1)
    x = [point.macs / divisor for point in points]
    y = [100 * point.accuracy for point in points]
    with _figure(path, 4.4) as axes:
        axes.plot(x, y, color=_PALE, linewidth=1.5, zorder=1)
        axes.scatter(x, y, s=110, color=[_ORANGE] + [_BLUE] * (len(points) - 1), zorder=2)
        spread = max(max(y) - min(y), 2.0)  # two points of accuracy at least, so that noise does not look like a cliff
        middle = (max(y) + min(y)) / 2
        low, high = middle - 0.75 * spread, middle + 0.75 * spread
        ticks = _ticker().MaxNLocator(5, steps=[1, 2, 5, 10])
        axes.set_yticks([tick for tick in ticks.tick_values(low, high) if low <= tick <= min(high, 100)])
        axes.set_ylim(low, high)
        axes.set_xlim(0, 1.18 * max(x))
        axes.xaxis.set_major_locator(_ticker().MaxNLocator(4, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        axes.grid(color="#E3E3E3")
        axes.set_axisbelow(True)
        axes.set_xlabel(f"{unit}MACs for one image")
        axes.set_title(measure, loc="left")
        _label_points(axes, x, y, [point.label for point in points])
    return Path(path)


def _label_points(axes: Any, x: Sequence[float], y: Sequence[float], labels: Sequence[str]) -> None:
    """Put each label at the first place around its point where it hits no other label, point or edge."""
    figure = axes.figure
    figure.draw_without_rendering()  # the layout moves the axes, and with them every pixel position
    figure.set_layout_engine("none")
    frame = axes.get_window_extent()
    dot = 0.1 * figure.dpi
    centres = axes.transData.transform(list(zip(x, y, strict=True)))
    places = [(0, 16, "center"), (14, 0, "left"), (-14, 0, "right"), (0, -18, "center"), (12, 18, "left")]
    places += [(-12, 18, "right"), (12, -20, "left"), (-12, -20, "right"), (0, 34, "center"), (0, -36, "center")]
    taken: list[Any] = []
    halo = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.5}
    for at, label in zip(zip(x, y, strict=True), labels, strict=True):
        lines = textwrap.fill(label, 16, break_on_hyphens=False)
        text = axes.annotate(lines, at, xytext=(0, 0), textcoords="offset points", va="center", bbox=halo)
        best: tuple[int, Any, Any, str] | None = None
        for dx, dy, side in places:
            text.set(position=(dx, dy), ha=side)
            box = text.get_window_extent()
            hits = sum(box.overlaps(other) for other in taken)
            hits += sum(box.x0 - dot < cx < box.x1 + dot and box.y0 - dot < cy < box.y1 + dot for cx, cy in centres)
            is_inside = frame.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            hits += 0 if is_inside else 10  # cut off is worse than crowded
            if best is None or hits < best[0]:
                best = (hits, box, (dx, dy), side)
        assert best is not None
        text.set(position=best[2], ha=best[3])
        taken.append(best[1])


def short_names(names: Iterable[str], longest: int = 24) -> dict[str, str]:
    """Shorter names that still tell the axes apart: words are left out of all names while these stay different.

    Words that all names share go first, then the longest, and last of all the words that a number follows. What is still
    too long loses its middle.

    Args:
        names: dotted module paths, with ``:heads`` and the like at the end of some.
        longest: number of characters aimed at.

    Returns:
        name -> short name, all different.
    """
    names = list(names)
    parts = {name: name.replace(":", ".:").split(".") for name in names}
    numbered = {word for kept in parts.values() for word, after in zip(kept, kept[1:], strict=False) if after.isdigit()}
    kept_for_clarity: set[str] = set()
    while max(map(len, _joined(parts).values()), default=0) > longest:
        counts = Counter(word for words in parts.values() for word in dict.fromkeys(words) if not word.isdigit())
        words = [word for word in counts if word not in kept_for_clarity and not word.startswith(":")]
        if not words:
            break
        # of equally long words the later one, so that "stages.0.layers.1" becomes "stages.0.1"
        word = max(reversed(words), key=lambda word: (word not in numbered, counts[word] == len(names), len(word)))
        fewer = {name: [part for part in kept if part != word] for name, kept in parts.items()}
        joined = _joined(fewer)
        if len(set(joined.values())) == len(names) and all(joined.values()):
            parts = fewer
        else:
            kept_for_clarity.add(word)
    short = _joined(parts)
    head = (longest - 1) // 2
    cut = {
        name: text if len(text) <= longest else f"{text[:head]}…{text[head + 1 - longest :]}"
        for name, text in short.items()
    }
    return cut if len(set(cut.values())) == len(names) else short


def _joined(parts: Mapping[str, Sequence[str]]) -> dict[str, str]:
    return {name: ".".join(words).replace(".:", ":") for name, words in parts.items()}


class _figure:
    """A figure in the house style; written beside its name and renamed when the block ends well."""

    def __init__(self, path: str | Path, height: float):
        self.path, self.height = Path(path), height

    def __enter__(self) -> Any:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.context = matplotlib.rc_context(_STYLE)
        self.context.__enter__()
        self.figure = Figure(figsize=(_WIDTH, self.height), dpi=150, layout="constrained")
        FigureCanvasAgg(self.figure)  # pyplot is left alone: no global state, no window
        return self.figure.add_subplot()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                partial = self.path.with_name(f".{self.path.name}.partial")
                self.figure.savefig(partial, format="png", facecolor="white", metadata={"Software": None})
                os.replace(partial, self.path)
        finally:
            self.context.__exit__(kind, error, trace)


def _ticker() -> Any:
    from matplotlib import ticker

    return ticker
