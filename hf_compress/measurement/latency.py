"""Time, measured so that two candidates can be compared on a machine that is never quite still."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch.utils.benchmark import Timer

_BLOCK_SECONDS = 0.02  # long against the clock and Python's overhead, short against a machine's drift


def compare_latency(candidates: Mapping[str, Callable[[], Any]], rounds: int = 15) -> dict[str, float]:
    """Time candidates in turns, so that a drift of the machine (heat, neighbours) hits all of them alike.

    In every round each candidate is called for about 20 ms, in an order that is reversed from round to round. Runs in
    ``torch.inference_mode`` with the current number of torch threads; a CUDA device is waited for. Bring models to
    evaluation mode first.

    Args:
        candidates: name -> a call without arguments.
        rounds: how often the candidates take turns.

    Returns:
        name -> milliseconds per call, the median of its rounds.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: at least one round is needed.")
    timer_class = _timer_class()
    with torch.inference_mode():
        timers = {
            name: timer_class("call()", globals={"call": call}, num_threads=torch.get_num_threads())
            for name, call in candidates.items()
        }
        repeats = {name: _calls_per_block(timer) for name, timer in timers.items()}
        seconds: dict[str, list[float]] = {name: [] for name in timers}
        order = list(timers)
        for _ in range(rounds):
            for name in order:
                seconds[name].append(timers[name].timeit(repeats[name]).mean)
            order.reverse()
    return {name: 1e3 * median(times) for name, times in seconds.items()}


def _timer_class() -> type[Timer]:
    """Imported late: it brings torch's C++ build tools along, which complain about every CUDA build without a GPU."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from torch.utils.benchmark import Timer
    finally:
        logger.setLevel(level)
    return Timer


def _calls_per_block(timer: Timer) -> int:
    """Warm up (``timeit`` also calls once before it starts its clock) and find how many calls fill a block."""
    timer.timeit(1)
    return max(1, round(_BLOCK_SECONDS / max(timer.timeit(3).mean, 1e-7)))


def describe_machine(device: torch.device | str = "cpu") -> str:
    """What a measured time depends on, in one line: processor, threads, versions. Names no host.

    Args:
        device: where the models ran.
    """
    device = torch.device(device)
    if device.type == "cuda":
        parts = [torch.cuda.get_device_name(device)]
    else:
        threads = torch.get_num_threads()
        parts = [_processor(), f"{threads} thread{'s' if threads != 1 else ''}"]
    parts.append(f"torch {torch.__version__}")
    for package in ("transformers", "onnxruntime"):
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(parts)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or f"{platform.machine()} CPU"
