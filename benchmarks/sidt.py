"""SiDT on a classifier and on a detector: dimensions searched during training against other ways to choose them.

A model is trained dense; then 20 % and 40 % of its inner dimensions are removed, and what is left is trained on. These
ways get the same dense start, the same number of steps after it and the same batches for one seed:

* search: DimensionSearchCallback during the middle steps,
* magnitude, taylor: ordinary training during the middle steps, then these scores, of each kind the same share, as large
  as the MACs of the searched model ask,
* torch-pruning: the same with its group-norm importance, to the same MACs, where it runs.

Others start from random weights and train the first and the middle steps under one schedule, which is the better use of
so few steps, and then the last steps:

* dense-once: the whole model,
* search-once: with DimensionSearchCallback all along, the cut before the last steps,
* search-held: the same with ``hold``, by which what goes is zero some time before the cut,
* scratch: a small dense model of uniform widths with the MACs of the searched one.

The classifier is a small ViT on Fashion-MNIST, measured by accuracy; queries and keys, values and hidden units are
searched. The detector is SidtForObjectDetection with a pruned ViT on scenes of 1 to 6 Fashion-MNIST items on crops of
photographs, measured by mAP; its head's channels are searched as well.

    python benchmarks/sidt.py classifier            # three seeds
    python benchmarks/sidt.py detector
    python benchmarks/sidt.py classifier --tune     # strengths, on a validation split and a seed that is not reported
    python benchmarks/sidt.py classifier --quick    # everything once at a toy size: does it run?
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import fashion_mnist
import torch
from fashion_mnist import DEFAULT_DATA, TUNING_SEED, Images, accuracy, load_data
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_compress import Plan, find_axes, shrink
from hf_compress.axes import AxisGraph
from hf_compress.data.collating import detection_collator
from hf_compress.data.scenes import Scenes
from hf_compress.measurement.detection import DetectionEvaluation
from hf_compress.methods.dimension_kinds import kind_of, searched_axes
from hf_compress.methods.dimension_plan import plan_of_shares
from hf_compress.methods.dimension_search import DimensionSearchCallback
from hf_compress.models.pruned_vit import PrunedViTConfig
from hf_compress.models.sidt import SidtConfig, SidtForObjectDetection, SidtImageProcessor
from hf_compress.surgery.importance import importance

HERE = Path(__file__).resolve().parent
FLOOR = {"qk": 8, "v": 8, "mlp": 16, "channels": 1}
STRENGTHS = (0.05, 0.1, 0.2, 0.5, 1.0)
WARMUPS = (0.1, 0.3, 0.6)
HOLDS = ((0.1, 0.4), (0.1, 0.6), (0.3, 0.8), (0.6, 0.9))  # warm-up and hold


TUNED = ("strength", "once_warmup", "held_warmup", "held_hold")  # settings of Protocol that --tune is for


@dataclass(frozen=True)
class Protocol:
    """What all ways share."""

    seeds: tuple[int, ...] = (0, 1, 2)
    shares: tuple[float, ...] = (0.2, 0.4)
    train_images: int = 55_000
    test_images: int = 10_000
    batch_size: int = 64
    dense_steps: int = 1_800
    middle_steps: int = 450
    final_steps: int = 300
    learning_rate: float = 1e-3
    middle_learning_rate: float = 5e-4
    final_learning_rate: float = 3e-4
    weight_decay: float = 0.05
    strength: float = 1.0
    once_warmup: float = 0.6
    held_warmup: float = 0.3
    held_hold: float = 0.8
    hidden_size: int = 96
    layers: int = 4
    heads: int = 3

    def schedule(self, steps: int, rate: float) -> dict[str, Any]:
        """AdamW with warm-up and a cosine, as TrainingArguments."""
        return {
            "max_steps": steps,
            "per_device_train_batch_size": self.batch_size,
            "learning_rate": rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": steps // 20,
            "weight_decay": self.weight_decay,
        }


class Classifier:
    """A small ViT on Fashion-MNIST."""

    protocol = Protocol()
    quick = Protocol(seeds=(0,), train_images=2_000, dense_steps=20, middle_steps=20, final_steps=5)
    metric = "accuracy"
    kinds = ("qk", "v", "mlp")

    def __init__(self, source: str, protocol: Protocol):
        self.settings = protocol
        self.data = load_data(source, protocol.train_images)

    def build(self, seed: int) -> PreTrainedModel:
        torch.manual_seed(seed)
        return ViTForImageClassification(
            ViTConfig(
                hidden_size=self.settings.hidden_size,
                num_hidden_layers=self.settings.layers,
                num_attention_heads=self.settings.heads,
                intermediate_size=4 * self.settings.hidden_size,
                image_size=28,
                patch_size=4,
                num_channels=1,
                num_labels=10,  # type: ignore[call-arg]
            )
        )

    def train(
        self, model: PreTrainedModel, seed: int, steps: int, rate: float, callbacks: Sequence[TrainerCallback] = ()
    ) -> None:
        fashion_mnist.train(model, self.data, seed, callbacks, **self.settings.schedule(steps, rate))

    def evaluate(self, model: PreTrainedModel, split: str = "test") -> float:
        """In percent."""
        return accuracy(model, self.data.validation if split == "validation" else self.data.test)

    def batches(self, seed: int, number: int = 8) -> list[dict[str, Any]]:
        images = Images(*self.data.train, seed=seed)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).split(
            self.settings.batch_size
        )
        return [images.__getitems__(chosen.tolist()) for chosen in order[:number]]

    def torch_pruned(self, model: Any, macs: float) -> None:
        kept = [model.classifier]
        torch_pruned(model, torch.zeros(1, 1, 28, 28), model.vit.layers, kept, self.settings.heads, macs)


class Rendered(Dataset[dict[str, Any]]):
    """Scenes kept in memory as bytes, made once."""

    def __init__(self, scenes: Scenes):
        self.examples = [
            {key: example[key] for key in ("image", "image_id", "objects")}
            for example in (scenes[i] for i in range(len(scenes)))
        ]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.examples[index]


class Detector:
    """SidtForObjectDetection on composed scenes of 64 pixels."""

    protocol = Protocol(
        train_images=4_000,
        test_images=500,
        batch_size=16,
        dense_steps=1_200,
        middle_steps=600,
        final_steps=400,
    )
    quick = replace(
        protocol, seeds=(0,), train_images=64, test_images=16, dense_steps=10, middle_steps=20, final_steps=5
    )
    metric = "map"
    kinds = ("qk", "v", "mlp", "channels")

    def __init__(self, source: str, protocol: Protocol):
        self.settings = protocol
        lengths = {"train": protocol.train_images, "validation": protocol.test_images, "test": protocol.test_images}
        self.scenes = {split: Scenes(split, length, source=source, size=64) for split, length in lengths.items()}
        self.splits = {split: Rendered(scenes) for split, scenes in self.scenes.items()}
        self.processor = SidtImageProcessor(size={"height": 64, "width": 64})

    def build(self, seed: int) -> PreTrainedModel:
        torch.manual_seed(seed)
        width = self.settings.hidden_size
        backbone = PrunedViTConfig(
            hidden_size=width,
            num_hidden_layers=self.settings.layers,
            num_attention_heads=self.settings.heads,
            intermediate_sizes=[4 * width] * self.settings.layers,
            image_size=64,
            patch_size=8,
        )
        config = SidtConfig(
            backbone_config=backbone, pyramid_channels=64, head_layers=2, id2label=self.scenes["train"].id2label
        )
        return SidtForObjectDetection(config)

    def trainer(
        self, model: PreTrainedModel, folder: str, callbacks: Sequence[TrainerCallback] = (), **arguments: Any
    ) -> Trainer:
        evaluation = DetectionEvaluation(self.processor)
        return Trainer(
            model,
            TrainingArguments(
                folder,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
                remove_unused_columns=False,
                eval_do_concat_batches=False,
                dataloader_drop_last="max_steps" in arguments,
                per_device_eval_batch_size=50,
                max_grad_norm=1.0,
                **arguments,
            ),
            train_dataset=self.splits["train"],
            data_collator=detection_collator(self.processor, 10),
            compute_metrics=evaluation,
            preprocess_logits_for_metrics=evaluation.detections,  # type: ignore[arg-type]
            callbacks=list(callbacks),
        )

    def train(
        self, model: PreTrainedModel, seed: int, steps: int, rate: float, callbacks: Sequence[TrainerCallback] = ()
    ) -> None:
        with tempfile.TemporaryDirectory() as folder:
            schedule = self.settings.schedule(steps, rate)
            self.trainer(model, folder, callbacks, seed=seed, data_seed=seed, **schedule).train()

    def evaluate(self, model: PreTrainedModel, split: str = "test") -> float:
        """Mean average precision over intersections of 0.5 to 0.95, in percent."""
        with tempfile.TemporaryDirectory() as folder:
            return 100 * self.trainer(model, folder).evaluate(self.splits[split])["eval_map"]

    def batches(self, seed: int, number: int = 8) -> list[dict[str, Any]]:
        scenes, size = self.splits["train"], self.settings.batch_size
        order = torch.randperm(len(scenes), generator=torch.Generator().manual_seed(seed)).split(size)
        collate = detection_collator(self.processor, 10)
        return [collate([scenes[i] for i in chosen.tolist()]) for chosen in order[:number]]

    def torch_pruned(self, model: Any, macs: float) -> None:
        head = model.head
        kept = [head.classification.cls_logits, head.regression.bbox_reg, head.regression.bbox_ctrness]
        layers = model.backbone.pruned_vit.layers
        torch_pruned(model, torch.zeros(1, 3, 64, 64), layers, kept, self.settings.heads, macs)


def torch_pruned(model: Any, images: Tensor, layers: Any, kept: list[nn.Module], heads: int, macs: float) -> None:
    """torch-pruning's group-norm importance, down to a number of MACs.

    As for the other ways, a transformer's dimensions in heads and hidden units go, not its residual stream; of what is
    outside of the transformer all but the layers in ``kept``.
    """
    import torch_pruning as tp

    class Outputs(nn.Module):  # torch-pruning's tracer does not look into transformers' output objects
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixels: Tensor) -> list[Tensor]:
            return [value for value in self.model(pixels).values() if isinstance(value, Tensor)]

    projections = {part: heads for x in layers for part in (x.attention.q_proj, x.attention.k_proj, x.attention.v_proj)}
    residual = [part for x in layers for part in (x.attention.o_proj, x.mlp.fc2)]
    patches = [m for name, m in model.named_modules() if name.endswith("patch_embeddings.projection")]
    pruner = tp.pruner.BasePruner(
        Outputs(),
        images,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=1.0,
        iterative_steps=200,
        num_heads=projections,
        root_module_types=[nn.Linear, nn.Conv2d],
        ignored_layers=[*kept, *residual, *patches],
    )
    for _ in range(200):
        if find_axes(model, images).macs <= macs:
            break
        pruner.step()
        for layer in layers:
            layer.attention.head_dim = layer.attention.q_proj.out_features // heads
    model(images)  # whether it still runs


TASKS: dict[str, type[Classifier] | type[Detector]] = {"classifier": Classifier, "detector": Detector}


def shares_plan(axes: AxisGraph, kinds: Sequence[str], scores: dict[str, Tensor], share: float) -> Plan:
    """The same share of every kind, or all that its floors let go, ranked over all layers, for any scores."""
    searched = [axis.name for axis in searched_axes(axes, "the model", kinds)]
    kind_by_name = {name: kind_of(axes[name], axes) for name in searched}
    floors = {name: min(FLOOR[kind], axes[name].size) for name, kind in kind_by_name.items()}
    kept, sizes = Counter[str](), Counter[str]()
    for name, kind in kind_by_name.items():
        kept[kind] += floors[name]
        sizes[kind] += axes[name].size
    shares = {name: min(share, 1 - kept[kind] / sizes[kind]) for name, kind in kind_by_name.items()}
    return plan_of_shares(axes, {name: scores[name] for name in searched}, floors, shares)


def plan_of_macs(axes: AxisGraph, kinds: Sequence[str], scores: dict[str, Tensor], macs: float) -> Plan:
    """As :func:`shares_plan`, with the smallest share that brings the model down to these MACs."""
    low, high = 0.0, 0.9
    for _ in range(12):  # to 1/4000 of the dimensions
        share = (low + high) / 2
        if axes.cost(shares_plan(axes, kinds, scores, share)).macs > macs:
            low = share
        else:
            high = share
    return shares_plan(axes, kinds, scores, high)


# search comes first: those at equal MACs are brought to its own
WAYS = ("search", "magnitude", "taylor", "torch-pruning", "search-once", "search-held", "scratch")
AT_EQUAL_MACS = ("magnitude", "taylor", "torch-pruning", "scratch")


class Run:
    """One seed: the dense starts, trained once and only where they are asked for, and every way from them."""

    def __init__(self, task: Classifier | Detector, seed: int):
        self.task, self.seed, self.settings = task, seed, task.settings

    @cached_property
    def dense(self) -> PreTrainedModel:
        model = self.task.build(self.seed)
        self.task.train(model, self.seed, self.settings.dense_steps, self.settings.learning_rate)
        return model

    @cached_property
    def plain(self) -> tuple[PreTrainedModel, float]:
        """The dense model after ordinary middle steps, and the seconds that these took."""
        model = copy.deepcopy(self.dense)
        start = time.perf_counter()
        self.train_middle(model)
        return model, time.perf_counter() - start

    @cached_property
    def axes(self) -> AxisGraph:
        return find_axes(self.task.build(self.seed))

    def train_middle(self, model: PreTrainedModel, callbacks: Sequence[TrainerCallback] = ()) -> None:
        steps, rate = self.settings.middle_steps, self.settings.middle_learning_rate
        self.task.train(model, self.seed + 1_000, steps, rate, callbacks)

    def train_once(self, model: PreTrainedModel, callbacks: Sequence[TrainerCallback] = ()) -> None:
        """The first and the middle steps under one schedule."""
        steps = self.settings.dense_steps + self.settings.middle_steps
        self.task.train(model, self.seed, steps, self.settings.learning_rate, callbacks)

    def callback(
        self, share: float, strength: float, warmup: float = 0.1, hold: float | None = None
    ) -> DimensionSearchCallback:
        return DimensionSearchCallback(strength, share, warmup=warmup, hold=hold, kinds=self.task.kinds)

    def search(self, share: float, strength: float) -> tuple[PreTrainedModel, dict[str, Any]]:
        plain_seconds = self.plain[1]
        model, search = copy.deepcopy(self.dense), self.callback(share, strength)
        start = time.perf_counter()
        self.train_middle(model, [search])
        ratio = (time.perf_counter() - start) / plain_seconds
        shrink(model, search.plan(model))
        return model, {"step_time_ratio": ratio}

    def search_once(self, share: float, strength: float, warmup: float, hold: float | None = None) -> PreTrainedModel:
        model, search = self.task.build(self.seed), self.callback(share, strength, warmup, hold)
        self.train_once(model, [search])
        shrink(model, search.plan(model))
        return model

    def start_of(self, way: str, share: float, macs: float) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The model before the last steps, and what else is to be written.

        Args:
            way, share: what to do.
            macs: of the searched model, for the ways that are brought to them.
        """
        task, axes, settings = self.task, self.axes, self.settings
        if way == "dense":
            return copy.deepcopy(self.plain[0]), {}
        if way == "search":
            return self.search(share, settings.strength)
        if way == "search-once":
            return self.search_once(share, settings.strength, settings.once_warmup), {}
        if way == "search-held":
            return self.search_once(share, settings.strength, settings.held_warmup, settings.held_hold), {}
        if way in ("dense-once", "scratch"):
            model = task.build(self.seed)
            if way == "scratch":
                zeros = {axis.name: torch.zeros(axis.size) for axis in axes}
                shrink(model, plan_of_macs(axes, task.kinds, zeros, macs), axes=axes)
            self.train_once(model)
            return model, {}
        model = copy.deepcopy(self.plain[0])
        if way == "torch-pruning":
            task.torch_pruned(model, macs)
            return model, {}
        given = task.batches(self.seed) if way == "taylor" else None
        axes = find_axes(model)
        scores = importance(model, axes, method="taylor" if way == "taylor" else "magnitude", batches=given)
        shrink(model, plan_of_macs(axes, task.kinds, scores, macs), axes=axes)
        return model, {}

    def finish(self, way: str, model: PreTrainedModel, split: str = "test") -> dict[str, Any]:
        """The last steps, and what came out."""
        task, settings = self.task, self.settings
        before = {"before_final": task.evaluate(model, split)}
        task.train(model, self.seed + 2_000, settings.final_steps, settings.final_learning_rate)
        left = find_axes(model)
        return {task.metric: task.evaluate(model, split), "params": left.params, "macs": left.macs, **before}


