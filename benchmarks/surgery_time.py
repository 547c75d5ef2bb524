"""How long it takes to find what can shrink in a ResNet-50 and to shrink it, against torch-pruning.

Both halve every prunable layer by the magnitude of its weights, on the same random ResNet-50 of transformers, in turn
within each round. Printed are medians of wall time on one thread, for the whole and for its two parts, and the ratio; a
plain forward pass of the same image is given for scale. ``find_axes`` alone is timed on further architectures.

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
from torch import Tensor, nn

from hf_compress import find_axes, magnitude_scores, select, shrink

RATIO = 0.5
CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "resnet-50": transformers.ResNetConfig,
    "vit-base": transformers.ViTConfig,
    "swin-tiny": transformers.SwinConfig,
    "convnext-tiny": transformers.ConvNextConfig,
    "mobilenet-v2": transformers.MobileNetV2Config,
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return transformers.AutoModelForImageClassification.from_config(CONFIGS[name]()).eval()


def ours(model: nn.Module, image: Tensor) -> tuple[float, float]:
    """Seconds to find the axes, and to score, select and cut."""
    start = time.perf_counter()
    axes = find_axes(model, image)
    found = time.perf_counter()
    shrink(model, select(axes, magnitude_scores(model, axes), ratio=RATIO))
    return found - start, time.perf_counter() - found


def theirs(model: nn.Module, image: Tensor) -> tuple[float, float]:
    """Seconds to build torch-pruning's dependency graph and pruner, and to score and cut."""
    start = time.perf_counter()
    pruner = torch_pruning.pruner.BasePruner(
        model,
        image,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=RATIO,
        ignored_layers=[model.classifier[-1]],
        output_transform=lambda output: output.logits,
    )
    found = time.perf_counter()
    pruner.step()
    return found - start, time.perf_counter() - found


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three rounds and ResNet-50 alone")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "surgery_time.json")
    arguments = parser.parse_args()
    rounds = 3 if arguments.quick else 11
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    image = torch.randn(1, 3, 224, 224)

    dense = build("resnet-50")
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

    finding: dict[str, dict[str, float]] = {}
    for name in list(CONFIGS)[: 1 if arguments.quick else None]:
        model = build(name)
        pairs = []
        for _ in range(rounds + 1):
            with torch.no_grad():
                plain = seconds(lambda model=model: model(image))
            pairs.append((plain, seconds(lambda model=model: find_axes(model, image))))
        plain, watched = (statistics.median(pair[i] for pair in pairs[1:]) for i in (0, 1))
        axes = find_axes(model, image)
        halved = {axis.name: axis.size // 2 or 1 for axis in axes}
        cost_us = statistics.median(seconds(lambda a=axes, h=halved: a.cost(h)) for _ in range(101)) * 1e6
        finding[name] = {"forward_s": plain, "find_axes_s": watched, "cost_us": cost_us, "axes": len(axes)}
        print(
            f"{name:14}  forward {plain:.3f} s, find_axes {watched:.3f} s ({(watched - plain) * 1e3:+.0f} ms), "
            f"cost(plan) {cost_us:.0f} us, {len(axes)} axes"
        )
    results["find_axes"] = finding
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
