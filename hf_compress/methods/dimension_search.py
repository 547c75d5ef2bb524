"""Search for the intrinsic dimensions of a vision transformer while it trains.

Learnable scores multiply every searched axis at one place, a sparsity penalty drives them to exact zeros, and one
ranking over all layers decides what goes. After Xue, Yang, Qi & Xin, "Searching Intrinsic Dimensions of Vision
Transformers" (arXiv 2204.07722), of which only the abstract was available here: from it come the task (backbones of
classifiers and detectors) and the budgets (20 % and 40 %). The rest is a reconstruction along the closest documented
mechanism, ViT-Slim (Chavan et al. 2022, arXiv 2201.00814), with these differences: a proximal step gives exact zeros;
where the target is a share, only the lowest scores are penalised (the trimmed l1 norm of Bertsimas, Copenhaver &
Mazumder 2017, arXiv 1708.04527, and Yun et al. 2019, "Trimming the l1 Regularizer"), and may be bounded by a line to
zero (our own); scores are folded into the weights instead of being rounded to one; no layer falls below a minimum; and
scores see no weight decay.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from hf_compress.axes import Axis, AxisGraph, Member, find_axes
from hf_compress.axes.finding import Inputs
from hf_compress.errors import MethodError, ModelError, NothingToShrinkError
from hf_compress.surgery.plan import Plan

from .axis_callback import AxisCallback, check_number
from .dimension_kinds import KINDS, kind_of, searched_axes
from .dimension_plan import Lowest, plan_in_budget, plan_of_counts, plan_of_shares
from .dimension_scores import DimensionScores, check_fits, scores_in
from .network_slimming import unscale_gradients
from .penalties import Penalty, as_penalty
from .trained_model import trained_model

logger = logging.get_logger(__name__)

MIN_KEEP: Mapping[str, int] = {"residual": 16, "heads": 1, "qk": 8, "v": 8, "mlp": 16, "channels": 1}
_BUDGETS = ("macs", "params", "latency")

# What a finished search found in a model. By model, because Trainer may have replaced the callback that the user holds.
_RESULTS: WeakKeyDictionary[nn.Module, tuple[AxisGraph, dict[str, Tensor]]] = WeakKeyDictionary()


class DimensionSearchCallback(AxisCallback):
    """Learn which dimensions a model needs, in one training run.

    Every searched axis gets a vector of scores alpha, one per index, starting at 1. They are parameters of the model
    while it trains (so optimizer, checkpoints, DDP and FSDP2 treat them as such) and multiply the axis at one place:

    * ``"qk"``, the dimensions of queries and keys inside a head: the queries or the keys, whichever the model makes
      first, where they are made. The logits are then linear in alpha.
    * ``"v"`` (values inside a head), ``"heads"``, ``"mlp"`` (hidden units), ``"channels"``: the input of the layer that
      reads the axis.
    * ``"residual"``: the input of every layer that reads the stream, which is behind that layer's norm. LayerNorm mixes
      the stream's indices in its statistics, so only there is a factor the same as scaled weights. Removing indices
      afterwards changes those statistics: the axis is inexact and needs ``inexact=True`` and training afterwards.

    Indices are uniform in a layer: all its heads keep the same dimensions. Where one packed projection makes queries,
    keys and values (timm), ``"qk"`` stands for all three, and alpha multiplies queries and values; the values are taken
    to come last in the projection.

    After every optimizer step the proximal operator of the penalty is applied to alpha. When training ends, the
    scores are folded into the weights, which keeps the function, and leave the model; the saved model is an ordinary
    one. Remove and train on::

        search = DimensionSearchCallback(target=0.4)
        Trainer(model, ..., callbacks=[search]).train()
        shrink(model, search.plan(model))
        Trainer(model, ...).train()

    A checkpoint written during the search holds the scores beside weights without them: use it to resume, not as a
    model. A model on which no training ended (interrupted, or never begun) still carries the scores; :meth:`fold` ends
    the search.

    Choosing the numbers. A score that the loss does not defend falls by ``lr * lr_factor * strength`` per step, so it
    reaches zero only where the sum of that over the steps after the warm-up exceeds 1; logs show the share of zeros.
    With a share as target only the lowest scores are penalised, those that :meth:`plan` would remove at that moment;
    the others are free, so a high strength decides early and does no other harm. With ``hold`` the removal changes
    nothing at the end whatever the learning rate and the strength: the magnitudes of the lowest scores are bounded by a
    line that falls from 1 where the warm-up ends to 0 at ``hold``. Otherwise all scores are penalised and ``strength``
    decides how many vanish: Adam's own steps are at most about ``lr * lr_factor``, so with it a score is defended where
    the mean of its gradient, over its root mean square, exceeds ``strength``; try 0.05 to 0.5, and from 1 on everything
    falls.

    Args:
        strength: weight of the penalty, at least 0; or kind -> weight.
        target: what :meth:`plan` removes. A share such as 0.2: of the dimensions of each kind, ranked over all layers
            (axes that the architecture ties, as qk and v, count together). A mapping kind -> share. Or a budget for the
            whole model, as for :func:`hf_compress.select`: ``{"macs": 0.6}``, ``{"params": 0.6}``,
            ``{"latency": limit}``. None: what became zero.
        warmup: steps before the penalty begins; below 1, a share of all steps. Scores start equal, so that the first
            ones tell little.
        hold: share of all steps after which what ``target`` removes is zero; above the warm-up, at most 1. The steps after
            it train what is left. Needs a target in shares and the proximal update. None: the penalty alone decides when.
        penalty: a name, a mapping ``{"name": ..., parameters}`` or a Penalty. MCP and SCAD stop pulling at scores beyond
            ``a * strength``; scores start at 1.
        kinds: which kinds of axes to search: "qk", "v", "mlp", "heads", "residual", "channels" (all others, those of
            convolutional networks among them). None: qk, v and mlp, or with ``axes`` all.
        axes: glob pattern or patterns of axis names, to search only these.
        inexact: also search axes whose removal is not the same function as masking.
        min_keep: the fewest indices that an axis keeps; one number, or kind -> number. By default 1 head, 8 dimensions in
            a head, 16 hidden units, 16 of the residual stream, 1 channel.
        lr_factor: scores learn with this multiple of the learning rate, since they must travel the whole way to zero.
        update: ``"proximal"``, or ``"subgradient"``, which adds the penalty's slope to the gradient as ViT-Slim does and
            leaves small scores instead of zeros.
        threshold: scores of at most this magnitude count as vanished in logs, in :meth:`support` and without a target.
        example_inputs: as for :func:`hf_compress.find_axes`; by default built from the model's configuration.

    Raises:
        MethodError: when the Trainer is made or training starts, for an argument out of range, for kinds that the model
            does not have, or for an optimizer that decays the scores or does not know them.
        NothingToShrinkError: at the start of training, when no axis can be searched.
        BudgetError: at the start of training, when the target cannot be met.
    """

    is_exclusive = True
    grouping = "scale"
    gamma_init = None

    def __init__(
        self,
        strength: float | Mapping[str, float] = 1.0,
        target: float | Mapping[str, float] | None = None,
        warmup: float = 0.1,
        *,
        hold: float | None = None,
        penalty: str | Mapping[str, Any] | Penalty = "l1",
        kinds: str | Sequence[str] | None = None,
        axes: str | Sequence[str] | None = None,
        inexact: bool = False,
        min_keep: int | Mapping[str, int] | None = None,
        lr_factor: float = 10.0,
        update: Literal["proximal", "subgradient"] = "proximal",
        threshold: float = 0.0,
        example_inputs: Inputs = None,
    ) -> None:
        self.strength = strength
        self.target = target
        self.warmup = warmup
        self.hold = hold
        self.penalty = penalty
        self.kinds = kinds
        self.axes = axes
        self.inexact = inexact
        self.min_keep = min_keep
        self.lr_factor = lr_factor
        self.update = update
        self.threshold = threshold
        self.example_inputs = example_inputs

    # -- Trainer hooks ------------------------------------------------------------------------------------------

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._validate()
        try:
            self.attach(trained_model(kwargs))
        except NothingToShrinkError:
            pass  # on_train_begin reports it; a Trainer that only evaluates has no need of it

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = trained_model(kwargs)
        if getattr(args, "n_gpu", 1) > 1:
            raise MethodError(
                "scores are not supported by torch.nn.DataParallel (one process, several GPUs). Start with torchrun, "
                "one process for each GPU."
            )
        self._validate()
        scores = self.attach(model)
        super().on_train_begin(args, state, control, **kwargs)
        self._group = self._find_group(kwargs["optimizer"], scores)
        self._prepare(scores)
        if state.global_step > 0 and not scores.is_training:
            logger.warning(
                f"{type(self).__name__}: the checkpoint holds no scores for these axes, so they start again at 1. Resume "
                "with the callback arguments of the interrupted run."
            )
        scores.is_training.fill_(True)
        is_share = 0 < self.warmup < 1
        self._warmup_steps = round(self.warmup * state.max_steps if is_share else self.warmup)
        self._hold_step = None if self.hold is None else round(self.hold * state.max_steps)
        if self._hold_step is not None and self._hold_step <= self._warmup_steps:
            raise MethodError(
                f"hold={self.hold!r} is not possible: of {state.max_steps} steps it is step {self._hold_step}, and the warm-up "
                f"(warmup={self.warmup!r}) ends at step {self._warmup_steps}. Give a later hold or a shorter warm-up."
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.scales_ is None:
            return
        with torch.no_grad():
            self._before = self.scales_.read()
            if self.update == "subgradient" and state.global_step >= self._warmup_steps:
                unscale_gradients(kwargs["optimizer"])
                parts = [self.penalty_.subgradient(x, strength) for x, strength in self._by_kind(self._before)]
                slopes = torch.cat(parts)
                self.scales_.add_to_gradients(
                    slopes if self._lowest is None else slopes * self._lowest(self._before.abs())
                )

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.scales_ is None or getattr(kwargs["optimizer"], "step_was_skipped", False):
            return
        with torch.no_grad():
            alpha = self.scales_.read()
            if self.lr_factor != 1:  # any optimizer's step is proportional to the learning rate
                alpha = self._before + self.lr_factor * (alpha - self._before)
            if self.update == "proximal" and state.global_step >= self._warmup_steps:
                step = float(kwargs["optimizer"].param_groups[self._group]["lr"]) * self.lr_factor
                alpha = self._shrunk(alpha, step, self._bound(state.global_step + 1))
            self.scales_.write(alpha)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the share of vanished scores to the training logs: overall and per kind, and per axis to the history."""
        super().on_log(args, state, control, **kwargs)
        logs: dict[str, float] = kwargs["logs"]
        scores = scores_in(trained_model(kwargs))
        if self.scales_ is None or scores is None or not ("loss" in logs or "train_loss" in logs):
            return
        shares = {f"sparsity_{kind}": 0.0 for kind in self._sizes}
        for name in scores.names:
            kind = scores.kinds[name]
            weight = scores.graph[name].size / self._sizes[kind]
            shares[f"sparsity_{kind}"] += weight * self.axis_metrics_[f"sparsity/{name}"]
        logs.update(shares)
        state.log_history[-1].update(shares)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # load_best_model_at_end has put the best checkpoint's scores back by now
        if self.scales_ is not None:
            self._warn_if_short(remedy="Give hold=0.9, raise strength or lr_factor, or train longer.")
            self.fold(trained_model(kwargs))
            super().on_train_end(args, state, control, **kwargs)

    # -- scores in and out of the model -----------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> DimensionScores:
        """Give a model its scores, all 1. The Trainer's creation does it; do it before making an optimizer by hand.

        Raises:
            MethodError: when the model carries scores for other axes, or lacks kinds.
            NothingToShrinkError: when no axis can be searched.
        """
        present = scores_in(model)
        graph = find_axes(model, self.example_inputs) if present is None else present.graph
        self.axes_ = graph
        chosen = searched_axes(graph, type(model).__name__, _listed(self.kinds), self.axes, self.inexact)
        if present is None:
            present = DimensionScores(model, graph, chosen)
            present.attach(model)
            _RESULTS.pop(model, None)
        elif present.names != [axis.name for axis in chosen]:
            raise MethodError(
                "the model already carries scores for other axes, from another DimensionSearchCallback or an "
                "interrupted search. Use one callback with all kinds, or end the search with its fold(model)."
            )
        return present

    def fold(self, model: nn.Module) -> None:
        """End the search: multiply the scores into the weights and take them out of the model.

        The function stays the same; an index with score 0 has become exactly removable. The end of training does it.
        """
        scores = scores_in(model)
        if scores is None:
            return
        _RESULTS[model] = scores.graph, self._magnitudes_by_axis(model)
        scores.fold(model)

    # -- results --------------------------------------------------------------------------------------------------

    def scores(self, model: nn.Module) -> dict[str, Tensor]:
        """The magnitude of every score, during the search or after it.

        Args:
            model: the model, not wrapped, before it is cut.

        Returns:
            Axis name -> float32 [axis size] on the CPU, at least 0.

        Raises:
            ModelError: when the model was not searched, or was cut since, or the scores are not finite.
        """
        return self._result(model)[1]

    def support(self, model: nn.Module) -> dict[str, Tensor]:
        """Which indices have not vanished; of every axis at least ``min_keep``, the highest.

        Returns:
            Axis name -> bool [axis size] on the CPU.

        Raises:
            ModelError: as :meth:`scores`.
        """
        graph, scores = self._result(model)
        support = {}
        for name, score in scores.items():
            support[name] = score > self.threshold
            best = torch.argsort(score, descending=True, stable=True)
            support[name][best[: self._floor(name, graph)]] = True
        return support

    def plan(self, model: nn.Module, *, measure: Callable[[Plan], float] | None = None) -> Plan:
        """What ``target`` asks for, as a plan for :func:`hf_compress.shrink`.

        A share is met exactly: of n dimensions ``round((1 - share) * n)`` stay. Of equal scores the later index goes
        first. For a budget, scores are divided by the mean of their kind, so that kinds compete on equal terms.

        Args:
            model: as for :meth:`scores`.
            measure: for a latency budget: gives the milliseconds of a plan.

        Raises:
            ModelError: as :meth:`scores`.
            BudgetError: when the target cannot be met; says how far it can.
        """
        return self._plan(*self._result(model), measure=measure)

    def first_scores(self, model: nn.Module) -> dict[str, Tensor]:
        """All 1; the target is checked on a copy of the model.

        Raises:
            MethodError, NothingToShrinkError, BudgetError: as the start of training.
        """
        self._validate()
        copied = copy.deepcopy(model)
        self.attach(copied)
        self.plan(copied)
        return self.scores(copied)

    def kept(self, model: nn.Module) -> dict[str, Tensor]:
        """What :meth:`plan` keeps, as masks."""
        return self.plan(model).masks(self._result(model)[0])

    # -- inside ---------------------------------------------------------------------------------------------------

    def _validate(self) -> None:
        check_number("threshold", self.threshold, minimum=0)
        check_number("warmup", self.warmup, minimum=0)
        check_number("lr_factor", self.lr_factor, minimum=0, is_open=True)
        for name, value in _entries("strength", self.strength):
            check_number(name, value, minimum=0)
        for name, value in _entries("min_keep", 1 if self.min_keep is None else self.min_keep):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise MethodError(f"{name}={value!r} is not possible: it must be an integer of at least 1.")
        for kind in _listed(self.kinds):
            if kind not in KINDS:
                raise MethodError(f"there is no kind {kind!r}; choose among {', '.join(KINDS)}.")
        if self.update not in ("proximal", "subgradient"):
            raise MethodError(f"update={self.update!r} is not possible; choose 'proximal' or 'subgradient'.")
        if self.hold is not None:
            check_number("hold", self.hold, minimum=0, is_open=True)
            if self.hold > 1:
                raise MethodError(f"hold={self.hold!r} is not possible: it is a share of all steps, at most 1.")
            if self.hold <= self.warmup < 1:  # a warm-up in steps can only be compared once training begins
                raise MethodError(
                    f"hold={self.hold!r} is not possible with a warm-up of {self.warmup!r} of all steps: scores begin to "
                    "move where that ends. Give a later hold or a shorter warm-up."
                )
            if self.target is None or self._is_budget() or self.update != "proximal":
                raise MethodError(
                    "hold needs a target in shares, such as target=0.4, and update='proximal': with anything else it is not "
                    "known before the end of the search which scores are to vanish. Leave hold out."
                )
        self.penalty_ = as_penalty(self.penalty)
        if self.update == "proximal":
            self.penalty_.proximal(torch.zeros(1), 1.0, 1.0)  # raises where there is no closed form
        if self._is_budget():
            assert isinstance(self.target, Mapping)
            if other := [key for key in self.target if key not in _BUDGETS]:
                raise MethodError(
                    f"target={dict(self.target)!r} mixes {other[0]!r} with a budget of the whole model. Give shares of kinds, "
                    "or macs, params and latency."
                )
            for key, value in self.target.items():
                check_number(f"target[{key!r}]", value, minimum=0, is_open=True)
        elif self.target is not None:
            for name, share in _entries("target", self.target):
                check_number(name, share, minimum=0)
                if share >= 1:
                    raise MethodError(
                        f"{name}={share!r} is not possible: it is the share of dimensions removed, below 1. For a budget of "
                        "the whole model give {'macs': ...} or {'params': ...}."
                    )

    def _is_budget(self) -> bool:
        return isinstance(self.target, Mapping) and any(key in _BUDGETS for key in self.target)

    def _graph(self, model: nn.Module) -> AxisGraph:
        scores = scores_in(model)
        return self._result(model)[0] if scores is None else scores.graph

    def _result(self, model: nn.Module) -> tuple[AxisGraph, dict[str, Tensor]]:
        present = scores_in(model)
        if present is not None:
            graph, scores = present.graph, self._magnitudes_by_axis(model)
        elif model in _RESULTS:
            graph, scores = _RESULTS[model]
            check_fits(graph, model)
        else:
            raise ModelError(f"this {type(model).__name__} was not searched; train it with this callback first.")
        if not all(score.isfinite().all() for score in scores.values()):
            raise ModelError("the scores are not finite; the training diverged. Lower the learning rate or lr_factor.")
        return graph, {name: score.clone() for name, score in scores.items()}

    def _magnitudes_by_axis(self, model: nn.Module) -> dict[str, Tensor]:
        scales = self._scales(model)
        return scales.by_axis(scales.read().abs().float().cpu())

    def _chosen(self, model: nn.Module, graph: AxisGraph) -> list[Axis]:
        """The searched axes, with the scores in the role of their scales."""
        scores = scores_in(model)
        assert scores is not None
        axes = []
        for name in scores.names:
            positions = torch.arange(graph[name].size)[:, None]
            axes.append(dataclasses.replace(graph[name], scales=(Member(scores.parameter_name(name), 0, positions),)))
        return axes

    def _vanished(self, model: nn.Module) -> Tensor:
        assert self.scales_ is not None
        return self.scales_.sum((self.scales_.read().abs() > self.threshold).float()) == 0

    def _prepare(self, scores: DimensionScores) -> None:
        """Get ready to penalise attached scores; :attr:`scales_` are theirs.

        Raises:
            BudgetError: when the target cannot be met.
        """
        assert self.scales_ is not None
        graph, names = scores.graph, scores.names
        floors = {name: self._floor(name, graph) for name in names}
        self._lowest = None
        if self._is_budget():
            if "latency" not in self.target:  # type: ignore[operator]
                self._plan(graph, {name: torch.ones(graph[name].size) for name in names})  # raises out of reach
        elif self.target is not None:
            self._lowest = Lowest(graph, names, floors, self._shares(scores.kinds), self.scales_.device)
        self._sizes = Counter[str]()
        for name in names:  # in the order of the kinds
            self._sizes[scores.kinds[name]] += graph[name].size

    def _bound(self, steps: int) -> float:
        """The largest magnitude of a score that is to vanish, after so many steps."""
        if self._hold_step is None:
            return math.inf
        return max(0.0, (self._hold_step - steps) / (self._hold_step - self._warmup_steps))

    def _shrunk(self, alpha: Tensor, step: float, bound: float = math.inf) -> Tensor:
        """[n] scores after the penalty's proximal operator, which acts on those that are to vanish.

        Args:
            alpha: [n].
            step: the step size.
            bound: of the magnitudes of those that are to vanish; has a meaning where the target says which.
        """
        parts = [self.penalty_.proximal(x, step, strength) for x, strength in self._by_kind(alpha)]
        shrunk = torch.cat(parts)
        if self._lowest is None:
            return shrunk
        return torch.where(self._lowest(alpha.abs()), shrunk.clamp(-bound, bound), alpha)

    def _by_kind(self, alpha: Tensor) -> Iterator[tuple[Tensor, float]]:
        """For every kind its part of [n] scores and the strength."""
        for part, kind in zip(alpha.split(list(self._sizes.values())), self._sizes, strict=True):
            yield part, _of_kind(self.strength, kind, 0.0)

    def _warn_if_short(self, callback: str = "DimensionSearchCallback", *, remedy: str) -> None:
        if self._lowest is None or self.update != "proximal":
            return
        assert self.scales_ is not None
        alpha = self.scales_.read().abs()
        chosen = alpha[self._lowest(alpha)]
        if bool((chosen > self.threshold).any()):
            logger.warning(
                f"{callback}: of the {len(chosen)} scores that target={self.target} removes, "
                f"{int((chosen <= self.threshold).sum())} became zero; the largest is {float(chosen.max()):.3g}, so the removal "
                f"will change what the model computes. {remedy}"
            )

    def _find_group(self, optimizer: Any, scores: DimensionScores) -> int:
        """The place of the optimizer's group that holds the scores."""
        found = {id(parameter): i for i, group in enumerate(optimizer.param_groups) for parameter in group["params"]}
        places = {found.get(id(parameter)) for parameter in scores.norm}
        place = places.pop()
        if place is None or places:
            raise MethodError(
                "the optimizer does not train the scores in one group. Make a new Trainer for every search; when you make "
                "the optimizer yourself, call callback.attach(model) before."
            )
        decay = optimizer.param_groups[place].get("weight_decay", 0)
        if decay:
            raise MethodError(
                f"the optimizer decays the scores (weight_decay={decay}). Put {scores.parameter_name(scores.names[0])!r} and its "
                "neighbours into a group with weight_decay=0."
            )
        return place

    def _floor(self, name: str, graph: AxisGraph) -> int:
        kind = kind_of(graph[name], graph)
        return min(_of_kind(self.min_keep, kind, None) or MIN_KEEP[kind], graph[name].size)

    def _plan(
        self, graph: AxisGraph, scores: Mapping[str, Tensor], measure: Callable[[Plan], float] | None = None
    ) -> Plan:
        floors = {name: self._floor(name, graph) for name in scores}
        if self._is_budget():
            budgets: dict[str, Any] = dict(self.target)  # type: ignore[arg-type]
            if "latency" in budgets and measure is not None:
                budgets["latency"] = (measure, budgets["latency"])
            return plan_in_budget(graph, scores, floors, budgets)
        if self.target is None:
            return plan_of_counts(
                graph, scores, floors, {n: int((s > self.threshold).sum()) for n, s in scores.items()}
            )
        kinds = {name: kind_of(graph[name], graph) for name in scores}
        return plan_of_shares(graph, scores, floors, self._shares(kinds))

    def _shares(self, kinds: Mapping[str, str]) -> dict[str, float]:
        return {name: _of_kind(self.target, kind, 0.0) for name, kind in kinds.items()}


def _listed(kinds: str | Sequence[str] | None) -> tuple[str, ...]:
    return () if kinds is None else (kinds,) if isinstance(kinds, str) else tuple(kinds)


def _of_kind(value: Any, kind: str, missing: Any) -> Any:
    """An argument that is one number, or kind -> number."""
    return value.get(kind, missing) if isinstance(value, Mapping) else value


def _entries(name: str, value: Any) -> list[tuple[str, Any]]:
    """The numbers of such an argument, each with the name for messages."""
    if not isinstance(value, Mapping):
        return [(name, value)]
    if unknown := [kind for kind in value if kind not in KINDS]:
        raise MethodError(f"{name} names {unknown[0]!r}, which is no kind; choose among {', '.join(KINDS)}.")
    return [(f"{name}[{kind!r}]", number) for kind, number in value.items()]
