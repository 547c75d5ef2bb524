"""Growing regularisation under a budget: a weight decay that grows, on the indices that a plan would remove now.

From Wang, Qin, Zhang & Fu 2021, "Neural Pruning via Growing Regularization" (arXiv 2012.09243; their GReg-1): an l2 penalty
on what is to be removed that starts at nothing and grows while the network trains, so that the rest can make up for it,
and after which the removal changes nothing. From Fang, Ma, Song, Mi & Wang 2023, "DepGraph" (arXiv 2301.12900): what is
decayed and measured is a group, all weights that leave with an index (filters, norms, and the layers that read it), and, as
an option, a penalty on all groups. Theirs scales an l2 penalty by a group's norm; that here is a group lasso.

Ours, and in neither paper: the set is what :func:`hf_compress.select` would remove under a budget of MACs or parameters,
over all layers, and it is chosen anew every few steps until the end (GReg-1 fixes a set from l1 norms with a ratio for every
layer before it begins; DepGraph's penalty knows no budget). Growth is linear in the steps, where GReg adds a constant to the
penalty every few steps until a ceiling: the same line as a staircase.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_compress.axes import AxisGraph
from hf_compress.axes.finding import Inputs
from hf_compress.errors import MethodError, ModelError, NothingToShrinkError
from hf_compress.surgery.plan import Plan
from hf_compress.surgery.select import select

from .axis_callback import check_number
from .dimension_plan import plan_of_shares
from .group_callback import GroupCallback
from .network_slimming import unscale_gradients
from .trained_model import trained_model
from .training_buffer import register
from .weight_groups import Decay, WeightGroups

logger = logging.get_logger(__name__)

_BUDGETS = ("macs", "params")


class GrowingRegularizationCallback(GroupCallback):
    """Train towards a budget: what it would remove decays faster and faster, and is gone before it is cut.

    The group of an index is everything that leaves the model with it. Every ``refresh`` steps the groups are ranked by
    their norm, relative to the mean norm of their axis, and :func:`hf_compress.select` says what the target would remove.
    These groups S, and no others, get an extra weight decay ``lambda_t w``, where lambda_t grows linearly from 0 at
    ``warmup`` to ``strength`` at ``hold`` and stays there. With a lasso on all groups g, up to ``hold``, the loss becomes

        L(w) + lambda_t / 2 sum over g in S of ||w_g||^2 + lasso sum over g of r_g ||w_g||

    with r_g the root mean square norm of the groups of g's axis, taken as a constant. Gradients of both are added after
    all-reduce and clipping and before the optimizer step, so they go through the optimizer like the loss's. A weight that
    two groups share, as those between two convolutions, gets both of theirs. A set that was chosen once mostly stays, since
    its norms fall and with them their rank. When training ends, what goes has all but vanished, and the cut changes next to
    nothing; cut and, if there is time, train on::

        growing = GrowingRegularizationCallback({"macs": 0.5})
        Trainer(model, ..., callbacks=[growing]).train()
        shrink(model, growing.plan(model))

    A run is for one budget. With SGD a group in S shrinks by ``lr * strength / (1 - momentum)`` per step, so the sum of that
    over the steps after ``hold`` decides how little is left, and ``lr * strength`` must stay below 1. Adam divides by the
    size of the gradients, so that the decay of a group is at most about the learning rate per step and weight.

    Args:
        target: a budget, ``{"macs": 0.5}``, ``{"params": 0.5}`` or both, as for :func:`hf_compress.select` (up to 1 a share
            of the model that is trained, above it a count). Or a number below 1: the share of the indices of each kind (see
            :class:`~hf_compress.methods.DimensionSearchCallback`) that goes, ranked over all layers.
        strength: the decay's last and largest factor, the GReg paper's tau; above 0.
        warmup: share of all steps before the decay begins, in which norms become worth comparing.
        hold: share of all steps after which the decay stays at ``strength``; above ``warmup``, at most 1. What is left
            after it trains as the small model.
        lasso: weight of a penalty on the norm of every group up to ``hold``: a group of average norm decays as under a
            weight decay of this size, a smaller one faster in inverse proportion (never faster than ``strength``). It
            separates the norms, and 1e-3 helped with SGD at half of the MACs. Leave it at 0 with Adam, which divides by the
            size of the gradients: where those of the loss are small, any lasso then acts like a large one. Factors follow
            the norms every ``refresh`` steps.
        refresh: steps from one choice to the next. A choice waits for the device and reads all weights.
        axes: glob pattern or patterns of axis names; None for all.
        inexact: also act on axes whose removal is not the same function as masking.
        min_keep: the fewest indices that an axis keeps.
        round_to: with a budget, widths are multiples of this, or the whole axis.
        threshold: a group of less than this share of its axis's mean norm counts as vanished: in the logged ``sparsity``,
            and in the warning at the end if something that goes has not. Affects no weight.
        example_inputs: as for :func:`hf_compress.find_axes`; by default built from the model's configuration.

    Raises:
        MethodError: when the Trainer is made or training starts, for an argument out of range, or for another callback
            on the same weights that tolerates none.
        NothingToShrinkError: at the start of training, when no axis can be used.
        BudgetError: at the start of training, when the target is out of reach; says how far it can go.
        ModelError: at the start of training, when weights are not finite; later, when the training diverged.
    """

    grouping = "scale"
    buffer_prefix = "hf_compress_growing"
    without_buffer = "what goes is chosen anew"

    def __init__(
        self,
        target: float | Mapping[str, float],
        strength: float = 0.3,
        *,
        warmup: float = 0.1,
        hold: float = 0.5,
        lasso: float = 0.0,
        refresh: int = 20,
        axes: str | Sequence[str] | None = None,
        inexact: bool = False,
        min_keep: int = 1,
        round_to: int = 1,
        threshold: float = 1e-2,
        example_inputs: Inputs = None,
    ) -> None:
        self.target = target
        self.strength = strength
        self.warmup = warmup
        self.hold = hold
        self.lasso = lasso
        self.refresh = refresh
        self.axes = axes
        self.inexact = inexact
        self.min_keep = min_keep
        self.round_to = round_to
        self.threshold = threshold
        self.example_inputs = example_inputs

    # -- Trainer hooks ------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = trained_model(kwargs)
        factors = self._start(args, model, state)
        self.plan(model)  # raises out of reach
        self._first_step = round(self.warmup * state.max_steps)
        self._last_step = max(round(self.hold * state.max_steps), self._first_step + 1)
        self._decay: Decay | None = None
        if factors is not None:
            self._decay = self._groups(model).decay(factors[0], factors[1])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.groups_ is None:
            return
        step = state.global_step
        with torch.no_grad():
            if self._decay is None or step % self.refresh == 0 or step in (self._first_step, self._last_step):
                self._choose(trained_model(kwargs), self.groups_, step)
            assert self._decay is not None
            unscale_gradients(kwargs["optimizer"])
            self._decay.add_to_gradients(self._strength_at(step))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the share of vanished groups to the training logs, and those of axes to the history."""
        logs: dict[str, float] = kwargs["logs"]
        if self.groups_ is None or not ("loss" in logs or "train_loss" in logs):
            return
        scores = self.groups_.by_axis(_relative(self.groups_))
        self._log_sparsity(logs, state, {name: (score < self.threshold).float() for name, score in scores.items()})

    # -- results --------------------------------------------------------------------------------------------------

    def scores(self, model: nn.Module) -> dict[str, Tensor]:
        """How much every index matters: the norm of its group, relative to the mean norm over its axis.

        Args:
            model: at any time, not wrapped.

        Returns:
            Axis name -> float32 [axis size] on the CPU, at least 0, 1 on average; axes without trained weights are left
            out.

        Raises:
            NothingToShrinkError: when no axis can be used.
            ModelError: when the weights are not finite.
        """
        groups = self._groups(model)
        return groups.by_axis(_finite(_relative(groups).float().cpu()))

    def plan(self, model: nn.Module) -> Plan:
        """What the target removes, as a plan for :func:`hf_compress.shrink`: the smallest groups.

        Args:
            model: as for :meth:`scores`.

        Raises:
            NothingToShrinkError, ModelError: as :meth:`scores`.
            BudgetError: when the target is out of reach.
        """
        scores = self.scores(model)
        return self._plan(self._graph(model), scores)

    def first_scores(self, model: nn.Module) -> dict[str, Tensor]:
        self._validate()
        self.plan(model)
        return self.scores(model)

    def kept(self, model: nn.Module) -> dict[str, Tensor]:
        """What :meth:`plan` keeps, as masks."""
        plan = self.plan(model)
        return plan.masks(self._graph(model))

    # -- inside ---------------------------------------------------------------------------------------------------

    def _validate(self) -> None:
        super()._validate()
        check_number("strength", self.strength, minimum=0, is_open=True)
        check_number("lasso", self.lasso, minimum=0)
        check_number("warmup", self.warmup, minimum=0)
        check_number("hold", self.hold, minimum=0)
        if not self.warmup < self.hold <= 1:
            raise MethodError(
                f"warmup={self.warmup!r} and hold={self.hold!r} are not possible: they are shares of all steps between "
                "which the decay grows. Give warmup < hold <= 1."
            )
        for name in ("refresh", "min_keep", "round_to"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise MethodError(f"{name}={value!r} is not possible: it must be an integer of at least 1.")
        if isinstance(self.target, Mapping):
            if not self.target or any(name not in _BUDGETS for name in self.target):
                raise MethodError(
                    f"target={dict(self.target)!r} is not possible: name macs, params or both, for example "
                    "{'macs': 0.5}, or give the share of indices that goes."
                )
            for name, value in self.target.items():
                check_number(f"target[{name!r}]", value, minimum=0, is_open=True)
            return
        check_number("target", self.target, minimum=0, is_open=True)
        if self.target >= 1:
            raise MethodError(
                f"target={self.target!r} is not possible: it is the share of indices that goes, below 1. For a budget give "
                "{'macs': ...} or {'params': ...}."
            )
        if self.round_to > 1:
            raise MethodError(
                f"round_to={self.round_to} needs a budget, and target={self.target!r} is a share of indices. Give "
                "target={'macs': ...}, or leave out round_to."
            )

    def _buffer_shape(self, groups: WeightGroups) -> tuple[int, ...]:
        # the factors of the lasso and whether a group goes: between two choices the set cannot be worked out again from
        # the weights of that moment
        return 2, len(groups.counts)

    def _finish(self, model: nn.Module, groups: WeightGroups) -> None:
        self._decay = None
        self._warn_if_short(model)

    def _strength_at(self, step: int) -> float:
        """lambda in the optimizer step after ``step`` finished ones; the first after the warm-up has some already."""
        grown = (step + 1 - self._first_step) / (self._last_step - self._first_step)
        return self.strength * min(max(grown, 0.0), 1.0)

    def _choose(self, model: nn.Module, groups: WeightGroups, step: int) -> None:
        """The factors of the lasso and of the growing decay, from the weights as they are."""
        relative = _relative(groups)
        lasso, gone = torch.zeros_like(relative), torch.zeros_like(relative)
        if self.lasso > 0 and step < self._last_step:
            parts = [part.square().mean().sqrt() / part for part in groups.by_side(relative)]
            lasso = torch.cat(parts).mul_(self.lasso).nan_to_num_(0.0).clamp_max_(self.strength)
        if step >= self._first_step:
            graph = self.axes_
            assert graph is not None
            kept = self._plan(graph, groups.by_axis(_finite(relative.float().cpu()))).masks(graph)
            masks = [
                ~kept[name] if name in kept else torch.zeros(size, dtype=torch.bool) for name, size in groups.sides
            ]
            gone = torch.cat(masks).to(relative)
        register(model, self._name(groups), torch.stack([lasso, gone]))
        self._decay = groups.decay(lasso, gone)

    def _plan(self, graph: AxisGraph, scores: Mapping[str, Tensor]) -> Plan:
        if isinstance(self.target, Mapping):
            return select(
                graph,
                scores,
                macs=self.target.get("macs"),
                params=self.target.get("params"),
                min_keep=self.min_keep,
                round_to=self.round_to,
                inexact=self.inexact,
            )
        # an axis that is tied to one which stays whole stays whole
        held = {name for tied in graph.sizes_tied if not scores.keys() >= set(tied) for name in tied}
        free = {name: score for name, score in scores.items() if name not in held}
        if not free:
            raise NothingToShrinkError(
                f"the chosen axes ({', '.join(list(scores)[:4])}) must stay as large as others that were not chosen. Choose "
                "those too, or leave out axes."
            )
        floors = {name: min(self.min_keep, graph[name].size) for name in free}
        return plan_of_shares(graph, free, floors, dict.fromkeys(free, self.target))

    def _warn_if_short(self, model: nn.Module) -> None:
        scores = self.scores(model)
        kept = self._plan(self._graph(model), scores).masks(self._graph(model))
        left = torch.cat([torch.zeros(1), *(scores[name][~mask] for name, mask in kept.items())])
        if (most := float(left.max())) >= self.threshold:
            logger.warning(
                f"{type(self).__name__}: {int((left >= self.threshold).sum())} of the {len(left) - 1} groups that "
                f"target={self.target} removes have not vanished; the largest has {most:.3g} of its axis's mean norm, so the "
                "removal will change what the model computes. Raise strength, lower hold, or train longer."
            )


def _relative(groups: WeightGroups) -> Tensor:
    """[g]: the norm of every group over the mean norm of its axis."""
    norms = groups.norms(groups.read())
    tiny = torch.finfo(norms.dtype).tiny
    return torch.cat([norm / norm.mean().clamp_min(tiny) for norm in groups.by_side(norms)])


def _finite(scores: Tensor) -> Tensor:
    if not scores.isfinite().all():
        raise ModelError("the weights of the model are not finite; the training diverged. Lower the learning rate.")
    return scores


__all__ = ["GrowingRegularizationCallback"]
