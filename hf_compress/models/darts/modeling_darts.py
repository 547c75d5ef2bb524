"""Networks of cells that were searched, and the supernet in which they are searched.

Liu, Simonyan & Yang 2019, "DARTS: Differentiable Architecture Search", arXiv 1806.09055; shapes as in the code that they
published. A cell reads the outputs of the two cells before it and concatenates its intermediate nodes, each of which is a sum
of operators of earlier nodes. Reduction cells halve the resolution.

For 10 classes the default ``DartsConfig`` has 3,349,342 parameters (the paper: 3.3 M), its ImageNet form 4,718,752 (4.7 M),
neither counting the auxiliary classifier.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)
from transformers.utils.generic import can_return_tuple

from ..slimming import ImageClassification, classifier
from .configuration_darts import DartsCells, DartsConfig, DartsSupernetConfig
from .genotype_darts import Cell, Genotype, all_cells, choose, edges_of, parameter_free_share, random_genotype
from .operations_darts import (
    DartsAuxiliaryHead,
    DartsCifarStem,
    DartsConvolution,
    DartsDropPath,
    DartsFactorizedReduction,
    DartsImageNetStem,
    StatisticsOnce,
    operation,
)
from .supernet_darts import DartsMixedConvolutions, DartsMixedNodes


def preprocessing(in_channels: int, width: int, is_halved: bool, affine: bool) -> nn.Module:
    """What brings an input of a cell to the cell's width and, where it is still twice as large, to its resolution."""
    if is_halved:
        return DartsFactorizedReduction(in_channels, width, affine)
    return DartsConvolution(in_channels, width, affine)


class DartsNodes(nn.Module):
    """The intermediate nodes of a cell with chosen operators."""

    def __init__(self, cell: Cell, width: int, is_reduction: bool, drop_prob: float):
        super().__init__()
        self.sources = [[source for _, source in node] for node in cell]
        self.operations: Any = nn.ModuleList()
        for node in cell:
            edges = nn.ModuleList()
            for operator, source in node:
                stride = 2 if is_reduction and source < 2 else 1
                layer = operation(operator, width, stride)
                # as in the paper's code, an identity is never dropped
                edges.append(
                    layer if isinstance(layer, nn.Identity) else nn.Sequential(layer, DartsDropPath(drop_prob))
                )
            self.operations.append(edges)

    def forward(self, earlier: Tensor, previous: Tensor) -> Tensor:
        states = [earlier, previous]
        for sources, edges in zip(self.sources, self.operations, strict=True):
            total = None
            for source, edge in zip(sources, edges, strict=True):
                output = edge(states[source])
                total = output if total is None else total + output
            states.append(total)  # type: ignore[arg-type]
        return torch.cat(states[2:], dim=1)


class DartsCell(nn.Module):
    """A cell: both inputs brought to its width, its intermediate nodes, and their concatenation.

    Gradient checkpointing computes the cell again in the backward pass; running statistics are still updated once.
    """

    gradient_checkpointing = False
    _gradient_checkpointing_func: Any

    def __init__(self, channels: tuple[int, int], width: int, was_halved: bool, nodes: nn.Module, affine: bool = True):
        super().__init__()
        self.preprocessing_earlier = preprocessing(channels[0], width, was_halved, affine)
        self.preprocessing_previous = preprocessing(channels[1], width, False, affine)
        self.nodes = nodes

    def forward(self, earlier: Tensor, previous: Tensor, *weights: Tensor) -> Tensor:
        """The outputs of the two cells before this one, and in a supernet the weights of this one's operators."""
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(StatisticsOnce(self, self._compute), earlier, previous, *weights)
        return self._compute(earlier, previous, *weights)

    def _compute(self, earlier: Tensor, previous: Tensor, *weights: Tensor) -> Tensor:
        return self.nodes(self.preprocessing_earlier(earlier), self.preprocessing_previous(previous), *weights)


