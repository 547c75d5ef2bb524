"""Students, teachers and one training of them, for test_feature_affinity; one of two processes when torchrun starts it.

Usage: torchrun ... distillation_run.py OUTPUT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
import transformers
from slimming_training import CLASSES, make_trainer, weights

from hf_compress.methods import DistillationCallback, FeatureAffinityDistillation
from hf_compress.models.lenet import LeNetConfig, LeNetForImageClassification

SIZE = 32


def resnet(seed: int = 0, widths: tuple[int, ...] = (8, 16), **settings: Any) -> Any:
    torch.manual_seed(seed)
    config = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=list(widths),
        depths=[1] * len(widths),
        layer_type="basic",
        **{"num_labels": CLASSES, **settings},
    )
    return transformers.ResNetForImageClassification(config)


def vit(seed: int = 0, patch: int = 8, layers: int = 3, **settings: Any) -> Any:
    torch.manual_seed(seed)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=24, image_size=SIZE,
        patch_size=patch, **{"num_labels": CLASSES, **settings},
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def lenet(seed: int = 0) -> Any:
    """Without BatchNorm, so that no example depends on the rest of its batch."""
    torch.manual_seed(seed)
    config = LeNetConfig(widths=[6, 8], hidden_size=16, num_channels=3, image_size=SIZE, num_labels=CLASSES)
    model = LeNetForImageClassification(config)
    with torch.no_grad():
        model.lenet.hidden.weight.mul_(0.05)  # its first logits are in the thousands
    return model


def trained(
    student: Any, teacher: Any, folder: Path, callbacks: Any = (), settings: Any = None, **arguments: Any
) -> Any:
    """The Trainer after training; ``settings`` are the wrapper's."""
    resume = arguments.pop("resume_from_checkpoint", None)
    model = FeatureAffinityDistillation(student, teacher, **(settings or {}))
    arguments = {"size": SIZE, "learning_rate": 0.02, "optim_args": "momentum=0.9", **arguments}
    trainer = make_trainer(model, [DistillationCallback(), *callbacks], folder, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def distributed(folder: Path, batch: int, **arguments: Any) -> dict[str, Any]:
    """Six steps with adaptors, whose parameters have to be kept equal too."""
    student = lenet(0)
    torch.manual_seed(5)  # of the adaptors
    model = FeatureAffinityDistillation(student, lenet(1), label_weight=0.5, adaptors=True)
    trainer = make_trainer(
        model, [DistillationCallback()], folder, size=SIZE, learning_rate=0.02, optim_args="momentum=0.9",
        per_device_train_batch_size=batch, **arguments,
    )  # fmt: skip
    trainer.train()
    parts = [
        {k: v for k, v in entry.items() if "_loss" in k} for entry in trainer.state.log_history if "kd_loss" in entry
    ]
    return {"weights": weights(student), "parts": parts}


if __name__ == "__main__":
    torch.set_num_threads(1)
    output = Path(sys.argv[1])
    torch.save(distributed(output.parent, batch=4, ddp_backend="gloo"), f"{output}.{torch.distributed.get_rank()}")
    torch.distributed.destroy_process_group()
