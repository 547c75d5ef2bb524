"""The scales of a model's axes, read and written as one flat vector.

A method then works with a handful of vector operations per step, whatever the number of layers, and never slices a
parameter. Every entry belongs to one index of one axis; an index has several entries where several scales share its
axis (the BatchNorm weights around a residual stream). Reductions over an index gather and then sum in a fixed order, so
that they are bit-identical on every process and in every run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from hf_compress.axes import Axis
from hf_compress.errors import ModelError


class Scales:
    """The scales of some axes of one model.

    Args:
        model: holds the parameters that the axes name, sharded or not.
        axes: axes with scales.

    Attributes:
        names: the parameters, each once.
        sizes: axis name -> number of indices.
        length: number of entries, n.
        counts: [g]: how many entries each index has; g is the number of indices of all axes.

    Raises:
        ModelError: when the model has no such parameter, or one of another shape.
    """

    def __init__(self, model: nn.Module, axes: Iterable[Axis]) -> None:
        axes = list(axes)
        parameters = dict(model.named_parameters())
        self.names = list(dict.fromkeys(member.parameter for axis in axes for member in axis.scales))
        if missing := [name for name in self.names if name not in parameters]:
            raise ModelError(
                f"the model has no parameter {missing[0]!r}, on which its axes were found. Wrappers that flatten or "
                "rename parameters (DeepSpeed, FSDP1) are not supported; use FSDP2 or DDP."
            )
        self.parameters = [parameters[name] for name in self.names]
        self.sizes = {axis.name: axis.size for axis in axes}
        device = self.parameters[0].device
        start, offset = {}, 0
        for name, parameter in zip(self.names, self.parameters, strict=True):
            start[name] = offset
            offset += parameter.numel()
        places: list[list[int]] = []  # for every index, the positions of its entries in the concatenated parameters
        for axis in axes:
            columns = []
            for member in axis.scales:
                positions = member.positions.flatten()
                if int(positions.max()) >= parameters[member.parameter].numel():
                    raise ModelError(f"{member.parameter!r} no longer has the size that axis {axis.name!r} has.")
                columns.append((positions + start[member.parameter]).tolist())
            places.extend(map(list, zip(*columns, strict=True)))
        used = sorted({place for row in places for place in row})
        entry = {place: i for i, place in enumerate(used)}
        self.length = len(used)
        self.counts = torch.tensor([len(row) for row in places], device=device)
        width = max(map(len, places))
        # rows are padded with n, one past the last entry: the place of an appended zero
        rows = [[entry[place] for place in row] + [self.length] * (width - len(row)) for row in places]
        self._entries = torch.tensor(rows, device=device)
        owner = torch.zeros(self.length + 1, dtype=torch.int64)
        owner[torch.tensor(rows)] = torch.arange(len(rows))[:, None]
        self._index_of = owner[:-1].to(device)
        self._used = None if self.length == offset else torch.tensor(used, device=device)
        self._total = offset
        self._lengths = [parameter.numel() for parameter in self.parameters]
        self.device = device

    def read(self) -> Tensor:
        """All entries, [n], a copy, in float32 or wider. A collective operation when parameters are sharded."""
        return self._gather([parameter.detach() for parameter in self.parameters])

    def write(self, values: Tensor) -> None:
        """Set all entries; frozen parameters keep theirs."""
        chosen = [i for i, parameter in enumerate(self.parameters) if parameter.requires_grad]
        if self._used is not None:
            values = self._gather([parameter.detach() for parameter in self.parameters], True).index_copy_(
                0, self._used, values
            )
        pieces = values.split(self._lengths)
        targets = [_local(self.parameters[i].detach()) for i in chosen]
        torch._foreach_copy_(targets, [_as(pieces[i], self.parameters[i]) for i in chosen])

    def add_to_gradients(self, values: Tensor) -> None:
        """Add [n] values to the gradients; parameters without one are left alone."""
        found = [(i, parameter.grad) for i, parameter in enumerate(self.parameters) if parameter.grad is not None]
        if not found:
            return
        if self._used is not None:
            values = values.new_zeros(self._total).index_copy_(0, self._used, values)
        pieces = values.split(self._lengths)
        torch._foreach_add_([_local(grad) for _, grad in found], [_as(pieces[i], self.parameters[i]) for i, _ in found])

    def spread_from_parameters(self, values: list[float]) -> Tensor:
        """One number per parameter -> [n], for every entry that of its parameter."""
        spread = torch.tensor(values).repeat_interleave(torch.tensor(self._lengths))
        return spread.to(self.device) if self._used is None else spread.to(self.device)[self._used]

    # -- per index ----------------------------------------------------------------------------------------------

    def sum(self, values: Tensor) -> Tensor:
        """[n] -> [g]: the sum over the entries of every index."""
        if self._entries.shape[1] == 1:
            return values[self._entries[:, 0]]
        return torch.cat([values, values.new_zeros(1)])[self._entries].sum(dim=1)

    def mean(self, values: Tensor) -> Tensor:
        """[n] -> [g]: the mean over the entries of every index."""
        return self.sum(values) / self.counts

    def spread(self, values: Tensor) -> Tensor:
        """[g] -> [n]: for every entry the number of its index."""
        return values[self._index_of]

    def by_axis(self, values: Tensor) -> dict[str, Tensor]:
        """[g] -> axis name -> [axis size]."""
        return dict(zip(self.sizes, values.split(list(self.sizes.values())), strict=True))

    def scaled_by_index(self, x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        """Replace the root mean square r of every index's entries by ``act(r)``, keeping their proportions.

        For a penalty ``k * f(||x|| / sqrt(k))`` of the k entries of an index, ``act = f'`` gives the gradient and
        ``act = prox_f`` the proximal operator; both follow from the chain rule and from rotational symmetry.

        Args:
            x: [n].
            act: [g] -> [g]; zero where its argument is zero.
        """
        root = self.mean(x**2).sqrt()
        factor = torch.where(root > 0, act(root) / root.clamp_min(torch.finfo(x.dtype).tiny), 0)
        return x * self.spread(factor)

    def _gather(self, tensors: list[Tensor], whole: bool = False) -> Tensor:
        full = [_whole(tensor).to(self.device).flatten() for tensor in tensors]
        values = torch.cat(full)
        if values.dtype in (torch.float16, torch.bfloat16):
            values = values.float()
        return values if self._used is None or whole else values[self._used]


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _as(piece: Tensor, parameter: Tensor) -> Tensor:
    """A piece of the flat vector in the shape and on the device of a parameter; for a DTensor this process's shard."""
    if piece.shape != parameter.shape:
        piece = piece.view(parameter.shape)
    piece = piece.to(parameter.device)
    if not hasattr(parameter, "full_tensor"):
        return piece
    from torch.distributed.tensor import DTensor, Replicate

    mesh = parameter.device_mesh  # type: ignore[attr-defined]
    whole = DTensor.from_local(piece.to(parameter.dtype), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return _local(whole.redistribute(mesh, parameter.placements))  # type: ignore[attr-defined]
