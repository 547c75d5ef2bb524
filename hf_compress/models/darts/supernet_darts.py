"""The intermediate nodes of a cell in which every edge has all operators, computed with as little work as they allow.

The function is that of Liu et al. 2019 (arXiv 1806.09055, Eq. 2) and the code that they published: BatchNorms without scales
and shifts, one behind each pooling, too. How it is computed here is our own, and the same up to rounding:

- "none" adds nothing and is left out, as are pruned operators.
- Poolings and their BatchNorms have no weights, so all edges from a node share one of each, and all share its ReLU.
- An operator's weight is the scale of its last BatchNorm, which makes the multiplication free.
- Dilated convolutions run without dilation on every second pixel; between them and the node's sum stands nothing that sees the
  order of the pixels, so that they are put together once for each node. See ``depthwise_darts``.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .depthwise_darts import depthwise, join_phases, split_phases
from .genotype_darts import INPUTS, edges_of
from .operations_darts import CONVOLUTIONS, POOLINGS, DartsFactorizedReduction


class DartsSearchNorm(nn.BatchNorm2d):
    """BatchNorm without parameters of its own, times a weight."""

    def __init__(self, channels: int):
        super().__init__(channels, affine=False)

    def forward(self, hidden_states: Tensor, weight: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Float [batch, channels, height, width] and a number -> the same shape."""
        if weight is None:
            return super().forward(hidden_states)
        is_tracked = self.track_running_stats and self.running_mean is not None
        if self.training and is_tracked and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(
            hidden_states,
            self.running_mean if is_tracked or not self.training else None,
            self.running_var if is_tracked or not self.training else None,
            weight=weight.expand(self.num_features).contiguous(),
            training=self.training,
            momentum=self.momentum or 0.0,
            eps=self.eps,
        )


class DartsMixedConvolution(nn.Module):
    """Depthwise convolution, 1x1 convolution and BatchNorm, once or twice with a ReLU between, times a weight.

    Args:
        channels: in and out.
        kernel, repeats: of the operator; see ``CONVOLUTIONS``.
        stride: of the first depthwise convolution.
        dilation: of the depthwise convolutions.
    """

    def __init__(self, channels: int, stride: int, kernel: int, dilation: int = 1, repeats: int = 2):
        super().__init__()
        self.stride, self.dilation = stride, dilation
        self.depthwise = nn.ModuleList(
            nn.Conv2d(channels, channels, kernel, dilation=dilation, groups=channels, bias=False)
            for _ in range(repeats)
        )
        self.pointwise = nn.ModuleList(nn.Conv2d(channels, channels, 1, bias=False) for _ in range(repeats))
        self.normalization = nn.ModuleList(DartsSearchNorm(channels) for _ in range(repeats))

    def forward(self, activated: Tensor, weight: Tensor, is_split: bool = False) -> Tensor:
        """Weighted output.

        Args:
            activated: the input behind its ReLU, float [batch, channels, height, width].
            weight: of the operator, a number.
            is_split: of a dilated convolution, whether ``activated`` is every second pixel of the input already.
        """
        last = len(self.depthwise) - 1
        hidden_states = activated
        for number, convolution in enumerate(self.depthwise):
            kernel: Any = convolution.weight
            stride, dilation = (1, 1) if is_split else (self.stride if number == 0 else 1, self.dilation)
            hidden_states = depthwise(hidden_states, kernel, stride, dilation)
            hidden_states = self.pointwise[number](hidden_states)
            hidden_states = self.normalization[number](hidden_states, weight if number == last else None)
            if number < last:
                hidden_states = F.relu_(hidden_states)  # the BatchNorm before it needs its input alone to go back
        return hidden_states


