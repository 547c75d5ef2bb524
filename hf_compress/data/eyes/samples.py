"""Rendered eyes as data sets for training: with exact labels, with open or closed alone, and both in every batch.

A sample is ``{"pixel_values": float32 [3, height, width] in 0..1, "openness": float, "aperture_ratio": float, "eye_state":
int, "domain_ids": int}``. NaN and -100 stand for labels that are not known; an eye state is 1 for open, 0 for closed. The
split of the labels, exact on synthetic pictures and open or closed on the others, is that of arXiv 1910.10845.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ...errors import DataError
from .renderer import EyeRenderer
from .traits import EXACTLY_CLOSED, EXACTLY_OPEN, check_seed, sample_openness

UNLABELLED = -100
CLOSED_MAX, OPEN_MIN = 0.12, 0.45  # what annotators are assumed to call closed and open
_SHARDS = 64  # of a stream; loader workers share them out
_BATCH = 64  # samples that are made at once when a data set is gone through


class EyeSamples(Dataset):
    """A map-style data set whose samples are made in batches.

    Subclasses say how: :meth:`batch` takes indices and returns every field of the samples as an array.
    """

    length: int

    def __len__(self) -> int:
        return self.length

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The fields of some samples, [samples, ...] each; indices are in range."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """Several samples at once, as torch's DataLoader asks for them."""
        places = np.asarray([int(index) for index in indices], dtype=np.int64)
        wrong = (places < -len(self)) | (places >= len(self))
        if wrong.any():
            raise IndexError(f"there is no sample {places[wrong][0]}; there are {len(self)}.")
        fields = self.batch(places % len(self))
        pixels = torch.from_numpy(fields.pop("pixel_values"))
        rest = {name: values.tolist() for name, values in fields.items()}
        return [
            {"pixel_values": pixels[i], **{name: values[i] for name, values in rest.items()}}
            for i in range(len(places))
        ]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self), _BATCH):
            yield from self.__getitems__(range(start, min(start + _BATCH, len(self))))

    def as_dataset(self, streaming: bool = True) -> Any:
        """The same samples as a ``datasets.IterableDataset``, or as a ``datasets.Dataset`` that is written into its cache.

        ``pixel_values`` are float32 arrays.
        """
        import datasets

        height, width = self[0]["pixel_values"].shape[1:]
        number, whole = datasets.Value("float32"), datasets.Value("int64")
        features = datasets.Features(
            {
                "pixel_values": datasets.Array3D((3, height, width), "float32"),
                "openness": number,
                "aperture_ratio": number,
                "eye_state": whole,
                "domain_ids": whole,
            }
        )
        if not streaming:
            made = datasets.Dataset.from_generator(
                _generate, features=features, gen_kwargs={"samples": [self], "indices": [np.arange(len(self))]}
            )
            return made.with_format("torch")
        shards = np.array_split(np.arange(len(self)), min(len(self), _SHARDS))
        made = datasets.IterableDataset.from_generator(
            _generate, features=features, gen_kwargs={"samples": [self] * len(shards), "indices": shards}
        )
        return made.with_format("torch")


def _generate(samples: list[EyeSamples], indices: list[np.ndarray]) -> Iterator[dict[str, Any]]:
    for part, numbers in zip(samples, indices, strict=True):
        for start in range(0, len(numbers), _BATCH):
            for sample in part.__getitems__(numbers[start : start + _BATCH]):
                yield {**sample, "pixel_values": sample["pixel_values"].numpy()}


class SyntheticEyes(EyeSamples):
    """Rendered eyes with their exact openness and aperture ratio; the eye state is left open.

    Args:
        length: number of samples. They are made when they are asked for, so a long data set costs nothing and a training
            run that never comes to its end never sees a picture twice.
        seed: another seed gives other eyes.
        renderer: ``EyeRenderer()`` when not given.
        exactly_closed, exactly_open: shares of samples with an openness of exactly 0 and 1; the rest is uniform. For an
            evaluation over all degrees give 0 and 0. With adversarial training, the share of closed eyes should be that
            of the other domain: it is about ``exactly_closed + 0.12 (1 - exactly_closed - exactly_open)``.
        domain: the samples' ``domain_ids``.

    Raises:
        DataError: when an argument is out of range.
    """

    def __init__(
        self,
        length: int = 100_000,
        seed: int = 0,
        renderer: EyeRenderer | None = None,
        *,
        exactly_closed: float = EXACTLY_CLOSED,
        exactly_open: float = EXACTLY_OPEN,
        domain: int = 0,
    ):
        _check_length(length, seed)
        if not (0 <= exactly_closed and 0 <= exactly_open and exactly_closed + exactly_open <= 1):
            raise DataError(
                f"exactly_closed={exactly_closed} and exactly_open={exactly_open} are not possible; they are shares."
            )
        self.length, self.seed, self.domain = length, seed, domain
        self.renderer = renderer if renderer is not None else EyeRenderer()
        self.exactly_closed, self.exactly_open = exactly_closed, exactly_open

    def label(self, uniform: np.ndarray) -> np.ndarray:
        """Uniform draws to openness."""
        return sample_openness(uniform, self.exactly_closed, self.exactly_open)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        found = self.renderer.render(self.seed, indices=indices, label=self.label)
        return _fields(found["images"], found["openness"], found["aperture_ratio"], UNLABELLED, self.domain)


