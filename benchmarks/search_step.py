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
            plain_tensor.copy_(ours_tensor)
    return model


def pairs(ours: DartsMixedNodes, theirs: PlainNodes) -> list[tuple[Tensor, Tensor]]:
    """Parameters and statistics of both that mean the same; those of ours are parts of larger ones."""
    return [(_part(a, i).detach(), _part(b, j).detach()) for a, i, b, j in _matched(ours, theirs)]


def gradients(ours: DartsMixedNodes, theirs: PlainNodes) -> list[tuple[Tensor, Tensor]]:
    """Gradients of the parameters of both that mean the same."""
    return [(_part(a.grad, i), _part(b.grad, j)) for a, i, b, j in _matched(ours, theirs) if a.grad is not None]


def _part(tensor: Tensor, index: tuple) -> Tensor:
    return tensor[index]


def _matched(ours: DartsMixedNodes, theirs: PlainNodes) -> list[tuple[Tensor, tuple, Tensor, tuple]]:
    """(tensor of ours, which part of it, plain tensor, which part of it)."""
    found: list[tuple[Tensor, tuple, Tensor, tuple]] = []
    for source, rows in enumerate(ours.rows):
        for edge, row in enumerate(rows):
            for operator, layer in zip(ours.operators, theirs.mixed[row], strict=True):
                if operator in CONVOLUTIONS:
                    mixed = ours.convolutions[source][operator]
                    convolutions = [module for module in layer if isinstance(module, nn.Conv2d)]
                    norms = [module for module in layer if isinstance(module, nn.BatchNorm2d)]
                    for number, norm in enumerate(norms):
                        depthwise, pointwise = convolutions[2 * number : 2 * number + 2]
                        here = (number, edge)
                        found += [
                            (mixed.depthwise, here, depthwise.weight, (slice(None), 0)),
                            (mixed.pointwise, here, pointwise.weight, (..., 0, 0)),
                            (mixed.running_mean, here, norm.running_mean, ()),
                            (mixed.running_var, here, norm.running_var, ()),
                        ]
                    continue
                if operator == "skip_connect" and ours.strides[source] == 2:
                    same = ours.reductions[source][edge]
                elif "pool" in operator:
                    same = ours.pooled[source][operator]
                else:
                    continue
                for a, b in zip(
                    [*same.parameters(), *same.buffers()], [*layer.parameters(), *layer.buffers()], strict=True
                ):
                    found.append((a, (), b, ()))
    return found


