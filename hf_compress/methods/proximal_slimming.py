"""Proximal network slimming: an auxiliary copy of the scales that becomes exactly sparse while training.

Source: Bui, Xue, Park, Qi & Xin 2023, "A Proximal Algorithm for Network Slimming" (arXiv 2307.00684), and the authors'
code. With gamma the scales, xi their auxiliary copy, lambda = ``strength`` and beta = ``coupling``, it minimises

    F(W, gamma, xi) = L(W, gamma) + lambda ||xi||_1 + beta/2 ||gamma - xi||^2

by proximal alternating linearised steps of length 1/alpha, where 1/alpha is the learning rate.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_compress.axes.finding import Inputs
from hf_compress.errors import MethodError
from hf_compress.surgery.plan import Plan

from .axis_callback import AxisCallback, Grouping, check_number, plan_of_support
from .penalties import L1, Penalty, as_penalty
from .scales import Scales
from .trained_model import trained_model
from .training_buffer import filled, register, registered, unregister

logger = logging.get_logger(__name__)

#: below this a scale is set to zero: it is contracting towards it, and denormal numbers make CPUs slow
_NEGLIGIBLE = 1e-30


def proximal_step(
    gamma: Tensor,
    xi: Tensor,
    lr: float | Tensor,
    coupling: float,
    shrink: Callable[[Tensor, float | Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """The part of one proximal alternating step that follows the gradient step.

    With alpha = 1 / lr, the paper's ``gamma = (alpha (gamma - grad / alpha) + beta xi) / (alpha + beta)`` and
    ``xi = S((alpha xi + beta gamma) / (alpha + beta), lambda / (alpha + beta))``, multiplied through by lr, so that a
    learning rate of 0 (warm-up) changes nothing.

    Args:
        gamma: [n], the scales after the optimizer's step.
        xi: [n], the auxiliary copy.
        lr: the learning rate of that step, or one per entry.
        coupling: beta.
        shrink: the proximal operator of the penalty on xi: ``shrink(v, step)``.

    Returns:
        The new gamma and the new xi.
    """
    weight = lr * coupling
    gamma = (gamma + weight * xi) / (1 + weight)
    xi = shrink((xi + weight * gamma) / (1 + weight), lr / (1 + weight))
    return gamma, xi


class ProximalSlimmingCallback(AxisCallback):
    """Train to exactly sparse scales; no threshold is needed afterwards and fine-tuning is optional.

    After every optimizer step, scales and their auxiliary copy xi are drawn together and xi is soft-thresholded. An
    index whose xi is zero can go: :meth:`support` says which stay, :meth:`plan` makes it a plan for
    ``shrink(model, plan, fold_shift=True)``.

    While training, xi is a buffer of the model, so that checkpoints hold it and resuming continues exactly; at the end
    of training it is taken away and the saved model is an ordinary one.

    Choosing the numbers. A scale that the loss does not defend falls by ``strength * lr / (2 + coupling * lr)`` per
    step, so within T steps it vanishes from 0.5 only if that times T exceeds 0.5: a shorter schedule needs a larger
    ``strength``. The scales kept differ from xi by ``strength / coupling``, and those of removed indices are below it.
    Keep that ratio far below the scales (0.01 of them is good): where a BatchNorm follows, it undoes a common factor of
    all scales, the loss does not resist, and all of them can slip under the ratio at once, which empties the support.
    Momentum m makes the loss's gradient reach the scales 1 / (1 - m) times while the coupling is not amplified:
    at convergence the loss's gradient on kept scales is ``(1 - m) * strength``. The papers' numbers are for m = 0.9
    (their 0.0045 corresponds to 0.00045 in network slimming). Weight decay of the optimizer acts on the scales beside
    it. With optimizers other than SGD the step is not a gradient step of length lr and convergence is not covered by
    the paper.

    Args:
        strength: lambda; at least 0. The authors' code uses 0.0045 (VGG-19), 0.004 (DenseNet-40), 0.002 (ResNet-164) on
            CIFAR-10 with a learning rate of 0.1.
        coupling: beta, above 0; 100, 100 and 0.25 there.
        penalty: what takes the place of the l1 norm on xi; a name, a mapping ``{"name": ..., parameters}`` or a Penalty
            with a proximal operator. Other than ``"l1"`` is not in the paper: MCP and SCAD stop pulling at scales beyond
            ``a * strength``, so that what stays is not held down.
        axes: glob pattern or patterns of the axis names to act on; None for all.
        inexact: also act on axes whose removal is not the same function as masking.
        grouping: ``"axis"`` soft-thresholds the root mean square of an index's scales, so that an index of an axis with
            several scales (a residual stream) vanishes as a whole; ``"scale"`` is the paper, where it can be removed
            only if all of its scales happen to vanish. The two are the same where axes have one scale.
        threshold: has no effect on training; an index counts as vanished in the logged ``sparsity`` when its xi is at
            most this.
        gamma_init: value given to all scales before training starts; 0.5 in the papers. None leaves them as they are.
            xi starts as a copy of the scales (the authors draw it from U(0.47, 0.53)).
        zero_on_removal: at the end of training, set the scales of the indices without support to zero, so that removing
            them afterwards changes nothing more.
        example_inputs: as for :func:`hf_compress.find_axes`; by default built from the model's configuration.

    Raises:
        MethodError: when the Trainer is made or training starts, for an argument out of range, or for another
            callback on the same scales.
        NothingToShrinkError: at the start of training, when the model has no axis with a scale.
        ModelError: at the start of training, when weights are not finite.
    """

    is_exclusive = True
    auxiliary_: Tensor | None = None

    def __init__(
        self,
        strength: float,
        coupling: float,
        *,
        penalty: str | Mapping[str, Any] | Penalty = "l1",
        axes: str | Sequence[str] | None = None,
        inexact: bool = False,
        grouping: Grouping = "axis",
        threshold: float = 0.0,
        gamma_init: float | None = None,
        zero_on_removal: bool = True,
        example_inputs: Inputs = None,
    ) -> None:
        self.strength = strength
        self.coupling = coupling
        self.penalty = penalty
        self.axes = axes
        self.inexact = inexact
        self.grouping = grouping
        self.threshold = threshold
        self.gamma_init = gamma_init
        self.zero_on_removal = zero_on_removal
        self.example_inputs = example_inputs

    # -- Trainer hooks ------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = trained_model(kwargs)
        optimizer = kwargs["optimizer"]
        super().on_train_begin(args, state, control, **kwargs)
        assert self.scales_ is not None
        self.auxiliary_ = None
        self._find_groups(optimizer)
        name = _name(self.scales_)
        if self._resumed(model, name, state, "it starts again as a copy of the scales") is None:
            register(model, name, self.scales_.read())

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = trained_model(kwargs)
        optimizer = kwargs["optimizer"]
        if self.scales_ is None or getattr(optimizer, "step_was_skipped", False):
            return
        xi = registered(model, _name(self.scales_))
        assert xi is not None
        with torch.no_grad():
            gamma, new = proximal_step(
                self.scales_.read(), xi, self._learning_rate(optimizer), self.coupling, self._shrink
            )
            self.scales_.write(torch.where(gamma.abs() < _NEGLIGIBLE, 0, gamma))
            xi.copy_(new)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = trained_model(kwargs)
        if self.scales_ is None:
            return
        if self.zero_on_removal:
            self._zero_removed(model)
        self.auxiliary_, self._sizes = self._auxiliary(model, self.scales_), self.scales_.sizes
        unregister(model, _name(self.scales_))
        super().on_train_end(args, state, control, **kwargs)

    # -- results --------------------------------------------------------------------------------------------------

    def support(self, model: nn.Module) -> dict[str, Tensor]:
        """Which indices the training decided to keep.

        An index is kept when the xi of any of its scales is not zero. Every axis keeps at least one: where all are
        zero, the one with the largest scales. Without xi (a model trained by another callback object) the scales stand
        in for it; ``zero_on_removal`` made them zero at the same places.

        Args:
            model: the model during or after training, not wrapped.

        Returns:
            Axis name -> bool [axis size] on the CPU, true where an index is kept.

        Raises:
            NothingToShrinkError: when no axis has a scale.
        """
        scales = self._scales(model)
        kept = scales.sum((self._auxiliary(model, scales) != 0).float()) > 0
        gamma = scales.by_axis(scales.mean(scales.read().abs()).cpu())
        support = {}
        for name, mask in scales.by_axis(kept.cpu()).items():
            support[name] = mask.clone()
            if not mask.any():
                support[name][gamma[name].argmax()] = True
        return support

    def kept(self, model: nn.Module) -> dict[str, Tensor]:
        """The support; see :meth:`support`."""
        return self.support(model)

    def plan(self, model: nn.Module) -> Plan:
        """The support as a plan, for ``shrink(model, plan, fold_shift=True)``.

        Axes that the architecture forces to keep equally many indices keep as many as the largest support among them,
        filled up by the size of the scales.

        Args:
            model: as for :meth:`support`.

        Raises:
            NothingToShrinkError: when no axis has a scale.
        """
        return plan_of_support(self.support(model), self._scales_magnitude(model), self._graph(model))

    # -- inside ---------------------------------------------------------------------------------------------------

    def _validate(self) -> None:
        super()._validate()
        check_number("strength", self.strength, minimum=0)
        check_number("coupling", self.coupling, minimum=0, is_open=True)
        self.penalty_ = as_penalty(self.penalty)
        self.penalty_.proximal(torch.zeros(1), 1.0, 1.0)  # raises where there is no closed form

    def _buffer(self, model: nn.Module) -> tuple[str, Tensor]:
        scales = self._scales(model)
        return _name(scales), scales.read()

    def _shrink(self, v: Tensor, step: float | Tensor) -> Tensor:
        """The proximal operator of the penalty on xi."""
        if isinstance(step, Tensor) and step.ndim:  # scales that learn at different rates
            if not isinstance(self.penalty_, L1):
                raise MethodError(
                    f"penalty {self.penalty_.name!r} needs one learning rate for all scales. Put them into one parameter "
                    "group, or use 'l1'."
                )
            if self.grouping == "axis":
                assert self.scales_ is not None
                step = self.scales_.mean(step)
        if self.grouping == "scale":
            return self.penalty_.proximal(v, step, self.strength)  # type: ignore[arg-type]  # checked above
        assert self.scales_ is not None
        return self.scales_.scaled_by_index(v, lambda root: self.penalty_.proximal(root, step, self.strength))  # type: ignore[arg-type]

    def _find_groups(self, optimizer: Any) -> None:
        """Which of the optimizer's groups trains which scale; None for those that it does not train."""
        assert self.scales_ is not None
        group_of = {id(parameter): i for i, group in enumerate(optimizer.param_groups) for parameter in group["params"]}
        self._groups = [
            group_of.get(id(parameter)) if parameter.requires_grad else None for parameter in self.scales_.parameters
        ]

    def _learning_rate(self, optimizer: Any) -> float | Tensor:
        """The learning rate of the step just taken: one number, or [n] where scales differ in it."""
        assert self.scales_ is not None
        rates = [0.0 if i is None else optimizer.param_groups[i]["lr"] for i in self._groups]
        first = rates[0]
        if all(rate is first or rate == first for rate in rates):
            return first
        return self.scales_.spread_from_parameters([float(rate) for rate in rates])

    def _auxiliary(self, model: nn.Module, scales: Scales) -> Tensor:
        """[n]: xi, wherever it is now."""
        xi = filled(model, _name(scales))
        if xi is not None:
            return xi.clone()
        if self.auxiliary_ is not None and self._sizes == scales.sizes:  # not for a model that was shrunk since
            return self.auxiliary_.to(scales.device)
        return scales.read()

    def _magnitudes(self, model: nn.Module, scales: Scales) -> Tensor:
        return self._auxiliary(model, scales).abs()

    def _vanished(self, model: nn.Module) -> Tensor:
        assert self.scales_ is not None
        xi = self._auxiliary(model, self.scales_)
        return self.scales_.sum((xi.abs() > self.threshold).float()) == 0

    def _scales_magnitude(self, model: nn.Module) -> dict[str, Tensor]:
        scales = self._scales(model)
        return scales.by_axis(scales.mean(scales.read().abs()).cpu())

    def _zero_removed(self, model: nn.Module) -> None:
        scales = self.scales_
        assert scales is not None
        masks = self.plan(model).masks(self._graph(model))
        kept = torch.cat([masks.get(name, torch.ones(size, dtype=torch.bool)) for name, size in scales.sizes.items()])
        with torch.no_grad():
            scales.write(scales.read() * scales.spread(kept.to(scales.device)))


# -- the buffer that holds xi while training ------------------------------------------------------------------------


def _name(scales: Scales) -> str:
    # by content: two callbacks on different axes have different buffers, and a replaced callback finds its own
    return f"hf_compress_xi_{zlib.crc32(chr(10).join([*scales.sizes, *scales.names]).encode()):08x}"
