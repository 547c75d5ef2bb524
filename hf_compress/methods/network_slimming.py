"""Network slimming: a sparsity penalty on the scales of axes, by subgradient.

Sources: Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming" (arXiv 1708.06519); with
nonconvex penalties, Bui et al. 2021, "Improving Network Slimming with Nonconvex Regularization" (arXiv 2010.01242).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_compress.axes.finding import Inputs

from .axis_callback import AxisCallback, Grouping, check_number
from .penalties import Penalty, as_penalty


class NetworkSlimmingCallback(AxisCallback):
    """Add a sparsity penalty to the scale of every prunable axis while training.

    The penalty's subgradient is added to the gradient of the scales after all-reduce and clipping and before the
    optimizer step, so it goes through the optimizer (momentum, Adam's normalisation) like the loss's gradient, and is
    not part of the reported loss. Weight decay is the optimizer's own and adds to it.

    Subgradient steps leave scales small, not zero (around the learning rate times ``strength``): rank them with
    :meth:`scores` and cut with :func:`hf_compress.select`.

    Args:
        penalty: what to add to the loss; a name, a mapping ``{"name": ..., parameters}`` or a Penalty. Paper: g(gamma).
        strength: weight of the penalty. Paper: lambda (1e-4 for VGG, 1e-5 for ResNet and DenseNet). At least 0.
        axes: glob pattern or patterns of the axis names to act on; None for all.
        inexact: also act on axes whose removal is not the same function as masking (the residual stream of ConvNeXt).
        grouping: ``"scale"`` is the paper: every scale has its own penalty. An axis with several scales (a residual
            stream with a BatchNorm at the end of every branch) loses an index only when all of them vanish;
            ``"axis"`` penalises the root mean square of an index's k scales, k times (group lasso for l1), which
            drives them to zero together. The two are the same where axes have one scale.
        threshold: scales below it count as vanished in the logged ``sparsity``. Affects no weight.
        gamma_init: value given to all scales before training starts; 0.5 in the papers. None leaves them as they are.
        example_inputs: as for :func:`hf_compress.find_axes`; by default built from the model's configuration.

    Raises:
        MethodError: when the Trainer is made or training starts, for an argument out of range, or for another
            callback on the same scales that tolerates none.
        NothingToShrinkError: at the start of training, when the model has no axis with a scale.
        ModelError: at the start of training, when weights are not finite.
    """

    def __init__(
        self,
        penalty: str | Mapping[str, Any] | Penalty = "l1",
        strength: float = 1e-4,
        *,
        axes: str | Sequence[str] | None = None,
        inexact: bool = False,
        grouping: Grouping = "scale",
        threshold: float = 1e-2,
        gamma_init: float | None = None,
        example_inputs: Inputs = None,
    ) -> None:
        self.penalty = penalty
        self.strength = strength
        self.axes = axes
        self.inexact = inexact
        self.grouping = grouping
        self.threshold = threshold
        self.gamma_init = gamma_init
        self.example_inputs = example_inputs

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        optimizer = kwargs["optimizer"]
        if self.scales_ is None or self.strength == 0:
            return
        unscale_gradients(optimizer)
        with torch.no_grad():
            self.scales_.add_to_gradients(self._subgradient(self.scales_.read()))

    def _subgradient(self, scales: Tensor) -> Tensor:
        assert self.scales_ is not None
        if self.grouping == "scale":
            return self.penalty_.subgradient(scales, self.strength)
        return self.scales_.scaled_by_index(scales, lambda root: self.penalty_.subgradient(root, self.strength))

    def _validate(self) -> None:
        super()._validate()
        check_number("strength", self.strength, minimum=0)
        self.penalty_ = as_penalty(self.penalty)


def unscale_gradients(optimizer: Any) -> None:
    """Divide the gradients by the loss scale of fp16 training, where that was not done yet.

    Trainer does it when it clips or measures the gradient norm, and some of its versions do neither when
    ``max_grad_norm`` is 0.

    Args:
        optimizer: the optimizer that Accelerate prepared, or any other.
    """
    scaler = getattr(optimizer, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return
    try:
        scaler.unscale_(optimizer.optimizer)
    except RuntimeError as error:
        if "already been called" not in str(error):  # torch offers no other way to ask
            raise
