"""What the affinity losses cost, exact against fast: time and memory of forward and backward up to maps of 128 x 128.

On one thread of the CPU, for pairs of maps with equally many pixels. Memory is what the tensors that the loss makes
take at its highest, found by following allocations and releases of the CPU's allocator. ``l1, exact`` forms the matrix of
all pairs of pixels, and is left out where that would take more than ``--most-gigabytes``.

    python benchmarks/feature_affinity_cost.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from records import write_figure
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from hf_compress.distillation import fast_feature_affinity, feature_affinity
from hf_compress.distillation.losses import Norm
from hf_compress.measurement.latency import describe_machine

HERE = Path(__file__).resolve().parent
SIDES = (8, 16, 32, 64, 128)
CHANNELS = (16, 64)
BATCH, PROJECTIONS = 4, 15


def pairwise(student: Tensor, teacher: Tensor) -> Tensor:
    """The squared form by its definition, over all pairs of pixels."""
    from hf_compress.distillation.losses import unit_pixels

    ours, theirs = unit_pixels(student), unit_pixels(teacher)
    return (ours @ ours.mT - theirs @ theirs.mT).square().mean()


def exact(norm: Norm) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda student, teacher: feature_affinity(student, teacher, norm)


def fast(norm: Norm) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda student, teacher: fast_feature_affinity(student, teacher, PROJECTIONS, norm)


LOSSES = {
    "squared, by definition": (pairwise, True),
    "squared, exact": (exact("squared"), False),
    "squared, fast": (fast("squared"), False),
    "l1, exact (paper)": (exact("l1"), True),
    "l1, fast (paper's code)": (fast("l1"), False),
}


def step(loss: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor) -> None:
    student.grad = None
    loss(student, teacher).backward()


def milliseconds(call: Callable[[], None], rounds: int) -> float:
    """Median CPU time, which neighbours on the machine disturb less than the clock."""
    call()
    found = []
    for _ in range(rounds):
        since = time.process_time()
        call()
        found.append(1e3 * (time.process_time() - since))
    return statistics.median(found)


def peak_bytes(call: Callable[[], None]) -> int:
    """The most that allocations of one call take at a time, beyond what was there before."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=False) as seen:
        call()
    now = most = 0
    for event in seen.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def measure(name: str, side: int, channels: int, rounds: int, most_bytes: float) -> dict[str, Any] | None:
    loss, is_quadratic = LOSSES[name]
    pixels = side * side
    if is_quadratic and 6 * 4 * BATCH * pixels**2 > most_bytes:  # about six such tensors at a time
        return None
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(BATCH, pixels, channels, generator=generator) for _ in range(2))
    student.requires_grad_()

    def call() -> None:
        step(loss, student, teacher)

    row = {"loss": name, "side": side, "channels": channels, "bytes": peak_bytes(call)}
    return {**row, "milliseconds": milliseconds(call, rounds)}


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for channels in CHANNELS:
        sides = sorted({row["side"] for row in rows if row["channels"] == channels})
        if not sides:
            continue
        lines += [f"\n{channels} channels, milliseconds (MB):\n"]
        lines += [
            "| loss | " + " | ".join(f"{side} x {side}" for side in sides) + " |",
            "|---" * (len(sides) + 1) + "|",
        ]
        for name in LOSSES:
            cells = []
            for side in sides:
                found = [r for r in rows if (r["loss"], r["side"], r["channels"]) == (name, side, channels)]
                cells += [f"{found[0]['milliseconds']:.2f} ({found[0]['bytes'] / 1e6:.1f})" if found else "-"]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2 * len(CHANNELS), figsize=(4.4 * 2 * len(CHANNELS), 3.8), squeeze=False)
    panels = [(channels, key) for channels in CHANNELS for key in ("milliseconds", "bytes")]
    for (channels, key), panel in zip(panels, axes[0], strict=True):
        for name in LOSSES:
            found = [r for r in rows if (r["loss"], r["channels"]) == (name, channels)]
            scale = 1e-6 if key == "bytes" else 1.0
            panel.plot([r["side"] for r in found], [scale * r[key] for r in found], marker="o", label=name)
        panel.set(xscale="log", yscale="log", xlabel="side of the map, pixels", title=f"{channels} channels")
        panel.set_ylabel("MB at the highest" if key == "bytes" else "ms, forward and backward")
        panel.set_xticks(SIDES, [str(side) for side in SIDES])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    write_figure(path, figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--most-gigabytes", type=float, default=4.0, help="leave out what would take more")
    parser.add_argument("--quick", action="store_true", help="small maps, one round: does it run?")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    sides, rounds = (SIDES[:2], 1) if arguments.quick else (SIDES, arguments.rounds)
    found = [
        measure(name, side, channels, rounds, arguments.most_gigabytes * 1e9)
        for channels in CHANNELS
        for side in sides
        for name in LOSSES
    ]
    rows = [row for row in found if row is not None]
    text = (
        f"Forward and backward of one loss on a batch of {BATCH}, k = {PROJECTIONS}, one thread: CPU time, median of {rounds}, "
        f"and memory at its highest. {describe_machine()}.\n{table(rows)}\n"
    )
    print(text)
    name = "feature_affinity_cost" + ("_quick" if arguments.quick else "")
    arguments.results.mkdir(parents=True, exist_ok=True)
    for suffix, content in ((".json", json.dumps({"rows": rows}, indent=1) + "\n"), (".md", text)):
        written = arguments.results / f"{name}{suffix}.part"
        written.write_text(content)
        os.replace(written, arguments.results / f"{name}{suffix}")
    plot(rows, arguments.results / f"{name}.png")


if __name__ == "__main__":
    main()