class DartsPreTrainedModel(PreTrainedModel):
    """Initialisation: torch's defaults, as in the paper's code. Architecture parameters: N(0, ``initial_alpha``^2)."""

    config: DartsConfig | DartsSupernetConfig
    base_model_prefix = "darts"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # Trainer must average over micro-batches
    _no_split_modules = ["DartsCell"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            bound = module.weight[0].numel() ** -0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, DartsMixedConvolutions):
            for parameter, fan_in in (
                (module.depthwise, module.depthwise.shape[-1] ** 2),
                (module.pointwise, module.channels),
            ):
                init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
        elif isinstance(module, nn.ParameterDict):
            for alpha in module.values():
                init.normal_(alpha, std=self.config.initial_alpha)


class DartsTrunk(nn.Module):
    """Stem, cells and pooling: what a network of chosen cells and a supernet share.

    Attributes:
        is_channels_last: whether images are brought to that layout on a CPU, where torch's poolings and depthwise
            convolutions are many times faster in it.
    """

    config: Any
    stem: Any
    cells: Any
    is_channels_last = True

    def _build(self, config: DartsCells, is_search: bool) -> None:
        if config.stem == "cifar":
            self.stem = DartsCifarStem(config.num_channels, config.stem_multiplier * config.width)
        else:
            self.stem = DartsImageNetStem(config.num_channels, config.width)
        earlier, previous = self.stem.channels
        width, was_halved, reductions = config.width, self.stem.is_halved, config.reductions
        self.cells = nn.ModuleList()
        self.kinds: list[str] = []
        self.cell_channels: list[int] = []
        for number in range(config.num_cells):
            is_reduction = number in reductions
            width *= 2 if is_reduction else 1
            self.kinds.append("reduce" if is_reduction else "normal")
            nodes, count = self._nodes(self.kinds[-1], width)
            self.cells.append(DartsCell((earlier, previous), width, was_halved, nodes, affine=not is_search))
            earlier, previous, was_halved = previous, count * width, is_reduction
            self.cell_channels.append(previous)
        self.pooler = nn.AdaptiveAvgPool2d(1)

    def _nodes(self, kind: str, width: int) -> tuple[nn.Module, int]:
        """The intermediate nodes of a cell, and how many there are."""
        raise NotImplementedError

    def _weights(self) -> dict[str, tuple[Tensor, ...]]:
        """What a cell of each type reads besides its inputs."""
        return {"normal": (), "reduce": ()}

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        """Features of images.

        Args:
            pixel_values: float [batch, config.num_channels, height, width].
            output_hidden_states: whether to return the output of the stem and of each cell, too.
            return_dict: False gives a tuple.

        Returns:
            ``last_hidden_state``: the output of the last cell, [batch, nodes x width, height, width];
            ``pooler_output``: its mean over the image, [batch, nodes x width].
        """
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if self.is_channels_last and pixel_values.device.type == "cpu":
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        earlier, previous = self.stem(pixel_values)
        collected = [previous]
        weights = self._weights()
        for kind, cell in zip(self.kinds, self.cells, strict=True):
            earlier, previous = previous, cell(earlier, previous, *weights[kind])
            if wanted:
                collected.append(previous)
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=previous,
            pooler_output=self.pooler(previous).flatten(1),
            hidden_states=tuple(collected) if wanted else None,
        )


class DartsModel(DartsTrunk, DartsPreTrainedModel):
    """Stem, cells with chosen operators, and the mean of the last features over the image."""

    config: DartsConfig

    def __init__(self, config: DartsConfig):
        DartsPreTrainedModel.__init__(self, config)
        self._build(config, is_search=False)
        self.post_init()

    def _nodes(self, kind: str, width: int) -> tuple[nn.Module, int]:
        cell = self.config.genotype[kind]  # type: ignore[index]
        return DartsNodes(cell, width, kind == "reduce", self.config.drop_path_rate), len(cell)


