"""What the methods that act on the scales of axes have in common.

Such a method is a ``TrainerCallback``: it finds the axes once, acts on their scales at one hook of the optimizer step,
logs how many indices have vanished, and gives scores at the end.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from hf_compress.axes import Axis, AxisGraph, find_axes
from hf_compress.axes.finding import Inputs
from hf_compress.errors import MethodError, ModelError, NothingToShrinkError
from hf_compress.surgery.plan import Plan

from .penalties import Penalty
from .scales import Scales
from .trained_model import trained_model
from .training_buffer import filled, reserve

logger = logging.get_logger(__name__)

Grouping = Literal["scale", "axis"]

# With restore_callback_states_from_checkpoint=True, Trainer replaces a callback by a new object between on_init_end and
# on_train_begin; the new object finds here what the old one found.
_GRAPHS: WeakKeyDictionary[nn.Module, AxisGraph] = WeakKeyDictionary()
# Which callbacks act on which scales in the current training of a model; see AxisCallback._claim.
_CLAIMS: WeakKeyDictionary[nn.Module, tuple[ref[TrainerState], list[tuple[str, bool, frozenset[str]]]]] = (
    WeakKeyDictionary()
)


class AxisCallback(TrainerCallback, ExportableState):
    """Base of the methods that act on scales. A subclass has the constructor arguments named here.

    Attributes:
        axes: glob pattern or patterns of axis names; None for all.
        inexact: whether axes are included whose removal is not the same function as masking.
        grouping: ``"scale"``: each scale on its own; ``"axis"``: the scales of an index together.
        threshold: an index counts as vanished, in the logged sparsity, when all its scales are smaller.
        gamma_init: value given to all scales before training starts; None leaves them.
        example_inputs: as for :func:`hf_compress.find_axes`. Not saved in checkpoints.
        axes_: the AxisGraph, from the creation of the Trainer on.
        axis_metrics_: what was last logged for single axes.
    """

    axes: str | Sequence[str] | None
    inexact: bool
    grouping: Grouping
    threshold: float
    gamma_init: float | None
    example_inputs: Inputs
    axes_: AxisGraph | None = None
    scales_: Scales | None = None
    axis_metrics_: dict[str, float]
    #: whether no other method may act on the same scales
    is_exclusive = False

    # -- Trainer hooks ------------------------------------------------------------------------------------------

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model: nn.Module = trained_model(kwargs)
        self._validate()
        self.axes_ = _GRAPHS[model] = find_axes(model, self.example_inputs)
        try:
            buffer = self._buffer(model)
        except NothingToShrinkError:
            return  # on_train_begin reports it; a Trainer that only evaluates has no need of it
        if buffer is not None:
            reserve(model, *buffer)  # here, so that resuming fills it from the checkpoint

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = trained_model(kwargs)
        self._begin(args, model)
        self.scales_ = self._scales(model)
        self._claim(model, state, self.scales_.names)
        if self.gamma_init is not None and state.global_step == 0:
            with torch.no_grad():
                self.scales_.write(torch.full_like(self.scales_.read(), self.gamma_init))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the sparsity to the training logs: overall to ``logs``, per axis to ``state.log_history``."""
        model: nn.Module = trained_model(kwargs)
        logs: dict[str, float] = kwargs["logs"]
        if self.scales_ is None or not ("loss" in logs or "train_loss" in logs):
            return
        self._log_sparsity(logs, state, self.scales_.by_axis(self._vanished(model).float()))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.scales_ = None  # it holds the parameters

    # -- results --------------------------------------------------------------------------------------------------

    def scores(self, model: nn.Module) -> dict[str, Tensor]:
        """How much every index matters: the mean of the absolute values of its scales.

        The mean, not the sum, so that an axis with many scales ranks beside one with a single scale.

        Args:
            model: the trained model, not wrapped.

        Returns:
            Axis name -> float32 [axis size] on the CPU, at least 0; axes without scales are left out.

        Raises:
            NothingToShrinkError: when no axis has a scale.
            ModelError: when the scales are not finite.
        """
        scales = self._scales(model)
        found = scales.mean(self._magnitudes(model, scales)).float().cpu()
        if not found.isfinite().all():
            raise ModelError("the scales of the model are not finite; the training diverged. Lower the learning rate.")
        return scales.by_axis(found)

    def first_scores(self, model: nn.Module) -> dict[str, Tensor]:
        """The scores before any training, with the complaints that training would begin with. The model stays as it is.

        Raises:
            HfCompressError: when the method cannot act on this model, or cannot reach its own target.
        """
        self._validate()
        return self.scores(model)

    def kept(self, model: nn.Module) -> dict[str, Tensor] | None:
        """What the method itself, after training, says should stay: axis name -> bool [axis size] on the CPU.

        None for a method that only ranks, and leaves the choice to a budget.
        """
        return None

    def state(self) -> dict[str, Any]:
        """The constructor's arguments as JSON data; Trainer makes a new callback from them when it resumes."""
        arguments = {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}
        arguments.pop("example_inputs")
        for name, value in arguments.items():
            if isinstance(value, Penalty):
                arguments[name] = value.to_json()
            elif isinstance(value, Sequence) and not isinstance(value, str):
                arguments[name] = list(value)
        return {"args": arguments, "attributes": {}}

    # -- for subclasses -------------------------------------------------------------------------------------------

    def _begin(self, args: TrainingArguments, model: nn.Module) -> None:
        """What every method sees to before its first step."""
        self._validate()
        if getattr(args, "deepspeed", None):
            raise MethodError(f"{type(self).__name__} cannot reach parameters under DeepSpeed; use DDP or FSDP2.")
        check_finite(model)
        self.axis_metrics_ = {}

    def _validate(self) -> None:
        """Check the constructor's arguments."""
        if self.grouping not in ("scale", "axis"):
            raise MethodError(f"grouping={self.grouping!r} is not possible; choose 'scale' or 'axis'.")
        check_number("threshold", self.threshold, minimum=0)
        if self.gamma_init is not None:
            check_number("gamma_init", self.gamma_init, minimum=0)

    def _buffer(self, model: nn.Module) -> tuple[str, Tensor] | None:
        """Name of the buffer that the method keeps in the model while it trains, and a tensor of its shape; None without.

        Raises:
            NothingToShrinkError: when the method finds nothing in this model to act on.
        """
        return None

    def _magnitudes(self, model: nn.Module, scales: Scales) -> Tensor:
        """[n]: the absolute value of every scale, on which scores rest."""
        return scales.read().abs()

    def _vanished(self, model: nn.Module) -> Tensor:
        """bool [g]: the indices that count as vanished in the logs."""
        assert self.scales_ is not None
        return self.scales_.sum((self.scales_.read().abs() >= self.threshold).float()) == 0

    def _graph(self, model: nn.Module) -> AxisGraph:
        """The axes of a model; found anew when it changed since."""
        for graph in (self.axes_, _GRAPHS.get(model)):
            if graph is not None and _fits(graph, model):
                self.axes_ = graph
                return graph
        self.axes_ = _GRAPHS[model] = find_axes(model, self.example_inputs)
        return self.axes_

    def _scales(self, model: nn.Module) -> Scales:
        return Scales(model, self._chosen(model, self._graph(model)))

    def _chosen(self, model: nn.Module, graph: AxisGraph) -> list[Axis]:
        scaled = [axis for axis in graph if axis.scales]
        if not scaled:
            raise NothingToShrinkError(
                f"no axis of {type(model).__name__} has a scale (a BatchNorm weight or a layer scale), so "
                f"{type(self).__name__} has nothing to act on. Use magnitude scores: prune(model, macs=...)."
            )
        usable = [axis for axis in scaled if axis.is_exact or self.inexact]
        if not usable:
            raise NothingToShrinkError(
                f"the axes of {type(model).__name__} that have a scale are all inexact (for example "
                f"{scaled[0].name!r}: {', '.join(scaled[0].reasons)}). Pass inexact=True to act on them."
            )
        return self._matching(usable, "that has a scale")

    def _matching(self, usable: list[Axis], kind: str) -> list[Axis]:
        """Those of the axes whose names match :attr:`axes`; ``kind`` says in an error which axes there were."""
        if self.axes is None:
            return usable
        patterns = [self.axes] if isinstance(self.axes, str) else list(self.axes)
        chosen = [axis for axis in usable if any(fnmatch.fnmatchcase(axis.name, pattern) for pattern in patterns)]
        if not chosen:
            names = ", ".join(axis.name for axis in usable[:6])
            raise NothingToShrinkError(f"axes={self.axes!r} matches no axis {kind}; the first of these are: {names}.")
        return chosen

    def _log_sparsity(
        self,
        logs: dict[str, float],
        state: TrainerState,
        vanished: dict[str, Tensor],
        extra: dict[str, Tensor] | None = None,
    ) -> None:
        """Log shares of vanished indices.

        Args:
            vanished: axis name -> [axis size], 1 where an index has vanished, else 0.
            extra: further numbers to log under their names.
        """
        shares = torch.stack([*(part.mean() for part in vanished.values())])
        totals = {"sparsity": torch.cat([*vanished.values()]).mean(), **(extra or {})}
        # the one synchronisation with the device
        values = torch.cat([shares, torch.stack([*totals.values()])]).tolist()
        self.axis_metrics_ = {f"sparsity/{name}": value for name, value in zip(vanished, values, strict=False)}
        overall = dict(zip(totals, values[len(vanished) :], strict=True))
        logs.update(overall)
        state.log_history[-1].update({**overall, **self.axis_metrics_})

    def _resumed(self, model: nn.Module, name: str, state: TrainerState, without: str) -> Tensor | None:
        """The method's buffer, where the checkpoint of an interrupted training has filled it.

        Args:
            name: of the buffer.
            without: for the warning: what happens where a checkpoint does not hold it.
        """
        found = filled(model, name)
        if found is None and state.global_step > 0:
            logger.warning(
                f"{type(self).__name__}: the checkpoint holds no auxiliary variable for these axes, so {without}. Resume "
                "with a new Trainer, made with the same callback arguments."
            )
        return found

    def _claim(self, model: nn.Module, state: TrainerState, parameters: Iterable[str]) -> None:
        """Refuse a second method on the same parameters where one of the two tolerates no other."""
        # The training's state object tells the claims of this training from those that an aborted one left behind.
        training, claims = _CLAIMS.get(model, (None, []))
        if training is None or training() is not state:
            claims = []
            _CLAIMS[model] = (ref(state), claims)
        names = frozenset(parameters)
        for other, is_exclusive, taken in claims:
            if (is_exclusive or self.is_exclusive) and names & taken:
                raise MethodError(
                    f"{other} and {type(self).__name__} would both act on {min(names & taken)!r} and cannot be combined "
                    "there. Drop one, or give them different axes=."
                )
        claims.append((type(self).__name__, self.is_exclusive, names))