Done = dict[tuple[Any, ...], dict[str, Any]]  # seed, way, share, strength, warm-up and hold -> what was written
NO_SETTING = (None, None, None)  # of a run that is no trial of settings


def key_of(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record.get(name) for name in ("seed", "way", "share", "strength", "warmup", "hold"))


def run_seed(task: Classifier | Detector, seed: int, write: Any, done: Done, ways: Sequence[str]) -> None:
    """All ways of one seed; each finished one is written."""
    run = Run(task, seed)
    wanted = [("dense", 0.0), ("dense-once", 0.0), *((way, share) for share in task.settings.shares for way in WAYS)]
    for way, share in wanted:
        if way not in ways or (seed, way, share, *NO_SETTING) in done:
            continue
        searched = done.get((seed, "search", share, *NO_SETTING), {})
        if way in AT_EQUAL_MACS and not searched:
            raise SystemExit(f"{way} is brought to the MACs of the searched model: run search for seed {seed} first.")
        start = time.perf_counter()
        try:
            model, more = run.start_of(way, share, searched.get("macs", 0))
            found = run.finish(way, model)
            record = {"seed": seed, "way": way, "share": share, **found, **more, "seconds": time.perf_counter() - start}
        except Exception as error:
            if way != "torch-pruning":
                raise
            # a peer that does not run is a result, and is reported as one
            record = {"seed": seed, "way": way, "share": share, "failed": f"{type(error).__name__}: {error}"[:200]}
        write(record)
        done[key_of(record)] = record


