"""Small models, data and Trainers for the tests of training methods."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor, nn

CLASSES = 7


class Images(torch.utils.data.Dataset):
    """Random images with labels; item i is always the same."""

    def __init__(self, size: int, length: int = 64) -> None:
        self.size, self.length = size, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict[str, Tensor | int]:
        generator = torch.Generator().manual_seed(i)
        return {"pixel_values": torch.randn(3, self.size, self.size, generator=generator), "labels": i % CLASSES}


class Scaled(nn.Module):
    """Hidden units with a learned scale and no BatchNorm, so that no example depends on the rest of its batch."""

    def __init__(self, width: int = 24, size: int = 4) -> None:
        super().__init__()
        self.inner = nn.Linear(3 * size * size, width)
        self.gamma = nn.Parameter(torch.linspace(0.05, 1.0, width))
        self.outer = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.gamma * torch.tanh(self.inner(x.flatten(1))))


class Classifier(nn.Module):
    """Any module that maps images to logits, with the loss that Trainer asks for."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.body(pixel_values)
        if not isinstance(logits, Tensor):
            logits = logits.logits
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def scaled_classifier(seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return Classifier(Scaled())


SCALED_INPUTS = {"pixel_values": torch.zeros(1, 3, 4, 4)}


def make_trainer(model, callbacks, output_dir, *, size=4, length=64, trainer=transformers.Trainer, **arguments):
    """A Trainer on the CPU with plain SGD; ``arguments`` override."""
    defaults = {
        "max_steps": 6, "per_device_train_batch_size": 8, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_steps": 3, "seed": 3,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    data = Images(size, length)
    evaluated = data if arguments.get("eval_strategy") else None
    training = transformers.TrainingArguments(output_dir=str(output_dir), **{**defaults, **arguments})
    return trainer(model, training, train_dataset=data, eval_dataset=evaluated, callbacks=list(callbacks))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)