class WeakEyes(EyeSamples):
    """Rendered eyes with the label open or closed alone, and none between, as an annotator would leave them.

    Closed eyes have an openness in 0..``closed_max``, open ones in ``open_min``..1, uniform within each.

    Args:
        length, seed, renderer: as for :class:`SyntheticEyes`; the renderer's style is "b" when none is given.
        closed_share: share of closed eyes; more than 0 and less than 1.
        closed_max, open_min: what the annotator calls closed and open.
        domain: the samples' ``domain_ids``.

    Raises:
        DataError: when an argument is out of range.
    """

    def __init__(
        self,
        length: int = 6000,
        seed: int = 1,
        renderer: EyeRenderer | None = None,
        *,
        closed_share: float = 0.4,
        closed_max: float = CLOSED_MAX,
        open_min: float = OPEN_MIN,
        domain: int = 1,
    ):
        _check_length(length, seed)
        if not 0 < closed_share < 1:
            raise DataError(f"closed_share={closed_share} would leave one class alone; give a share between 0 and 1.")
        if not 0 <= closed_max < open_min <= 1:
            raise DataError(f"closed_max={closed_max} has to be below open_min={open_min}, both in 0..1.")
        self.length, self.seed, self.domain = length, seed, domain
        self.renderer = renderer if renderer is not None else EyeRenderer("b")
        self.closed_share, self.closed_max, self.open_min = closed_share, closed_max, open_min

    def label(self, uniform: np.ndarray) -> np.ndarray:
        """Uniform draws to openness."""
        closed = uniform / self.closed_share * self.closed_max
        opened = self.open_min + (uniform - self.closed_share) / (1 - self.closed_share) * (1 - self.open_min)
        return np.where(uniform < self.closed_share, closed, opened).astype(np.float32)

    def batch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        found = self.renderer.render(self.seed, indices=indices, label=self.label)
        states = (found["openness"] > (self.closed_max + self.open_min) / 2).astype(np.int64)
        return _fields(found["images"], np.nan, np.nan, states, self.domain)


