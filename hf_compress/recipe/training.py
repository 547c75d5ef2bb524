"""One training stage under Trainer: it continues from its own last complete checkpoint, to the very same weights."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import ModelError
from ..methods.checkpoint_names import own_names_in_checkpoints
from .data import as_batch
from .preparation import Prepared, method_callback, quantization_callback, training_arguments
from .schema import DistillStage, Training

_COMPLETE = "complete"  # the file that marks a checkpoint as whole


class StageTrainer(Trainer):
    """Trainer with the step schedule of the slimming papers.

    Args:
        milestones: shares of the training after which the learning rate is multiplied by ``decay``; None leaves the
            schedule to ``lr_scheduler_type``.
    """

    def __init__(self, *args: Any, milestones: Sequence[float] | None = None, decay: float = 0.1, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.milestones, self.decay = milestones, decay

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if self.milestones is not None and self.lr_scheduler is None:
            warmup, steps = self.args.get_warmup_steps(num_training_steps), num_training_steps
            milestones, decay = self.milestones, self.decay

            def factor(step: int) -> float:
                passed = sum(step >= share * steps for share in milestones)
                return min(1.0, (step + 1) / (warmup + 1)) * decay**passed

            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)  # type: ignore[arg-type]
        return super().create_scheduler(num_training_steps, optimizer)


class CompleteCheckpoints(TrainerCallback):
    """Mark a checkpoint when it is complete, and only then drop the older ones. Must be the last callback."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        newest = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        (newest / _COMPLETE).touch()
        best = Path(state.best_model_checkpoint).name if state.best_model_checkpoint else None
        for folder in newest.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            if folder != newest and folder.name != best:
                _drop(folder)


class Epochs(TrainerCallback):
    """Tell the images which epoch begins, also where a run continues in the middle of one."""

    def __init__(self, images: Any):
        self.images = images

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.images.augment_for(int(state.epoch + 1e-6))  # a sum of shares may fall a rounding short of a whole epoch


class QuietBar(ProgressCallback):
    """Trainer's bar, with the newest values beside it instead of a line for each log."""

    def __init__(self, title: str):
        super().__init__()
        self.title = title

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.title)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None:
            shown = {
                name: logs[name]
                for name in ("loss", "eval_accuracy", "eval_map", "eval_mean_iou", "eval_mae", "sparsity")
                if name in logs
            }
            if "train_runtime" not in logs:
                self.training_bar.set_postfix(shown)


def last_complete(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; half-written ones are removed."""
    found = []
    for checkpoint in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if (checkpoint / _COMPLETE).exists():
            found.append(checkpoint)
        else:
            _drop(checkpoint)
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _drop(checkpoint: Path) -> None:
    (checkpoint / _COMPLETE).unlink(missing_ok=True)  # first, so that a partly removed one does not count
    shutil.rmtree(checkpoint, ignore_errors=True)


def train(
    prepared: Prepared, index: int, model: Any, folder: Path, teacher: str | None = None
) -> tuple[Any, list[dict[str, Any]]]:
    """Train ``model`` in place as stage ``index`` says, with checkpoints in ``folder``.

    Args:
        teacher: of a distill stage: a folder or a Hub id.

    Returns:
        The stage's method callback (None for ordinary training), and Trainer's log.

    Raises:
        ModelError: when the training diverged.
    """
    recipe = prepared.recipe
    stage = recipe.stages[index]
    assert isinstance(stage, Training)
    arguments = training_arguments(recipe, index, folder)
    set_seed(arguments.seed)
    callback = method_callback(recipe, index, prepared.example_inputs)
    callbacks = [found for found in (callback, quantization_callback(recipe, index)) if found is not None]
    images = prepared.training_split(arguments.seed)
    with own_names_in_checkpoints(model):
        whole = model
        if isinstance(stage, DistillStage):
            whole = stage.wrap(model, teacher, prepared.example_inputs)
        trainer = StageTrainer(
            model=whole,
            args=arguments,
            train_dataset=callback.halve(images) if hasattr(callback, "halve") else images,
            eval_dataset=prepared.split("validation"),
            data_collator=as_batch,
            callbacks=[*prepared.task.callbacks(model), *callbacks],
            milestones=stage.lr_milestones,
            decay=stage.lr_decay,
            **prepared.task.evaluation(prepared.processor),
        )
        if callbacks:
            from ..methods.reporting import report_first

            report_first(trainer)
        if trainer.pop_callback(ProgressCallback) is not None:  # it is another one in a notebook, or with disable_tqdm
            trainer.add_callback(QuietBar(stage.stage))
        trainer.add_callback(Epochs(images))
        trainer.add_callback(CompleteCheckpoints())
        checkpoint = last_complete(folder)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    bad = [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
    if bad:
        raise ModelError(
            f"{recipe.where('stages', index)}: the training diverged: {bad[0]} holds NaN or infinity. Lower "
            "training.learning_rate (or the stage's strength), add training.warmup_steps, and start over with --restart."
        )
    return callback, trainer.state.log_history
