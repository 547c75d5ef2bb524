"""Drop path that grows over the epochs of a training.

Larsson, Maire & Shakhnarovich 2017 (arXiv 1605.07648) introduced drop path; Liu et al. 2019 (DARTS, arXiv 1806.09055) raise
its rate linearly from 0, once an epoch.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import MethodError
from .trained_model import trained_model


class DropPathScheduleCallback(TrainerCallback):
    """Raise every drop path's rate linearly, from 0 in the first epoch towards the model's own after the last.

    In epoch e of E, counted from 0, the rate is e / E of the model's, as in DARTS's code. It follows from the epoch alone, so
    that an interrupted run goes on with the same rates. When training ends, the model has its own rates again.

    Works on any module with a number ``drop_prob``: those of DARTS networks here, of timm, and of most transformers models.

    Raises:
        MethodError: at the start of training, when no drop path of the model has a rate above 0.
    """

    def __init__(self) -> None:
        self.rates_: list[tuple[Any, float]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = trained_model(kwargs)
        found: list[Any] = list(model.modules())
        rates = [(module, getattr(module, "drop_prob", None)) for module in found]
        self.rates_ = [(module, float(rate)) for module, rate in rates if isinstance(rate, (int, float)) and rate > 0]
        if not self.rates_:
            raise MethodError(
                f"{type(model).__name__} has no drop path with a rate above 0; set it in the configuration, for example "
                "drop_path_rate=0.2."
            )

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # whole epochs done; on resuming within one, Trainer counts its part, too
        share = int(state.epoch or 0) / max(1, state.num_train_epochs)
        for module, rate in self.rates_:
            module.drop_prob = rate * share

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for module, rate in self.rates_:
            module.drop_prob = rate
        self.rates_ = []


__all__ = ["DropPathScheduleCallback"]
