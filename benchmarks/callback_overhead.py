"""What a slimming callback adds to a training step.

A ResNet of the size of ResNet-20 is trained by Trainer with each callback and without any, in turns within one run, so
that whatever else the machine does falls on all alike. Printed per callback: the median, over the rounds, of the ratio
of the round's median step times; and the time spent inside the callback's own hooks.

    python benchmarks/callback_overhead.py [--quick] [--threads 1] [--image-size 32] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers

from hf_compress import NetworkSlimmingCallback, ProximalSlimmingCallback

METHODS = {
    "none": lambda: None,
    "network slimming, l1": lambda: NetworkSlimmingCallback("l1", 1e-4),
    "network slimming, l1, by axis": lambda: NetworkSlimmingCallback("l1", 1e-4, grouping="axis"),
    "network slimming, lp 0.5": lambda: NetworkSlimmingCallback({"name": "lp", "p": 0.5}, 1e-4),
    "proximal slimming": lambda: ProximalSlimmingCallback(0.002, 0.25),
    "proximal slimming, by scale": lambda: ProximalSlimmingCallback(0.002, 0.25, grouping="scale"),
}
HOOKS = ("on_pre_optimizer_step", "on_optimizer_step")
WARM_UP = 2  # steps


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
    """Seconds from the first forward to the end of every optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.start)


def timed(callback: transformers.TrainerCallback, spent: list[float]) -> transformers.TrainerCallback:
    """Add the time of every call of the callback's step hooks to ``spent``."""
    for name in HOOKS:
        hook = getattr(callback, name)

        def measured(*args, hook=hook, **kwargs):
            start = time.perf_counter()
            hook(*args, **kwargs)
            spent.append(time.perf_counter() - start)

        setattr(callback, name, measured)
    return callback


def one_round(method: str, data: Images, steps: int, batch: int, folder: str) -> tuple[float, float]:
    """Median seconds of a step, and mean seconds per step inside the callback."""
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64], depths=[3, 3, 3], layer_type="basic", num_labels=10
    )
    model = transformers.AutoModelForImageClassification.from_config(config)
    timer, spent, callback = Timer(), [], METHODS[method]()
    if callback is not None:
        callback.example_inputs = {"pixel_values": data.images[:1]}
    arguments = transformers.TrainingArguments(
        output_dir=folder, max_steps=steps + WARM_UP, per_device_train_batch_size=batch, learning_rate=0.1,
        optim="sgd", optim_args="momentum=0.9", report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
        logging_strategy="no", dataloader_drop_last=True,
    )  # fmt: skip
    callbacks = [timer] if callback is None else [timer, timed(callback, spent)]
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=callbacks)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    calls = spent[WARM_UP * len(HOOKS) :]
    return statistics.median(timer.seconds[WARM_UP:]), sum(calls) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a minute instead of ten")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--image-size", type=int, default=32, help="smaller images make cheaper steps, so a harder test"
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "callback_overhead.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rounds, steps = (5, 8) if options.quick else (15, 30)
    data = Images(options.batch * (steps + WARM_UP), options.image_size)
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    inside: dict[str, list[float]] = {name: [] for name in METHODS}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds):
            order = list(METHODS) if turn % 2 == 0 else list(METHODS)[::-1]
            for name in order:
                step, hook = one_round(name, data, steps, options.batch, folder)
                seconds[name].append(step)
                inside[name].append(hook)
    rows = {
        name: {
            "step_ms": 1e3 * statistics.median(seconds[name]),
            "ratio": statistics.median(a / b for a, b in zip(seconds[name], seconds["none"], strict=True)),
            "hooks_ms": 1e3 * statistics.median(inside[name]),
            "hooks_share": statistics.median(a / b for a, b in zip(inside[name], seconds["none"], strict=True)),
        }
        for name in METHODS
    }
    print(f"ResNet-20 size, batch {options.batch}, {options.image_size} px, {options.threads} threads, {rounds} rounds")
    print(f"{'callback':32} {'step ms':>9} {'ratio':>7} {'hooks ms':>9} {'hooks / step':>13}")
    for name, row in rows.items():
        print(
            f"{name:32} {row['step_ms']:9.2f} {row['ratio']:7.4f} {row['hooks_ms']:9.3f} {100 * row['hooks_share']:12.2f}%"
        )
    result = {
        "rows": rows, "rounds": rounds, "steps": steps, "batch": options.batch, "image_size": options.image_size,
        "threads": options.threads, "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    beside = options.output.with_name(options.output.name + ".tmp")
    beside.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(beside, options.output)
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
