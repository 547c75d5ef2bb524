"""Configurations of networks of DARTS cells: with chosen operators, and with all of them for the search."""

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from hf_compress.errors import ModelError

from .genotype_darts import (
    CELL_TYPES,
    DARTS_V2,
    INPUTS,
    MOST_NODES,
    OPERATORS,
    Genotype,
    check_genotype,
    check_operators,
    edges_of,
)

_MOST_CELLS = 1000  # config.json is untrusted input; these bound what a number in it can make us allocate
_LARGEST_SIZE = 2**16


class DartsCells:
    """What both configurations share: the frame of the network, that is everything but the inside of its cells."""

    num_cells: int
    width: int
    stem: str
    stem_multiplier: int
    reduction_cells: list[int] | tuple[int, ...] | None
    num_channels: int
    image_size: int

    @property
    def reductions(self) -> list[int]:
        """Numbers of the cells that halve the resolution and double the width."""
        if self.reduction_cells is not None:
            return list(self.reduction_cells)
        return sorted({self.num_cells // 3, 2 * self.num_cells // 3})

    @property
    def cell_types(self) -> list[str]:
        """What types of cells the network has: "normal", "reduce" or both."""
        count = len(self.reductions)
        return [kind for kind, there in zip(CELL_TYPES, (count < self.num_cells, count > 0), strict=True) if there]

    def _check_frame(self) -> None:
        for name, most in (("num_cells", _MOST_CELLS), *((n, _LARGEST_SIZE) for n in _SIZES)):
            if not 1 <= getattr(self, name) <= most:
                self._refuse(name, getattr(self, name), f"must be from 1 to {most}")
        if self.stem == "imagenet" and self.width % 2:
            self._refuse(
                "width", self.width, 'must be even with stem="imagenet", whose first convolution has half of it'
            )
        if self.reduction_cells is not None:
            cells = self.reduction_cells = list(self.reduction_cells)
            if cells != sorted(set(cells)) or any(not 0 <= cell < self.num_cells for cell in cells):
                self._refuse("reduction_cells", cells, f"must be increasing numbers from 0 to {self.num_cells - 1}")
        if self.width * 2 ** len(self.reductions) > _LARGEST_SIZE:
            self._refuse("reduction_cells", self.reductions, f"would widen the last cells beyond {_LARGEST_SIZE}")

    def _refuse(self, name: str, value: Any, why: str) -> NoReturn:
        shown = repr(value)
        raise ModelError(f"{type(self).__name__}: {name}={shown if len(shown) < 80 else shown[:80] + '...'}: {why}.")


_SIZES = ("width", "stem_multiplier", "num_channels", "image_size")


@strict
class DartsConfig(DartsCells, PreTrainedConfig):
    """Configuration of :class:`DartsModel`, a network of cells with chosen operators.

    The defaults give the network that Liu et al. 2019 train on CIFAR-10 with the cells that second-order DARTS found,
    without its auxiliary head and drop path, for which set ``auxiliary_weight=0.4`` and ``drop_path_rate=0.2``.
    Their network for ImageNet: ``num_cells=14, width=48, stem="imagenet", image_size=224, num_labels=1000``.

    Args:
        genotype: the cells, ``{"normal": [node, ...], "reduce": [node, ...]}``; a node is a list of edges, an edge is
            ``[operator, number of the node that it comes from]``. See ``genotype_darts``.
        num_cells: number of cells. Paper: L, 20.
        width: channels of every node of the first cells; each reduction cell doubles it. Paper: C, 36.
        stem: "cifar" is one convolution, to ``stem_multiplier`` x ``width`` channels; "imagenet" is three convolutions
            with stride 2.
        stem_multiplier: see ``stem``. Paper's code: 3.
        reduction_cells: numbers of the cells that halve the resolution. By default cells L // 3 and 2 L // 3.
        auxiliary_weight: weight of the loss of a second classifier, which reads the output of cell 2 L // 3, while training.
            0 makes no such classifier. Paper: 0.4.
        drop_path_rate: share of the examples for which an edge is dropped while training. Paper: 0.2, reached linearly
            over the epochs (``DropPathScheduleCallback``).
        num_channels: channels of an image.
        image_size: height and width that a model is inspected and measured at; other sizes work too.

    Raises:
        ModelError: when a field is not as said here, with the possible operators where one of them is at fault.
        StrictDataclassError: of huggingface_hub, naming a field of another type.
    """

    model_type = "darts"
    keys_to_ignore_at_inference = ["auxiliary_logits"]  # noqa: RUF012

    genotype: dict[str, Any] | None = None
    num_cells: int = 20
    width: int = 36
    stem: Literal["cifar", "imagenet"] = "cifar"
    stem_multiplier: int = 3
    reduction_cells: list[int] | tuple[int, ...] | None = None
    auxiliary_weight: float | int = 0.0
    drop_path_rate: float | int = 0.0
    num_channels: int = 3
    image_size: int = 32

    def __post_init__(self, **kwargs):
        self._check_frame()
        genotype = copy.deepcopy(DARTS_V2) if self.genotype is None else self.genotype
        self.genotype = check_genotype(genotype, f"{type(self).__name__}: genotype", self.cell_types)
        if not (math.isfinite(self.auxiliary_weight) and self.auxiliary_weight >= 0):
            self._refuse("auxiliary_weight", self.auxiliary_weight, "must be a finite number, not below 0")
        if not 0 <= self.drop_path_rate < 1:
            self._refuse("drop_path_rate", self.drop_path_rate, "must be at least 0 and below 1")
        super().__post_init__(**kwargs)

    @property
    def auxiliary_cell(self) -> int:
        """Number of the cell that the auxiliary classifier reads."""
        return 2 * self.num_cells // 3


@strict
class DartsSupernetConfig(DartsCells, PreTrainedConfig):
    """Configuration of :class:`DartsSupernetModel`, a network in whose cells every edge has all operators.

    The defaults give the network that Liu et al. 2019 search on CIFAR-10.

    Args:
        nodes: intermediate nodes of a cell. Paper: 4.
        operators: what is searched over, a choice of :data:`~.genotype_darts.OPERATORS`. Paper: all eight.
        edges_per_node: edges of a node that stay in the derived cell. Paper: 2.
        num_cells: number of cells. Paper: 8.
        width: channels of every node of the first cells. Paper: C, 16.
        stem, stem_multiplier, reduction_cells: as in :class:`DartsConfig`.
        pruned_operators: operators that are left out of single edges, cell type -> [[number of the edge, operator], ...],
            edges as in :func:`~.genotype_darts.edges_of`. They have no weight in the softmax, and no cost. See
            ``DartsSupernetForImageClassification.prune_operators``.
        initial_alpha: standard deviation of the first architecture parameters. Paper's code: 1e-3.
        num_channels: channels of an image.
        image_size: height and width that a model is inspected and measured at; other sizes work too.

    Raises:
        ModelError: when a field is not as said here, with the possible operators where one of them is at fault.
        StrictDataclassError: of huggingface_hub, naming a field of another type.
    """

    model_type = "darts_supernet"

    nodes: int = 4
    operators: list[str] | tuple[str, ...] = OPERATORS
    edges_per_node: int = 2
    num_cells: int = 8
    width: int = 16
    stem: Literal["cifar", "imagenet"] = "cifar"
    stem_multiplier: int = 3
    reduction_cells: list[int] | tuple[int, ...] | None = None
    pruned_operators: dict[str, Any] | None = None
    initial_alpha: float | int = 1e-3
    num_channels: int = 3
    image_size: int = 32

    def __post_init__(self, **kwargs):
        self._check_frame()
        if not 1 <= self.nodes <= MOST_NODES:
            self._refuse("nodes", self.nodes, f"must be from 1 to {MOST_NODES}")
        if not 1 <= self.edges_per_node <= INPUTS + self.nodes:
            self._refuse("edges_per_node", self.edges_per_node, f"must be from 1 to {INPUTS + self.nodes}")
        if not (math.isfinite(self.initial_alpha) and self.initial_alpha >= 0):
            self._refuse("initial_alpha", self.initial_alpha, "must be a finite number, not below 0")
        self.operators = check_operators(self.operators, f"{type(self).__name__}: operators")
        self.pruned_operators = self._checked_pruned({} if self.pruned_operators is None else self.pruned_operators)
        super().__post_init__(**kwargs)

    def active_operators(self, cell_type: str) -> list[list[str]]:
        """The operators of every edge of a cell that are still searched over, edges as in ``edges_of``."""
        gone = {tuple(pair) for pair in (self.pruned_operators or {}).get(cell_type, [])}
        edges = range(len(edges_of(self.nodes)))
        return [[operator for operator in self.operators if (edge, operator) not in gone] for edge in edges]

    def derived(self, genotype: Genotype, **changes: Any) -> DartsConfig:
        """The configuration of the network with these cells: frame and labels from here, unless ``changes`` say else."""
        frame = {name: getattr(self, name) for name in ("num_cells", "width", "stem", *_SIZES[1:], "reduction_cells")}
        labels: dict[str, Any] = {"id2label": self.id2label, "label2id": self.label2id}
        if "num_labels" in changes:
            labels = {}
        if "num_cells" in changes:
            frame["reduction_cells"] = None
        return DartsConfig(genotype=genotype, **{**frame, **labels, **changes})

    def _checked_pruned(self, pruned: dict[str, Any]) -> dict[str, Any]:
        edges = len(edges_of(self.nodes))
        checked: dict[str, Any] = {}
        for kind, pairs in pruned.items():
            if kind not in self.cell_types:
                self._refuse(
                    "pruned_operators", kind, f"not a cell type of this network ({', '.join(self.cell_types)})"
                )
            if not isinstance(pairs, (list, tuple)):
                self._refuse(f"pruned_operators.{kind}", pairs, "must be a list of [number of the edge, operator]")
            left = [set(self.operators) for _ in range(edges)]
            for pair in pairs:
                if not _is_pair(pair, edges, self.operators):
                    self._refuse(
                        f"pruned_operators.{kind}", pair, f"must be the number of an edge, 0 to {edges - 1}, and an "
                        f"operator of this search: {', '.join(self.operators)}",
                    )  # fmt: skip
                left[pair[0]].discard(pair[1])
            empty = next((number for number, names in enumerate(left) if not names - {"none"}), None)
            if empty is not None:
                self._refuse(f"pruned_operators.{kind}", empty, 'this edge has no operator other than "none" left')
            unique = sorted({(pair[0], self.operators.index(pair[1])) for pair in pairs})
            checked[kind] = [[edge, self.operators[column]] for edge, column in unique]
        return checked


def _is_pair(pair: Any, edges: int, operators: Sequence[str]) -> bool:
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        return False
    edge, operator = pair
    return type(edge) is int and 0 <= edge < edges and isinstance(operator, str) and operator in operators


__all__ = ["DartsConfig", "DartsSupernetConfig"]
