"""A small network with architecture parameters, its data halves, and Trainers, for the tests of architecture search."""

from __future__ import annotations

import torch
import transformers
from slimming_training import CLASSES, Images
from torch import Tensor, nn
from torch.func import functional_call

SIZE = 4


class Mixed(nn.Module):
    """Two edges, each a softmax-weighted sum of three operators; with BatchNorm or without, where no example depends on
    the rest of its batch."""

    def __init__(self, with_norm: bool = False, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width) if with_norm else nn.Identity()
        self.edges = nn.ModuleList(
            nn.ModuleList([nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1), nn.Identity()])
            for _ in range(2)
        )
        self.alphas = nn.Parameter(1e-3 * torch.randn(2, 3))
        self.head = nn.Linear(width, CLASSES)

    def architecture_parameters(self) -> dict[str, nn.Parameter]:
        return {"alphas": self.alphas}

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x = torch.tanh(self.norm(self.stem(pixel_values)))
        for edge, weights in zip(self.edges, self.alphas.softmax(-1), strict=True):
            x = torch.tanh(sum(weight * operator(x) for weight, operator in zip(weights, edge, strict=True)))
        logits = self.head(x.mean((2, 3)))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def mixed(with_norm: bool = False, seed: int = 0) -> Mixed:
    torch.manual_seed(seed)
    return Mixed(with_norm)


def search_trainer(model, callback, folder, *, length=32, halve=True, size=SIZE, **arguments) -> transformers.Trainer:
    """A Trainer on the CPU with plain SGD on the training half; ``arguments`` override."""
    defaults = {
        "max_steps": 6, "per_device_train_batch_size": 8, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_steps": 3, "seed": 3,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    data = Images(size, length)
    training = transformers.TrainingArguments(output_dir=str(folder), **{**defaults, **arguments})
    return transformers.Trainer(
        model, training, train_dataset=callback.halve(data) if halve else data,
        eval_dataset=data if arguments.get("eval_strategy") else None, callbacks=[callback],
    )  # fmt: skip


def losses_of(model: nn.Module, callback, length: int = 32):
    """L_val and L_train of the whole halves as functions of lists of tensors, and the tensors they start from.

    Returns:
        The two losses, weights and architecture as dictionaries of copies.
    """
    data = Images(SIZE, length)
    training = callback.halve(data)
    names = [name for name, _ in model.named_parameters() if name != "alphas"]
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def loss(dataset):
        items = [dataset[i] for i in range(len(dataset))]
        batch = {
            "pixel_values": torch.stack([item["pixel_values"] for item in items]),
            "labels": torch.tensor([item["labels"] for item in items]),
        }

        def value(weights, architecture):
            tensors = dict(zip(names, weights, strict=True)) | {"alphas": architecture[0]}
            return functional_call(model, tensors, (), batch)["loss"]

        return value

    weights = {name: start[name] for name in names}
    return loss(callback.validation_dataset), loss(training), weights, {"alphas": start["alphas"]}
