"""Sparse group regularisation: zero weights and zero groups of weights in one training, by relaxed variable splitting.

Sources: Bui, Park, Zhang, Qi & Xin 2019, "l0 Regularized Structured Sparsity Convolutional Neural Networks" (arXiv
1912.07868), and 2021, "Structured Sparsity of CNNs via Nonconvex Sparse Group Regularization" (Frontiers Appl. Math.
Stat. 6:529564). The formulas are reconstructed from the authors' code, since the printed ones were not available. With W
the weights, V their auxiliary copy, lambda = ``strength`` and beta = ``split``, it minimises

    F(W, V) = L(W) + lambda (r(V) + sum over groups g of sqrt|g| ||V_g||_2) + beta/2 ||W - V||^2

by a step of the optimizer on W, in which the coupling is part of the gradient, and ``V = prox(W)`` after it.

Departures from the authors' code: losses there are means over N examples with lambda / N and beta / N, so the numbers
here are theirs divided by N (60,000 for MNIST, 50,000 for CIFAR). The group norm stands on V, not on W: what it does to
W is the same gradient wherever ``||W_g|| > lambda sqrt|g| / beta``, and smooth below, where that of the norm is not
defined at zero. V then has exactly zero groups. All layers take part in the growth of beta. V starts as W.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_compress.axes.finding import Inputs
from hf_compress.errors import MethodError, ModelError
from hf_compress.surgery.plan import Plan

from .axis_callback import check_number, plan_of_support
from .group_callback import GroupCallback
from .network_slimming import unscale_gradients
from .trained_model import trained_model
from .training_buffer import filled, register, registered
from .weight_groups import Slices, WeightGroups

logger = logging.get_logger(__name__)

_AT_ONCE = 1 << 16  # weights; so many and their intermediate results stay in a CPU's cache


# -- the penalty on single weights ----------------------------------------------------------------------------------


class Element(Protocol):
    """A penalty r on the single weights of a vector that has a closed-form proximal operator.

    The operators work in place, and without ``torch.where``, which takes some ten times as long as anything else here.
    """

    def proximal_(self, v: Tensor, mu: float) -> None:
        """Replace ``v`` by ``argmin_u mu r(u) + ||u - v||^2 / 2``. Ties go to the smaller minimiser."""
        ...


@dataclass(frozen=True)
class L0:
    """The number of nonzero entries; its proximal operator is hard thresholding at ``sqrt(2 mu)``."""

    name: ClassVar[str] = "l0"

    def proximal_(self, v: Tensor, mu: float) -> None:
        torch.ops.aten.hardshrink.out(v, math.sqrt(2 * mu), out=v)


@dataclass(frozen=True)
class L1:
    """``||x||_1``: soft thresholding."""

    name: ClassVar[str] = "l1"

    def proximal_(self, v: Tensor, mu: float) -> None:
        torch.ops.aten.softshrink.out(v, mu, out=v)


@dataclass(frozen=True)
class TL1:
    """``(a + 1) |x| / (a + |x|)``, transformed l1 (Zhang & Xin 2017); the authors' code has a = 1.

    The same operator as that of :class:`~hf_compress.methods.penalties.TransformedL1`.
    """

    a: float = 1.0
    name: ClassVar[str] = "tl1"

    def proximal_(self, v: Tensor, mu: float) -> None:
        a = self.a
        is_continuous = mu <= a**2 / (2 * (a + 1))
        threshold = mu * (a + 1) / a if is_continuous else math.sqrt(2 * mu * (a + 1)) - a / 2
        size = v.abs().clamp_min_(threshold)
        sign = torch.nn.functional.hardshrink(v, threshold).sign_()
        shifted = size + a
        angle = shifted.pow(3).reciprocal_().mul_(-27 / 2 * mu * a * (a + 1)).add_(1).clamp_(-1, 1).acos_()
        root = angle.div_(3).cos_().mul_(shifted).mul_(2 / 3).add_(size, alpha=1 / 3).sub_(2 * a / 3)
        torch.minimum(root, size, out=root)  # never past v by rounding
        torch.mul(root, sign, out=v)


@dataclass(frozen=True)
class SCAD:
    """SCAD whose own lambda is ``mu``, as in the authors' code: zero up to ``mu``, the identity beyond ``a mu``."""

    a: float = 3.7
    name: ClassVar[str] = "scad"

    def proximal_(self, v: Tensor, mu: float) -> None:
        reach = (self.a - 2) * mu
        bend = torch.nn.functional.softshrink(v, 2 * mu).clamp_(-reach, reach)
        torch.ops.aten.softshrink.out(v, mu, out=v)
        v.add_(bend, alpha=1 / (self.a - 2))


