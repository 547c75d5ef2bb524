"""Search for the widths of any model, with the solver of the architecture search.

RARTS's authors apply it to channel numbers (Xue, Qi & Xin, arXiv 2008.03901v2, of which only the abstract was available
here). How is our own: the architecture variables are the scores of :mod:`.dimension_scores`, one per index of an axis,
multiplied into the weights that read it; both copies of the network share them; a penalty drives them to exact zeros, as
in :mod:`.dimension_search`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_compress.axes.finding import Inputs
from hf_compress.surgery.plan import Plan

from .architecture_search import ArchitectureSearchCallback, SearchMethod
from .architecture_state import ArchitectureState, Optimizer, state_in
from .dimension_scores import scores_in
from .dimension_search import DimensionSearchCallback
from .penalties import Penalty
from .relaxed_search import Passes


class WidthSearchCallback(ArchitectureSearchCallback):
    """Learn which channels, hidden units or heads a model needs, from both halves of its data.

    Every searched axis has scores alpha, one per index, starting at 1: parameters of the model while it trains, as in
    :class:`DimensionSearchCallback`, whose arguments these are too. They are the architecture of
    :class:`ArchitectureSearchCallback`, stepped by the gradients of both halves and then by the penalty's proximal
    operator. When training ends they are folded into the weights y, and the model is an ordinary one::

        search = WidthSearchCallback(target=0.4)
        Trainer(model, args, train_dataset=search.halve(dataset), callbacks=[search]).train()
        shrink(model, search.plan(model))
        Trainer(model, args, train_dataset=dataset).train()

    A score that the losses do not defend falls by ``architecture_lr * strength`` in every step, so it reaches zero only
    where the steps after the warm-up times that exceed 1.

    Args:
        strength: weight of the penalty, at least 0; or kind -> weight.
        target: what :meth:`plan` removes: a share of the dimensions of each kind, kind -> share, a budget such as
            ``{"macs": 0.5}``, or None for what became zero.
        method, split, split_seed, training_weight, coupling, passes, architecture_lr, architecture_optimizer,
            architecture_betas, architecture_weight_decay, validation_dataset: as there.
        warmup: steps before scores move; below 1, a share of all steps.
        penalty, kinds, axes, inexact, min_keep, threshold, example_inputs: as for DimensionSearchCallback; without kinds
            and axes, all axes are searched whose removal is exact.

    Raises:
        MethodError: when the Trainer is made or training starts, as for both.
        NothingToShrinkError: at the start of training, when no axis can be searched.
        BudgetError: at the start of training, when the target cannot be met.
    """

    def __init__(
        self,
        strength: float | Mapping[str, float] = 1.0,
        target: float | Mapping[str, float] | None = None,
        method: SearchMethod = "rarts",
        *,
        split: float = 0.5,
        split_seed: int = 0,
        training_weight: float | Sequence[float] = 1.0,
        coupling: float | Sequence[float] = 1.0,
        passes: Passes = "shared",
        warmup: float = 0.1,
        penalty: str | Mapping[str, Any] | Penalty = "l1",
        kinds: str | Sequence[str] | None = None,
        axes: str | Sequence[str] | None = None,
        inexact: bool = False,
        min_keep: int | Mapping[str, int] | None = None,
        threshold: float = 0.0,
        architecture_lr: float = 0.01,
        architecture_optimizer: Optimizer = "adam",
        architecture_betas: Sequence[float] = (0.5, 0.999),
        architecture_weight_decay: float = 0.0,
        validation_dataset: Any = None,
        example_inputs: Inputs = None,
    ) -> None:
        super().__init__(
            method,
            split=split,
            split_seed=split_seed,
            training_weight=training_weight,
            coupling=coupling,
            passes=passes,
            architecture_lr=architecture_lr,
            architecture_optimizer=architecture_optimizer,
            architecture_betas=architecture_betas,
            architecture_weight_decay=architecture_weight_decay,
            warmup=warmup,
            validation_dataset=validation_dataset,
        )
        self.strength = strength
        self.target = target
        self.penalty = penalty
        self.kinds = kinds
        self.axes = axes
        self.inexact = inexact
        self.min_keep = min_keep
        self.threshold = threshold
        self.example_inputs = example_inputs

    # -- Trainer hooks --------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        model = kwargs["model"]
        scores = scores_in(model)
        assert scores is not None
        self._dimensions.scales_ = self._dimensions._scales(model)
        self._dimensions._validate()
        self._dimensions.axis_metrics_ = {}
        self._dimensions._prepare(scores)
        scores.is_training.fill_(True)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the share of vanished scores, overall, per kind and per axis, to what the architecture search logs."""
        super().on_log(args, state, control, **kwargs)
        if self._handles:
            self._dimensions.on_log(args, state, control, **kwargs)
            self.axis_metrics_ = self._dimensions.axis_metrics_

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._handles:
            remedy = "Raise strength or architecture_lr, or train longer."
            self._dimensions._warn_if_short(type(self).__name__, remedy=remedy)
            self._dimensions.scales_ = None  # it holds the parameters
        super().on_train_end(args, state, control, **kwargs)

    # -- the search's state in the model --------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> ArchitectureState:
        """Give a model its scores, all 1, and the state of the search.

        Raises:
            NothingToShrinkError: when no axis can be searched.
            MethodError: when the model lacks kinds, or carries the state of another search.
        """
        self._dimensions = self._dimension_search()
        if state_in(model) is None:  # the second copy gets the scores too
            self._dimensions.attach(model)
        return super().attach(model)

    def detach(self, model: nn.Module) -> None:
        """End the search: the scores become part of the weights y, and its state leaves the model."""
        super().detach(model)
        self._dimension_search().fold(model)

    # -- results --------------------------------------------------------------------------------------------------

    def scores(self, model: nn.Module) -> dict[str, Tensor]:
        """The magnitude of every score: axis name -> float32 [axis size]; see :meth:`DimensionSearchCallback.scores`."""
        return self._dimension_search().scores(model)

    def support(self, model: nn.Module) -> dict[str, Tensor]:
        """Which indices have not vanished; see :meth:`DimensionSearchCallback.support`."""
        return self._dimension_search().support(model)

    def plan(self, model: nn.Module, *, measure: Callable[[Plan], float] | None = None) -> Plan:
        """What ``target`` asks for, for :func:`hf_compress.shrink`; see :meth:`DimensionSearchCallback.plan`."""
        return self._dimension_search().plan(model, measure=measure)

    def first_scores(self, model: nn.Module) -> dict[str, Tensor]:
        """All 1; the target is checked on a copy of the model. See :meth:`DimensionSearchCallback.first_scores`."""
        self._validate()
        return self._dimension_search().first_scores(model)

    def kept(self, model: nn.Module) -> dict[str, Tensor]:
        """What :meth:`plan` keeps, as masks."""
        return self._dimension_search().kept(model)

    def state(self) -> dict[str, Any]:
        """The constructor's arguments as JSON data; Trainer makes a new callback from them when it resumes."""
        found = super().state()
        if isinstance(self.penalty, Penalty):
            found["args"]["penalty"] = self.penalty.to_json()
        return found

    # -- inside ---------------------------------------------------------------------------------------------------

    def _validate(self) -> None:
        super()._validate()
        self._dimension_search()._validate()

    def _dimension_search(self) -> DimensionSearchCallback:
        """What knows kinds, targets and results."""
        everything = self.axes is None and self.kinds is None
        return DimensionSearchCallback(
            self.strength,
            self.target,
            self.warmup,
            penalty=self.penalty,
            kinds=self.kinds,
            axes="*" if everything else self.axes,
            inexact=self.inexact,
            min_keep=self.min_keep,
            threshold=self.threshold,
            example_inputs=self.example_inputs,
        )

    def _architecture(self, model: nn.Module) -> dict[str, nn.Parameter]:
        scores = scores_in(model)
        assert scores is not None
        names = [scores.parameter_name(axis) for axis in scores.names]
        return dict(zip(names, scores.norm, strict=True))

    def _shared_objects(self, model: nn.Module) -> list[Any]:
        scores = scores_in(model)
        return [] if scores is None else [scores.graph]

    def _after_architecture_step(self, state: TrainerState) -> None:
        scales = self._dimensions.scales_
        assert scales is not None
        with torch.no_grad():
            self._require_gradients(True)  # Scales writes to parameters that are trained
            scales.write(self._dimensions._shrunk(scales.read(), self.architecture_lr))
            self._require_gradients(False)


__all__ = ["WidthSearchCallback"]
