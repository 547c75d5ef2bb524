"""Fashion-MNIST in memory, for the benchmarks."""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from records import Records
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

SHARED_DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "fashion_mnist"
HUB_DATA = "zalando-datasets/fashion_mnist"
DEFAULT_DATA = str(SHARED_DATA) if SHARED_DATA.is_dir() else HUB_DATA
MEAN, STD = 0.2860, 0.3530  # of the training pixels


TUNING_SEED = 100  # settings are chosen with it, on the validation split; it is not among the seeds that are reported


class Images(Dataset[dict[str, Tensor]]):
    """Batches from memory, with random flips.

    The flips follow one generator, so that two trainings with equal seeds see the same pixels.
    """

    def __init__(self, pixels: Tensor, labels: Tensor, seed: int):
        self.pixels, self.labels = pixels, labels
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        chosen = torch.as_tensor(indices)
        pixels = self.pixels[chosen]
        flips = torch.rand(len(chosen), 1, 1, 1, generator=self.generator) < 0.5
        return {
            "pixel_values": normalised(torch.where(flips, pixels.flip(3), pixels)),
            "labels": self.labels[chosen],
        }


def as_batch(batch: Any) -> dict[str, Tensor]:
    """The collator for batches that are complete already."""
    return batch


@dataclass(frozen=True)
class Data:
    """uint8 [n, 1, 28, 28] and int64 [n] for each split."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def normalised(pixels: Tensor) -> Tensor:
    return (pixels.float() / 255 - MEAN) / STD


def load_data(source: str, train_images: int) -> Data:
    """Read Fashion-MNIST from a folder of parquet files or a Hub id."""
    from datasets import Image, load_dataset
    from PIL import Image as PILImage
    from torchvision.transforms.functional import pil_to_tensor

    def split(name: str) -> tuple[Tensor, Tensor]:
        table = load_dataset(source, split=name).cast_column("image", Image(decode=False))
        images = [pil_to_tensor(PILImage.open(io.BytesIO(entry["bytes"]))) for entry in table["image"]]
        return torch.stack(images), torch.tensor(table["label"])

    pixels, labels = split("train")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    kept, held_out = order[:train_images], order[55_000:]
    return Data((pixels[kept], labels[kept]), (pixels[held_out], labels[held_out]), split("test"))


@torch.no_grad()
def accuracy(model: nn.Module, split: tuple[Tensor, Tensor]) -> float:
    """In percent."""
    model.eval()
    right = 0
    for pixels, labels in zip(split[0].split(500), split[1].split(500), strict=True):
        batch = normalised(pixels).contiguous(memory_format=torch.channels_last)
        right += int((model(pixel_values=batch).logits.argmax(-1) == labels).sum())
    return 100 * right / len(split[1])


def train(
    model: PreTrainedModel,
    data: Data,
    seed: int,
    callbacks: Iterable[TrainerCallback] = (),
    optimizer: torch.optim.Optimizer | None = None,
    **arguments: Any,
) -> None:
    """Train by the ordinary Trainer, in silence and with nothing kept but the model; ``arguments`` are TrainingArguments.

    A callback that searches on two halves of the training images keeps the one that it does not train on.
    """
    callbacks, images = list(callbacks), Images(*data.train, seed=seed)
    halving = next((callback.halve for callback in callbacks if hasattr(callback, "halve")), None)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            dataloader_drop_last=True,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
            seed=seed,
            data_seed=seed,
            **arguments,
        )
        Trainer(
            model,
            settings,
            train_dataset=halving(images) if halving is not None else images,
            data_collator=as_batch,
            optimizers=(optimizer, None),
            callbacks=callbacks,
        ).train()


class Bench(Records):
    """Runs what is not yet among the records.

    Args:
        protocol: of the benchmark.
        data: to train and measure on.
        file: of the records.
    """

    def __init__(self, protocol: Any, data: Data, file: Path):
        super().__init__(file)
        self.protocol, self.data = protocol, data

    def measured(self, model: nn.Module, stage: str, seed: int) -> dict[str, float]:
        """Accuracies in percent; on the test split only with a seed that is reported."""
        found = {f"validation_{stage}": accuracy(model, self.data.validation)}
        if seed != TUNING_SEED:
            found[stage] = accuracy(model, self.data.test)
        return found


def data_of(arguments: argparse.Namespace, train_images: int) -> Data:
    """What the options of a benchmark ask for: nothing where it only reports, few test images for a smoke test."""
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    if arguments.plot_only:
        return Data(*[(torch.empty(0), torch.empty(0))] * 3)
    data = load_data(arguments.data, train_images)
    if arguments.quick:
        return Data(data.train, *((pixels[:500], labels[:500]) for pixels, labels in (data.validation, data.test)))
    return data
