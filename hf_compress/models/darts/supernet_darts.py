"""The intermediate nodes of a cell in which every edge has all operators."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .genotype_darts import INPUTS, edges_of
from .operations_darts import operation


class DartsMixedNodes(nn.Module):
    """Nodes that sum weighted operators of all earlier nodes.

    Args:
        operators: columns of the weights.
        active: the operators of every edge that are computed.
        width: channels of every node.
        is_reduction: whether edges from the two inputs have stride 2.
    """

    def __init__(self, operators: Sequence[str], active: Sequence[Sequence[str]], width: int, is_reduction: bool):
        super().__init__()
        self.operators = list(operators)
        nodes = next(n for n in range(1, len(active) + 1) if len(edges_of(n)) == len(active))
        self.edges = edges_of(nodes)
        self.mixed: Any = nn.ModuleList()
        for source, _ in self.edges:
            stride = 2 if is_reduction and source < INPUTS else 1
            layers = nn.ModuleDict()
            for operator in operators:
                if operator == "none":
                    continue
                layer = operation(operator, width, stride, affine=False)
                if "pool" in operator:
                    layer = nn.Sequential(layer, nn.BatchNorm2d(width, affine=False))
                layers[operator] = layer
            self.mixed.append(layers)
        self.set_active(active)

    def reset_parameters(self) -> None:
        pass

    def set_active(self, active: Sequence[Sequence[str]]) -> None:
        """Change which operators are computed."""
        self.active = [list(names) for names in active]

    def forward(self, earlier: Tensor, previous: Tensor, weights: Tensor) -> Tensor:
        """Inputs [batch, width, height, width], weights [edges, operators] -> [batch, nodes x width, ...]."""
        states: list[Any] = [earlier, previous]
        for row, (source, target) in enumerate(self.edges):
            output: Any = 0.0
            for column, operator in enumerate(self.operators):
                if operator != "none" and operator in self.active[row]:
                    output = output + weights[row, column] * self.mixed[row][operator](states[source])
            if len(states) == INPUTS + target:
                states.append(output)
            else:
                states[INPUTS + target] = states[INPUTS + target] + output
        return torch.cat(states[INPUTS:], dim=1)