@dataclass
class DartsImageClassifierOutput(ImageClassifierOutputWithNoAttention):
    """Output of :class:`DartsForImageClassification`.

    Attributes:
        loss: float, with labels; see there.
        logits: float [batch, num_labels].
        auxiliary_logits: float [batch, num_labels], of the auxiliary classifier when there is one.
        hidden_states: of the stem and of each cell, where asked for.
    """

    auxiliary_logits: Tensor | None = None


class DartsForImageClassification(DartsPreTrainedModel):
    """A network of chosen cells with one linear layer on the pooled features, and perhaps an auxiliary classifier."""

    config: DartsConfig

    def __init__(self, config: DartsConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.darts = DartsModel(config)
        self.classifier = classifier(self.darts.cell_channels[-1], config)
        self.auxiliary_head: nn.Module | None = None
        if config.auxiliary_weight > 0:
            channels = self.darts.cell_channels[config.auxiliary_cell]
            self.auxiliary_head = DartsAuxiliaryHead(channels, self.num_labels or 0, config.stem)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, output_hidden_states: bool | None = None
    ) -> DartsImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: float [batch, config.num_channels, height, width].
            labels: int64 [batch]; with them the output has the mean cross entropy as its loss and, while training,
                ``config.auxiliary_weight`` times that of the auxiliary classifier.
            output_hidden_states: whether to return the output of the stem and of each cell as well.
            return_dict: False gives a tuple.
        """
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        outputs = self.darts(
            pixel_values, output_hidden_states=wanted or self.auxiliary_head is not None, return_dict=True
        )
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        auxiliary_logits = None
        if self.auxiliary_head is not None:
            # in evaluation, too: find_axes watches a model evaluate, and has to see that the head's input shrinks with the
            # cell. The head has 0.1 % of the paper's network's multiply-accumulates.
            auxiliary_logits = self.auxiliary_head(outputs.hidden_states[self.config.auxiliary_cell + 1])
            if loss is not None and self.training:
                loss = loss + self.config.auxiliary_weight * self.loss_function(labels, auxiliary_logits, self.config)
        return DartsImageClassifierOutput(
            loss=loss,
            logits=logits,
            auxiliary_logits=auxiliary_logits,
            hidden_states=outputs.hidden_states if wanted else None,
        )

    def remove_auxiliary_head(self) -> "DartsForImageClassification":
        """Drop the auxiliary classifier, which serves training alone, from the model and its configuration."""
        self.auxiliary_head = None
        self.config.auxiliary_weight = 0.0
        return self


class DartsSupernetPreTrainedModel(DartsPreTrainedModel):
    """Initialisation and loading of supernets."""

    config: DartsSupernetConfig
    base_model_prefix = "supernet"


class DartsSupernetModel(DartsTrunk, DartsSupernetPreTrainedModel):
    """Stem, cells whose edges have all operators, and the mean of the last features over the image.

    Attributes:
        alphas: architecture parameters, cell type -> float [edges, operators]; rows as in ``genotype_darts.edges_of``,
            columns as in ``config.operators``. All cells of a type share them.
    """

    config: DartsSupernetConfig

    def __init__(self, config: DartsSupernetConfig):
        DartsSupernetPreTrainedModel.__init__(self, config)
        shape = len(edges_of(config.nodes)), len(config.operators)
        self.alphas = nn.ParameterDict({kind: nn.Parameter(torch.zeros(shape)) for kind in config.cell_types})
        self._build(config, is_search=True)
        self.post_init()

    def _nodes(self, kind: str, width: int) -> tuple[nn.Module, int]:
        active = self.config.active_operators(kind)
        return DartsMixedNodes(self.config.operators, active, width, kind == "reduce"), self.config.nodes

    def operator_weights(self) -> dict[str, Tensor]:
        """Cell type -> the softmax over the operators of every edge, float [edges, operators]; pruned operators have 0."""
        return {kind: self._softmax(kind, alpha) for kind, alpha in self.alphas.items()}

    def _softmax(self, kind: str, alpha: Tensor) -> Tensor:
        pruned = self.config.pruned_operators.get(kind)  # type: ignore[union-attr]
        if pruned:
            rows = torch.tensor([edge for edge, _ in pruned], device=alpha.device)
            columns = torch.tensor([self.config.operators.index(name) for _, name in pruned], device=alpha.device)
            alpha = alpha.index_put((rows, columns), alpha.new_tensor(-torch.inf))
        return alpha.softmax(dim=-1)

    def _weights(self) -> dict[str, tuple[Tensor, ...]]:
        return {kind: (weights,) for kind, weights in self.operator_weights().items()}


class DartsSupernetForImageClassification(ImageClassification, DartsSupernetPreTrainedModel):
    """The supernet with one linear layer on the pooled features: what an architecture search trains.

    Its weights are ordinary parameters; :meth:`architecture_parameters` are those that choose among operators, and
    :meth:`derive` makes the network that they have chosen.
    """

    def __init__(self, config: DartsSupernetConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.supernet = DartsSupernetModel(config)
        self.classifier = classifier(self.supernet.cell_channels[-1], config)
        self.post_init()

    def architecture_parameters(self) -> dict[str, nn.Parameter]:
        """Cell type -> architecture parameters, float [edges, operators]; see :class:`DartsSupernetModel`."""
        return dict(self.supernet.alphas.items())

    def operator_weights(self) -> dict[str, Tensor]:
        """Cell type -> the softmax over the operators of every edge, float [edges, operators]; pruned operators have 0."""
        return self.supernet.operator_weights()

    @torch.no_grad()
    def genotype(self) -> Genotype:
        """The cells that the architecture parameters choose now, by DARTS's rule (``genotype_darts.choose``).

        Raises:
            ModelError: when an architecture parameter is NaN.
        """
        config = self.config
        return {
            kind: choose(weights.double().tolist(), config.nodes, config.operators, config.edges_per_node)
            for kind, weights in self.operator_weights().items()
        }

    def derive(self, **changes: Any) -> DartsForImageClassification:
        """The network with the chosen cells and new weights, which is trained from scratch as in the paper.

        Args:
            changes: fields of :class:`DartsConfig` that differ from the supernet's, for example ``num_cells=20, width=36``.
                With another number of cells, reduction cells are at a third and two thirds again.

        Raises:
            ModelError: when an architecture parameter is NaN, or a field is impossible.
        """
        config = self.config.derived(self.genotype(), **changes)
        model: Any = DartsForImageClassification(config)
        return model.to(self.device, self.dtype).train(self.training)

    def prune_operators(self, threshold: float) -> int:
        """Leave out operators whose weight is small: they are computed no more, and the others of the edge share the softmax.

        The strongest operator of an edge other than "none" always stays. Weights of pruned operators stay in the model.

        Args:
            threshold: softmax weights below this are pruned. From 0, where none is, to 1, where one is left of each edge.

        Returns:
            How many operators of edges are pruned now in a normal and a reduction cell together.
        """
        operators = self.config.operators
        pruned = {}
        for kind, weights in self.operator_weights().items():
            pairs = []
            for edge, row in enumerate(weights.tolist()):
                best = max((k for k, name in enumerate(operators) if name != "none"), key=lambda k: row[k])
                pairs += [
                    [edge, name]
                    for k, name in enumerate(operators)
                    if k != best and (row[k] < threshold or row[k] == 0)
                ]
            pruned[kind] = pairs
        self.config.pruned_operators = pruned
        cells: Any = self.supernet.cells
        for kind, cell in zip(self.supernet.kinds, cells, strict=True):
            cell.nodes.set_active(self.config.active_operators(kind))
        return sum(map(len, pruned.values()))


__all__ = [
    "DartsForImageClassification",
    "DartsImageClassifierOutput",
    "DartsModel",
    "DartsPreTrainedModel",
    "DartsSupernetForImageClassification",
    "DartsSupernetModel",
    "all_cells",
    "parameter_free_share",
    "random_genotype",
]