def tune(task: Classifier | Detector, write: Any, done: Done, ways: Sequence[str]) -> None:
    """Every strength of the search, every warm-up and hold of those from random weights, on the validation split."""
    run, strength, last_share = Run(task, TUNING_SEED), task.settings.strength, task.settings.shares[-1]
    grid: list[dict[str, Any]] = [
        {"way": "search", "share": share, "strength": value} for share in task.settings.shares for value in STRENGTHS
    ]
    grid += [{"way": "search-once", "share": last_share, "warmup": value} for value in WARMUPS]
    grid += [{"way": "search-held", "share": last_share, "warmup": warmup, "hold": hold} for warmup, hold in HOLDS]
    for setting in grid:
        if setting["way"] not in ways or key_of({"seed": TUNING_SEED, **setting}) in done:
            continue
        share, more = setting["share"], {}
        if setting["way"] == "search":
            model, more = run.search(share, setting["strength"])
        else:
            model = run.search_once(share, strength, setting["warmup"], setting.get("hold"))
        write({"seed": TUNING_SEED, **setting, **run.finish(setting["way"], model, "validation"), **more})


def table(records: list[dict[str, Any]], metric: str) -> str:
    lines = [
        f"| removed | way | {metric} (mean, range) | before the last steps | parameters | MACs |",
        "|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for record in records:
        if metric in record and record["seed"] != TUNING_SEED:
            groups.setdefault((record["share"], record["way"]), []).append(record)
    dense = groups.get((0.0, "dense"), [])

    def mean(rows: list[dict[str, Any]], key: str) -> float:
        return statistics.mean(row[key] for row in rows if key in row)

    order = ("dense", "dense-once", *WAYS)
    for (share, way), rows in sorted(groups.items(), key=lambda item: (item[0][0], order.index(item[0][1]))):
        values = [row[metric] for row in rows]
        before = f"{mean(rows, 'before_final'):.2f}" if any("before_final" in row for row in rows) else ""
        ratios = [f"{mean(rows, key) / mean(dense, key):.2f}" if dense else "" for key in ("params", "macs")]
        lines.append(
            f"| {share:.0%} | {way} | {statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f}, n={len(values)}) | "
            f"{before} | {ratios[0]} | {ratios[1]} |"
        )
    failures = {(record["share"], record["way"]): record["failed"] for record in records if "failed" in record}
    lines += [f"| {share:.0%} | {way} | did not run: {why} | | | |" for (share, way), why in failures.items()]
    tuned = [record for record in records if record["seed"] == TUNING_SEED]
    if tuned:
        lines += ["", f"Settings, on the validation split, seed {TUNING_SEED}:", ""]
        lines += [f"| removed | way | strength | warm-up | hold | {metric} |", "|---|---|---|---|---|---|"]
        lines += [
            f"| {row['share']:.0%} | {row['way']} | {row.get('strength', '')} | {row.get('warmup', '')} | "
            f"{row.get('hold', '')} | {row[metric]:.2f} |"
            for row in tuned
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--data", default=DEFAULT_DATA)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tune", action="store_true")
    ways = ("dense", "dense-once", *WAYS)
    parser.add_argument("--only", nargs="+", choices=ways, default=ways, help="only these ways")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these; a second process may work on the others")
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    kind = TASKS[arguments.task]
    protocol = kind.quick if arguments.quick else kind.protocol
    name = f"sidt_{arguments.task}{'_quick' if arguments.quick else ''}.jsonl"
    output = arguments.output or HERE / "results" / name
    output.parent.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(asdict(protocol)))

    def finished() -> list[dict[str, Any]]:
        lines = output.read_text(encoding="utf-8").splitlines() if output.exists() else []
        return [json.loads(line) for line in lines]

    shared = {key: value for key, value in settings.items() if key not in TUNED}
    for record in finished():
        if {key: record["protocol"][key] for key in shared} != shared:
            raise SystemExit(f"{output} holds results of another protocol; move it away.")

    def write(record: dict[str, Any]) -> None:
        with output.open("a", encoding="utf-8") as file:  # one short line at a time, so that two processes may share it
            file.write(json.dumps({"protocol": settings, **record}) + "\n")
        print(record, flush=True)

    task = kind(arguments.data, protocol)
    done = {key_of(record): record for record in finished()}
    if arguments.tune:
        tune(task, write, done, arguments.only)
    else:
        for seed in arguments.seeds or protocol.seeds:
            run_seed(task, seed, write, done, arguments.only)
    text = table(finished(), kind.metric)
    print(text)
    partial = output.with_suffix(".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, output.with_suffix(".md"))


if __name__ == "__main__":
    main()
