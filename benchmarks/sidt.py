"""SiDT on a classifier: dimensions searched during training against other ways to choose them, on Fashion-MNIST.

A vision transformer is trained dense; then 20 % and 40 % of its inner dimensions (queries and keys, values, hidden units) are
removed, and what is left is trained on. All ways get the same dense start, the same number of steps after it and the same
batches for one seed:

* search: DimensionSearchCallback during the middle steps,
* magnitude, taylor: ordinary training during the middle steps, then these scores, of each kind the same share,
* torch-pruning: the same with its group-norm importance, to the same number of parameters, where it runs,
* scratch: a small dense model of the same sizes, trained from random weights for all of the steps.

    python benchmarks/sidt.py            # three seeds
    python benchmarks/sidt.py --quick    # everything once at a toy size: does it run?
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fashion_mnist
import torch
from fashion_mnist import DEFAULT_DATA, Data, Images, accuracy, load_data
from torch import Tensor
from transformers import TrainerCallback, ViTConfig, ViTForImageClassification

from hf_compress import Plan, find_axes, shrink
from hf_compress.axes import AxisGraph
from hf_compress.methods.dimension_kinds import kind_of
from hf_compress.methods.dimension_plan import plan_of_shares
from hf_compress.methods.dimension_search import DimensionSearchCallback
from hf_compress.surgery.importance import importance

HERE = Path(__file__).resolve().parent
KINDS = ("qk", "v", "mlp")
FLOOR = {"qk": 8, "v": 8, "mlp": 16}


@dataclass(frozen=True)
class Protocol:
    """What all ways share."""

    seeds: tuple[int, ...] = (0, 1, 2)
    shares: tuple[float, ...] = (0.2, 0.4)
    train_images: int = 55_000
    batch_size: int = 64
    dense_steps: int = 900
    middle_steps: int = 450
    final_steps: int = 300
    learning_rate: float = 1e-3
    middle_learning_rate: float = 5e-4
    final_learning_rate: float = 3e-4
    weight_decay: float = 0.05
    strength: float = 0.2
    hidden_size: int = 96
    layers: int = 4
    heads: int = 3


QUICK = Protocol(seeds=(0,), train_images=2_000, dense_steps=20, middle_steps=20, final_steps=5)


def build(protocol: Protocol, seed: int) -> ViTForImageClassification:
    torch.manual_seed(seed)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=protocol.hidden_size,
            num_hidden_layers=protocol.layers,
            num_attention_heads=protocol.heads,
            intermediate_size=4 * protocol.hidden_size,
            image_size=28,
            patch_size=4,
            num_channels=1,
            num_labels=10,
        )
    )


def train(
    model: ViTForImageClassification,
    data: Data,
    protocol: Protocol,
    seed: int,
    steps: int,
    rate: float,
    callbacks: Iterable[TrainerCallback] = (),
) -> None:
    """AdamW with warm-up and a cosine, by the ordinary Trainer."""
    fashion_mnist.train(
        model,
        data,
        seed,
        callbacks,
        max_steps=steps,
        per_device_train_batch_size=protocol.batch_size,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        weight_decay=protocol.weight_decay,
    )


def shares_plan(axes: AxisGraph, scores: dict[str, Tensor], share: float) -> Plan:
    """The same share of every kind, ranked over all layers, for any scores."""
    searched = {a.name: scores[a.name] for a in axes if a.is_exact and kind_of(a, axes) in KINDS and a.name in scores}
    floors = {name: min(FLOOR[kind_of(axes[name], axes)], axes[name].size) for name in searched}
    return plan_of_shares(axes, searched, floors, dict.fromkeys(searched, share))


def batches(data: Data, protocol: Protocol, seed: int, number: int = 8) -> list[dict[str, Tensor]]:
    images = Images(*data.train, seed=seed)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).split(protocol.batch_size)
    return [images.__getitems__(chosen.tolist()) for chosen in order[:number]]


def torch_pruned(model: ViTForImageClassification, protocol: Protocol, params: int) -> None:
    """torch-pruning's group-norm importance over heads' dimensions and hidden units, down to a number of parameters."""
    import torch_pruning as tp

    class Logits(torch.nn.Module):  # torch-pruning's tracer does not look into transformers' output objects
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixels: Tensor) -> Tensor:
            return self.model(pixels).logits

    heads = {}
    for layer in model.vit.layers:
        for part in (layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj):
            heads[part] = protocol.heads
    pruner = tp.pruner.BasePruner(
        Logits(),
        torch.zeros(1, 1, 28, 28),
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=1.0,
        iterative_steps=200,
        num_heads=heads,
        root_module_types=[torch.nn.Linear],
        ignored_layers=[model.classifier, *(layer.attention.o_proj for layer in model.vit.layers),
                        *(layer.mlp.fc2 for layer in model.vit.layers)],
    )  # fmt: skip
    for _ in range(200):
        if sum(p.numel() for p in model.parameters()) <= params:
            break
        pruner.step()
    for layer in model.vit.layers:
        layer.attention.head_dim = layer.attention.q_proj.out_features // protocol.heads


WAYS = ("search", "magnitude", "taylor", "torch-pruning", "scratch")


def run_seed(data: Data, protocol: Protocol, seed: int, write: Any, done: set[tuple[int, str, float]]) -> None:
    """All ways of one seed; each finished one is written."""
    wanted = [(share, way) for share in protocol.shares for way in WAYS if (seed, way, share) not in done]
    if not wanted and (seed, "dense", 0.0) in done:
        return
    dense = build(protocol, seed)
    train(dense, data, protocol, seed, protocol.dense_steps, protocol.learning_rate)
    middle = copy.deepcopy(dense)
    start = time.perf_counter()
    train(middle, data, protocol, seed + 1_000, protocol.middle_steps, protocol.middle_learning_rate)
    plain_seconds = time.perf_counter() - start
    axes = find_axes(middle)

    def start_of(way: str, share: float) -> tuple[ViTForImageClassification, dict[str, Any]]:
        """The model before the last steps, and what else is to be written."""
        if way == "scratch":  # uniform widths, random weights, all of the steps
            model = build(protocol, seed + 5)
            zeros = {axis.name: torch.zeros(axis.size) for axis in axes}
            shrink(model, shares_plan(axes, zeros, share), axes=axes)
            train(model, data, protocol, seed, protocol.dense_steps + protocol.middle_steps, protocol.learning_rate)
            return model, {}
        more: dict[str, Any] = {}
        if way == "search":
            model = copy.deepcopy(dense)
            search = DimensionSearchCallback(protocol.strength, share, warmup=0.1, kinds=KINDS)
            start = time.perf_counter()
            train(model, data, protocol, seed + 1_000, protocol.middle_steps, protocol.middle_learning_rate, [search])
            more["step_time_ratio"] = (time.perf_counter() - start) / plain_seconds
            shrink(model, search.plan(model))
        else:
            model = copy.deepcopy(middle)
            given = batches(data, protocol, seed) if way == "taylor" else None
            scores = importance(model, axes, method="taylor" if way == "taylor" else "magnitude", batches=given)
            plan = shares_plan(axes, scores, share)
            if way == "torch-pruning":
                torch_pruned(model, protocol, axes.cost(plan).params)
            else:
                shrink(model, plan, axes=axes)
        return model, {**more, "before_final": accuracy(model, data.test)}

    def finish(way: str, share: float, model: ViTForImageClassification, more: dict[str, Any]) -> None:
        train(model, data, protocol, seed + 2_000, protocol.final_steps, protocol.final_learning_rate)
        left = find_axes(model)
        found = {"accuracy": accuracy(model, data.test), "params": left.params, "macs": left.macs}
        write({"seed": seed, "way": way, "share": share, **found, **more})

    if (seed, "dense", 0.0) not in done:
        finish("dense", 0.0, copy.deepcopy(middle), {})
    for share, way in wanted:
        try:
            finish(way, share, *start_of(way, share))
        except Exception as error:
            if way != "torch-pruning":
                raise
            # a peer that does not run is a result, and is reported as one
            write({"seed": seed, "way": way, "share": share, "failed": f"{type(error).__name__}: {error}"[:200]})


def table(records: list[dict[str, Any]]) -> str:
    lines = [
        "| removed | way | accuracy (mean, range) | before the last steps | parameters | MACs |",
        "|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for record in records:
        if "accuracy" in record:
            groups.setdefault((record["share"], record["way"]), []).append(record)
    dense = groups.get((0.0, "dense"), [])

    def mean(rows: list[dict[str, Any]], key: str) -> float:
        return statistics.mean(row[key] for row in rows if key in row)

    for (share, way), rows in sorted(groups.items()):
        values = [row["accuracy"] for row in rows]
        before = f"{mean(rows, 'before_final'):.2f}" if any("before_final" in row for row in rows) else ""
        ratios = [f"{mean(rows, key) / mean(dense, key):.2f}" if dense else "" for key in ("params", "macs")]
        lines.append(
            f"| {share:.0%} | {way} | {statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f}, n={len(values)}) | "
            f"{before} | {ratios[0]} | {ratios[1]} |"
        )
    for record in records:
        if "failed" in record:
            lines.append(f"| {record['share']:.0%} | {record['way']} | did not run: {record['failed']} | | | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", default=DEFAULT_DATA)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    protocol = QUICK if arguments.quick else Protocol()
    output = arguments.output or HERE / "results" / ("sidt_quick.jsonl" if arguments.quick else "sidt.jsonl")
    output.parent.mkdir(parents=True, exist_ok=True)
    lines = output.read_text(encoding="utf-8").splitlines() if output.exists() else []
    records = [json.loads(line) for line in lines]
    settings = json.loads(json.dumps(asdict(protocol)))
    if records and records[0]["protocol"] != settings:
        raise SystemExit(f"{output} holds results of another protocol; move it away.")

    def write(record: dict[str, Any]) -> None:
        records.append({"protocol": settings, **record})
        partial = output.with_suffix(".partial")
        partial.write_text("".join(json.dumps(entry) + "\n" for entry in records), encoding="utf-8")
        os.replace(partial, output)
        print({key: value for key, value in record.items() if key != "protocol"}, flush=True)

    data = load_data(arguments.data, protocol.train_images)
    for seed in protocol.seeds:
        run_seed(data, protocol, seed, write, {(r["seed"], r["way"], r["share"]) for r in records})
    print(table(records))
    output.with_suffix(".md").write_text(table(records) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