def check_number(name: str, value: Any, minimum: float, is_open: bool = False) -> None:
    """Refuse an argument that is no finite number of at least (or, when open, above) a minimum.

    Raises:
        MethodError: naming the argument.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
    if not is_number or value < minimum or (is_open and value == minimum):
        raise MethodError(
            f"{name}={value!r} is not possible: it must be a number {'above' if is_open else 'of at least'} {minimum}."
        )


def plan_of_support(support: Mapping[str, Tensor], magnitude: Mapping[str, Tensor], graph: AxisGraph) -> Plan:
    """The plan that keeps a support.

    Axes that the architecture forces to keep equally many indices keep as many as the largest support among them.

    Args:
        support: axis name -> bool [axis size], true where an index is kept; at least one is.
        magnitude: axis name -> [axis size], what such axes are filled up by.
        graph: the axes of the model.
    """
    support = {name: mask.clone() for name, mask in support.items()}
    for tied in graph.sizes_tied:
        if not any(name in support for name in tied):
            continue
        count = max(int(support[name].sum()) if name in support else graph[name].size for name in tied)
        for name in tied:
            if name in support:
                # the support first, then by magnitude
                ranking = magnitude[name] + support[name] * (magnitude[name].max() + 1)
                support[name][ranking.topk(count).indices] = True
    keep = {name: tuple(mask.nonzero().flatten().tolist()) for name, mask in support.items() if not mask.all()}
    return Plan(keep, graph)


def _fits(graph: AxisGraph, model: nn.Module) -> bool:
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return all(graph.parameter_dims.get(name) == shape for name, shape in shapes.items())


def check_finite(model: nn.Module) -> None:
    """Refuse a model whose training cannot go well.

    Raises:
        ModelError: naming the parameter that holds NaN or infinity.
    """
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if not local.isfinite().all():
            raise ModelError(
                f"parameter {name!r} holds NaN or infinite values before training begins. Load or initialise the model "
                "again."
            )
