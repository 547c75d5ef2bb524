"""How long it takes to find what can shrink in a ResNet-50 and to shrink it, against torch-pruning.

Both halve every prunable layer by the magnitude of its weights, on the same random ResNet-50 of transformers, in turn
within each round. Printed are medians of processor time of one thread, for the whole and for its two parts, and the ratio;
a plain forward pass of the same image is given for scale. ``find_axes`` alone is timed on further architectures, against
torch-pruning's graph where it can build one.

    python benchmarks/surgery_time.py [--quick] [--output FILE]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch_pruning
import transformers
from latency import classifier, detr, logits, torch_pruning_graph
from torch import Tensor, nn

from hf_compress import find_axes, magnitude_scores, select, shrink

RATIO = 0.5
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet-50": (lambda: classifier(transformers.ResNetConfig()), 224),
    "vit-base": (lambda: classifier(transformers.ViTConfig()), 224),
    "swin-tiny": (lambda: classifier(transformers.SwinConfig()), 224),
    "convnext-tiny": (lambda: classifier(transformers.ConvNextConfig()), 224),
    "mobilenet-v2": (lambda: classifier(transformers.MobileNetV2Config()), 224),
    "detr-resnet-50": (detr, 480),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    make, size = MODELS[name]
    torch.manual_seed(0)
    return make().eval(), torch.randn(1, 3, size, size)


def ours(model: nn.Module, image: Tensor) -> tuple[float, float]:
    """Seconds to find the axes, and to score, select and cut."""
    start = time.process_time()
    axes = find_axes(model, image)
    found = time.process_time()
    shrink(model, select(axes, magnitude_scores(model, axes), ratio=RATIO))
    return found - start, time.process_time() - found


def theirs(model: nn.Module, image: Tensor) -> tuple[float, float]:
    """Seconds to build torch-pruning's dependency graph and pruner, and to score and cut."""
    start = time.process_time()
    pruner = torch_pruning.pruner.BasePruner(
        model,
        image,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=RATIO,
        ignored_layers=[model.classifier[-1]],
        output_transform=logits,
    )
    found = time.process_time()
    pruner.step()
    return found - start, time.process_time() - found


def seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three rounds and ResNet-50 alone")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "surgery_time.json")
    arguments = parser.parse_args()
    rounds = 3 if arguments.quick else 11
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dense, image = build("resnet-50")
    samples: dict[str, list[tuple[float, float]]] = {"hf_compress": [], "torch-pruning": []}
    forward: list[float] = []
    params: dict[str, int] = {"dense": sum(p.numel() for p in dense.parameters())}
    for round_number in range(rounds + 1):
        with torch.no_grad():
            duration = seconds(lambda: dense(image))
        for name, prune in (("hf_compress", ours), ("torch-pruning", theirs)):
            model = copy.deepcopy(dense)
            parts = prune(model, image)
            with torch.no_grad():
                assert model(image).logits.isfinite().all()
            params[name] = sum(p.numel() for p in model.parameters())
            if round_number:  # the first round warms up
                samples[name].append(parts)
        if round_number:
            forward.append(duration)

    results: dict[str, object] = {"rounds": rounds, "params": params, "forward_s": statistics.median(forward)}
    print(f"ResNet-50, one 224 x 224 image, {rounds} rounds, medians; forward pass {statistics.median(forward):.3f} s")
    print(f"{'':14}  {'graph s':>8}  {'cut s':>8}  {'total s':>8}  {'params':>12}")
    totals = {}
    for name, parts in samples.items():
        graph, cut = (statistics.median(part[i] for part in parts) for i in (0, 1))
        totals[name] = statistics.median(sum(part) for part in parts)
        results[name] = {"graph_s": graph, "cut_s": cut, "total_s": totals[name]}
        print(f"{name:14}  {graph:8.3f}  {cut:8.3f}  {totals[name]:8.3f}  {params[name]:12,}")
    results["ratio"] = totals["hf_compress"] / totals["torch-pruning"]
    print(f"hf_compress takes {results['ratio']:.2f} of the time of torch-pruning")

    finding: dict[str, dict[str, float | str]] = {}
    for name in list(MODELS)[: 1 if arguments.quick else None]:
        model, image = build(name)
        taken: dict[str, list[float | str]] = {"forward_s": [], "find_axes_s": [], "torch_pruning_graph_s": []}
        for _ in range(rounds + 1):
            with torch.no_grad():
                taken["forward_s"].append(seconds(lambda model=model, image=image: model(image)))
            taken["find_axes_s"].append(seconds(lambda model=model, image=image: find_axes(model, image)))
            taken["torch_pruning_graph_s"].append(torch_pruning_graph(copy.deepcopy(model), image, time.process_time))
        row: dict[str, float | str] = {
            key: found if isinstance(found := values[-1], str) else statistics.median(values[1:])  # type: ignore[type-var]
            for key, values in taken.items()
        }
        axes = find_axes(model, image)
        halved = {axis.name: axis.size // 2 or 1 for axis in axes}
        cost_us = statistics.median(seconds(lambda a=axes, h=halved: a.cost(h)) for _ in range(101)) * 1e6
        finding[name] = {**row, "cost_us": cost_us, "axes": len(axes)}
        shown = ", ".join(
            f"{key[:-2].replace('_', ' ')} {value if isinstance(value, str) else f'{value:.3f} s'}"
            for key, value in row.items()
        )
        print(f"{name:14}  {shown}, cost(plan) {cost_us:.0f} us, {len(axes)} axes")
    results["find_axes"] = finding
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
