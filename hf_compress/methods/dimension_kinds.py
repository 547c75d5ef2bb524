"""What kind of dimension an axis is, which axes a search takes, and where a score multiplies them.

All of it is read off the axis graph, which has seen the forward pass; no model or module is known by name.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_compress.axes import Axis, AxisGraph, Contraction, Member
from hf_compress.errors import MethodError, NothingToShrinkError

KINDS = ("residual", "heads", "qk", "v", "mlp", "channels")
ATTENTION_KINDS = ("heads", "qk", "v")
DEFAULT_KINDS = ("qk", "v", "mlp")

_ROLE = re.compile(r":(heads|head_dim|value_dim)\d*$")
_KIND_OF_ROLE = {"heads": "heads", "head_dim": "qk", "value_dim": "v"}


class Place(NamedTuple):
    """One parameter dimension that the scores of an axis multiply, and the module that runs with it.

    ``positions`` is int64 [axis size, k], as in :class:`hf_compress.axes.Member`.
    """

    module: str
    parameter: str
    dim: int
    positions: Tensor


def readers_of(axis: Axis, graph: AxisGraph) -> list[Contraction]:
    """The layers that sum over an axis, each weight once."""
    found = {(c.weight, c.dim, c.module): c for c in graph.contractions if axis.name in c.axis_names}
    return list(found.values())


def kind_of(axis: Axis, graph: AxisGraph) -> str:
    """What an axis is in the architecture, from what the forward pass did with it and not from module names.

    Returns:
        ``"heads"``: attention heads. ``"qk"``: the dimension of queries and keys inside a head, and of the values too
        where one packed projection makes all three. ``"v"``: the dimension of values inside a head. ``"mlp"``: what
        linear layers make and exactly one other reads. ``"residual"``: what several layers read behind a LayerNorm over
        it. ``"channels"``: all others.
    """
    readers = {(c.weight, c.dim) for c in readers_of(axis, graph)}
    if "statistics" in axis.reasons and len(readers) > 1:
        return "residual"  # first: a stream that an attention layer splits into heads has their role too
    role = _ROLE.search(axis.name)
    if role is not None:
        return _KIND_OF_ROLE[role[1]]
    made = [m for m in axis.producers if len(graph.parameter_dims[m.parameter]) == 2]
    if made and len(readers) == 1 and len(graph.parameter_dims[next(iter(readers))[0]]) == 2:
        return "mlp"
    return "channels"


def places_of(axis: Axis, graph: AxisGraph) -> list[Place]:
    """Where the scores of an axis are multiplied, so that every path through the axis passes them once.

    At its readers, along their input: the values of a head before the output projection, hidden units before the
    second linear layer, the residual stream behind the norm in front of every layer that reads it. The dimension of
    queries and keys has no reader with a weight, the logits sum over it; there the first of the two (queries in most
    models, keys in DETR) is multiplied where it is made, so that the logits are linear in alpha. Where a packed projection makes the values with the same
    dimension, both are done.

    Returns:
        Empty for an axis that no layer reads or makes in a way that a score could multiply.
    """
    members = {(m.parameter, m.dim): m for m in axis.members}
    readers = [
        Place(c.module, c.weight, c.dim, members[c.weight, c.dim].positions)
        for c in readers_of(axis, graph)
        if (c.weight, c.dim) in members
    ]
    if readers and kind_of(axis, graph) != "qk":
        return readers
    return _queries(axis, graph, readers) + readers


def _queries(axis: Axis, graph: AxisGraph, readers: list[Place]) -> list[Place]:
    """The producers of the queries: the first module that makes the axis, or the first norm on it."""
    by_module: dict[str, list[Member]] = {}
    for member in axis.producers:
        by_module.setdefault(member.parameter.rpartition(".")[0], []).append(member)
    if not by_module:
        return []
    norms = [p for p, made in by_module.items() if all(len(graph.parameter_dims[m.parameter]) == 1 for m in made)]
    path = next(iter(norms or by_module))  # a norm undoes what comes before it
    heads = {(m.parameter, m.dim): m for other in graph if ":heads" in other.name for m in other.members}
    columns = readers[0].positions.shape[1] if readers else None
    return [
        Place(path, m.parameter, m.dim, _first(m.positions, heads.get((m.parameter, m.dim)), columns))
        for m in by_module[path]
    ]


def _first(positions: Tensor, heads: Member | None, columns: int | None) -> Tensor:
    """Of the positions that one index has in each head of a packed projection the first: queries (or keys) lead."""
    if heads is None:
        return positions.sort(dim=1).values[:, :columns]
    owner = torch.full((int(max(positions.max(), heads.positions.max())) + 1,), -1)
    owner[heads.positions] = torch.arange(len(heads.positions))[:, None].expand_as(heads.positions)
    rows = []
    for row in positions.sort(dim=1).values.tolist():
        first: dict[int, int] = {}
        for position in row:
            first.setdefault(int(owner[position]), position)
        rows.append(list(first.values()))
    return torch.tensor(rows)


def searched_axes(
    graph: AxisGraph,
    model: str,
    kinds: Sequence[str] = (),
    axes: str | Sequence[str] | None = None,
    inexact: bool = False,
) -> list[Axis]:
    """The axes that a search takes, sorted by kind.

    Args:
        graph: all axes.
        model: its class's name, for messages.
        kinds: the kinds wanted; none for ``DEFAULT_KINDS``, or with ``axes`` for all.
        axes: glob pattern or patterns of names; None for all of these kinds.
        inexact: whether inexact axes are taken.

    Raises:
        MethodError: for a kind that the model lacks or has inexact only, or when axes tied in size are not all taken.
        NothingToShrinkError: when there is none.
    """
    of_kind: dict[str, list[Axis]] = {kind: [] for kind in KINDS}
    for axis in graph:
        of_kind[kind_of(axis, graph)].append(axis)
    if not len(graph):
        raise NothingToShrinkError(f"{model} has no axis that could shrink; print find_axes(model).fixed for why.")
    if axes is None:
        kinds = kinds or DEFAULT_KINDS
        for kind in kinds:
            _check_kind(kind, kinds, of_kind, graph, model, inexact)
    kinds = kinds or KINDS
    patterns = ["*"] if axes is None else [axes] if isinstance(axes, str) else list(axes)
    chosen = [
        axis
        for kind, found in of_kind.items()
        for axis in found
        if kind in kinds and (axis.is_exact or inexact) and any(fnmatch.fnmatchcase(axis.name, p) for p in patterns)
    ]
    if not chosen:
        raise NothingToShrinkError(
            f"axes={axes!r} matches no axis of {model} that may be searched; the first are: "
            f"{', '.join(list(graph.axes)[:6])}. Inexact ones need inexact=True."
        )
    names = {axis.name for axis in chosen}
    for tied in graph.sizes_tied:
        inside = [name for name in tied if name in names]
        left = [name for name in tied if name not in names]
        if inside and left:
            raise MethodError(
                f"{inside[0]!r} must keep as many indices as {left[0]!r} (kind {kind_of(graph[left[0]], graph)!r}), which "
                "is not searched. Search both, or neither."
            )
    return chosen


def _check_kind(
    kind: str, kinds: Sequence[str], of_kind: dict[str, list[Axis]], graph: AxisGraph, model: str, inexact: bool
) -> None:
    present = ", ".join(f"{name} ({len(found)} axes)" for name, found in of_kind.items() if found)
    if not of_kind[kind]:
        hint = ""
        if kind == "v" and any(readers_of(axis, graph) for axis in of_kind["qk"]):
            if "qk" in kinds:
                return
            hint = " One packed projection makes its values with queries and keys: take 'qk'."
        elif kind in ATTENTION_KINDS and not any(of_kind[other] for other in ATTENTION_KINDS):
            hint = " No attention was seen in its forward pass."
        raise MethodError(
            f"{model} has no axis of kind {kind!r}.{hint} Its kinds are: {present}. Choose them with kinds=."
        )
    if not inexact and not any(axis.is_exact for axis in of_kind[kind]):
        first = of_kind[kind][0]
        raise MethodError(
            f"the axes of kind {kind!r} in {model} are inexact ({first.name!r}: {', '.join(first.reasons)}). Pass "
            f"inexact=True to search them all the same, or kinds= without {kind!r}; there are: {present}."
        )
