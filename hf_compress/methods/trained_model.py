"""Which model a method acts on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def trained_model(kwargs: Mapping[str, Any]) -> nn.Module:
    """The model that Trainer trains: its own, or the student where that is a student under its teacher.

    Args:
        kwargs: what Trainer gives to a callback.
    """
    model: nn.Module = kwargs["model"]
    return getattr(model, "hf_compress_student", model)


__all__ = ["trained_model"]
