"""What the methods share that act on groups of weights: everything that leaves the model with an index of an axis."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_compress.axes import Axis, AxisGraph
from hf_compress.errors import NothingToShrinkError

from .axis_callback import AxisCallback
from .trained_model import trained_model
from .training_buffer import unregister
from .weight_groups import Slices, WeightGroups


class GroupCallback(AxisCallback):
    """Base of the methods that act on groups of weights and keep a buffer of their own in the model while it trains.

    Attributes:
        groups_: the groups, while training.
        slices: which weights make up a group; see :class:`WeightGroups`.
        buffer_prefix: what the buffer's name begins with.
        without_buffer: for a warning: what happens where a checkpoint does not hold the buffer.
    """

    is_exclusive = True
    gamma_init = None
    groups_: WeightGroups | None = None
    slices: Slices = "all"
    buffer_prefix: ClassVar[str]
    without_buffer: ClassVar[str]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.groups_ is None:
            return
        model: nn.Module = trained_model(kwargs)
        self._finish(model, self.groups_)
        unregister(model, self._name(self.groups_))
        self.groups_ = None  # it holds the parameters

    # -- for subclasses -------------------------------------------------------------------------------------------

    def _buffer(self, model: nn.Module) -> tuple[str, Tensor]:
        groups = self._groups(model)
        return self._name(groups), groups.counts.new_empty(self._buffer_shape(groups))

    def _buffer_shape(self, groups: WeightGroups) -> tuple[int, ...]:
        raise NotImplementedError

    def _finish(self, model: nn.Module, groups: WeightGroups) -> None:
        """What is to be done at the end of training, while the buffer is still there."""

    def _start(self, args: TrainingArguments, model: nn.Module, state: TrainerState) -> Tensor | None:
        """Begin training: find the groups and claim their weights.

        Returns:
            The buffer, where the checkpoint of an interrupted training has filled it.
        """
        self._begin(args, model)
        self.groups_ = groups = self._groups(model)
        self._claim(model, state, [n for n, shape in zip(groups.names, groups.shapes, strict=True) if len(shape) > 1])
        return self._resumed(model, self._name(groups), state, self.without_buffer)

    def _name(self, groups: WeightGroups) -> str:
        # by content: two callbacks on different axes have different buffers, and a replaced callback finds its own
        return f"{self.buffer_prefix}_{groups.key}"

    def _chosen(self, model: nn.Module, graph: AxisGraph) -> list[Axis]:
        if not len(graph):
            raise NothingToShrinkError(f"{type(model).__name__} has no axis, so there are no groups of weights.")
        usable = [axis for axis in graph if axis.is_exact or self.inexact]
        if not usable:
            raise NothingToShrinkError(
                f"the axes of {type(model).__name__} are all inexact (for example {next(iter(graph)).name!r}). Pass "
                "inexact=True to act on them."
            )
        return self._matching(usable, "that can be used")

    def _groups(self, model: nn.Module) -> WeightGroups:
        if self.groups_ is not None and self.groups_.model() is model:
            return self.groups_
        graph = self._graph(model)
        return WeightGroups(model, graph, self._chosen(model, graph), self.slices)


__all__ = ["GroupCallback"]
