"""What an architecture search keeps in the model while it trains, so that Trainer's checkpoints hold it.

One submodule: the second copy of the network, whose parameters Trainer's optimizer trains like all others, and the state
of the optimizer of the architecture variables. Those belong to the model itself and are shared: the copy refers to them
without owning them, so they are in the state dict once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed
from torch import Tensor, nn
from torch.optim.adam import adam

from .checkpoint_names import restore_names, use_own_names

#: the submodule of the model that holds it
NAME = "hf_compress_architecture_search"
Optimizer = Literal["adam", "sgd"]

_BUCKET = 2**23  # entries of gradients that are averaged over processes at once


class ArchitectureState(nn.Module):
    """The state of one search in one model.

    Args:
        model: the network, without such a state.
        architecture: name in the model -> architecture variable.
        with_copy: whether the search needs a second copy of the weights.
        shared: objects that the copy shares with the model although deep copies would have their own.

    Attributes:
        network: the second copy, or None.
        names: those of the architecture variables.
        steps: int64 buffer, steps taken by the architecture's optimizer.
        is_training: bool buffer, whether training has begun with this state; a checkpoint without it leaves it false.
    """

    steps: Tensor
    is_training: Tensor

    def __init__(
        self, model: nn.Module, architecture: Mapping[str, nn.Parameter], with_copy: bool, shared: Iterable[Any] = ()
    ) -> None:
        super().__init__()
        self.names = list(architecture)
        self.network = _second_copy(model, list(architecture.values()), shared) if with_copy else None
        for i, alpha in enumerate(architecture.values()):
            self.register_buffer(f"average_{i}", torch.zeros_like(alpha.detach()))
            self.register_buffer(f"square_{i}", torch.zeros_like(alpha.detach()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("is_training", torch.zeros((), dtype=torch.bool))

    def attach(self, model: nn.Module) -> None:
        """Become a submodule of the model. Architecture variables stop being Trainer's: this search steps them."""
        parameters = dict(model.named_parameters())
        for name in self.names:
            parameters[name].requires_grad_(False)
        self._own_names = use_own_names(model)
        setattr(model, NAME, self)
        inside = [name for name, _ in [*self.named_parameters(), *self.named_buffers()]]
        ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", [])
        # DistributedDataParallel never sees them run; average() takes its part
        model._ddp_params_and_buffers_to_ignore = [*ignored, *(f"{NAME}.{name}" for name in inside)]  # type: ignore[assignment]

    def detach_from(self, model: nn.Module) -> None:
        """Leave the model."""
        delattr(model, NAME)
        restore_names(model, self._own_names)
        ignored: Any = model._ddp_params_and_buffers_to_ignore
        model._ddp_params_and_buffers_to_ignore = [  # type: ignore[assignment]
            name for name in ignored if not name.startswith(f"{NAME}.")
        ]
        parameters = dict(model.named_parameters())
        for name in self.names:
            if name in parameters:
                parameters[name].requires_grad_(True)

    def pairs(self, model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The trained weights of the second copy and, in the same order, those of the model."""
        if self.network is None:
            return [], trained_weights(model, self.names)
        mine = dict(self.network.named_parameters())
        chosen = [(mine[name], p) for name, p in model.named_parameters() if name in mine and p.requires_grad]
        return [w for w, _ in chosen], [y for _, y in chosen]

    @torch.no_grad()
    def start(self, model: nn.Module, architecture: Sequence[nn.Parameter]) -> None:
        """Refer to the model's architecture variables and, where training has not begun yet, begin with its weights."""
        if self.network is not None:
            _share(self.network, dict(zip(self.names, architecture, strict=True)))
            if not self.is_training:
                values = {name: value for name, value in model.state_dict().items() if not name.startswith(f"{NAME}.")}
                for name, value in self.network.state_dict(keep_vars=True).items():
                    value.detach().copy_(values[name])
        self.is_training.fill_(True)
        self._taken = int(self.steps)  # a number here, so that a step does not wait for the device

    @torch.no_grad()
    def step(
        self,
        architecture: Sequence[Tensor],
        gradients: Sequence[Tensor],
        optimizer: Optimizer,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        """One step of the architecture's optimizer: torch's Adam on buffers that checkpoints hold, or plain descent."""
        self._taken += 1
        self.steps.fill_(self._taken)
        if optimizer == "sgd":
            if weight_decay:
                gradients = torch._foreach_add(list(gradients), list(architecture), alpha=weight_decay)
            torch._foreach_add_(list(architecture), list(gradients), alpha=-lr)
            return
        count = len(architecture)
        adam(
            list(architecture),
            list(gradients),
            [getattr(self, f"average_{i}") for i in range(count)],
            [getattr(self, f"square_{i}") for i in range(count)],
            [],
            [torch.tensor(self._taken - 1.0) for _ in range(count)],  # adam() counts by itself
            amsgrad=False,
            beta1=betas[0],
            beta2=betas[1],
            lr=lr,
            weight_decay=weight_decay,
            eps=1e-8,
            maximize=False,
        )


def state_in(model: nn.Module) -> ArchitectureState | None:
    """The state of the search that a model carries."""
    return model._modules.get(NAME)  # type: ignore[return-value]


def trained_weights(model: nn.Module, architecture: Iterable[str]) -> list[nn.Parameter]:
    """The parameters that are trained and are neither architecture nor the second copy."""
    names = set(architecture)
    return [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name not in names and not name.startswith(f"{NAME}.")
    ]


def _second_copy(model: nn.Module, architecture: Sequence[nn.Parameter], shared: Iterable[Any]) -> nn.Module:
    memo: dict[int, Any] = {id(thing): thing for thing in [*architecture, *shared]}
    network = copy.deepcopy(model, memo)
    owned = {id(alpha) for alpha in architecture}
    for module in network.modules():
        for attribute, parameter in list(module._parameters.items()):
            if id(parameter) in owned:
                # an attribute in the instance's dictionary is found like the parameter, and belongs to nobody here
                del module._parameters[attribute]
                vars(module)[attribute] = parameter
    return network


def _share(network: nn.Module, architecture: Mapping[str, nn.Parameter]) -> None:
    """Put the model's variables where the copy refers to them."""
    for name, alpha in architecture.items():
        path, _, attribute = name.rpartition(".")
        vars(network.get_submodule(path))[attribute] = alpha


# -- passes -----------------------------------------------------------------------------------------------------------


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Leave the buffers of a model (the running statistics of its norms) as they were before the passes inside."""
    # all buffers, since not every running statistic is one of BatchNorm's; in training mode no output depends on them
    buffers = [buffer for buffer in model.buffers() if buffer.numel()]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)


def processes() -> int:
    """How many processes train together."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


@torch.no_grad()
def average(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their mean over all processes, in place."""
    count = processes()
    if count == 1:
        return
    for batch in _batches(tensors):
        flat = torch.cat([tensor.flatten() for tensor in batch])
        torch.distributed.all_reduce(flat)
        flat /= count
        _put(flat, batch)


@torch.no_grad()
def take_statistics_of_first(network: nn.Module) -> None:
    """Give the floating-point buffers of the first process to all, as DistributedDataParallel does for a model."""
    if processes() == 1:
        return
    for batch in _batches([buffer for buffer in network.buffers() if buffer.is_floating_point()]):
        flat = torch.cat([tensor.flatten() for tensor in batch])
        torch.distributed.broadcast(flat, src=0)
        _put(flat, batch)


def _put(flat: Tensor, batch: Sequence[Tensor]) -> None:
    pieces = flat.split([tensor.numel() for tensor in batch])
    torch._foreach_copy_(list(batch), [piece.view_as(t) for piece, t in zip(pieces, batch, strict=True)])


def _batches(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one type in lists of a bounded size."""
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_type.setdefault(tensor.dtype, []).append(tensor)
    for alike in by_type.values():
        batch: list[Tensor] = []
        size = 0
        for tensor in alike:
            batch.append(tensor)
            size += tensor.numel()
            if size >= _BUCKET:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch
