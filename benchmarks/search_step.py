"""How much faster is a search step of the DARTS supernet here than a plain implementation of it?

A step is one forward and one backward pass of the supernet, to its weights and architecture parameters. The baseline is
written below the plain way, one module for every operator of every edge, each output multiplied by its weight, as DARTS's
published code has it. Both have the same weights, and their losses and gradients are compared before anything is timed.

Variants are measured in turn in every round, and a ratio is the median over the rounds of the ratio within one round, so that
another load on the machine hits both sides alike. Times are CPU seconds of one thread.

"second order" is DARTS's own step for the architecture: a virtual step of the weights, the validation gradient there, and two
gradients of the training loss for the finite difference (Liu et al. 2019, Eq. 7 and 8).

    python benchmarks/search_step.py            # all cases
    python benchmarks/search_step.py --quick    # a smoke test
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from hf_compress.measurement import describe_machine
from hf_compress.models.darts import DartsSupernetConfig, DartsSupernetForImageClassification
from hf_compress.models.darts.genotype_darts import INPUTS
from hf_compress.models.darts.operations_darts import CONVOLUTIONS, operation
from hf_compress.models.darts.supernet_darts import DartsMixedNodes


class PlainNodes(nn.Module):
    """The nodes of a supernet's cell, one module for every operator of every edge."""

    def __init__(self, nodes: DartsMixedNodes, width: int) -> None:
        super().__init__()
        self.operators, self.edges = nodes.operators, nodes.edges
        self.mixed = nn.ModuleList()
        for source, _ in self.edges:
            layers: list[nn.Module] = []
            for operator in self.operators:
                if operator == "none":
                    layers.append(Zero(nodes.strides[source]))
                    continue
                layer = operation(operator, width, nodes.strides[source], affine=False)
                if "pool" in operator:
                    layer = nn.Sequential(layer, nn.BatchNorm2d(width, affine=False))
                layers.append(layer)
            self.mixed.append(nn.ModuleList(layers))

    def forward(self, earlier: Tensor, previous: Tensor, weights: Tensor) -> Tensor:
        states = [earlier, previous]
        edge = 0
        while len(states) < INPUTS + 1 + self.edges[-1][1]:
            total: Tensor | float = 0.0
            for state in list(states):
                outputs = (w * layer(state) for w, layer in zip(weights[edge], self.mixed[edge], strict=True))
                total = total + sum(outputs)
                edge += 1
            states.append(total)
        return torch.cat(states[INPUTS:], dim=1)


class Zero(nn.Module):
    """ "none"."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, state: Tensor) -> Tensor:
        return state[:, :, :: self.stride, :: self.stride].mul(0.0)


def plain(model: DartsSupernetForImageClassification) -> DartsSupernetForImageClassification:
    """A copy of a supernet that computes the plain way, with the same weights and statistics."""
    model = copy.deepcopy(model)
    for cell in model.supernet.cells:
        ours, width = cell.nodes, cell.preprocessing_previous.convolution.out_channels
        cell.nodes = PlainNodes(ours, width).to(model.device, model.dtype).train(model.training)
        for ours_tensor, plain_tensor in pairs(ours, cell.nodes):
            plain_tensor.data.copy_(ours_tensor.detach())
    return model


def pairs(ours: DartsMixedNodes, theirs: PlainNodes) -> list[tuple[Tensor, Tensor]]:
    """Parameters and statistics of both that mean the same; those of ours are parts of larger ones."""
    found: list[tuple[Tensor, Tensor]] = []
    for source, rows in enumerate(ours.rows):
        for edge, row in enumerate(rows):
            for operator, layer in zip(ours.operators, theirs.mixed[row], strict=True):
                if operator in CONVOLUTIONS:
                    mixed = ours.convolutions[source][operator]
                    convolutions = [module for module in layer if isinstance(module, nn.Conv2d)]
                    norms = [module for module in layer if isinstance(module, nn.BatchNorm2d)]
                    for number, norm in enumerate(norms):
                        depthwise, pointwise = convolutions[2 * number : 2 * number + 2]
                        found += [
                            (mixed.depthwise[number, edge], depthwise.weight[:, 0]),
                            (mixed.pointwise[number, edge], pointwise.weight[..., 0, 0]),
                            (mixed.running_mean[number, edge], norm.running_mean),
                            (mixed.running_var[number, edge], norm.running_var),
                        ]
                elif operator == "skip_connect" and ours.strides[source] == 2:
                    found += zip(
                        ours.reductions[source][edge].state_dict().values(), layer.state_dict().values(), strict=True
                    )
                elif "pool" in operator:
                    found += zip(
                        ours.pooled[source][operator].state_dict().values(), layer.state_dict().values(), strict=True
                    )
    return found