@dataclass(frozen=True)
class L1MinusL2:
    """``||x||_1 - alpha ||x||_2`` of a whole layer's weights, as in the authors' code without its bugs."""

    alpha: float = 1.0
    name: ClassVar[str] = "l1-l2"

    def proximal_(self, v: Tensor, mu: float) -> None:
        # where all entries are within mu, soft thresholding leaves nothing, and at most the largest entry comes back
        place = v.abs().argmax(0, keepdim=True)
        largest = v[place].abs()
        alone = v[place].sign() * (largest + (self.alpha - 1) * mu)
        torch.ops.aten.softshrink.out(v, mu, out=v)
        norm = torch.linalg.vector_norm(v)
        v.mul_(1 + self.alpha * mu / norm.clamp_min(torch.finfo(v.dtype).tiny))
        v.index_add_(0, place, alone * ((largest <= mu) & (largest > (1 - self.alpha) * mu)))


ELEMENTS: Mapping[str, type[Any]] = {kind.name: kind for kind in (L0, L1, TL1, L1MinusL2, SCAD)}


def element_from(element: str | Mapping[str, Any] | None) -> Element | None:
    """The penalty on single weights from a name or a mapping ``{"name": ..., parameters}``; None for none.

    Raises:
        MethodError: for an unknown name or parameter, or one out of range.
    """
    if element is None:
        return None
    data = {"name": element} if isinstance(element, str) else dict(element) if isinstance(element, Mapping) else {}
    kind = ELEMENTS.get(str(data.pop("name", element)))
    if kind is None:
        raise MethodError(f"element={element!r} is not possible; choose one of {', '.join(ELEMENTS)}, or None.")
    known = [name for name in kind.__dataclass_fields__ if name != "name"]
    if unknown := [name for name in data if name not in known]:
        raise MethodError(
            f"element {kind.name!r} has no parameter {unknown[0]!r}; it takes {', '.join(known) or 'none'}."
        )
    for name, value in data.items():
        check_number(f"element {kind.name!r}: {name}", value, minimum=0, is_open=name == "a")
    built = kind(**data)
    if isinstance(built, L1MinusL2) and built.alpha > 1:
        raise MethodError(f"element 'l1-l2': alpha={built.alpha} is not possible; it must be between 0 and 1.")
    if isinstance(built, SCAD) and built.a <= 2:
        raise MethodError(f"element 'scad': a={built.a} is not possible; it must be above 2. Fan & Li use 3.7.")
    return built


def group_factors(norms: Tensor, thresholds: Tensor) -> Tensor:
    """What the proximal operator of ``threshold ||x||_2`` multiplies a group by: ``max(0, 1 - threshold / norm)``.

    Args:
        norms: [g], at least 0.
        thresholds: [g], at least 0.
    """
    return torch.where(norms > thresholds, 1 - thresholds / norms, 0)


# -- the method -----------------------------------------------------------------------------------------------------


