"""What a callback adds to a training step.

A model is trained by Trainer with each callback and without any, in turns within one run, and CPU time is taken, so that
what else the machine does falls on all alike or not at all: all callbacks on a ResNet of the size of ResNet-20, and rank
pruning, whose work grows with the cube of the widths, on ResNet-18 too. Printed per callback: the median, over the
rounds, of the ratio of the round's median and mean step times; and the time spent inside the callback's own hooks. What
happens every 20th step is in the mean and in the time of the hooks, which are taken over whole periods, not in the
median. A run of one case leaves the other one's figures in the file, if it was measured with the same versions.

    python benchmarks/callback_overhead.py [--quick] [--case resnet-18] [--threads 1] [--image-size 32] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import transformers

from hf_compress import GrowingRegularizationCallback, NetworkSlimmingCallback, ProximalSlimmingCallback
from hf_compress.methods.trained_rank_pruning import TrainedRankPruningCallback

PERIOD = 20  # steps from one truncation to the next
METHODS = {
    "none": lambda: None,
    "network slimming, l1": lambda: NetworkSlimmingCallback("l1", 1e-4),
    "network slimming, l1, by axis": lambda: NetworkSlimmingCallback("l1", 1e-4, grouping="axis"),
    "network slimming, lp 0.5": lambda: NetworkSlimmingCallback({"name": "lp", "p": 0.5}, 1e-4),
    "proximal slimming": lambda: ProximalSlimmingCallback(0.002, 0.25),
    "proximal slimming, by scale": lambda: ProximalSlimmingCallback(0.002, 0.25, grouping="scale"),
    "growing regularisation": lambda: GrowingRegularizationCallback({"macs": 0.5}, warmup=0, hold=1, refresh=PERIOD),
    "rank pruning, channel": lambda: TrainedRankPruningCallback(0.02, PERIOD),
    "rank pruning, channel, nuclear": lambda: TrainedRankPruningCallback(0.02, PERIOD, nuclear=3e-4),
    "same, nuclear at all steps": lambda: TrainedRankPruningCallback(0.02, PERIOD, nuclear=3e-4, nuclear_steps="all"),
    "rank pruning, spatial, nuclear": lambda: TrainedRankPruningCallback(0.02, PERIOD, "spatial", 3e-4),
    "rank pruning, decoupled": lambda: TrainedRankPruningCallback(0.02, PERIOD, "decoupled"),
}
HOOKS = ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step")
WARM_UP = 2  # steps


@dataclass(frozen=True)
class Case:
    """A model and what is trained with it."""

    embedding_size: int
    hidden_sizes: tuple[int, ...]
    depths: tuple[int, ...]
    image_size: int
    batch: int
    methods: tuple[str, ...]

    def model(self) -> transformers.PreTrainedModel:
        torch.manual_seed(0)
        sizes = {"embedding_size": self.embedding_size, "hidden_sizes": [*self.hidden_sizes], "depths": [*self.depths]}
        config = transformers.ResNetConfig(layer_type="basic", num_labels=10, **sizes)
        return transformers.AutoModelForImageClassification.from_config(config)


RANK = tuple(name for name in METHODS if name == "none" or "rank" in name or "nuclear" in name)
CASES = {
    "resnet-20": Case(16, (16, 32, 64), (3, 3, 3), 32, 64, tuple(METHODS)),
    # 0.46 GMACs an image, like ResNet-18 on CIFAR; a quarter of ImageNet's
    "resnet-18": Case(64, (64, 128, 256, 512), (2, 2, 2, 2), 112, 64, RANK),
}


class Images(torch.utils.data.Dataset):
    """Random images, made once: loading is not what is measured."""

    def __init__(self, count: int, size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(count, 3, size, size, generator=generator)

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
    model = case.model()
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
    data = Images(case.batch * (steps + WARM_UP), case.image_size)
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
        heavy = len(case.hidden_sizes) > 3
        rounds, steps = (1 if heavy else 5, PERIOD) if options.quick else (3 if heavy else 15, 2 * PERIOD)
        rows = measured(case, rounds, steps)
        print(f"{name}, batch {case.batch}, {case.image_size} px, {options.threads} threads, {rounds} rounds")
        print(f"{'callback':32} {'step ms':>9} {'median':>7} {'mean':>7} {'hooks ms':>9} {'hooks / step':>13}")
        for method, row in rows.items():
            print(
                f"{method:32} {row['step_ms']:9.2f} {row['ratio']:7.4f} {row['mean_ratio']:7.4f} "
                f"{row['hooks_ms']:9.3f} {100 * row['hooks_share']:12.2f}%"
            )
        result[name] = {"rows": rows, "rounds": rounds, "steps": steps, **asdict(case)}
    beside = options.output.with_name(options.output.name + ".tmp")
    beside.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(beside, options.output)
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