@dataclass(frozen=True)
class Case:
    """A supernet and a batch; the widths and depths of the paper unless said otherwise."""

    batch: int
    image_size: int = 32
    num_channels: int = 3
    num_cells: int = 8
    width: int = 16
    nodes: int = 4

    def model(self) -> DartsSupernetForImageClassification:
        torch.manual_seed(0)
        fields = {key: value for key, value in asdict(self).items() if key != "batch"}
        return DartsSupernetForImageClassification(DartsSupernetConfig(num_labels=10, **fields)).train()

    def images(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        shape = self.batch, self.num_channels, self.image_size, self.image_size
        return torch.randn(shape, generator=generator), torch.randint(10, (self.batch,), generator=generator)


CASES = {
    "paper": Case(batch=16),
    "fashion_mnist": Case(batch=32, image_size=28, num_channels=1, num_cells=5, width=8),
    "digits": Case(batch=64, image_size=8, num_channels=1, num_cells=3, width=4, nodes=2),
}


def search_step(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """One forward and backward pass."""
    model.zero_grad(set_to_none=True)
    loss = model(images, labels=labels).loss
    loss.backward()
    return loss.detach()


def second_order_step(model: nn.Module, images: Tensor, labels: Tensor, rate: float = 0.025) -> list[Tensor]:
    """DARTS's second-order gradient of the architecture parameters; half of the batch is for training, half for validation."""
    half = len(labels) // 2
    train, validation = (images[:half], labels[:half]), (images[half:], labels[half:])
    alphas = list(model.architecture_parameters().values())
    weights = [p for p in model.parameters() if all(p is not alpha for alpha in alphas)]

    def gradient(batch: tuple[Tensor, Tensor], of: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(model(batch[0], labels=batch[1]).loss, of)

    with torch.no_grad():
        saved = [w.clone() for w in weights]
    step = gradient(train, weights)
    with torch.no_grad():
        torch._foreach_add_(weights, step, alpha=-rate)
    both = gradient(validation, alphas + weights)
    direct, at_virtual = both[: len(alphas)], list(both[len(alphas) :])
    epsilon = 0.01 / float(torch.stack(torch._foreach_norm(at_virtual)).norm())
    sides = []
    for sign in (1.0, -1.0):
        with torch.no_grad():
            torch._foreach_copy_(weights, saved)
            torch._foreach_add_(weights, at_virtual, alpha=sign * epsilon)
        sides.append(gradient(train, alphas))
    with torch.no_grad():
        torch._foreach_copy_(weights, saved)
    return [d - rate * (p - m) / (2 * epsilon) for d, p, m in zip(direct, *sides, strict=True)]


def in_contiguous_layout(model: DartsSupernetForImageClassification) -> DartsSupernetForImageClassification:
    """The plain supernet as it is usually run: [batch, channels, height, width] in this order in memory."""
    model.supernet.is_channels_last = False
    return model


def variants(case: Case) -> dict[str, Callable[[], object]]:
    """Name -> what is timed. All have the same weights."""
    images, labels = case.images()
    models = {"ours": case.model()}
    models["plain"] = in_contiguous_layout(plain(models["ours"]))
    models["plain, channels last"] = plain(models["ours"])
    losses = {name: search_step(model, images, labels) for name, model in models.items()}
    alphas = {name: model.architecture_parameters()["normal"].grad for name, model in models.items()}
    for name in models:  # float32, another order of summation
        assert abs(float(losses[name] - losses["ours"])) < 1e-4, losses
        error = float((alphas[name] - alphas["ours"]).abs().max() / alphas["ours"].abs().max())
        assert error < 1e-2, error
    timed: dict[str, Callable[[], object]] = {
        name: lambda model=model: search_step(model, images, labels) for name, model in models.items()
    }
    for threshold, words in ((0.2, "half of the operators"), (1.0, "all operators but one of an edge")):
        model = copy.deepcopy(models["ours"])
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():  # as after a search: half of the operators of every edge have nearly all the weight
            for alpha in model.architecture_parameters().values():
                order = torch.rand(alpha.shape, generator=generator).argsort(1)
                alpha.copy_(torch.where(order < alpha.shape[1] // 2, 2.0, -2.0))
        model.prune_operators(threshold)
        timed[f"ours, {words} pruned"] = lambda model=model: search_step(model, images, labels)
    timed["ours, second order"] = lambda: second_order_step(models["ours"], images, labels)
    timed["plain, second order"] = lambda: second_order_step(models["plain"], images, labels)
    return timed


def measured(case: Case, rounds: int) -> dict[str, dict[str, float]]:
    """Variant -> CPU seconds of a step, and how many times longer than ours it takes."""
    timed = variants(case)
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(rounds + 1):
        for name in list(timed)[:: 1 if turn % 2 == 0 else -1]:
            start = time.process_time()
            timed[name]()
            seconds[name].append(time.process_time() - start)

    def row(name: str) -> dict[str, float]:
        base = "ours, second order" if name.endswith("second order") else "ours"
        ratios = [a / b for a, b in zip(seconds[name][1:], seconds[base][1:], strict=True)]  # the first round warms up
        return {
            "ms": 1e3 * statistics.median(seconds[name][1:]),
            "ratio": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
        }

    return {name: row(name) for name in timed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest case, one round")
    parser.add_argument("--case", nargs="+", choices=sorted(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "search_step.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.case or (["digits"] if options.quick else list(CASES))
    rounds = 1 if options.quick else options.rounds
    result: dict[str, object] = {
        "machine": describe_machine(), "threads": 1, "rounds": rounds, "torch": torch.__version__,
        "transformers": transformers.__version__,
    }  # fmt: skip
    for name in names:
        rows = measured(CASES[name], rounds)
        print(f"{name}: {CASES[name]}")
        print(f"{'variant':45} {'ms a step':>10} {'x ours':>7} {'lowest':>7} {'highest':>8}")
        for variant, row in rows.items():
            print(
                f"{variant:45} {row['ms']:10.1f} {row['ratio']:7.2f} {row['lowest']:7.2f} {row['highest']:8.2f}",
                flush=True,
            )
        result[name] = {"case": asdict(CASES[name]), "rows": rows}
    if options.quick:
        return
    beside = options.output.with_name(options.output.name + ".tmp")
    beside.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(beside, options.output)
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
