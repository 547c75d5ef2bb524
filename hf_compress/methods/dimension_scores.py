"""Learnable scores on axes, multiplied into the weights that read them while a model runs.

For every searched axis there is one vector alpha with one number per index. It acts on weights, not on activations:
before a layer runs, its weight W is replaced by ``W * alpha`` along the axis's dimension, and afterwards the
parameter is back. That is the same function as multiplying the layer's input, it costs as much as the weight is large
(and not the batch), and folding changes nothing: the folded weight is the tensor that the layer computed with.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_compress.axes import Axis, AxisGraph
from hf_compress.errors import MethodError, ModelError

from .checkpoint_names import restore_names, use_own_names
from .dimension_kinds import Place, kind_of, places_of
from .scales import _as, _local, _whole

#: the submodule of the model that holds the scores while training
NAME = "hf_compress_dimension_scores"


class DimensionScores(nn.Module):
    """The scores of a model's searched axes; a submodule of the model while it trains.

    Args:
        model: that the axes belong to.
        graph: its axes, found before any scores were attached.
        axes: the searched ones.

    Attributes:
        norm: the parameters, one per axis, each [axis size]. Trainer exempts parameters from weight decay by name, and
            ``.norm.`` is one of its patterns.
        names: the axes, in the order of the parameters.
        kinds: axis -> kind.
        is_training: buffer, whether training has begun with these scores; a checkpoint that lacks them leaves it false.
        graph: as given.

    Raises:
        MethodError: when an axis has no place for scores.
    """

    is_training: Tensor

    def __init__(self, model: nn.Module, graph: AxisGraph, axes: Iterable[Axis]) -> None:
        super().__init__()
        self.graph = graph
        self.names: list[str] = []
        self.kinds: dict[str, str] = {}
        self.norm = nn.ParameterList()
        self.register_buffer("is_training", torch.zeros((), dtype=torch.bool))
        parameters = dict(model.named_parameters())
        self._edits: dict[tuple[str, str], list[_Factor]] = {}  # (running module, parameter)
        for axis in axes:
            places = [place for place in places_of(axis, graph) if place.parameter in parameters]
            if not places:
                raise MethodError(
                    f"axis {axis.name!r} is neither made nor read by a layer with a weight, so no score can multiply it. "
                    "Leave it out with axes= or kinds=."
                )
            weight = parameters[places[0].parameter]
            dtype = torch.promote_types(weight.dtype, torch.float32)  # steps of lr * strength vanish in half precision
            for place in places:
                dense = graph.parameter_dims[place.parameter]
                factor = _Factor(len(self.norm), place.dim, len(dense), *_placement(place, dense[place.dim]))
                self._edits.setdefault((place.module, place.parameter), []).append(factor)
            self.names.append(axis.name)
            self.kinds[axis.name] = kind_of(axis, graph)
            self.norm.append(nn.Parameter(torch.ones(axis.size, dtype=dtype, device=weight.device)))

    def parameter_name(self, axis: str) -> str:
        """The name of an axis's scores in the model."""
        return f"{NAME}.norm.{self.names.index(axis)}"

    def attach(self, model: nn.Module) -> None:
        """Become a submodule of the model and act on it from now on."""
        hosts: dict[str, list[tuple[nn.Module, str, list[_Factor]]]] = {}
        holders: dict[int, list[tuple[str, nn.Module, str]]] = {}
        for path, module in model.named_modules():
            for attribute, parameter in module._parameters.items():
                holders.setdefault(id(parameter), []).append((path, module, attribute))
        parameters = dict(model.named_parameters())
        for (host, name), factors in self._edits.items():
            inside = f"{host}." if host else ""
            for path, holder, attribute in holders[id(parameters[name])]:
                # a tied weight has several holders; this module runs with those that are in it
                if path == host or path.startswith(inside):
                    hosts.setdefault(host, []).append((holder, attribute, factors))
        self._handles = []
        for path, edits in hosts.items():
            gate = _Gate(self, edits)
            module = model.get_submodule(path)
            self._handles.append(module.register_forward_pre_hook(gate.enter))
            # always: an exception (also the one by which checkpointing ends a recomputation) must not leave W * alpha
            self._handles.append(module.register_forward_hook(gate.leave, always_call=True))
        self._names = use_own_names(model)  # checkpoints of a search hold the scores and serve to resume alone
        setattr(model, NAME, self)

    def fold(self, model: nn.Module) -> None:
        """Multiply the scores into the parameters and leave the model; its function stays the same, to rounding."""
        scores = [_whole(parameter.detach()) for parameter in self.norm]
        parameters = dict(model.named_parameters())
        done = set()
        with torch.no_grad():
            for (_, name), factors in self._edits.items():
                parameter = parameters[name]
                if id(parameter) not in done:  # several modules may run with one parameter
                    done.add(id(parameter))
                    value = _multiplied(_whole(parameter.detach()), factors, scores)
                    _local(parameter.detach()).copy_(_as(value, parameter))
        self.detach_from(model)

    def detach_from(self, model: nn.Module) -> None:
        """Leave the model; its function is then the one without scores."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        restore_names(model, self._names)
        delattr(model, NAME)


def scores_in(model: nn.Module) -> DimensionScores | None:
    """The scores attached to a model."""
    return model._modules.get(NAME)  # type: ignore[return-value]


def check_fits(graph: AxisGraph, model: nn.Module) -> None:
    """See that a model still has the shapes that the axes were found with.

    Raises:
        ModelError: when it was cut, or is another one.
    """
    for name, parameter in model.named_parameters():
        expected = graph.parameter_dims.get(name)
        if not name.startswith(NAME + ".") and expected != tuple(parameter.shape):
            raise ModelError(
                f"the scores do not belong to this {type(model).__name__}: {name!r} has shape {tuple(parameter.shape)}, "
                f"they were learned with {expected}. Ask before the model is cut."
            )


class _Factor(NamedTuple):
    """How the scores of one axis multiply one dimension of one parameter.

    ``order`` permutes ``[each score k times, one 1]`` to the dimension; None where it is the scores as they are.
    """

    score: int
    dim: int
    ndim: int
    repeats: int
    order: Tensor | None


def _placement(place: Place, size: int) -> tuple[int, Tensor | None]:
    count, repeats = place.positions.shape
    flat = place.positions.flatten()
    if repeats == 1 and count == size and torch.equal(flat, torch.arange(size)):
        return 1, None
    order = torch.full((size,), count * repeats)  # positions of other axes: the appended 1
    order[flat] = torch.arange(count * repeats)
    return repeats, order


def _multiplied(weight: Tensor, factors: list[_Factor], scores: list[Tensor]) -> Tensor:
    for factor in factors:
        alpha = scores[factor.score].to(weight.device, weight.dtype)
        if factor.order is not None:
            # expand and a permutation, not a repeated index: its backward pass adds in a fixed order on every device
            spread = alpha[:, None].expand(-1, factor.repeats).flatten()
            spread = torch.cat([spread, spread.new_ones(1)])
            alpha = spread.index_select(0, factor.order.to(spread.device))
        weight = weight * alpha.view(-1, *(1,) * (factor.ndim - factor.dim - 1))
    return weight


class _Gate:
    """Replaces the parameters that a module runs with, for the duration of its forward pass.

    An attribute in the instance's dictionary hides the parameter of the same name: what optimizer, state dict and
    distributed wrappers see never changes. Hooks are bound methods of plain objects, so a deep copy of the model has
    hooks of its own.
    """

    def __init__(self, scores: DimensionScores, edits: list[tuple[nn.Module, str, list[_Factor]]]) -> None:
        self.scores = scores
        self.edits = edits

    def enter(self, module: nn.Module, inputs: Any) -> None:
        scores = list(self.scores.norm)
        for holder, attribute, factors in self.edits:
            # from the table, where FSDP2 puts the gathered parameter
            weight: Any = holder._parameters[attribute]
            vars(holder)[attribute] = _multiplied(weight, factors, scores)

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        for holder, attribute, _ in self.edits:
            vars(holder).pop(attribute, None)
