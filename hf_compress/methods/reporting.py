"""Bring the metrics of methods to Trainer's reporters (TensorBoard, Trackio, ...).

Trainer calls the reporters before the user's callbacks, so what a callback adds to the logs comes too late for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, PrinterCallback

from .architecture_search import ArchitectureSearchCallback
from .axis_callback import AxisCallback
from .feature_affinity import DistillationCallback
from .trained_rank_pruning import TrainedRankPruningCallback

# whose on_log adds to the logs
_LOGGING = (AxisCallback, ArchitectureSearchCallback, DistillationCallback, TrainedRankPruningCallback)

if TYPE_CHECKING:
    from transformers import Trainer


class _Order(TrainerCallback):
    """Keeps the methods ahead of the reporters, and the metrics of single axes out of the printed line.

    Two of them stand around the reporters: the first adds what the methods measured for single axes to the logs, the
    last takes it out again, so that it reaches the reporters and not the printer.
    """

    def __init__(self, handler: CallbackHandler, is_first: bool) -> None:
        self.handler = handler
        self.is_first = is_first

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Restoring callbacks from a checkpoint puts new objects at the end of the list. A new list, since the handler
        # is iterating over the old one.
        if self.is_first:
            self.handler.callbacks = _sorted(self.handler)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs: dict[str, float] = kwargs["logs"]
        if not ("loss" in logs or "train_loss" in logs):
            return
        for callback in self.handler.callbacks:
            for name, value in getattr(callback, "axis_metrics_", {}).items():
                if self.is_first:
                    logs[name] = value
                else:
                    logs.pop(name, None)


def report_first(trainer: Trainer) -> None:
    """Move the methods' callbacks ahead of Trainer's reporters, so that their metrics are reported.

    Call it once, after the Trainer is made and before it trains. The order of the methods among themselves stays.
    """
    handler = trainer.callback_handler
    if not any(isinstance(callback, _Order) for callback in handler.callbacks):
        handler.callbacks = [*handler.callbacks, _Order(handler, True), _Order(handler, False)]
    handler.callbacks = _sorted(handler)


def _sorted(handler: CallbackHandler) -> list[TrainerCallback]:
    from transformers.trainer import DEFAULT_PROGRESS_CALLBACK  # another class in notebooks

    def rank(callback: TrainerCallback) -> int:
        if isinstance(callback, DefaultFlowCallback):
            return 0
        if isinstance(callback, _LOGGING):
            return 1
        if isinstance(callback, _Order):
            return 2 if callback.is_first else 4
        return 5 if isinstance(callback, (PrinterCallback, DEFAULT_PROGRESS_CALLBACK)) else 3

    return sorted(handler.callbacks, key=rank)
