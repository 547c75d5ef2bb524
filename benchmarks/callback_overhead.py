"""What a callback adds to a training step.

A model is trained by Trainer with each callback and without any, in turns within one run, and CPU time is taken, so that
what else the machine does falls on all alike or not at all: all callbacks on a ResNet of the size of ResNet-20; rank
pruning, whose work grows with the cube of the widths, on ResNet-18 too; sparse groups, which touch every weight in every
step, on their paper's two networks, of which LeNet-5 has many weights for its few operations. Printed per callback: the median, over the
rounds, of the ratio of the round's median and mean step times; and the time spent inside the callback's own hooks. What
happens every 20th step is in the mean and in the time of the hooks, which are taken over whole periods, not in the
median. A run of one case leaves the figures of the others in the file, if it was measured with the same versions.

    python benchmarks/callback_overhead.py [--quick] [--case resnet-18] [--threads 1] [--image-size 32] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from records import write

from hf_compress import GrowingRegularizationCallback, NetworkSlimmingCallback, ProximalSlimmingCallback
from hf_compress.methods.sparse_group import SparseGroupCallback
from hf_compress.methods.trained_rank_pruning import TrainedRankPruningCallback
from hf_compress.models.lenet import LeNetConfig, LeNetForImageClassification
from hf_compress.models.wide_resnet import WideResNetConfig, WideResNetForImageClassification

PERIOD = 20  # steps from one truncation to the next
METHODS = {
    "none": lambda: None,
    "network slimming, l1": lambda: NetworkSlimmingCallback("l1", 1e-4),
    "network slimming, l1, by axis": lambda: NetworkSlimmingCallback("l1", 1e-4, grouping="axis"),
    "network slimming, lp 0.5": lambda: NetworkSlimmingCallback({"name": "lp", "p": 0.5}, 1e-4),
    "proximal slimming": lambda: ProximalSlimmingCallback(0.002, 0.25),
    "proximal slimming, by scale": lambda: ProximalSlimmingCallback(0.002, 0.25, grouping="scale"),
    "growing regularisation": lambda: GrowingRegularizationCallback({"macs": 0.5}, warmup=0, hold=1, refresh=PERIOD),
    "sparse groups, l0 + l2,1": lambda: SparseGroupCallback("l0", strength=1e-6, split=1e-3),
    "rank pruning, channel": lambda: TrainedRankPruningCallback(0.02, PERIOD),
    "rank pruning, channel, nuclear": lambda: TrainedRankPruningCallback(0.02, PERIOD, nuclear=3e-4),
    "same, nuclear at all steps": lambda: TrainedRankPruningCallback(0.02, PERIOD, nuclear=3e-4, nuclear_steps="all"),
    "rank pruning, spatial, nuclear": lambda: TrainedRankPruningCallback(0.02, PERIOD, "spatial", 3e-4),
    "rank pruning, decoupled": lambda: TrainedRankPruningCallback(0.02, PERIOD, "decoupled"),
}
HOOKS = ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step")
WARM_UP = 2  # steps


def resnet(embedding_size: int, hidden_sizes: tuple[int, ...], depths: tuple[int, ...]) -> transformers.PreTrainedModel:
    sizes = {"embedding_size": embedding_size, "hidden_sizes": [*hidden_sizes], "depths": [*depths]}
    config = transformers.ResNetConfig(layer_type="basic", num_labels=10, **sizes)
    return transformers.AutoModelForImageClassification.from_config(config)


@dataclass(frozen=True)
class Case:
    """A model and what is trained with it.

    Attributes:
        rounds, steps: of one run; a quick one takes a third of the rounds and half of the steps.
    """

    build: Callable[[], transformers.PreTrainedModel]
    methods: tuple[str, ...]
    batch: int
    rounds: int
    steps: int = 2 * PERIOD
    channels: int = 3
    image_size: int = 32


RANK = tuple(name for name in METHODS if name == "none" or "rank" in name or "nuclear" in name)
SPARSE = ("none", "sparse groups, l0 + l2,1")
CASES = {
    "resnet-20": Case(lambda: resnet(16, (16, 32, 64), (3, 3, 3)), methods=tuple(METHODS), batch=64, rounds=15),
    # 0.46 GMACs an image, like ResNet-18 on CIFAR; a quarter of ImageNet's
    "resnet-18": Case(
        lambda: resnet(64, (64, 128, 256, 512), (2, 2, 2, 2)), methods=RANK, image_size=112, batch=64, rounds=3
    ),
    "lenet-5": Case(
        lambda: LeNetForImageClassification(LeNetConfig(num_labels=10)),
        methods=SPARSE, channels=1, image_size=28, batch=128, rounds=15,
    ),
    # a quarter of the paper's batch of 128, so a share four times as high as there
    "wrn-28-10": Case(
        lambda: WideResNetForImageClassification(WideResNetConfig(depth=28, widen_factor=10, num_labels=10)),
        methods=SPARSE, batch=32, rounds=3, steps=6,
    ),
}  # fmt: skip


class Images(torch.utils.data.Dataset):
    """Random images, made once: loading is not what is measured."""

    def __init__(self, count: int, channels: int, size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(count, channels, size, size, generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor | int]:
        return {"pixel_values": self.images[i], "labels": i % 10}


class Timer(transformers.TrainerCallback):
    """CPU seconds from before the first forward to the end of every optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.process_time() - self.start)


