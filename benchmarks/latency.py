"""Achieved time against MACs at half of the budget: what a MACs budget saves, and what a latency budget saves.

Random ResNet-50, ViT-S, Swin-T, ConvNeXt-T (224 x 224) and DETR with a ResNet-50 (480 x 480) are pruned by weight magnitude:

- ``macs``: to 50 % of the MACs, any width,
- ``macs_fast``: to 50 % of the MACs, with the fast widths of the latency table,
- ``latency``: to 50 % of the predicted time, by the same table,

and timed for one image, in PyTorch and in ONNX Runtime. All candidates take turns in every round; the ratio is the median
over the rounds of compressed to dense. With two threads (the default) wall time counts, which needs a quiet machine; with one
thread processor time counts, which stands still while other processes run. Also timed: ``find_axes`` against a forward pass and against
torch-pruning's graph, a budget query, selection and surgery.

    python benchmarks/latency.py [--quick] [--threads N] [--only NAME ...] [--output FILE]

Finished models are kept in the output file, so the models may be run one by one.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from hf_compress import AxisGraph, HfCompressError, export_onnx, find_axes, magnitude_scores, select, shrink
from hf_compress.export import onnx_runner
from hf_compress.measurement import describe_machine
from hf_compress.measurement.latency_table import LatencyTable

SHARE = 0.5
VARIANTS: dict[str, Callable[[LatencyTable], dict[str, Any]]] = {
    "macs": lambda table: {"macs": SHARE},
    "macs_fast": lambda table: {"macs": SHARE, "latency_table": table},
    "latency": lambda table: {"latency": SHARE, "latency_table": table},
}


def classifier(config: transformers.PretrainedConfig) -> nn.Module:
    return transformers.AutoModelForImageClassification.from_config(config)


def detr() -> nn.Module:
    backbone = transformers.ResNetConfig(out_features=["stage4"])
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone
    )
    return transformers.DetrForObjectDetection(config)


VIT_S = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet-50": (lambda: classifier(transformers.ResNetConfig(num_labels=1000)), 224),
    "vit-small": (lambda: classifier(transformers.ViTConfig(num_labels=1000, **VIT_S)), 224),
    "swin-tiny": (lambda: classifier(transformers.SwinConfig(num_labels=1000)), 224),
    "convnext-tiny": (lambda: classifier(transformers.ConvNextConfig(num_labels=1000)), 224),
    "detr-resnet-50": (detr, 480),
}


def seconds(function: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    function()
    return clock() - start


def ratios(
    calls: Mapping[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]
) -> tuple[dict[str, float], float]:
    """Median over rounds of each call's time over that of ``dense``; and the milliseconds of ``dense``."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    with torch.inference_mode():
        for round_number in range(rounds + 1):  # the first round warms up
            for name in order:
                taken = seconds(calls[name], clock)
                found[name] += [taken] if round_number else []
            order.reverse()
    dense = found.pop("dense")
    pairs = {name: [a / b for a, b in zip(times, dense, strict=True)] for name, times in found.items()}
    return {name: statistics.median(values) for name, values in pairs.items()}, 1e3 * statistics.median(dense)


def torch_pruning_graph(model: nn.Module, image: Tensor, clock: Callable[[], float]) -> float | str:
    """Seconds that torch-pruning needs for its graph, or why it has none."""
    import torch_pruning

    try:
        build = torch_pruning.DependencyGraph().build_dependency
        return seconds(lambda: build(model, image, output_transform=logits), clock)
    except Exception as error:  # its failures have no common class
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def logits(output: Any) -> Tensor:
    return output.logits


def prunable_share(axes: AxisGraph) -> float:
    """Share of the MACs that stay when every axis keeps one index."""
    return axes.cost({axis.name: 1 for axis in axes}).macs / axes.macs


