"""Eyes for a recipe: rendered ones with exact labels, and others with the label open or closed alone.

The test images are of the style that training has no exact labels of, so that they measure what the weak labels are for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..data.eyes import EyeRenderer, EyeSamples, SyntheticEyes, WeakEyes, open_closed_folder
from ..data.eyes.augmentation import EyeAugmentation
from ..errors import DataError
from .data import RawData, divide, local_folder
from .schema import EyesSection, Recipe

LABELS = ("openness", "aperture_ratio", "eye_state", "domain_ids")
IMAGE_SIZE = (32, 48)
_CHUNK = 512


@dataclass(frozen=True)
class RawEyes:
    """Eyes of one or several sources, made when they are asked for.

    Attributes:
        sources: one after another.
        places: int64 [n], into all sources together.
    """

    sources: tuple[EyeSamples, ...]
    places: np.ndarray

    @classmethod
    def of(cls, *sources: EyeSamples) -> RawEyes:
        """All samples of the sources."""
        return cls(sources, np.arange(sum(map(len, sources))))

    def __len__(self) -> int:
        return len(self.places)

    @property
    def strata(self) -> np.ndarray:
        """int64 [n]: the source of each."""
        return np.searchsorted(self._ends, self.places, side="right")

    @property
    def _ends(self) -> np.ndarray:
        return np.cumsum([len(source) for source in self.sources])

    def take(self, chosen: np.ndarray) -> RawEyes:
        """The subset at the given indices."""
        return RawEyes(self.sources, self.places[chosen])

    def fields(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """``pixel_values`` uint8 [n, 3, height, width] and the labels [n] of some samples."""
        wanted = self.places[np.asarray(indices, dtype=np.int64)]
        source_of = np.searchsorted(self._ends, wanted, side="right")
        found: dict[str, np.ndarray] = {}
        for number, source in enumerate(self.sources):
            here = np.flatnonzero(source_of == number)
            if not len(here):
                continue
            part = source.batch(wanted[here] - (self._ends[number] - len(source)))
            part["pixel_values"] = np.round(255 * part["pixel_values"]).astype(np.uint8)
            for name in ("pixel_values", *LABELS):
                values = np.asarray(part[name])
                found.setdefault(name, np.empty((len(wanted), *values.shape[1:]), values.dtype))[here] = values
        return found

    def read(self, indices: Sequence[int]) -> list[Image.Image]:
        """RGB crops."""
        return [Image.fromarray(pixels) for pixels in self.fields(indices)["pixel_values"].transpose(0, 2, 3, 1)]

    @cached_property
    def melanin(self) -> np.ndarray | None:
        """Skin tone of every eye, [n], 0 light to 1 dark; None where it is not known."""
        (source, *others) = self.sources
        if others or not isinstance(source, SyntheticEyes):
            return None
        tones: np.ndarray = source.renderer.render(source.seed, indices=self.places, label=source.label)["melanin"]
        return tones


class EyeSplit(Dataset[dict[str, Tensor]]):
    """Batches of ``pixel_values`` float32 [n, 3, height, width] and labels [n, 1] (``domain_ids`` [n]), kept as bytes.

    A data loader asks for a whole batch at once; use :func:`~.data.as_batch` as the collator. Augmentation depends on (seed,
    epoch, the batch) alone.
    """

    def __init__(
        self, raw: RawEyes, processor: Any, augmentation: EyeAugmentation | None = None, seed: int = 0
    ) -> None:
        self.raw, self.processor, self.augmentation, self.seed, self.epoch = raw, processor, augmentation, seed, 0
        parts = [raw.fields(range(i, min(i + _CHUNK, len(raw)))) for i in range(0, len(raw), _CHUNK)]
        self._labels = {name: torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in LABELS}
        size = (int(processor.size["height"]), int(processor.size["width"]))
        pixels = [torch.from_numpy(part["pixel_values"]) for part in parts]
        if size != tuple(pixels[0].shape[-2:]):
            arguments = {"return_tensors": "pt", "do_rescale": False}
            pixels = [processor(list(part), **arguments)["pixel_values"].to(torch.uint8) for part in pixels]
        self._pixels = torch.cat(pixels)

    def __len__(self) -> int:
        return len(self.raw)

    def augment_for(self, epoch: int) -> None:
        """Choose the augmentation of an epoch."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        chosen = torch.as_tensor(indices)
        pixels = self._pixels[chosen].float() / 255
        if self.augmentation is not None:
            # seeded by what is asked for: a run that goes on sees the same crops as one that was not interrupted
            key = (self.seed * 1_000_003 + self.epoch) * 1_000_003 + int(chosen[0])
            pixels = self.augmentation(pixels, torch.Generator().manual_seed(key))
        labels = {name: self._labels[name][chosen] for name in LABELS}
        return {
            "pixel_values": pixels,
            **{name: value if name == "domain_ids" else value[:, None] for name, value in labels.items()},
        }

    def pixels(self, number: int) -> Tensor:
        """The first images, [up to ``number``, 3, height, width], without augmentation."""
        return self._pixels[:number].float() / 255


def load_eye_data(recipe: Recipe) -> RawData[RawEyes]:
    """The eyes that a recipe names: training with exact and with weak labels, validation in the rendered style, test in the
    style of the weak labels.

    Raises:
        DataError: when a folder of the user's cannot be used.
    """
    section = recipe.data.eyes or EyesSection()
    seed = 10 * section.seed  # every part has a seed of its own
    other = EyeRenderer("b", section.shift)
    sources: list[EyeSamples] = [SyntheticEyes(section.train, seed)]
    if section.folder is not None:
        folder = local_folder(recipe, section.folder, "data", "eyes", "folder")
        if folder is None:
            raise DataError(f"{recipe.where('data', 'eyes', 'folder')}: there is no folder {section.folder!r}.")
        sources.append(open_closed_folder(folder, image_size=IMAGE_SIZE))
    elif section.weak:
        sources.append(WeakEyes(section.weak, seed + 1, other, closed_share=section.closed_share))
    validation = SyntheticEyes(section.validation, seed + 2, exactly_closed=0, exactly_open=0)
    test = SyntheticEyes(section.test, seed + 3, other, exactly_closed=0, exactly_open=0, domain=1)
    parts = {"train": RawEyes.of(*sources), "validation": RawEyes.of(validation), "test": RawEyes.of(test)}
    splits = divide(recipe, parts, {name: name for name in parts})
    return RawData(**splits, label_names=["closed", "open"], native_size=IMAGE_SIZE)


__all__ = ["EyeSplit", "RawEyes", "load_eye_data"]