def timed(callback: transformers.TrainerCallback, spent: list[float]) -> transformers.TrainerCallback:
    """Add the time of every call of the callback's step hooks to ``spent``."""
    for name in HOOKS:
        hook = getattr(callback, name)

        def measured(*args, hook=hook, **kwargs):
            start = time.process_time()
            hook(*args, **kwargs)
            spent.append(time.process_time() - start)

        setattr(callback, name, measured)
    return callback


def one_round(method: str, case: Case, data: Images, steps: int, folder: str) -> tuple[float, float, float]:
    """Median and mean seconds of a step, and mean seconds per step inside the callback."""
    torch.manual_seed(0)
    model = case.build()
    timer, spent, callback = Timer(), [], METHODS[method]()
    if callback is not None:
        callback.example_inputs = {"pixel_values": data.images[:1]}
    arguments = transformers.TrainingArguments(
        output_dir=folder, max_steps=steps + WARM_UP, per_device_train_batch_size=case.batch, learning_rate=0.1,
        optim="sgd", optim_args="momentum=0.9", report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
        logging_strategy="no", dataloader_drop_last=True,
    )  # fmt: skip
    callbacks = [timer] if callback is None else [timer, timed(callback, spent)]
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=callbacks)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    calls = spent[WARM_UP * len(HOOKS) :]
    times = timer.seconds[WARM_UP:]
    return statistics.median(times), statistics.fmean(times), sum(calls) / steps


def measured(case: Case, rounds: int, steps: int) -> dict[str, dict[str, float]]:
    """Method -> what is printed."""
    data = Images(case.batch * (steps + WARM_UP), case.channels, case.image_size)
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in case.methods}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds):
            for name in case.methods[:: 1 if turn % 2 == 0 else -1]:
                found[name].append(one_round(name, case, data, steps, folder))

    def ratio(name: str, what: int, to: int) -> float:
        return statistics.median(a[what] / b[to] for a, b in zip(found[name], found["none"], strict=True))

    return {
        name: {
            "step_ms": 1e3 * statistics.median(step for step, _, _ in found[name]),
            "ratio": ratio(name, 0, 0),
            "mean_ratio": ratio(name, 1, 1),
            "hooks_ms": 1e3 * statistics.median(hooks for _, _, hooks in found[name]),
            "hooks_share": ratio(name, 2, 0),
        }
        for name in case.methods
    }


def kept(file: Path, settings: dict[str, object]) -> dict[str, object]:
    """Cases of an earlier run of the same settings, which a run of the other case does not take away."""
    before = json.loads(file.read_text()) if file.exists() else {}
    same = all(before.get(key) == value for key, value in settings.items())
    return {name: before[name] for name in CASES if name in before} if same else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few minutes instead of an hour")
    parser.add_argument("--case", nargs="+", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--image-size", type=int, help="smaller images make cheaper steps, so a harder test")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "callback_overhead.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = {"threads": options.threads, "torch": torch.__version__, "transformers": transformers.__version__}
    result: dict[str, object] = {**kept(options.output, settings), **settings}
    for name in options.case:
        given = {"image_size": options.image_size, "batch": options.batch}
        case = replace(CASES[name], **{key: value for key, value in given.items() if value})
        rounds, steps = (case.rounds // 3, case.steps // 2) if options.quick else (case.rounds, case.steps)
        rows = measured(case, rounds, steps)
        print(f"{name}, batch {case.batch}, {case.image_size} px, {options.threads} threads, {rounds} rounds")
        print(f"{'callback':32} {'step ms':>9} {'median':>7} {'mean':>7} {'hooks ms':>9} {'hooks / step':>13}")
        for method, row in rows.items():
            print(
                f"{method:32} {row['step_ms']:9.2f} {row['ratio']:7.4f} {row['mean_ratio']:7.4f} "
                f"{row['hooks_ms']:9.3f} {100 * row['hooks_share']:12.2f}%"
            )
        sizes = {"image_size": case.image_size, "batch": case.batch, "rounds": rounds, "steps": steps}
        result[name] = {"rows": rows, **sizes}
        write(options.output, json.dumps(result, indent=2) + "\n")  # a later case may be killed
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