class DartsMixedReduction(DartsFactorizedReduction):
    """The skip connection of an edge with stride 2, times a weight; its ReLU is shared by the edges of a node."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, affine=False)
        self.normalization = DartsSearchNorm(channels)

    def forward(self, activated: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        return self.normalization(self.halved(activated), weight)


class DartsMixedNodes(nn.Module):
    """Nodes that sum weighted operators of all earlier nodes.

    Args:
        operators: columns of the weights.
        active: the operators of every edge that are computed; the others have weight 0.
        width: channels of every node.
        is_reduction: whether edges from the two inputs have stride 2.

    Attributes:
        mixed: the operators with weights of every edge, edges as in ``genotype_darts.edges_of``.
        pooled: of every node, the BatchNorms behind its poolings.
    """

    def __init__(self, operators: Sequence[str], active: Sequence[Sequence[str]], width: int, is_reduction: bool):
        super().__init__()
        self.operators = list(operators)
        self.num_nodes = next(n for n in range(1, len(active) + 1) if len(edges_of(n)) == len(active))
        self.edges = edges_of(self.num_nodes)
        self.strides = [2 if is_reduction and node < INPUTS else 1 for node in range(INPUTS + self.num_nodes - 1)]
        self.mixed: Any = nn.ModuleList(
            nn.ModuleDict(
                {
                    operator: _with_weights(operator, width, self.strides[source])
                    for operator in operators
                    if operator in CONVOLUTIONS or (operator == "skip_connect" and self.strides[source] == 2)
                }
            )
            for source, _ in self.edges
        )
        self.pooled: Any = nn.ModuleList(
            nn.ModuleDict({operator: DartsSearchNorm(width) for operator in operators if operator in POOLINGS})
            for _ in self.strides
        )
        self.set_active(active)

    def set_active(self, active: Sequence[Sequence[str]]) -> None:
        """Change which operators of every edge are computed."""
        self.active = [[operator for operator in names if operator != "none"] for names in active]

    def forward(self, earlier: Tensor, previous: Tensor, weights: Tensor) -> Tensor:
        """Inputs [batch, width, height, width], weights [edges, operators] -> [batch, nodes x width, ...]."""
        # one gradient for the matrix instead of one for each of its numbers
        numbers = weights.to(earlier.dtype).flatten().unbind()
        height, width = (-(-size // self.strides[0]) for size in earlier.shape[-2:])
        is_even = height % 2 == 0 and width % 2 == 0
        states = [earlier, previous]
        totals: list[Tensor | None] = [None] * self.num_nodes
        phased: list[Tensor | None] = [None] * self.num_nodes
        for source, stride in enumerate(self.strides):
            if source >= INPUTS:
                states.append(_joined(totals[source - INPUTS], phased[source - INPUTS]))
            rows = [row for row, (start, _) in enumerate(self.edges) if start == source]
            shared = _Shared(states[source], stride, self.pooled[source])
            for row in rows:
                target = self.edges[row][1]
                for operator in self.active[row]:
                    weight = numbers[row * len(self.operators) + self.operators.index(operator)]
                    if operator in CONVOLUTIONS:
                        is_dilated = "dilation" in CONVOLUTIONS[operator]
                        # with stride 2, every second pixel of the input is all that is read, and gives the whole output;
                        # images of odd size cannot be split into four of the same size, as BatchNorm needs them
                        is_split = is_dilated and (stride == 2 or is_even)
                        read = shared.every_second() if is_split else shared.activated()
                        output = self.mixed[row][operator](read, weight, is_split)
                        sums = phased if is_split and stride == 1 else totals
                    elif operator in self.mixed[row]:
                        output, sums = self.mixed[row][operator](shared.activated(), weight), totals
                    if operator in self.mixed[row]:
                        # in place: what is added to is the output of a BatchNorm or a sum, which nothing else reads
                        total = sums[target]
                        sums[target] = output if total is None else total.add_(output)
                    else:
                        output = shared.unweighted(operator)
                        total = totals[target]
                        totals[target] = output * weight if total is None else total.addcmul_(output, weight)
        states.append(_joined(totals[-1], phased[-1]))
        return torch.cat(states[INPUTS:], dim=1)


class _Shared:
    """What all edges from a node read, each computed when the first of them does."""

    def __init__(self, state: Tensor, stride: int, normalizations: Any):
        self.state, self.stride, self.normalizations = state, stride, normalizations
        self.made: dict[str, Tensor] = {}

    def activated(self) -> Tensor:
        if "relu" not in self.made:
            self.made["relu"] = F.relu(self.state)
        return self.made["relu"]

    def every_second(self) -> Tensor:
        if "phases" not in self.made:
            relu = self.activated()
            self.made["phases"] = relu[:, :, ::2, ::2] if self.stride == 2 else split_phases(relu)
        return self.made["phases"]

    def unweighted(self, operator: str) -> Tensor:
        """A pooling, or the identity."""
        if operator == "skip_connect":
            return self.state
        if operator not in self.made:
            self.made[operator] = self.normalizations[operator](POOLINGS[operator](self.stride)(self.state))
        return self.made[operator]


def _with_weights(operator: str, width: int, stride: int) -> nn.Module:
    if operator == "skip_connect":
        return DartsMixedReduction(width)
    return DartsMixedConvolution(width, stride, **CONVOLUTIONS[operator])


def _joined(total: Tensor | None, phased: Tensor | None) -> Tensor:
    parts = [] if total is None else [total]
    if phased is not None:
        parts.append(join_phases(phased))
    return parts[0] + parts[1] if len(parts) == 2 else parts[0]
