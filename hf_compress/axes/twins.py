"""Modules that did not run, and the ones beside them that did.

A model may choose by its input which of several like modules runs (a head per domain, an expert), or use some of them in
training only. What did not run cannot be watched, but where a module list or dict holds another one of the same build that
did run, the two read and make the same things: their dimensions are taken to be the same.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .algebra import unify
from .tracing import Tracer


def tie_idle(model: nn.Module, tracer: Tracer) -> dict[str, str]:
    """Give the parameters of every module that did not run the dimensions of its twin's.

    Returns:
        path of the idle module, the largest that holds nothing that ran -> path of the one that ran.
    """
    twins: dict[str, str] = {}
    owners: dict[str, list[str]] = {}
    for name in tracer.idle:
        owner, _, last = name.rpartition(".")
        owners.setdefault(owner, []).append(last)
    for owner, names in owners.items():
        for idle, ran in _entries_beside(model, owner):
            other = ran + owner[len(idle) :]
            pairs = [(f"{owner}.{name}", f"{other}.{name}") for name in names]
            if all(_is_alike(tracer, name, twin) for name, twin in pairs) and any(
                tracer.parameters[twin].readers for _, twin in pairs
            ):
                for name, twin in pairs:
                    for a, b in zip(tracer.parameters[name].dims, tracer.parameters[twin].dims, strict=True):
                        unify(b, a)
                whole = _largest_idle(tracer, idle, owner)
                twins[whole] = ran + whole[len(idle) :]
                break
    return twins


def idle_paths(path: str, twins: dict[str, str]) -> Iterator[str]:
    """The paths of the idle modules (or parameters) whose twin is at a path."""
    for idle, ran in twins.items():
        if path == ran or path.startswith(f"{ran}."):
            yield idle + path[len(ran) :]


def _entries_beside(model: nn.Module, path: str) -> Iterator[tuple[str, str]]:
    """Entries of module lists and dicts on the way to a module, innermost first, each with every entry beside it."""
    parts = path.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        container = model.get_submodule(".".join(parts[:depth]))
        if isinstance(container, (nn.ModuleList, nn.ModuleDict)):
            for key, entry in container.named_children():
                own = container.get_submodule(parts[depth])
                if entry is not own and type(entry) is type(own):
                    yield ".".join(parts[: depth + 1]), ".".join([*parts[:depth], key])


def _largest_idle(tracer: Tracer, outer: str, inner: str) -> str:
    """The outermost module on the way from one to another in which nothing ran."""
    path, *steps = [outer, *inner[len(outer) + 1 :].split(".")]
    for step in steps:
        if not tracer.ran_inside(path):
            return path
        path = f"{path}.{step}"
    return inner


def _is_alike(tracer: Tracer, name: str, twin: str) -> bool:
    own, other = tracer.parameters[name], tracer.parameters.get(twin)
    return other is not None and [d.size for d in own.dims] == [d.size for d in other.dims]
