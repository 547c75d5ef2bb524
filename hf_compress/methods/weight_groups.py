"""The weights of a model in groups, each of which makes or feeds one index of one axis.

Norms over groups and multiplications by one number per group take a handful of tensor operations per parameter, whatever
the number of groups. Like :class:`~hf_compress.methods.scales.Scales`, it gathers and sums in a fixed order, so that
results are bit-identical on every process and in every run.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from hf_compress.axes import Axis, AxisGraph, Member
from hf_compress.errors import ModelError, NothingToShrinkError

from .scales import _as, _local, _whole

_AT_ONCE = 1 << 15  # numbers

Slices = Literal["auto", "producers", "readers", "all"]


class _Slot(NamedTuple):
    """One dimension of one parameter that groups run along; ``start`` is its place in the row of all positions."""

    parameter: int
    dim: int
    start: int
    end: int


class WeightGroups:
    """The weights that some axes put into groups.

    An axis has a group for every index and every side that is taken: ``producers`` are the slices that make the index
    (filters, rows of a linear layer, heads, with their biases and the scale and shift of a norm), ``readers`` the slices
    of the linear layers that read it (their columns: "input units"). An index is gone as soon as one of its groups is.
    With ``slices="all"`` an index has one group, of everything that leaves with it: its makers, its readers of any kind and
    what stands between them.

    Args:
        model: holds the parameters that the axes name.
        graph: the axes of the model.
        axes: those that are used.
        slices: ``"producers"``, ``"readers"``, or ``"auto"``: linear layers by their inputs and convolutions by their
            outputs; a linear layer whose inputs are no axis in use goes by its outputs. Or ``"all"``.

    Attributes:
        names: the parameters, each once; frozen ones are left out.
        matrices: those of the names that are weights of linear layers and convolutions; they come first.
        matrix_length: number of their entries, the first in a flat vector.
        sizes: axis name -> number of indices.
        key: eight digits that stand for the axes and parameters.
        length: number of entries of all parameters.
        counts: [g], how many entries each group has; groups may overlap (the heads and the dimensions in heads).

    Raises:
        NothingToShrinkError: when no axis has a group with a trainable matrix.
        ModelError: when the model has no such parameter.
    """

    def __init__(self, model: nn.Module, graph: AxisGraph, axes: Iterable[Axis], slices: Slices = "auto") -> None:
        def rank(member: Member) -> int:
            return len(graph.parameter_dims[member.parameter])

        parameters = dict(model.named_parameters())
        modules = dict(model.named_modules())
        sides = _sides(graph, list(axes), slices)
        if missing := [m.parameter for _, found in sides for m in found if m.parameter not in parameters]:
            missing = [name for name in missing if name not in dict(model.named_buffers())]
            if missing:
                raise ModelError(
                    f"the model has no parameter {missing[0]!r}, on which its axes were found. Wrappers that flatten or "
                    "rename parameters (DeepSpeed, FSDP1) are not supported; use FSDP2 or DDP."
                )
        kept: list[tuple[Axis, Sequence[Member]]] = []
        for axis, found in sides:
            trained = [m for m in found if m.parameter in parameters and parameters[m.parameter].requires_grad]
            if any(parameters[m.parameter].dim() > 1 for m in trained):
                kept.append((axis, trained))
        if not kept:
            raise NothingToShrinkError(
                f"no weights of {type(model).__name__} that can be trained make an index of an axis. Unfreeze them, or "
                "choose other axes."
            )
        names = dict.fromkeys(member.parameter for _, members in kept for member in members)
        # matrices first, then other parameters of several dimensions, then vectors, so that most steps take one operation
        self.names = sorted(names, key=lambda name: (not _is_matrix(name, modules), parameters[name].dim() == 1))
        self.parameters: list[Tensor] = [parameters[name] for name in self.names]
        self.shapes = [parameter.shape for parameter in self.parameters]
        self.lengths = [parameter.numel() for parameter in self.parameters]
        self.length = sum(self.lengths)
        self.matrices = [name for name in self.names if _is_matrix(name, modules)]
        self.matrix_length = sum(parameters[name].numel() for name in self.matrices)
        self.device = self.parameters[0].device
        self.dtype = torch.promote_types(max((p.dtype for p in self.parameters), key=_bits), torch.float32)
        self._is_plain = all(
            p.dtype == self.dtype and p.device == self.device and not hasattr(p, "full_tensor") for p in self.parameters
        )
        place = {name: i for i, name in enumerate(self.names)}
        wide = {(m.dim, place[m.parameter]) for _, members in kept for m in members if rank(m) > 1}
        slots: dict[tuple[int, int], _Slot] = {}
        end = 0
        for dim, parameter in sorted(wide):  # parameters one after another, as in the flat vector; see _blocks
            slots[parameter, dim] = _Slot(parameter, dim, end, end + self.shapes[parameter][dim])
            end = slots[parameter, dim].end
        self._slots = list(slots.values())
        self._blocks = self._joined(self._slots)
        # the positions of vectors follow, in the order of the flat vector
        self._first_vector, self._vector_start = end, 0
        for parameter, shape in enumerate(self.shapes):
            if len(shape) == 1:
                slots[parameter, 0] = _Slot(parameter, 0, end, end + shape[0])
                end += shape[0]
            else:
                self._vector_start += self.lengths[parameter]
        self._every_slot = list(slots.values())
        rows: list[list[int]] = []
        layers: list[dict[int, int]] = []  # position -> group; positions appear in a further layer when they are taken
        counts: list[int] = []
        for _, members in kept:
            first = len(rows)
            size = members[0].positions.shape[0]
            rows += [[] for _ in range(size)]
            counts += [0] * size
            layer = next(
                (layer for layer in layers if not any(p in layer for p in _places(members, slots, place))), None
            )
            if layer is None:
                layers.append(layer := {})
            for member in members:
                slot = slots[place[member.parameter], member.dim]
                shape = self.shapes[slot.parameter]
                weight = self.lengths[slot.parameter] // shape[slot.dim]
                for index, positions in enumerate((member.positions + slot.start).tolist()):
                    rows[first + index] += positions
                    counts[first + index] += weight * len(positions)
                    layer.update(dict.fromkeys(positions, first + index))
        is_matrix_position = torch.zeros(end + 1, dtype=torch.bool)
        is_matrix_position[: self._first_vector] = True
        width = max(map(len, rows))
        entries = torch.tensor([row + [end] * (width - len(row)) for row in rows])
        self._entries = entries.to(self.device)
        self._is_matrix_entry = is_matrix_position[entries].to(self.device)
        # a position without a group gets the number of groups, the place of an appended one
        owners = torch.full((len(layers), end), len(rows))
        for row, layer in zip(owners, layers, strict=True):
            row[torch.tensor(list(layer))] = torch.tensor(list(layer.values()))
        self._owners = owners.to(self.device)
        self.counts = torch.tensor(counts, device=self.device, dtype=self.dtype)
        self.sides = [(axis.name, axis.size) for axis, _ in kept]
        self._members = [(axis.name, place[m.parameter], m.dim, m.positions) for axis, members in kept for m in members]
        self.model = ref(model)
        self._viewed: tuple[Tensor, list[Tensor], list[Tensor]] | None = None
        self.sizes = {name: size for name, size in self.sides}
        content = [*(f"{name} {size}" for name, size in self.sides), *self.names]
        self.key = f"{zlib.crc32(chr(10).join(content).encode()):08x}"

    @torch.no_grad()
    def read(self, out: Tensor | None = None) -> Tensor:
        """All entries, [length], in :attr:`dtype`; into ``out`` if given. Collective when parameters are sharded."""
        out = torch.empty(self.length, dtype=self.dtype, device=self.device) if out is None else out
        torch._foreach_copy_(self.views(out), self._whole())
        return out

    def write(self, flat: Tensor) -> None:
        """Set all entries."""
        targets = [_local(parameter.detach()) for parameter in self.parameters]
        torch._foreach_copy_(targets, [_as(v, p) for v, p in zip(self.views(flat), self.parameters, strict=True)])

    @torch.no_grad()
    def pull_gradients(self, flat: Tensor, strength: float) -> None:
        """Add ``strength * (parameters - flat)`` to the gradients; parameters without one are left alone."""
        views, wholes = self.views(flat), self._whole()
        found = [i for i, parameter in enumerate(self.parameters) if parameter.grad is not None]
        if not found:
            return
        if self._is_plain:
            gradients: list[Tensor] = [self.parameters[i].grad for i in found]  # type: ignore[misc]
            torch._foreach_add_(gradients, [wholes[i] for i in found], alpha=strength)
            torch._foreach_add_(gradients, [views[i] for i in found], alpha=-strength)
            return
        for i in found:
            gradient = _local(self.parameters[i].grad)  # type: ignore[arg-type]
            gradient += _as(wholes[i] - views[i], self.parameters[i]).to(gradient.dtype) * strength

    def decay(self, fixed: Tensor, growing: Tensor) -> Decay:
        """A weight decay of ``fixed + strength * growing`` for every group, ready to be added to gradients.

        Groups for which both are 0 get none, to the bit; an entry that two groups share gets both of theirs. Waits for the
        device once.

        Args:
            fixed, growing: [g], at least 0.
        """
        padded = torch.cat([torch.stack([fixed, growing]), fixed.new_zeros(2, 1)], dim=1)
        factors = padded[:, self._owners]  # [2, layers, positions]
        is_used = (factors != 0).any(0).cpu()
        current = torch.empty_like(factors[0])
        places = [
            (layer, slot)
            for layer in range(len(current))
            for slot in self._every_slot
            if is_used[layer, slot.start : slot.end].any()
        ]

        def spread(values: Tensor, layer: int, slot: _Slot) -> Tensor:
            shape = [1] * len(self.shapes[slot.parameter])
            shape[slot.dim] = -1
            return values[layer, slot.start : slot.end].view(shape)

        if self._is_plain:
            chosen = [self.parameters[slot.parameter] for _, slot in places]
            return Decay(chosen, [spread(current, *place) for place in places], [(factors[0], factors[1], current)])
        sums: dict[int, list[Tensor]] = {}  # whole, since a shard holds its part of a whole tensor only
        for layer, slot in places:
            i = slot.parameter
            total = sums.setdefault(i, [fixed.new_zeros(self.shapes[i]) for _ in range(2)])
            for values, part in zip(factors, total, strict=True):
                part += spread(values, layer, slot)
        chosen = [self.parameters[i] for i in sums]
        parts = [
            [_as(total, parameter).to(parameter.dtype) for total in totals]
            for parameter, totals in zip(chosen, sums.values(), strict=True)
        ]
        terms = [(fixed, growing, torch.empty_like(fixed)) for fixed, growing in parts]
        return Decay(chosen, [out for *_, out in terms], terms)

    def views(self, flat: Tensor) -> list[Tensor]:
        """A flat vector [length] as one tensor for every parameter."""
        if self._viewed is None or self._viewed[0] is not flat:  # as good as always the same vector
            parts = zip(flat.split(self.lengths), self.shapes, strict=True)
            views = [part.view(shape) for part, shape in parts]
            slices = [self._sliced(flat, views, block) for block in self._blocks]
            self._viewed = flat, views, slices
        return self._viewed[1]

    def _slices(self, flat: Tensor) -> list[Tensor]:
        """For every block a view [before, size of the dimension, after]; in the order of the positions."""
        self.views(flat)
        assert self._viewed is not None
        return self._viewed[2]

    def _joined(self, slots: list[_Slot]) -> list[list[_Slot]]:
        """Slots that are one matrix of the flat vector: rows of one length, parameter after parameter.

        The layers of a stage mostly are, and an operation for all of them takes little longer than for one.
        """

        def row(slot: _Slot) -> int:
            return self.lengths[slot.parameter] // self.shapes[slot.parameter][0]

        blocks: list[list[_Slot]] = []
        for slot in slots:
            last = blocks[-1][-1] if blocks else None
            if (
                last is not None
                and last.dim == slot.dim == 0
                and last.parameter + 1 == slot.parameter
                and row(last) == row(slot)
            ):
                blocks[-1].append(slot)
            else:
                blocks.append([slot])
        return blocks

    def _sliced(self, flat: Tensor, views: list[Tensor], block: list[_Slot]) -> Tensor:
        first, last = block[0], block[-1]
        if first.dim > 0:
            shape = self.shapes[first.parameter]
            return views[first.parameter].view(math.prod(shape[: first.dim]), shape[first.dim], -1)
        start = views[first.parameter].storage_offset() - flat.storage_offset()
        end = start + sum(self.lengths[first.parameter : last.parameter + 1])
        return flat[start:end].view(1, last.end - first.start, -1)

    def _whole(self) -> list[Tensor]:
        if self._is_plain:
            return self.parameters  # used without gradients only
        return [_whole(parameter.detach()).to(self.device, self.dtype) for parameter in self.parameters]

    # -- per group ----------------------------------------------------------------------------------------------

    def norms(self, flat: Tensor) -> Tensor:
        """[length] -> [g]: the Euclidean norm of every group; 0 also where none of a group's matrix entries is left.

        A filter of zeros emits a constant; its bias and its norm's scale and shift are no reason to keep it.
        """
        norms = [_norms(part) for part in self._slices(flat)]
        norms += [flat[self._vector_start :], flat.new_zeros(1)]
        gathered = torch.cat(norms).square_()[self._entries]
        return torch.where((gathered * self._is_matrix_entry).sum(1) != 0, gathered.sum(1), 0).sqrt()  # NaN stays

    def scale_(self, flat: Tensor, factors: Tensor) -> None:
        """Multiply every group in ``flat`` by its factor [g], in place."""
        slices = self._slices(flat)
        sizes = [*(part.shape[1] for part in slices), len(flat) - self._vector_start]
        for owners in torch.cat([factors, factors.new_ones(1)])[self._owners]:
            *parts, last = owners.split(sizes)
            for part, factor in zip(slices, parts, strict=True):
                part.mul_(factor[:, None])
            flat[self._vector_start :].mul_(last)

    def restore_(self, flat: Tensor, source: Tensor, axis: str, index: int) -> None:
        """Copy the groups of one index of an axis from ``source`` [length] to ``flat``."""
        into, out = self.views(flat), self.views(source)
        for name, parameter, dim, positions in self._members:
            if name == axis:
                chosen = positions[index].to(self.device)
                into[parameter].index_copy_(dim, chosen, out[parameter].index_select(dim, chosen))

    def by_axis(self, values: Tensor) -> dict[str, Tensor]:
        """[g], at least 0 -> axis name -> [axis size]: the smaller number where an index has two groups."""
        found: dict[str, Tensor] = {}
        for (name, _), part in zip(self.sides, values.split([size for _, size in self.sides]), strict=True):
            found[name] = torch.minimum(found[name], part) if name in found else part
        return found

    def by_side(self, values: Tensor) -> list[Tensor]:
        """[g] -> one [axis size] for every axis and side."""
        return list(values.split([size for _, size in self.sides]))


class Decay:
    """A weight decay with factors of its own for slices of parameters; see :meth:`WeightGroups.decay`.

    Args:
        parameters: each once or, with several factors, several times.
        factors: for each a tensor that broadcasts to it, or to this process's shard; views of the third of the terms.
        terms: what the factors are made of: (fixed, growing, where ``fixed + strength * growing`` is written).
    """

    def __init__(
        self, parameters: Sequence[Tensor], factors: list[Tensor], terms: list[tuple[Tensor, Tensor, Tensor]]
    ) -> None:
        self._parameters = parameters
        self._weights = [_local(parameter.detach()) for parameter in parameters]
        self._factors = factors
        self._terms = terms

    def add_to_gradients(self, strength: float) -> None:
        """Add ``(fixed + strength * growing) * parameter`` to the gradients; parameters without one are left alone."""
        for fixed, growing, out in self._terms:
            torch.add(fixed, growing, alpha=strength, out=out)
        gradients = [parameter.grad for parameter in self._parameters]
        found = [i for i, gradient in enumerate(gradients) if gradient is not None]
        if found:
            torch._foreach_addcmul_(
                [_local(gradient) for gradient in gradients if gradient is not None],
                [self._weights[i] for i in found],
                [self._factors[i] for i in found],
            )


def _norms(part: Tensor) -> Tensor:
    """[before, size, after] -> [size]: Euclidean norms."""
    if part.shape[0] == 1:
        return torch.linalg.vector_norm(part[0], dim=1)
    if part.shape[2] == 1:  # columns: several times as fast as a norm, while what is squared stays in a CPU's cache
        rows = part[:, :, 0].split(max(1, _AT_ONCE // part.shape[1]))
        return torch.stack([chunk.square().sum(0) for chunk in rows]).sum(0).sqrt_()
    return torch.linalg.vector_norm(part, dim=(0, 2))


def _places(members: Sequence[Member], slots: dict[tuple[int, int], _Slot], place: dict[str, int]) -> list[int]:
    return [
        position
        for member in members
        for position in (member.positions + slots[place[member.parameter], member.dim].start).flatten().tolist()
    ]


def _sides(graph: AxisGraph, axes: list[Axis], slices: Slices) -> list[tuple[Axis, tuple[Member, ...]]]:
    """The members of every group: (axis, members), up to two for an axis."""
    if slices == "all":
        return [(axis, axis.members) for axis in axes]
    contracted = {(item.weight, item.dim) for item in graph.contractions}

    def rank(member: Member) -> int:
        return len(graph.parameter_dims[member.parameter])

    def readers(axis: Axis) -> tuple[Member, ...]:
        made = {(member.parameter, member.dim) for member in axis.producers}
        found = [m for m in axis.members if rank(m) > 1 and (m.parameter, m.dim) not in made]
        is_linear = all(rank(m) == 2 and (m.parameter, m.dim) in contracted for m in found)
        return tuple(found) if is_linear else ()

    read = [(axis, members) for axis in axes if slices != "producers" and (members := readers(axis))]
    covered = {member.parameter for _, members in read for member in members}
    made = [
        (axis, axis.producers)
        for axis in axes
        if slices == "producers"
        or (slices == "auto" and any(m.parameter not in covered for m in axis.producers if rank(m) > 1))
    ]
    return made + read


def _is_matrix(name: str, modules: dict[str, nn.Module]) -> bool:
    path, _, last = name.rpartition(".")
    return last == "weight" and isinstance(modules[path], (nn.Linear, nn.modules.conv._ConvNd))


def _bits(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits


__all__ = ["Decay", "Slices", "WeightGroups"]
