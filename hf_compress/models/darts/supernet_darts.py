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
        assert self.running_mean is not None and self.num_batches_tracked is not None
        if self.training:
            self.num_batches_tracked.add_(1)
        return F.batch_norm(
            hidden_states,
            self.running_mean,
            self.running_var,
            weight=weight.to(self.running_mean.dtype).expand(self.num_features).contiguous(),
            training=self.training,
            momentum=self.momentum or 0.0,
            eps=self.eps,
        )


class DartsMixedConvolutions(nn.Module):
    """One convolutional operator of all edges from a node: depthwise and 1x1 convolution and BatchNorm, once or twice.

    Three ways to compute the same, chosen by what was measured on a CPU (``benchmarks/search_step.py``):

    - "composed": the depthwise and the 1x1 convolution have nothing between them, so they are one ordinary convolution, and
      those of all edges, which read the same input, are one together. For few channels, where it takes 0.2 to 0.7 of the time.
    - "grouped": one depthwise and one grouped 1x1 convolution for all edges. For small feature maps, where it saves calls.
    - "separate": one after the other, for large feature maps, which stay in the processor's cache this way.

    Args:
        channels: in and out, of an edge.
        edges: how many edges the node has.
        stride: of the first depthwise convolution.
        kernel, dilation, repeats: of the operator; see ``CONVOLUTIONS``.

    Attributes:
        depthwise: [repeats, edges, channels, kernel, kernel].
        pointwise: [repeats, edges, channels out, channels in].
        running_mean, running_var: of the BatchNorms, [repeats, edges, channels].
        way: one of the three; None chooses.
    """

    eps, momentum = 1e-5, 0.1  # torch's defaults for BatchNorm

    def __init__(self, channels: int, edges: int, stride: int, kernel: int, dilation: int = 1, repeats: int = 2):
        super().__init__()
        self.channels, self.stride, self.dilation, self.repeats = channels, stride, dilation, repeats
        self.way: str | None = None
        self.track_running_stats = True  # as of a BatchNorm, for ``StatisticsOnce``
        self.depthwise = nn.Parameter(torch.empty(repeats, edges, channels, kernel, kernel))
        self.pointwise = nn.Parameter(torch.empty(repeats, edges, channels, channels))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(repeats, edges, channels))
        self.register_buffer("running_var", torch.ones(repeats, edges, channels))

    def forward(self, read: Tensor, weights: Sequence[Tensor], edges: Sequence[int], is_split: bool) -> list[Tensor]:
        """Weighted outputs of some edges.

        Args:
            read: the node behind its ReLU, float [batch, channels, height, width].
            weights: of the operator on each of these edges, numbers.
            edges: which.
            is_split: of a dilated convolution, whether ``read`` is every second pixel of the node already.

        Returns:
            One [batch, channels, height / stride, width / stride] for each edge.
        """
        stride, dilation = (1, 1) if is_split else (self.stride, self.dilation)
        depthwise: Tensor = self.depthwise
        pointwise: Tensor = self.pointwise
        mean, variance = self.running_mean, self.running_var
        is_whole = len(edges) == self.depthwise.shape[1]
        if not is_whole:
            index = torch.tensor(edges, device=read.device)
            depthwise, pointwise = depthwise.index_select(1, index), pointwise.index_select(1, index)
            mean, variance = mean.index_select(1, index), variance.index_select(1, index)
        ways = self._ways(read, len(edges), stride)
        scales = [None] * (self.repeats - 1) + [weights]
        states, is_shared = [read], True
        for number, (way, scale) in enumerate(zip(ways, scales, strict=True)):
            if number:
                # in place: to go back, the BatchNorms before need their inputs alone
                states = [F.relu_(state) for state in states]
            step = stride if number == 0 else 1
            states = self._convolved(way, states, depthwise[number], pointwise[number], step, dilation, is_shared)
            states = self._normalized(states, mean[number], variance[number], scale)
            is_shared = False
        if not is_whole and self.training:
            self.running_mean.index_copy_(1, index, mean)
            self.running_var.index_copy_(1, index, variance)
        return [part for state in states for part in state.split(self.channels, dim=1)]

    def _ways(self, read: Tensor, edges: int, stride: int) -> list[str]:
        """How each repeat is computed."""
        if self.way is not None:
            return [self.way] * self.repeats
        if read.device.type != "cpu" or torch.compiler.is_compiling():
            return ["grouped"] * self.repeats  # fewest calls; a choice by the batch would tie a program to its size
        numbers = read.numel() * edges // stride**2
        other = "grouped" if numbers < _MOST_GROUPED else "separate"
        return [("composed" if self.channels < _FEWEST_SEPARABLE else other)] + [other] * (self.repeats - 1)

    def _convolved(
        self,
        way: str,
        states: list[Tensor],
        kernels: Tensor,
        mixing: Tensor,
        stride: int,
        dilation: int,
        is_shared: bool,
    ) -> list[Tensor]:
        """Each state has the channels of all edges, or there is one for each edge, or one that all edges read."""
        edges, size = kernels.shape[0], kernels.shape[-1]
        if way == "composed":
            weight = (mixing[..., None, None] * kernels[:, None]).flatten(0, 1)
            groups, padding = 1 if is_shared else edges, dilation * (size // 2)
            return [F.conv2d(_together(states), weight, None, stride, padding, dilation, groups)]
        if way == "grouped":
            state = _together(states)
            if is_shared and edges > 1:
                state = torch.cat([state] * edges, dim=1)
            state = depthwise(state, kernels.flatten(0, 1)[:, None], stride, dilation)
            return [F.conv2d(state, mixing.flatten(0, 1)[..., None, None], groups=edges)]
        if is_shared:
            states = states * edges
        elif len(states) < edges:
            states = list(states[0].split(self.channels, dim=1))
        return [
            F.conv2d(depthwise(state, kernel[:, None], stride, dilation), mix[..., None, None])
            for state, kernel, mix in zip(states, kernels.unbind(), mixing.unbind(), strict=True)
        ]

    def _normalized(
        self, states: list[Tensor], mean: Tensor, variance: Tensor, scale: Sequence[Tensor] | None
    ) -> list[Tensor]:
        """BatchNorm without shifts, and with the operators' weights as scales."""
        means, variances = mean.reshape(len(states), -1), variance.reshape(len(states), -1)
        per_state = mean.shape[0] // len(states)
        outputs = []
        for number, state in enumerate(states):
            weight = None
            if scale is not None:
                here = scale[number * per_state : (number + 1) * per_state]
                weight = torch.stack(list(here)).to(mean.dtype).repeat_interleave(self.channels)
            outputs.append(
                F.batch_norm(
                    state,
                    means[number],
                    variances[number],
                    weight=weight,
                    training=self.training,
                    momentum=self.momentum,
                    eps=self.eps,
                )
            )
        return outputs


_FEWEST_SEPARABLE = 16  # oneDNN computes channels in blocks of 16 numbers (AVX-512)
_MOST_GROUPED = 2**20  # numbers in the output of all edges together


def _together(states: list[Tensor]) -> Tensor:
    return states[0] if len(states) == 1 else torch.cat(states, dim=1)


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
        rows: of every node that edges come from, their numbers as in ``genotype_darts.edges_of``.
        convolutions: of every such node, its convolutional operators.
        reductions: of every such node with stride 2, the skip connection of each edge.
        pooled: of every such node, the BatchNorms behind its poolings.
    """

    def __init__(self, operators: Sequence[str], active: Sequence[Sequence[str]], width: int, is_reduction: bool):
        super().__init__()
        self.operators = list(operators)
        self.num_nodes = next(n for n in range(1, len(active) + 1) if len(edges_of(n)) == len(active))
        self.edges = edges_of(self.num_nodes)
        self.strides = [2 if is_reduction and node < INPUTS else 1 for node in range(INPUTS + self.num_nodes - 1)]
        self.rows = [
            [row for row, edge in enumerate(self.edges) if edge[0] == node] for node in range(len(self.strides))
        ]
        self.convolutions: Any = nn.ModuleList(
            nn.ModuleDict(
                {
                    operator: DartsMixedConvolutions(width, len(rows), stride, **CONVOLUTIONS[operator])
                    for operator in operators
                    if operator in CONVOLUTIONS
                }
            )
            for rows, stride in zip(self.rows, self.strides, strict=True)
        )
        self.reductions: Any = nn.ModuleList(
            nn.ModuleList(DartsMixedReduction(width) for _ in rows)
            for rows, stride in zip(self.rows, self.strides, strict=True)
            if stride == 2 and "skip_connect" in operators
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
        numbers = weights.flatten().unbind()
        height, width = (-(-size // self.strides[0]) for size in earlier.shape[-2:])
        is_even = height % 2 == 0 and width % 2 == 0
        states = [earlier, previous]
        totals = [_Sum() for _ in range(self.num_nodes)]
        phased = [_Sum() for _ in range(self.num_nodes)]
        for source, stride in enumerate(self.strides):
            if source >= INPUTS:
                states.append(_joined(totals[source - INPUTS], phased[source - INPUTS]))
            shared = _Shared(states[source], stride, self.pooled[source])
            for column, operator in enumerate(self.operators):
                edges = [edge for edge, row in enumerate(self.rows[source]) if operator in self.active[row]]
                if operator == "none" or not edges:
                    continue
                places = [self.rows[source][edge] for edge in edges]
                here = [numbers[row * len(self.operators) + column] for row in places]
                sums = totals
                if operator in CONVOLUTIONS:
                    is_dilated = "dilation" in CONVOLUTIONS[operator]
                    # with stride 2, every second pixel of the input is all that is read, and gives the whole output;
                    # images of odd size cannot be split into four of the same size, as BatchNorm needs them
                    is_split = is_dilated and (stride == 2 or is_even)
                    read = shared.every_second() if is_split else shared.activated()
                    outputs = self.convolutions[source][operator](read, here, edges, is_split)
                    sums = phased if is_split and stride == 1 else totals
                elif operator == "skip_connect" and stride == 2:
                    layers = self.reductions[source]
                    outputs = [layers[e](shared.activated(), w) for e, w in zip(edges, here, strict=True)]
                else:
                    output = shared.unweighted(operator)
                    for row, weight in zip(places, here, strict=True):
                        totals[self.edges[row][1]].add_weighted(output, weight)
                    continue
                for row, output in zip(places, outputs, strict=True):
                    sums[self.edges[row][1]].add(output)
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


class _Sum:
    """A sum of tensors, in place as soon as it has memory of its own."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.is_owned = False

    def add(self, output: Tensor) -> None:
        if self.total is None:
            self.total = output  # perhaps a part of what is computed for several edges together
        elif self.is_owned:
            self.total.add_(output)
        else:
            self.total, self.is_owned = self.total + output, True

    def add_weighted(self, output: Tensor, weight: Tensor) -> None:
        weight = weight.to(output.dtype)
        if self.total is None:
            self.total, self.is_owned = output * weight, True
        elif self.is_owned:
            self.total.addcmul_(output, weight)
        else:
            self.total, self.is_owned = torch.addcmul(self.total, output, weight), True


def _joined(whole: _Sum, phased: _Sum) -> Tensor:
    if phased.total is not None:
        whole.add(join_phases(phased.total))
    assert whole.total is not None  # an edge always has an operator
    return whole.total