class SparseGroupCallback(GroupCallback):
    """Train to zero weights and zero groups of weights; no threshold is needed afterwards.

    A group is everything that makes an index of an axis (an output filter, a head; with its bias and the scale and shift
    of the norm behind it), or, for linear layers, the weights that read it (an "input unit"). After training the weights
    outside the support of V are set to zero. An axis index with a zero group is one that ``shrink`` removes without
    changing the function: :meth:`support` says which stay, :meth:`plan` makes it a plan. Zeros in what remains are
    reported by :func:`weight_zeros` and make checkpoints smaller after :func:`hf_compress.hub.compact`.

    V is the proximal operator of r, entry by entry, followed by that of the group norm. Together this is the proximal
    operator of the sum for ``element="l1"`` (and None); for the others the group norm sees the weights that r has left,
    an approximation that errs towards keeping: a weight between the two thresholds stays.

    Choosing the numbers. Weights below ``sqrt(2 strength / split)`` (l0), or below ``strength / split`` (l1, tl1 about
    twice that), and groups below ``strength sqrt|g| / split`` are drawn to zero, at a rate of
    ``lr * split / (1 - momentum)`` per step; over the training that should add up to 5 or more, else the last step (setting
    weights to zero) changes the function. Below its threshold a group is pulled in proportion to its size, so that a whole
    layer can keep working there and be lost at the end: raise ``split`` until ``strength sqrt|g| / split`` is a small part
    of the norms (LeNet-5 on Fashion-MNIST with SGD at 0.05: split 0.3 with strength 1e-4 to 3e-4 loses nothing at the end,
    split 0.05 with strength 2.5e-4 all but one channel of a layer). A schedule that is n times shorter needs a ``split`` n times larger, and a
    ``strength`` n times larger for the same thresholds.

    While training, V is a buffer of the model, so that checkpoints hold it and resuming continues exactly; at the end of
    training it is taken away and the saved model is an ordinary one. An axis whose groups are all zero keeps the one with
    the largest weights, and a warning is logged.

    Args:
        element: the penalty r on single weights of linear layers and convolutions: ``"l0"``, ``"l1"``, ``"tl1"``,
            ``"l1-l2"``, ``"scad"``, None, or a mapping with its parameters (``{"name": "tl1", "a": 0.5}``).
        group: ``"l2,1"``, or None.
        strength: lambda / N; at least 0. The code's default is 0.1 / 60000 for LeNet-5, 0.001 / 50000 for WRN-28-10.
        split: beta / N at the start; above 0. 2.5 / 60000 and 0.04 / 50000 there.
        growth: what ``split`` is multiplied by after every ``growth_every`` epochs; at least 1. 1.25 there.
        growth_every: epochs, above 0. 40 and 20 there.
        slices: ``"auto"`` is the code's choice: convolutions by output filters, linear layers by input units (by output
            units where the inputs are no axis in use). ``"producers"`` or ``"readers"`` for all.
        axes: glob pattern or patterns of the axis names to act on; None for all.
        inexact: also act on axes whose removal is not the same function as masking.
        threshold: has no effect on training; an index counts as vanished in the logged ``sparsity`` when the norm of one
            of its groups in V is at most this.
        example_inputs: as for :func:`hf_compress.find_axes`; by default built from the model's configuration.

    Raises:
        MethodError: when the Trainer is made or training starts, for an argument out of range, or for another callback
            that acts on the same weights.
        NothingToShrinkError: at the start of training, when no axis can be used.
        ModelError: at the start of training, when weights are not finite.
    """

    grouping = "axis"
    buffer_prefix = "hf_compress_v"
    without_buffer = "it starts again as a copy of the weights"

    def __init__(
        self,
        element: str | Mapping[str, Any] | None = "l0",
        group: str | None = "l2,1",
        strength: float = 1e-5,
        split: float = 1e-3,
        growth: float = 1.25,
        *,
        growth_every: float = 20,
        slices: Slices = "auto",
        axes: str | Sequence[str] | None = None,
        inexact: bool = False,
        threshold: float = 0.0,
        example_inputs: Inputs = None,
    ) -> None:
        self.element = element
        self.group = group
        self.strength = strength
        self.split = split
        self.growth = growth
        self.growth_every = growth_every
        self.slices = slices
        self.axes = axes
        self.inexact = inexact
        self.threshold = threshold
        self.example_inputs = example_inputs

    # -- Trainer hooks ------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = trained_model(kwargs)
        self._warned: set[str] = set()
        if self._start(args, model, state) is None:
            groups = self._groups(model)
            register(model, self._name(groups), groups.read())

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add beta (W - V) to the gradients, after all-reduce and clipping."""
        if self.groups_ is None:
            return
        unscale_gradients(kwargs["optimizer"])
        flat = registered(trained_model(kwargs), self._name(self.groups_))
        assert flat is not None
        beta = self._split_at(state)
        with torch.no_grad():
            self.groups_.pull_gradients(flat, beta)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """V = prox(W)."""
        if self.groups_ is None or getattr(kwargs["optimizer"], "step_was_skipped", False):
            return
        flat = registered(trained_model(kwargs), self._name(self.groups_))
        assert flat is not None
        with torch.no_grad():
            self._proximal(self.groups_, flat, self.strength / self._split_at(state))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the shares of zero weights and of zero groups to the training logs, and those of axes to the history."""
        model: nn.Module = trained_model(kwargs)
        logs: dict[str, float] = kwargs["logs"]
        if self.groups_ is None or not ("loss" in logs or "train_loss" in logs):
            return
        values = self._values(model, self.groups_)
        vanished = self.groups_.by_axis((self.groups_.norms(values) > self.threshold).float())
        matrices = values[: self.groups_.matrix_length]
        extra = {"weight_sparsity": (matrices == 0).float().mean()} if len(matrices) else {}
        self._log_sparsity(logs, state, {name: 1 - kept for name, kept in vanished.items()}, extra)
        for name in vanished:
            if self.axis_metrics_[f"sparsity/{name}"] == 1 and name not in self._warned:
                self._warned.add(name)
                logger.warning(
                    f"{type(self).__name__}: all groups of axis {name!r} are zero in V at step {state.global_step}. If "
                    "they stay so, the largest of them is kept at the end. Lower strength, or raise split."
                )

    # -- results --------------------------------------------------------------------------------------------------

    def scores(self, model: nn.Module) -> dict[str, Tensor]:
        """How much every index matters: the norm of its group in V, relative to the mean norm in W over the axis.

        Where an index has two groups (its makers and its readers), the smaller number. 0 says that it can go. After
        training the weights stand in for V; they were made zero at the same places.

        Args:
            model: the model during or after training, not wrapped.

        Returns:
            Axis name -> float32 [axis size] on the CPU, at least 0; axes without groups are left out.

        Raises:
            NothingToShrinkError: when no axis can be used.
            ModelError: when the weights are not finite.
        """
        groups = self._groups(model)
        norms = groups.by_side(groups.norms(self._values(model, groups)))
        units = groups.by_side(groups.norms(groups.read()))
        tiny = torch.finfo(groups.dtype).tiny
        parts = [norm / unit.mean().clamp_min(tiny) for norm, unit in zip(norms, units, strict=True)]
        scores = torch.cat(parts).float().cpu()
        if not scores.isfinite().all():
            raise ModelError("the weights of the model are not finite; the training diverged. Lower the learning rate.")
        return groups.by_axis(scores)

    def group_norms(self, model: nn.Module) -> dict[str, Tensor]:
        """The norm of every index's group in the weights, over the root of the group's size: a root mean square weight.

        Where an index has two groups, the smaller number.

        Args:
            model: at any time, not wrapped.

        Returns:
            Axis name -> float32 [axis size] on the CPU; axes without groups are left out.
        """
        groups = self._groups(model)
        norms = groups.norms(groups.read()) / groups.counts.sqrt()
        return {name: norm.float().cpu() for name, norm in groups.by_axis(norms).items()}

    def support(self, model: nn.Module) -> dict[str, Tensor]:
        """Which indices the training decided to keep: those with no zero group, and of every axis at least one.

        Args:
            model: as for :meth:`scores`.

        Returns:
            Axis name -> bool [axis size] on the CPU, true where an index is kept.

        Raises:
            NothingToShrinkError: when no axis can be used.
        """
        groups = self._groups(model)
        support = {
            name: (kept > 0).cpu() for name, kept in groups.by_axis(groups.norms(self._values(model, groups))).items()
        }
        magnitude = self._magnitude(groups)
        for name, kept in support.items():
            if not kept.any():
                kept[magnitude[name].argmax()] = True
        return support

    def kept(self, model: nn.Module) -> dict[str, Tensor]:
        """The support; see :meth:`support`."""
        return self.support(model)

    def plan(self, model: nn.Module) -> Plan:
        """The support as a plan, for ``shrink(model, plan)``.

        Axes that the architecture forces to keep equally many indices keep as many as the largest support among them,
        filled up by the size of the weights.

        Args:
            model: as for :meth:`scores`.

        Raises:
            NothingToShrinkError: when no axis can be used.
        """
        return plan_of_support(self.support(model), self._magnitude(self._groups(model)), self._graph(model))

    # -- inside ---------------------------------------------------------------------------------------------------

    def _validate(self) -> None:
        super()._validate()
        self.element_ = element_from(self.element)
        if self.group not in ("l2,1", None):
            raise MethodError(f"group={self.group!r} is not possible; choose 'l2,1' or None.")
        if self.group is None and self.element is None:
            raise MethodError("with element=None and group=None there is no penalty. Choose at least one.")
        if self.slices not in ("auto", "producers", "readers"):
            raise MethodError(f"slices={self.slices!r} is not possible; choose 'auto', 'producers' or 'readers'.")
        check_number("strength", self.strength, minimum=0)
        check_number("split", self.split, minimum=0, is_open=True)
        check_number("growth", self.growth, minimum=1)
        check_number("growth_every", self.growth_every, minimum=0, is_open=True)

    def _buffer_shape(self, groups: WeightGroups) -> tuple[int, ...]:
        return (groups.length,)

    def _finish(self, model: nn.Module, groups: WeightGroups) -> None:
        self._project(model, groups)

    def _split_at(self, state: TrainerState) -> float:
        """beta in the optimizer step after ``state``; the epoch counts finished steps, also after a resume."""
        return self.split * self.growth ** math.floor((state.epoch or 0.0) / self.growth_every + 1e-9)

    def _proximal(self, groups: WeightGroups, flat: Tensor, mu: float) -> None:
        """Write prox(W) into ``flat``: single weights, then groups."""
        groups.read(out=flat)
        if self.element_ is not None:
            end = groups.matrix_length
            is_by_layer = isinstance(self.element_, L1MinusL2)
            parts = flat[:end].split(groups.lengths[: len(groups.matrices)] if is_by_layer else _AT_ONCE)
            for part in parts:
                self.element_.proximal_(part, mu)
        thresholds = mu * groups.counts.sqrt() if self.group is not None else torch.zeros_like(groups.counts)
        groups.scale_(flat, group_factors(groups.norms(flat), thresholds))

    def _values(self, model: nn.Module, groups: WeightGroups) -> Tensor:
        """[length]: V, or W where there is no V."""
        flat = filled(model, self._name(groups))
        return groups.read() if flat is None else flat

    def _magnitude(self, groups: WeightGroups) -> dict[str, Tensor]:
        """Axis name -> [axis size] on the CPU: the norms of the weights."""
        return {name: norm.float().cpu() for name, norm in groups.by_axis(groups.norms(groups.read())).items()}

    def _project(self, model: nn.Module, groups: WeightGroups) -> None:
        """Set the weights outside the support of V to zero; what is in it keeps its value, undiminished by r."""
        weights, values = groups.read(), self._values(model, groups)
        alive = {name: bool(kept.any()) for name, kept in groups.by_axis(groups.norms(values)).items()}
        kept = torch.where(values != 0, weights, 0)
        support = self.support(model)
        for name in [name for name, is_alive in alive.items() if not is_alive]:
            logger.warning(
                f"{type(self).__name__}: all {groups.sizes[name]} groups of axis {name!r} vanished. The largest is kept, "
                "so that the layer is not lost. Lower strength, or raise split."
            )
            groups.restore_(kept, weights, name, int(support[name].nonzero()))
        groups.write(kept)


