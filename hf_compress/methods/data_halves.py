"""Two halves of one data set, and batches of the second that any process and any resumed run draws alike."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from hf_compress.errors import DataError


def half_sizes(size: int, split: float) -> tuple[int, int]:
    """How many of ``size`` items are in the two parts.

    Raises:
        DataError: when a part would be empty.
    """
    first = round(split * size)
    if not 0 < first < size:
        empty = "training" if first == 0 else "validation"
        raise DataError(f"split={split!r} of {size} items leaves the {empty} half empty. Use a share nearer to 0.5.")
    return first, size - first


def split_halves(dataset: Any, split: float, seed: int) -> tuple[Any, Any]:
    """Two parts of a data set that have no item in common.

    Args:
        dataset: of ``datasets``, or any other with a length.
        split: share of the first part.
        seed: which items it gets.

    Returns:
        The parts, in the order of the data set; as large as ``round(split * n)`` and the rest.

    Raises:
        DataError: when the data set has no length, or a part would be empty.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise DataError(
            f"a {type(dataset).__name__} without a length cannot be split. Split it yourself: give one part to Trainer and "
            "the other as validation_dataset=."
        )
    size = len(dataset)
    first, _ = half_sizes(size, split)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    parts = sorted(order[:first]), sorted(order[first:])
    if hasattr(dataset, "select") and hasattr(dataset, "column_names"):
        return dataset.select(parts[0]), dataset.select(parts[1])
    return Subset(dataset, parts[0]), Subset(dataset, parts[1])


class ValidationBatches:
    """An endless sequence of batches of a data set, in an order that depends on a seed alone.

    Positions run through one random order after another. Batch k of process r takes the positions from
    ``(k * processes + r) * batch_size`` on, so that processes together take what one with the whole batch would.

    Args:
        dataset: with a length above 0.
        batch_size: per process.
        collate: items to a batch.
        seed: of the order, and of random transformations of the items.
        process, processes: which one this is, of how many.
        workers: processes that load ahead; 0 loads in this one. Random transformations in them follow their own seeds, so
            that with workers a resumed run transforms other than one that was not interrupted.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        collate: Any,
        seed: int,
        process: int,
        processes: int,
        workers: int,
    ) -> None:
        self.dataset, self.batch_size, self.collate, self.seed = dataset, batch_size, collate, seed
        self.process, self.processes, self.workers = process, processes, workers
        self._next: int | None = None
        self._iterator: Iterator[Any] = iter(())

    def get(self, number: int) -> Any:
        """Batch ``number``. Asking in order is what it is made for; other orders start anew."""
        with _own_randomness(self.seed + number * self.processes + self.process):
            if number != self._next:
                sampler = _Positions(len(self.dataset), self, number)  # type: ignore[arg-type]
                loader = DataLoader(
                    self.dataset,
                    batch_sampler=sampler,
                    collate_fn=self.collate,
                    num_workers=self.workers,
                    generator=torch.Generator().manual_seed(
                        self.seed
                    ),  # else it draws from the global one when it starts
                )
                self._iterator = iter(loader)
            self._next = number + 1
            return next(self._iterator)


class _Positions(Sampler[list[int]]):
    def __init__(self, size: int, batches: ValidationBatches, first: int) -> None:
        self.size, self.batches, self.first = size, batches, first

    def __iter__(self) -> Iterator[list[int]]:
        length, number, pass_, order = self.batches.batch_size, self.first, -1, []
        while True:
            start = (number * self.batches.processes + self.batches.process) * length
            chosen = []
            for position in range(start, start + length):
                if position // self.size != pass_:
                    pass_ = position // self.size
                    generator = torch.Generator().manual_seed(self.batches.seed * 100_003 + pass_)
                    order = torch.randperm(self.size, generator=generator).tolist()
                chosen.append(order[position % self.size])
            yield chosen
            number += 1


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """Seed what transformations of items draw from, and leave it as it was."""
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds accelerators too
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_state)
