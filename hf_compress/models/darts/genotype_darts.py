"""Genotypes: which edges and operators a cell has, as plain JSON; checking, choosing, counting and drawing them by lot.

Liu, Simonyan & Yang 2019, "DARTS: Differentiable Architecture Search", arXiv 1806.09055. A cell has two inputs, the
outputs of the two cells before it, as nodes 0 and 1. Every intermediate node sums edges from nodes before it, and the cell's
output is the concatenation of its intermediate nodes.

A genotype is ``{"normal": [node, ...], "reduce": [node, ...]}``; a node is a list of edges, and an edge is
``[operator, number of the node that it comes from]``.
"""

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Any, NoReturn

from hf_compress.errors import ModelError

OPERATORS = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
"""The operators of DARTS, in the order of its code. "none" takes part in the search and is never chosen."""

PARAMETER_FREE = ("max_pool_3x3", "avg_pool_3x3", "skip_connect")
"""Operators without weights in a normal cell. DARTS is known to collapse onto them."""

CELL_TYPES = ("normal", "reduce")
INPUTS = 2
MOST_NODES = 32  # config.json is untrusted input

Edge = tuple[str, int]
Cell = list[list[Any]]
Genotype = dict[str, Cell]

DARTS_V2: Genotype = {
    "normal": [
        [["sep_conv_3x3", 0], ["sep_conv_3x3", 1]],
        [["sep_conv_3x3", 0], ["sep_conv_3x3", 1]],
        [["sep_conv_3x3", 1], ["skip_connect", 0]],
        [["skip_connect", 0], ["dil_conv_3x3", 2]],
    ],
    "reduce": [
        [["max_pool_3x3", 0], ["max_pool_3x3", 1]],
        [["skip_connect", 2], ["max_pool_3x3", 1]],
        [["max_pool_3x3", 0], ["skip_connect", 2]],
        [["skip_connect", 2], ["max_pool_3x3", 1]],
    ],
}
"""What second-order DARTS found on CIFAR-10, as published."""


def edges_of(nodes: int) -> list[tuple[int, int]]:
    """All edges of a cell that is searched, in the order of the rows of its architecture parameters.

    Args:
        nodes: number of intermediate nodes.

    Returns:
        [(source, target)], where target counts intermediate nodes from 0, and source all nodes: 0 and 1 are the inputs.
    """
    return [(source, target) for target in range(nodes) for source in range(INPUTS + target)]


def check_operators(operators: Any, where: str) -> list[str]:
    """The operators of a search, when they can be searched over.

    Raises:
        ModelError: naming an operator that does not exist, or one that is there twice; also when nothing but "none" is left.
    """
    if not isinstance(operators, (list, tuple)):
        _refuse(where, operators, f"must be a list of operators. Possible: {', '.join(OPERATORS)}.")
    for i, operator in enumerate(operators):
        if not isinstance(operator, str) or operator not in OPERATORS:
            _refuse(f"{where}[{i}]", operator, f"no such operator. Possible: {', '.join(OPERATORS)}.")
        if operator in operators[:i]:
            _refuse(f"{where}[{i}]", operator, "is there twice; name every operator once.")
    if not set(operators) - {"none"}:
        _refuse(where, list(operators), 'needs an operator other than "none".')
    return list(operators)


def check_genotype(genotype: Any, where: str = "genotype", needed: Collection[str] = CELL_TYPES) -> Genotype:
    """A copy of the genotype in plain lists, when it is one.

    Args:
        genotype: anything, for example what a config.json holds.
        where: what to call it in errors.
        needed: the cell types that the network has.

    Raises:
        ModelError: saying which part is not as the module's docstring says.
    """
    if not isinstance(genotype, Mapping):
        _refuse(where, genotype, 'must be {"normal": [node, ...], "reduce": [node, ...]}.')
    for kind in genotype:
        if kind not in CELL_TYPES:
            _refuse(where, kind, f"no such cell type. Possible: {', '.join(CELL_TYPES)}.")
    for kind in needed:
        if kind not in genotype:
            _refuse(where, sorted(genotype), f'has no cell "{kind}", and the network has such cells.')
    return {kind: _check_cell(cell, f"{where}.{kind}") for kind, cell in genotype.items()}


def _check_cell(cell: Any, where: str) -> Cell:
    if not isinstance(cell, (list, tuple)) or not 1 <= len(cell) <= MOST_NODES:
        _refuse(where, cell, f"must be a list of 1 to {MOST_NODES} nodes.")
    return [_check_node(node, INPUTS + i, f"{where}[{i}]") for i, node in enumerate(cell)]


