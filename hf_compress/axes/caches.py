"""Tensors that a forward pass keeps on a module for the next one.

What an evaluation cached was made of the weights as they were then: it hides the parameters behind it from a watched pass,
and it has the wrong sizes or values once they change.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .tracing import tensors_in


def held_dicts(module: nn.Module) -> Iterator[dict[Any, Any]]:
    """The dicts among a module's attributes and among those of the plain objects that it holds."""
    for name, value in vars(module).items():
        if name.startswith("_"):
            continue
        if isinstance(value, dict):
            yield value
        elif hasattr(value, "__dict__") and not isinstance(value, (nn.Module, Tensor, type)):
            yield from (item for item in vars(value).values() if isinstance(item, dict))


def is_cache(held: dict[Any, Any]) -> bool:
    """Whether a dict holds tensors in every entry."""
    return bool(held) and all(tensors_in(value) for value in held.values())


def drop_caches(module: nn.Module) -> None:
    """Forget the tensors that an earlier forward pass kept."""
    for held in held_dicts(module):
        if is_cache(held):
            held.clear()