def run(name: str, rounds: int, threads: int) -> dict[str, Any]:
    build, size = MODELS[name]
    clock = time.process_time if threads == 1 else time.perf_counter
    torch.manual_seed(0)
    model = build().eval()
    image = torch.randn(1, 3, size, size)
    repeats = 1 if rounds < 5 else 5

    def forward(candidate: nn.Module = model) -> Any:
        with torch.inference_mode():
            return candidate(pixel_values=image)

    forward()
    axes = find_axes(model, image)
    finding: dict[str, list[Any]] = {"forward_s": [], "find_axes_s": [], "torch_pruning_graph_s": []}
    for _ in range(repeats):
        finding["forward_s"].append(seconds(forward, clock))
        finding["find_axes_s"].append(seconds(lambda: find_axes(model, image), clock))
        finding["torch_pruning_graph_s"].append(torch_pruning_graph(copy.deepcopy(model), image, clock))
    result: dict[str, Any] = {
        "image": size,
        "threads": threads,
        "clock": clock.__name__,
        **{
            key: statistics.median(values) if isinstance(values[0], float) else values[0]
            for key, values in finding.items()
        },
    }
    start = clock()
    table = LatencyTable.for_model(model, axes, image)
    result["table_s"] = clock() - start
    result["table_again_s"] = seconds(lambda: LatencyTable.for_model(model, axes, image), clock)
    result["timed_share"] = table.timed_share
    result["lowest_macs"] = prunable_share(axes)
    halved = {axis.name: max(axis.size // 2, 1) for axis in axes}
    result["predict_us"] = 1e6 * statistics.median(seconds(lambda: table.predict(halved), clock) for _ in range(51))
    result["cost_us"] = 1e6 * statistics.median(seconds(lambda: axes.cost(halved), clock) for _ in range(51))

    scores = magnitude_scores(model, axes)
    models: dict[str, nn.Module] = {"dense": model}
    variants: dict[str, dict[str, Any]] = {}
    for variant, budget in VARIANTS.items():
        small = copy.deepcopy(model)
        start = clock()
        try:
            plan = select(axes, scores, inexact=True, **budget(table))
        except HfCompressError as error:
            variants[variant] = {"error": str(error)}
            continue
        chosen = clock()
        models[variant] = shrink(small, plan, axes=axes)
        variants[variant] = {
            "select_s": chosen - start,
            "shrink_s": clock() - chosen,
            "macs_ratio": axes.cost(plan).macs / axes.macs,
            "predicted_ratio": table.predict(plan) / table.dense_ms,
        }
    result["variants"] = variants

    calls = {key: functools.partial(forward, candidate) for key, candidate in models.items()}
    found, result["torch_dense_ms"] = ratios(calls, rounds, clock)
    for variant, ratio in found.items():
        variants[variant]["torch_ratio"] = ratio
    with tempfile.TemporaryDirectory() as folder:
        runners = {}
        for key, candidate in models.items():
            path = export_onnx(candidate, Path(folder) / f"{key}.onnx", image, tolerance=1e-3)
            runners[key] = functools.partial(onnx_runner(path), image)
        found, result["onnx_dense_ms"] = ratios(runners, rounds, clock)
    for variant, ratio in found.items():
        variants[variant]["onnx_ratio"] = ratio
    result["load_average"] = os.getloadavg()[0]
    return result


def show(name: str, result: Mapping[str, Any]) -> None:
    print(
        f"\n{name}: dense {result['torch_dense_ms']:.1f} ms PyTorch, {result['onnx_dense_ms']:.1f} ms ONNX Runtime; "
        f"forward {result['forward_s']:.3f} s, find_axes {result['find_axes_s']:.3f} s, torch-pruning's graph "
        f"{result['torch_pruning_graph_s']}; table {result['table_s']:.1f} s, predict {result['predict_us']:.0f} us"
    )
    print(f"{'':12}{'MACs':>8}{'predicted':>11}{'PyTorch':>9}{'ONNX RT':>9}{'select s':>10}{'shrink s':>10}")
    for variant, row in result["variants"].items():
        if "error" in row:
            print(f"{variant:12}{row['error']}")
            continue
        print(
            f"{variant:12}{row['macs_ratio']:8.3f}{row['predicted_ratio']:11.3f}{row['torch_ratio']:9.3f}"
            f"{row['onnx_ratio']:9.3f}"
            f"{row['select_s']:10.3f}{row['shrink_s']:10.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds, ResNet-50 alone")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=list(MODELS), help="these models")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "latency.json")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        results = json.loads(arguments.output.read_text())
    except FileNotFoundError:
        results = {"models": {}}
    results |= {"machine": describe_machine(), "rounds": 2 if arguments.quick else 15}
    for name in arguments.only or (list(MODELS)[:1] if arguments.quick else list(MODELS)):
        results["models"][name] = run(name, results["rounds"], arguments.threads)
        show(name, results["models"][name])
        partial = arguments.output.with_suffix(".partial")
        partial.write_text(json.dumps(results, indent=2) + "\n")
        os.replace(partial, arguments.output)


if __name__ == "__main__":
    main()
