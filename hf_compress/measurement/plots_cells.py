"""Cells of a searched network, and the weights of all operators while it is searched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..models.darts.genotype_darts import Cell, check_genotype, choose, edges_of
from .plots import _GREY, _PALE, _figure, _ticker

# colours of the Okabe-Ito palette; line styles tell the same, so that no colour is needed
_STYLES: dict[str, dict[str, Any]] = {
    "sep_conv_3x3": {"color": "#0072B2", "linewidth": 2.2},
    "sep_conv_5x5": {"color": "#0072B2", "linewidth": 4.2},
    "dil_conv_3x3": {"color": "#D55E00", "linewidth": 2.2, "linestyle": (0, (4, 1.2))},
    "dil_conv_5x5": {"color": "#D55E00", "linewidth": 4.2, "linestyle": (0, (2.2, 0.8))},
    "max_pool_3x3": {"color": "#009E73", "linewidth": 2.2, "linestyle": (0, (1, 1))},
    "avg_pool_3x3": {"color": "#CC79A7", "linewidth": 2.2, "linestyle": (0, (1, 1))},
    "skip_connect": {"color": "#595959", "linewidth": 1.4},
}
_TITLES = {"normal": "normal cell", "reduce": "reduction cell"}


def plot_cells(path: str | Path, genotype: Mapping[str, Cell]) -> Path:
    """Draw the cells of a genotype: nodes from left to right, and an arc for every edge, whose style is its operator.

    Args:
        path: the PNG to write.
        genotype: ``config.genotype`` of a DARTS network, or what a supernet's ``genotype()`` gives.

    Raises:
        ModelError: when it is no genotype.
    """
    cells = check_genotype(genotype, needed=())
    if not cells:
        raise ModelError("genotype={}: has no cell; give at least one.")
    used = [
        name for name in _STYLES if any(name == edge[0] for cell in cells.values() for node in cell for edge in node)
    ]
    with _figure(path, 2.5 * len(cells) + 0.35 + 0.33 * -(-len(used) // 2)) as frame:
        from matplotlib.lines import Line2D

        figure = frame.figure
        frame.remove()
        for axes, (kind, cell) in zip(figure.subplots(len(cells), squeeze=False)[:, 0], cells.items(), strict=True):
            _draw_cell(axes, cell)
            axes.set_title(_TITLES[kind], loc="left")
        handles = [Line2D([], [], **_STYLES[name]) for name in used]
        figure.legend(handles, used, loc="outside lower center", ncols=2, handlelength=3)
    return Path(path)


def _draw_cell(axes: Any, cell: Cell) -> None:
    from matplotlib.patches import FancyArrowPatch

    names = ["k-2", "k-1", *map(str, range(len(cell)))]
    gap = 1.25  # between the inputs and the nodes
    places = [0.0, 1.0, *(gap + 1.0 + number for number in range(len(cell)))]
    output = places[-1] + gap
    highest = 1.0
    for number, node in enumerate(cell):
        target = places[2 + number]
        for operator, source in node:
            start = places[source]
            distance = target - start
            # arcs to alternate sides, so that those from both inputs to one node do not lie on each other
            side = -1 if source % 2 == 0 else 1
            highest = max(highest, 0.25 * distance + 0.3)
            arc = f"arc3,rad={side * 0.5}"
            patch = FancyArrowPatch(
                (start, 0), (target, 0), connectionstyle=arc, arrowstyle="-|>", mutation_scale=13, shrinkA=12, shrinkB=13,
                **_STYLES[operator],
            )  # fmt: skip
            axes.add_patch(patch)
        axes.plot([target, output], [0, 0], color=_PALE, linewidth=1.2, zorder=0)
    for place, name in zip(places, names, strict=True):
        is_input = name.startswith("k")
        box = {"boxstyle": "circle,pad=0.25", "facecolor": _PALE if is_input else "white", "edgecolor": _GREY}
        axes.text(place, 0, name, ha="center", va="center", fontsize=11, bbox=box, zorder=3)
    box = {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": _GREY}
    axes.text(output, 0, "concat", ha="center", va="center", fontsize=11, bbox=box, zorder=3)
    axes.set_xlim(-0.45, output + 0.65)
    axes.set_ylim(-highest, highest)
    axes.set_axis_off()


def plot_operator_weights(
    path: str | Path, weights: Mapping[str, Any], operators: Sequence[str], edges_per_node: int = 2
) -> Path:
    """Draw the softmax weight of every operator on every edge as a heat map; what would be chosen now has a ring.

    Args:
        path: the PNG to write.
        weights: cell type -> [edges, operators], as ``operator_weights()`` of a supernet gives.
        operators: names of the columns, ``config.operators``.
        edges_per_node: how many edges of a node are chosen, ``config.edges_per_node``.

    Raises:
        ModelError: when there is nothing to draw, or the rows are not the edges of a cell.
    """
    if not weights:
        raise ModelError("weights={}: has no cell type; give at least one.")
    rows = {kind: [[float(value) for value in row] for row in matrix] for kind, matrix in weights.items()}
    count = max(map(len, rows.values()))
    top = max(value for matrix in rows.values() for row in matrix for value in row)
    with _figure(path, 2.2 + 0.29 * count) as frame:
        figure = frame.figure
        frame.remove()
        panels = figure.subplots(1, len(rows), squeeze=False, sharey=True)[0]
        for panel, (kind, matrix) in zip(panels, rows.items(), strict=True):
            nodes = next((n for n in range(1, 33) if len(edges_of(n)) == len(matrix)), None)
            if nodes is None or any(len(row) != len(operators) for row in matrix):
                raise ModelError(
                    f"weights of {kind!r} have {len(matrix)} rows; must have one for every edge of a cell (2, 5, 9, 14, ...) "
                    f"and {len(operators)} columns."
                )
            image = panel.imshow(matrix, cmap="viridis", vmin=0.0, vmax=top, aspect="auto", interpolation="nearest")
            labels = ["k-2", "k-1", *map(str, range(nodes))]
            edges = edges_of(nodes)
            panel.set_yticks(
                range(len(edges)), [f"{labels[source]} → {target}" for source, target in edges], fontsize=11
            )
            panel.set_xticks(range(len(operators)), operators, rotation=90, fontsize=11)
            panel.set_title(_TITLES.get(kind, kind), loc="left")
            for target, node in enumerate(choose(matrix, nodes, operators, edges_per_node)):
                for operator, source in node:
                    at = operators.index(operator), edges.index((source, target))
                    for colour, thickness in (("black", 4.2), ("white", 2.0)):  # seen on dark and on light fields
                        panel.plot(
                            *at, marker="o", markersize=8, markerfacecolor="none", markeredgecolor=colour,
                            markeredgewidth=thickness,
                        )  # fmt: skip
            panel.tick_params(length=0)
            for target in range(1, nodes):  # a line between the edges of two nodes
                panel.axhline(edges.index((0, target)) - 0.5, color="white", linewidth=2)
        figure.colorbar(image, ax=list(panels), location="top", shrink=0.6, label="weight", pad=0.02)
    return Path(path)


_COLOURS = {
    "sep_conv_3x3": "#56B4E9",
    "sep_conv_5x5": "#0072B2",
    "dil_conv_3x3": "#E69F00",
    "dil_conv_5x5": "#D55E00",
    "max_pool_3x3": "#009E73",
    "avg_pool_3x3": "#CC79A7",
    "skip_connect": "#595959",
}


def plot_genotype_history(path: str | Path, history: Sequence[Mapping[str, Cell]]) -> Path:
    """Draw how a genotype changes during a search: a row for every edge, a column for every epoch, a colour for an operator.

    Args:
        path: the PNG to write.
        history: the genotype after each epoch, all with the same cell types and numbers of nodes.

    Raises:
        ModelError: when one is no genotype, or they differ in their cell types or nodes.
    """
    checked = [check_genotype(genotype, f"history[{i}]", needed=()) for i, genotype in enumerate(history)]
    shapes = [{kind: len(cell) for kind, cell in genotype.items()} for genotype in checked]
    if not checked or not shapes[0] or any(shape != shapes[0] for shape in shapes):
        raise ModelError(
            f"history has {len(checked)} genotypes with the nodes {shapes[:2]}; needs at least one, and all must have the same "
            "cell types and numbers of nodes."
        )
    used = [
        n for n in _COLOURS if any(n == e[0] for g in checked for cell in g.values() for node in cell for e in node)
    ]
    rows = sum(len(edges_of(nodes)) for nodes in shapes[0].values())
    with _figure(path, 1.5 + 0.75 * len(shapes[0]) + 0.27 * rows) as frame:
        from matplotlib.colors import ListedColormap
        from matplotlib.patches import Patch

        figure = frame.figure
        frame.remove()
        heights = [len(edges_of(nodes)) for nodes in shapes[0].values()]
        panels = figure.subplots(len(heights), squeeze=False, sharex=True, height_ratios=heights)[:, 0]
        for panel, (kind, nodes) in zip(panels, shapes[0].items(), strict=True):
            edges = edges_of(nodes)
            labels = ["k-2", "k-1", *map(str, range(nodes))]
            grid = [[0] * len(checked) for _ in edges]
            for epoch, genotype in enumerate(checked):
                for target, node in enumerate(genotype[kind]):
                    for operator, source in node:
                        grid[edges.index((source, target))][epoch] = 1 + used.index(operator)
            colours = ListedColormap(["white", *(_COLOURS[name] for name in used)])
            panel.imshow(
                grid, cmap=colours, vmin=0, vmax=len(used), aspect="auto", interpolation="nearest",
                extent=(0.5, len(checked) + 0.5, len(edges) - 0.5, -0.5),
            )  # fmt: skip
            panel.set_yticks(
                range(len(edges)), [f"{labels[source]} → {target}" for source, target in edges], fontsize=10.5
            )
            panel.set_title(_TITLES[kind], loc="left")
            panel.xaxis.set_major_locator(_ticker().MaxNLocator(6, integer=True))
            panel.tick_params(length=0)
            for target in range(1, nodes):
                panel.axhline(edges.index((0, target)) - 0.5, color=_PALE, linewidth=1)
        panels[-1].set_xlabel("epoch")
        handles = [Patch(color=_COLOURS[name]) for name in used]
        figure.legend(handles, used, loc="outside lower center", ncols=2, fontsize=12)
    return Path(path)


__all__ = ["plot_cells", "plot_genotype_history", "plot_operator_weights"]