class MixedEyes(Dataset):
    """Samples of two data sets at a fixed ratio in every batch, for the ordinary Trainer.

    An item is a small group, ``ratio[0]`` samples of the first source and ``ratio[1]`` of the second, its fields stacked;
    :func:`eye_collator` joins groups to a batch. So ``per_device_train_batch_size`` counts groups. What item ``i`` holds
    depends on ``i`` alone, whatever the order, number of workers or processes, and also after a resume. A source that is
    too short is gone through again, in another order each time.

    Args:
        synthetic: the first source, such as :class:`SyntheticEyes`.
        weak: the second, such as :class:`WeakEyes` or a folder of your own.
        ratio: samples of each in an item.
        length: number of items; as many as the first source fills when not given.
        balanced: take open and closed eyes of the second source in turn. It needs ``eye_states`` there: the state of
            every sample, int [samples].
        seed: of the orders.

    Raises:
        DataError: when a source is empty, an argument is out of range, or ``balanced`` meets a source without
            ``eye_states`` or with one class alone.
    """

    def __init__(
        self,
        synthetic: Any,
        weak: Any,
        ratio: tuple[int, int] = (1, 1),
        *,
        length: int | None = None,
        balanced: bool = False,
        seed: int = 0,
    ):
        if not len(synthetic) or not len(weak):
            raise DataError(f"the sources have {len(synthetic)} and {len(weak)} samples; each needs at least one.")
        if len(ratio) != 2 or min(ratio) < 1:
            raise DataError(f"ratio={ratio} is not possible; give two whole numbers, at least 1 each.")
        self.synthetic, self.weak, self.ratio, self.seed = synthetic, weak, (int(ratio[0]), int(ratio[1])), seed
        self.length = int(length) if length is not None else max(1, len(synthetic) // self.ratio[0])
        _check_length(self.length, seed)
        self._groups = [np.arange(len(weak))]
        if balanced:
            states = np.asarray(getattr(weak, "eye_states", ()))
            if len(states) != len(weak):
                raise DataError("balanced=True needs a second source with eye_states, the state of every sample.")
            self._groups = [np.flatnonzero(states == state) for state in (0, 1)]
            if not all(len(group) for group in self._groups):
                counts = [len(group) for group in self._groups]
                raise DataError(f"the second source has {counts[0]} closed and {counts[1]} open eyes; both are needed.")
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return self.length

    def _order(self, group: int, turn: int) -> np.ndarray:
        """The order in which a group is gone through for the ``turn``-th time."""
        key = (group, turn)
        if key not in self._orders:
            if len(self._orders) >= 8:  # turns that are over
                self._orders.pop(next(iter(self._orders)))
            self._orders[key] = np.random.default_rng([self.seed, *key]).permutation(self._groups[group])
        return self._orders[key]

    def weak_index(self, number: int) -> int:
        """The sample of the second source that is the ``number``-th to be taken."""
        number, group = divmod(number, len(self._groups))
        turn, place = divmod(number, len(self._groups[group]))
        return int(self._order(group, turn)[place])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> list[dict[str, torch.Tensor]]:
        places = [int(index) for index in indices]
        for place in places:
            if not -len(self) <= place < len(self):
                raise IndexError(f"there is no item {place}; there are {len(self)}.")
        places = [place % len(self) for place in places]
        first, second = self.ratio
        exact = take(self.synthetic, [(p * first + k) % len(self.synthetic) for p in places for k in range(first)])
        weak = take(self.weak, [self.weak_index(p * second + k) for p in places for k in range(second)])
        return [
            eye_collator([*exact[i * first : (i + 1) * first], *weak[i * second : (i + 1) * second]])
            for i in range(len(places))
        ]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (self[index] for index in range(len(self)))


def take(source: Any, indices: Sequence[int]) -> list[dict[str, Any]]:
    """Samples of a map-style data set, in one go where it can."""
    if isinstance(source, Dataset) and hasattr(source, "__getitems__"):
        return list(source.__getitems__(indices))
    return [source[index] for index in indices]


_KINDS: dict[str, tuple[torch.dtype, float]] = {
    "openness": (torch.float32, float("nan")),
    "aperture_ratio": (torch.float32, float("nan")),
    "eye_state": (torch.int64, UNLABELLED),
    "domain_ids": (torch.int64, 0),
}


def eye_collator(samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A ``data_collator`` for Trainer: samples, or the groups of :class:`MixedEyes`, to a batch.

    A label that a sample does not have counts as unknown, and a missing domain as 0.

    Returns:
        ``pixel_values`` float32 [samples, 3, height, width]; ``openness``, ``aperture_ratio`` float32, ``eye_state``,
        ``domain_ids`` int64, [samples] each.

    Raises:
        DataError: when a sample has no pixels, or pictures differ in size.
    """
    pixels = []
    for sample in samples:
        if "pixel_values" not in sample:
            raise DataError(f"a sample has the fields {sorted(sample)}; pixel_values are needed.")
        image = torch.as_tensor(sample["pixel_values"], dtype=torch.float32)
        pixels.append(image if image.ndim == 4 else image[None])
    sizes = {tuple(part.shape[1:]) for part in pixels}
    if len(sizes) > 1:
        raise DataError(f"pictures of the sizes {sorted(sizes)} cannot share a batch; bring them to one size first.")
    batch = {"pixel_values": torch.cat(pixels)}
    for name, (kind, unknown) in _KINDS.items():
        parts = []
        for sample, part in zip(samples, pixels, strict=True):
            value = sample.get(name)
            value = torch.as_tensor(unknown if value is None else value, dtype=kind)
            parts.append(value.reshape(-1) if value.numel() == len(part) else value.expand(len(part)))
        batch[name] = torch.cat(parts)
    return batch


def _fields(images: np.ndarray, openness: Any, aperture: Any, states: Any, domain: int) -> dict[str, np.ndarray]:
    count = len(images)
    return {
        "pixel_values": to_pixel_values(images),
        "openness": np.broadcast_to(np.float32(openness), (count,)),
        "aperture_ratio": np.broadcast_to(np.float32(aperture), (count,)),
        "eye_state": np.broadcast_to(np.int64(states), (count,)),
        "domain_ids": np.full(count, domain, np.int64),
    }


def to_pixel_values(images: np.ndarray) -> np.ndarray:
    """uint8 [samples, height, width, 3] to float32 [samples, 3, height, width] in 0..1."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).astype(np.float32) / 255


def _check_length(length: int, seed: int) -> None:
    if length < 1:
        raise DataError(f"length={length} is not possible; give at least 1.")
    check_seed(seed)


__all__ = [
    "CLOSED_MAX",
    "OPEN_MIN",
    "UNLABELLED",
    "EyeSamples",
    "MixedEyes",
    "SyntheticEyes",
    "WeakEyes",
    "eye_collator",
    "take",
    "to_pixel_values",
]
