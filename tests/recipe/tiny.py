"""A run of seconds, and how to kill it at a chosen place."""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TINY: dict[str, Any] = {
    "name": "tiny",
    "model": {
        "config": {
            "model_type": "resnet",
            "layer_type": "basic",
            "embedding_size": 8,
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
        }
    },
    "data": {
        "name": "digits",
        "image_size": 16,
        "train_limit": 96,
        "validation_limit": 32,
        "test_limit": 32,
        "crop_padding": 2,  # augmentation that depends on the epoch: a wrong epoch after a resume changes the weights
        "horizontal_flip": True,
    },
    "training": {
        "per_device_train_batch_size": 16,
        "learning_rate": 0.05,
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "save_steps": 4,  # 6 steps to an epoch: checkpoints in the middle of epochs
        "logging_steps": 3,
        "disable_tqdm": False,
    },
    "stages": [
        {"stage": "train", "epochs": 2, "lr_milestones": [0.5]},
        {"stage": "network_slimming", "epochs": 2, "strength": 0.01},
        {"stage": "prune", "macs": 0.5},
        {"stage": "finetune", "epochs": 2},
    ],
}


DETECTION: dict[str, Any] = {
    "name": "tiny",
    "task": "object-detection",
    "model": {
        "config": {
            "model_type": "sidt",
            "pyramid_channels": 16,
            "pyramid_scales": [2, 1],
            "group_size": 4,
            "head_layers": 1,
            "backbone_config": {
                "model_type": "pruned_vit",
                "hidden_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 32,
                "image_size": 32,
                "patch_size": 8,
            },
        }
    },
    "data": {
        "name": "scenes",
        "scenes": {"size": 32, "items": [1, 2], "scale": [0.4, 0.7], "train": 24, "validation": 10, "test": 12},
        "horizontal_flip": True,
    },
    "training": {"per_device_train_batch_size": 8, "learning_rate": 0.001, "disable_tqdm": True},
    "stages": [
        {"stage": "train", "steps": 4, "training": {"eval_strategy": "steps", "eval_steps": 2}},
        {
            "stage": "dimension_search",
            "epochs": 2,
            "target": 0.25,
            "kinds": ["qk", "v", "mlp", "channels"],
            "min_keep": 1,
            "training": {"save_steps": 2},
        },
        {"stage": "prune", "support": True},
        {"stage": "finetune", "steps": 2},
        {"stage": "export", "int8": True, "calibration_images": 16, "min_agreement": 0.5},
        {"stage": "report", "latency_rounds": 1},
    ],
}


def tiny(**changes: Any) -> dict[str, Any]:
    """A copy of the tiny recipe, with top-level fields replaced."""
    return {**copy.deepcopy(TINY), **changes}


def tiny_detection(**changes: Any) -> dict[str, Any]:
    """A copy of the tiny recipe for detection, with top-level fields replaced."""
    return {**copy.deepcopy(DETECTION), **changes}


def die() -> None:
    """As sudden as a power cut: no handler, no clean-up."""
    os.kill(os.getpid(), signal.SIGKILL)


def run_and_die(recipe: dict[str, Any], output: Path, place: str) -> None:
    """Run a recipe in this process and die at a place.

    Args:
        place: ``step:STAGE:N`` after optimizer step N of a stage; ``checkpoint:STAGE:N`` while the checkpoint of step N is
            written; ``mark:STAGE:N`` after it is written and before it counts; ``finish:N`` before stage N is declared
            complete; ``finished:N`` right after; ``publish`` while the result is copied to its place; ``none``.
    """
    import torch
    from transformers import Trainer

    from hf_compress.recipe import folder, run, training

    torch.set_num_threads(1)
    kind, _, rest = place.partition(":")
    if kind in ("step", "checkpoint", "mark"):
        stage, _, step = rest.partition(":")

        def at(trainer_state: Any, args: Any) -> bool:
            return f"-{stage}." in args.output_dir and trainer_state.global_step == int(step)

    if kind == "step":

        def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if at(state, args):
                die()

        training.CompleteCheckpoints.on_step_end = on_step_end
    elif kind == "checkpoint":
        save = Trainer._save_rng_state  # the last file but one of a checkpoint

        def save_or_die(self: Any, output_dir: str) -> None:
            if at(self.state, self.args):
                die()
            save(self, output_dir)

        Trainer._save_rng_state = save_or_die
    elif kind == "mark":
        mark = training.CompleteCheckpoints.on_save

        def mark_or_die(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if at(state, args):
                die()
            mark(self, args, state, control, **kwargs)

        training.CompleteCheckpoints.on_save = mark_or_die
    elif kind in ("finish", "finished"):
        finish = folder.RunFolder.finish

        def finish_or_die(self: Any, number: int, notes: dict[str, Any]) -> None:
            if number != int(rest):
                return finish(self, number, notes)
            if kind == "finished":
                finish(self, number, notes)
            die()

        folder.RunFolder.finish = finish_or_die
    elif kind == "publish":
        copied = []
        copyfile = folder.shutil.copyfile

        def copy_half(source: Any, target: Any) -> None:
            if str(target).endswith("model.safetensors.partial"):
                Path(target).write_bytes(Path(source).read_bytes()[:1000])
                die()
            copied.append(copyfile(source, target))

        folder.shutil.copyfile = copy_half
    run.run_recipe(recipe, output=output)


def save_masks(folder: Path, masks: list[Image.Image], column: str = "annotation", size: int = 20) -> Path:
    """A data set of random images and these masks, as one split called train."""
    import datasets

    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 255, (size, size, 3), dtype=np.uint8)) for _ in masks]
    features = datasets.Features(
        {"image": datasets.Image(), column: datasets.Image(), "name": datasets.Value("string")}
    )
    rows = {"image": images, column: masks, "name": [str(i) for i in range(len(masks))]}
    table = datasets.Dataset.from_dict(rows, features=features)
    folder.mkdir()
    table.to_parquet(folder / "train.parquet")
    return folder