def _check_node(node: Any, earlier: int, where: str) -> list[Any]:
    if not isinstance(node, (list, tuple)) or not 1 <= len(node) <= earlier:
        _refuse(where, node, f"must be a list of 1 to {earlier} edges, since {earlier} nodes come before it.")
    checked: list[Any] = []
    for i, edge in enumerate(node):
        if not isinstance(edge, (list, tuple)) or len(edge) != 2:
            _refuse(f"{where}[{i}]", edge, 'must be an edge, for example ["sep_conv_3x3", 0].')
        operator, source = edge
        possible = [name for name in OPERATORS if name != "none"]
        if not isinstance(operator, str) or operator not in possible:
            _refuse(f"{where}[{i}]", operator, f"no such operator. Possible: {', '.join(possible)}.")
        if type(source) is not int or not 0 <= source < earlier:
            _refuse(f"{where}[{i}]", source, f"must be the number of a node before this one, from 0 to {earlier - 1}.")
        if any(source == other for _, other in checked):
            _refuse(f"{where}[{i}]", source, "a second edge from the same node; a node has at most one from each.")
        checked.append([operator, source])
    return checked


def choose(weights: Sequence[Sequence[float]], nodes: int, operators: Sequence[str], edges_per_node: int = 2) -> Cell:
    """The discrete cell that a search has found: DARTS's rule.

    For every node, its edges are ranked by the largest weight of an operator other than "none", the best
    ``edges_per_node`` stay, and each keeps that operator. Of equal weights the earlier edge, and the earlier operator, wins.

    Args:
        weights: softmax weights, [edges, operators], edges as in :func:`edges_of`.
        nodes: number of intermediate nodes.
        operators: names of the columns.
        edges_per_node: how many edges stay; all of them where a node has fewer.

    Returns:
        The nodes of a cell; the edges of each from the strongest to the weakest, as in the published genotypes.

    Raises:
        ModelError: when a weight is not a number.
    """
    columns = [k for k, operator in enumerate(operators) if operator != "none"]
    if any(value != value for row in weights for value in row):
        raise ModelError(
            "architecture weights are NaN, so no operator can be chosen; lower the search's learning rates."
        )
    cell: Cell = [[] for _ in range(nodes)]
    for row, (source, target) in zip(weights, edges_of(nodes), strict=True):
        best = max(columns, key=lambda k: row[k])
        cell[target].append((row[best], [operators[best], source]))
    # sorting is stable, so that of equal edges the earlier one stays
    return [[edge for _, edge in sorted(node, key=lambda pair: -pair[0])[:edges_per_node]] for node in cell]


def all_cells(nodes: int, operators: Sequence[str] = OPERATORS, edges_per_node: int = 2) -> Iterator[Cell]:
    """Every cell that a search could find, each once. There are very many unless the space is tiny.

    Args:
        nodes: number of intermediate nodes.
        operators: what is searched over; "none" is never chosen.
        edges_per_node: how many edges a node has; all there are where these are fewer.
    """
    named = [operator for operator in operators if operator != "none"]
    choices = []
    for target in range(nodes):
        count = min(edges_per_node, INPUTS + target)
        choices.append(
            [
                [[operator, source] for operator, source in zip(chosen, sources, strict=True)]
                for sources in combinations(range(INPUTS + target), count)
                for chosen in product(named, repeat=count)
            ]
        )
    for cell in product(*choices):
        yield [[list(edge) for edge in node] for node in cell]


def random_genotype(
    nodes: int = 4,
    operators: Sequence[str] = OPERATORS,
    edges_per_node: int = 2,
    cell_types: Collection[str] = CELL_TYPES,
    seed: int | None = None,
) -> Genotype:
    """A genotype drawn uniformly from those that a search could find: the control that every search has to beat.

    Args:
        nodes: number of intermediate nodes.
        operators: what is drawn from; "none" is never drawn.
        edges_per_node: how many edges a node has; all there are where these are fewer.
        cell_types: what cells the network has.
        seed: of the draw; None draws anew each time.
    """
    draw = random.Random(seed)
    named = [operator for operator in operators if operator != "none"]
    return {
        kind: [
            [
                [draw.choice(named), source]
                for source in sorted(draw.sample(range(INPUTS + target), min(edges_per_node, INPUTS + target)))
            ]
            for target in range(nodes)
        ]
        for kind in CELL_TYPES
        if kind in cell_types
    }


def parameter_free_share(genotype: Mapping[str, Cell]) -> float:
    """The share of a genotype's edges whose operators have no weights (pooling, skip), from 0 to 1."""
    chosen = [operator for cell in genotype.values() for node in cell for operator, _ in node]
    return sum(operator in PARAMETER_FREE for operator in chosen) / len(chosen)


def _refuse(where: str, value: Any, why: str) -> NoReturn:
    shown = repr(value)
    raise ModelError(f"{where}={shown if len(shown) < 80 else shown[:80] + '...'}: {why}")