class KeepZerosCallback(TrainerCallback):
    """Keep the weights that are exactly zero when training starts at zero: fine-tuning of a sparse model.

    The zeros of linear layers and convolutions are put back after every optimizer step. Momentum of the optimizer is
    left alone, and has no effect on them.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        named = _matrices(trained_model(kwargs))
        with torch.no_grad():
            self._weights = [weight for weight in named.values() if weight.requires_grad and bool((weight == 0).any())]
            self._zeros = [weight == 0 for weight in self._weights]

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        with torch.no_grad():
            for weight, zeros in zip(self._weights, self._zeros, strict=True):
                weight.masked_fill_(zeros, 0)  # a product would leave -0, which is stored as a value

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._weights, self._zeros = [], []


def weight_zeros(model: nn.Module) -> dict[str, float]:
    """The share of exact zeros in the weight of every linear layer and convolution, and of all together.

    Before :func:`hf_compress.shrink` zero groups count; after it, what remains are the zeros inside groups.

    Returns:
        Parameter name -> share; the last entry, ``"all"``, is that of all of them (0 where there are none).
    """
    weights = _matrices(model)
    zeros = {name: int((weight.detach() == 0).sum()) for name, weight in weights.items()}
    shares = {name: zeros[name] / max(weight.numel(), 1) for name, weight in weights.items()}
    return {**shares, "all": sum(zeros.values()) / max(sum(weight.numel() for weight in weights.values()), 1)}


def _matrices(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{path}.weight" if path else "weight": module.weight
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
    }


__all__ = ["KeepZerosCallback", "SparseGroupCallback", "element_from", "group_factors", "weight_zeros"]
