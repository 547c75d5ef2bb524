"""A buffer that a method keeps in the model while it trains, so that checkpoints hold it and resuming continues from it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def registered(model: nn.Module, name: str) -> Tensor | None:
    """The buffer, or None where there is none."""
    return model._buffers.get(name)


def register(model: nn.Module, name: str, values: Tensor) -> None:
    """Make the buffer, or fill the one that is there.

    Args:
        model: the model, not wrapped.
        name: one that two callbacks with different axes do not share, and that a replaced callback finds again.
        values: what it holds.
    """
    present = registered(model, name)
    if present is not None and present.shape == values.shape and present.dtype == values.dtype:
        present.copy_(values)  # in place: DistributedDataParallel holds on to the buffers it was made with
    else:
        model.register_buffer(name, values)


def reserve(model: nn.Module, name: str, like: Tensor) -> None:
    """Make a buffer that nothing has filled yet, which NaN says: loading a checkpoint may.

    Args:
        model, name: as for :func:`register`.
        like: a floating-point tensor of its shape, dtype and device.
    """
    register(model, name, torch.full_like(like, torch.nan))


def filled(model: nn.Module, name: str) -> Tensor | None:
    """The buffer, or None where there is none or nothing has filled it."""
    present = registered(model, name)
    return None if present is None or present.isnan().any() else present


def unregister(model: nn.Module, name: str) -> None:
    """Take the buffer out of the model, where there is one."""
    if registered(model, name) is not None:
        delattr(model, name)
