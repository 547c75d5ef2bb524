"""Milliseconds of single operators on this machine, measured once per shape and kept on disk.

A :class:`Grid` names an operator and the widths at which it is timed. :class:`OperatorTimes` holds one JSON file per
processor, number of threads, torch version and dtype, in ``$HF_COMPRESS_CACHE/latency`` or
``$HF_HOME/hf_compress/latency``.

Vector units work on blocks of channels: on most processors a convolution of 65 channels takes as long as one of 80, or
longer. Widths are therefore timed at multiples of a block; what it costs not to be one is measured apart, as a factor.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .latency import _processor

logger = logging.getLogger(__name__)

_VERSION = 1
_ROUNDS = (4, 12)  # fewest and most
_AGREEMENT = 1.05  # a time is settled when its three fastest rounds differ by less
_BLOCK_SECONDS = 0.001  # of one operator in one round: long against the clock, shorter than a turn of the scheduler
_MOST_UNALIGNED = 1.5  # measured: 1.0 to 1.25; above that something else was running
_POINTS = {0: 1, 1: 10, 2: 6, 3: 4}  # grid points along each width that varies, by how many vary


@dataclass(frozen=True)
class Grid:
    """An operator and the sizes at which it is timed.

    Attributes:
        kind, settings: as of :class:`~.workload.Operation`.
        sizes: dense sizes.
        varying: places in ``sizes`` that follow the axes.
        widths: of every varying place, increasing; the last one is dense.
        blocks: of every varying place, the multiple that its widths are.
    """

    kind: str
    settings: tuple[Any, ...]
    sizes: tuple[int, ...]
    varying: tuple[int, ...]
    widths: tuple[tuple[int, ...], ...]
    blocks: tuple[int, ...]

    @classmethod
    def of(cls, kind: str, settings: tuple[Any, ...], sizes: Sequence[int], varying: Sequence[int]) -> Grid:
        """The grid of an operator with these dense sizes."""
        blocks = tuple(_block(sizes[place], _is_count(kind, sizes, place)) for place in varying)
        points = _POINTS[len(varying)]
        widths = tuple(_widths(sizes[p], b, points) for p, b in zip(varying, blocks, strict=True))
        return cls(kind, settings, tuple(sizes), tuple(varying), widths, blocks)

    @property
    def key(self) -> str:
        parts = (self.kind, self.settings, self.sizes, self.varying, self.widths, self.blocks)
        return json.dumps(parts, separators=(",", ":"))

    def points(self) -> list[tuple[int, ...]]:
        """Sizes of every grid point, the last varying place fastest."""
        return [self._at(values) for values in itertools.product(*self.widths)]

    def probes(self) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
        """(number of the varying place, sizes between two blocks, sizes at the block above)."""
        found = []
        dense = [widths[-1] for widths in self.widths]
        for number, (widths, block) in enumerate(zip(self.widths, self.blocks, strict=True)):
            for width in {widths[-1], widths[len(widths) // 2]}:
                if block > 1 and width > block:
                    between = width - 1 - (width - 1) % block + (block // 2 - 1 or 1)
                    sizes = [dense[:number] + [w] + dense[number + 1 :] for w in (min(between, width - 1), width)]
                    found.append((number, self._at(sizes[0]), self._at(sizes[1])))
        return found

    def _at(self, values: Iterable[int]) -> tuple[int, ...]:
        sizes = list(self.sizes)
        for place, value in zip(self.varying, values, strict=True):
            sizes[place] = value
        return tuple(sizes)


@dataclass(frozen=True)
class Times:
    """What was measured on a grid.

    Attributes:
        ms: of every point, in the order of :meth:`Grid.points`.
        unaligned: of every varying place, how much longer a width between two blocks takes than the block above; >= 1.
    """

    ms: tuple[float, ...]
    unaligned: tuple[float, ...]


def _is_count(kind: str, sizes: Sequence[int], place: int) -> bool:
    """Whether a size counts repetitions (heads, groups) and is no width that a vector unit works on in blocks."""
    return kind != "linear" and (place == 0 or (kind == "conv" and place == 1 and sizes[2] > 1))


def _block(size: int, is_count: bool) -> int:
    if is_count:
        return 1
    return 16 if size % 16 == 0 or size >= 64 else 8 if size % 8 == 0 or size >= 32 else 4 if size >= 8 else 1


def _widths(size: int, block: int, points: int) -> tuple[int, ...]:
    wanted = [block] + [size * (i + 1) / points for i in range(points - 1)]
    return tuple(sorted({min(max(round(w / block), 1) * block, size) for w in wanted} | {size}))


class OperatorTimes:
    """Times of operators on this machine, from the file where they are known and measured where not.

    Args:
        device, dtype: what the operators run with.
        folder: of the files; see the module's text when not given.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, folder: str | Path | None = None) -> None:
        self.device, self.dtype = device, dtype
        self.hardware = hardware(device, dtype)
        name = re.sub(r"[^a-z0-9.]+", "-", " ".join(str(value) for value in self.hardware.values()).lower()).strip("-")
        self.path = (cache_folder() if folder is None else Path(folder)) / f"{name}.json"
        self._known = self._read()

    def get(self, grids: Iterable[Grid]) -> dict[Grid, Times]:
        """Times of all grids; those that were never measured are measured now and written to the file."""
        wanted = list(dict.fromkeys(grids))
        missing = [grid for grid in wanted if grid.key not in self._known]
        if missing:
            number = sum(len(grid.points()) for grid in missing)
            logger.info("timing %d operators at %d shapes, once on this machine (%s)", len(missing), number, self.path)
            for place, grid in enumerate(missing, 1):
                self._known[grid.key] = self._measure(grid)
                if place % 16 == 0:  # so that an interrupted run keeps most
                    self._write()
            self._write()
        return {grid: self._known[grid.key] for grid in wanted}

    def _measure(self, grid: Grid) -> Times:
        points, probes = grid.points(), grid.probes()
        shapes = dict.fromkeys([*points, *(sizes for probe in probes for sizes in probe[1:])])
        make = _BUILDERS[grid.kind]
        memory = _Memory(self.device, self.dtype)
        ms = time_calls({sizes: make(memory, grid.settings, sizes) for sizes in shapes}, self.device)
        factors: list[list[float]] = [[1.0] for _ in grid.varying]
        for number, between, above in probes:
            factors[number].append(ms[between] / ms[above])
        table = np.array([ms[point] for point in points]).reshape([len(widths) for widths in grid.widths])
        for dim in range(table.ndim):
            # padding makes a narrow operator a wider one; where it took longer, something else was running
            table = np.flip(np.minimum.accumulate(np.flip(table, dim), dim), dim)
        unaligned = [min(max(1.0, min(found[1:] or found)), _MOST_UNALIGNED) for found in factors]
        return Times(tuple(round(float(value), 7) for value in table.flat), tuple(round(f, 4) for f in unaligned))

    # -- the file -------------------------------------------------------------------------------------------------

    def _read(self) -> dict[str, Times]:
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            if data["version"] != _VERSION or data["hardware"] != self.hardware:
                raise ValueError("another version or other hardware")
            return {key: _times(entry) for key, entry in data["times"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            warnings.warn(
                f"the measured times in {self.path} cannot be used ({type(error).__name__}: {error}); they are measured "
                "again.",
                UserWarning,
                stacklevel=4,
            )
            return {}

    def _write(self) -> None:
        """Merge with what another process may have written meanwhile, beside the file, then rename."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a file that was said to be unusable before
            self._known = {**self._read(), **self._known}
        content = {
            "version": _VERSION,
            "hardware": self.hardware,
            "times": {key: {"ms": times.ms, "unaligned": times.unaligned} for key, times in self._known.items()},
        }
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
            os.replace(partial, self.path)
        except OSError as error:  # a full or read-only disk costs time, not the result
            warnings.warn(f"the measured times could not be kept in {self.path} ({error}).", UserWarning, stacklevel=4)


def _times(entry: Mapping[str, Any]) -> Times:
    ms, unaligned = (tuple(float(value) for value in entry[name]) for name in ("ms", "unaligned"))
    if not all(0 < value < 1e9 for value in (*ms, *unaligned)):
        raise ValueError("a time that is none")
    return Times(ms, unaligned)


def cache_folder() -> Path:
    """Where measured times are kept: ``$HF_COMPRESS_CACHE/latency`` or ``$HF_HOME/hf_compress/latency``."""
    own = os.environ.get("HF_COMPRESS_CACHE")
    if own:
        return Path(own) / "latency"
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "hf_compress" / "latency"


def hardware(device: torch.device, dtype: torch.dtype) -> dict[str, str | int]:
    """What a time depends on besides the shape."""
    is_cuda = device.type == "cuda"
    return {
        "processor": torch.cuda.get_device_name(device) if is_cuda else _processor(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "dtype": str(dtype).removeprefix("torch."),
    }


# -- timing -------------------------------------------------------------------------------------------------------


def stopwatch(device: torch.device) -> tuple[Callable[[], object], Callable[[], float]]:
    """How to wait for a device, and the clock to read.

    Where one thread does all the work its processor time counts, which stands still while another process runs.
    """
    if device.type == "cuda":
        return torch.cuda.synchronize, time.perf_counter
    is_alone = device.type == "cpu" and torch.get_num_threads() == 1
    return (lambda: None), time.thread_time if is_alone else time.perf_counter


def time_calls(calls: Mapping[Any, Callable[[], Any]], device: torch.device) -> dict[Any, float]:
    """Milliseconds of each call on a machine that may have other work to do.

    The calls take turns, in alternating order, until the three fastest rounds of each agree. The fastest counts: what else
    the machine does can only add to a time.
    """
    wait, clock = stopwatch(device)

    def seconds(call: Callable[[], Any], repeats: int) -> float:
        wait()
        start = clock()
        for _ in range(repeats):
            call()
        wait()
        return (clock() - start) / repeats

    found: dict[Any, list[float]] = {name: [] for name in calls}
    repeats = {}
    with torch.inference_mode():
        for name, call in calls.items():
            call()
            repeats[name] = max(1, round(_BLOCK_SECONDS / max(seconds(call, 1), 1e-7)))
        pending = list(calls)
        for number in range(1, _ROUNDS[1] + 1):
            for name in pending:
                found[name] = sorted([*found[name], seconds(calls[name], repeats[name])])
            if number >= _ROUNDS[0]:
                pending = [name for name in pending if found[name][2] > _AGREEMENT * found[name][0]]
            pending.reverse()
    return {name: 1e3 * times[0] for name, times in found.items()}


class _Memory:
    """Operands of all sizes lie in the same memory, so that a whole grid needs no more than its largest point."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int, channels_last: bool = False) -> Callable[[], Tensor]:
        size = prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            # zeros would be faster than real numbers on processors that clock by power
            self._buffers[name] = torch.randn(size).to(self.device, self.dtype)

        def view() -> Tensor:
            flat = self._buffers[name][:size]
            if channels_last:
                batch, channels, *spatial = shape
                return flat.view(batch, *spatial, channels).movedim(-1, 1)
            return flat.view(shape)

        return view


_Builder = Callable[[_Memory, tuple[Any, ...], tuple[int, ...]], Callable[[], Tensor]]


def _lazily(function: Callable[..., Tensor], *operands: Callable[[], Tensor], **settings: Any) -> Callable[[], Tensor]:
    """A call whose operands are looked up when it first runs: by then the largest buffers exist."""
    ready: list[Tensor] = []

    def call() -> Tensor:
        if not ready:
            ready.extend(operand() for operand in operands)
        return function(*ready, **settings)

    return call


def _linear(memory: _Memory, settings: tuple[Any, ...], sizes: tuple[int, ...]) -> Callable[[], Tensor]:
    rows, inner, out = sizes
    operands = [memory("input", rows, inner), memory("weight", out, inner)]
    return _lazily(F.linear, *operands, *([memory("bias", out)] if settings[0] else []))


def _conv(memory: _Memory, settings: tuple[Any, ...], sizes: tuple[int, ...]) -> Callable[[], Tensor]:
    height, width, *kernel = settings[:4]
    stride, padding, dilation, has_bias, is_channels_last = settings[4:]
    batch, groups, inner, out = sizes
    operands = [
        memory("input", batch, groups * inner, height, width, channels_last=is_channels_last),
        memory("weight", groups * out, inner, *kernel),
        *([memory("bias", groups * out)] if has_bias else []),
    ]
    return _lazily(F.conv2d, *operands, stride=stride, padding=padding, dilation=dilation, groups=groups)


def _attention(memory: _Memory, settings: tuple[Any, ...], sizes: tuple[int, ...]) -> Callable[[], Tensor]:
    mask, is_causal = settings
    heads, queries, keys, inner, out = sizes
    operands = [memory("query", 1, heads, queries, inner), memory("key", 1, heads, keys, inner)]
    operands.append(memory("value", 1, heads, keys, out))
    if mask != "none":
        operands.append(memory("mask", 1, heads if mask == "own" else 1, queries, keys))
    return _lazily(F.scaled_dot_product_attention, *operands, is_causal=is_causal)


def _matmul(memory: _Memory, settings: tuple[Any, ...], sizes: tuple[int, ...]) -> Callable[[], Tensor]:
    batch, rows, inner, out = sizes
    return _lazily(torch.bmm, memory("input", batch, rows, inner), memory("other", batch, inner, out))


_BUILDERS: dict[str, _Builder] = {"linear": _linear, "conv": _conv, "attention": _attention, "matmul": _matmul}
