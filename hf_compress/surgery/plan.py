"""A plan: which indices every axis keeps.

A plan is plain data. It names axes by the names that :func:`hf_compress.find_axes` gives them and can be written to
JSON, read back and applied to any model of the same architecture.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_compress.axes import AxisGraph
from hf_compress.errors import PlanError

PLAN_VERSION = 1


@dataclass(frozen=True)
class Plan:
    """Which indices every axis keeps; an axis that is not named stays whole.

    Args:
        keep: axis name -> kept indices, strictly increasing, at least one.
        axes: the graph that the plan was made on. Held in memory only: neither compared nor written to JSON.

    Raises:
        PlanError: when the indices are no such sequence, or do not fit ``axes``.
    """

    keep: Mapping[str, tuple[int, ...]]
    axes: AxisGraph | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.keep, Mapping):
            raise PlanError(f"keep must map axis names to kept indices, got {type(self.keep).__name__}.")
        object.__setattr__(self, "keep", {name: _indices(name, kept) for name, kept in self.keep.items()})
        if self.axes is not None:
            self.check(self.axes)

    def __hash__(self) -> int:
        return hash(tuple(sorted(self.keep.items())))

    @property
    def sizes(self) -> dict[str, int]:
        """Axis name -> number of indices kept."""
        return {name: len(kept) for name, kept in self.keep.items()}

    def check(self, axes: AxisGraph) -> None:
        """See that every axis exists, every index is in range and tied axes keep equally many.

        Raises:
            PlanError: naming the axis that does not fit.
        """
        for name, kept in self.keep.items():
            size = axes[name].size
            if kept[-1] >= size:
                raise PlanError(
                    f"axis {name!r}: index {kept[-1]} is out of range; the axis has {size} indices, 0 to {size - 1}. "
                    "Select on the model that is to be cut."
                )
        for tied in axes.sizes_tied:
            counts = {name: len(self.keep[name]) if name in self.keep else axes[name].size for name in tied}
            if len(set(counts.values())) > 1:
                raise PlanError(
                    f"axes that share one module attribute must keep equally many indices, got {counts}. Keep the same "
                    "number of each; select() does."
                )

    def masks(self, axes: AxisGraph) -> dict[str, Tensor]:
        """Axis name -> bool [axis size], true where an index is kept."""
        masks = {}
        for name, kept in self.keep.items():
            mask = torch.zeros(axes[name].size, dtype=torch.bool)
            mask[torch.tensor(kept)] = True
            masks[name] = mask
        return masks

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON data: ``{"version": 1, "keep": {axis: [indices]}}``."""
        return {"version": PLAN_VERSION, "keep": {name: list(kept) for name, kept in self.keep.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | str, axes: AxisGraph | None = None) -> Plan:
        """Read what :meth:`to_json` gave, as data or as JSON text.

        Raises:
            PlanError: when it is not a plan, or was written by a newer version of this package.
        """
        if isinstance(data, str):
            try:
                data = json.loads(data)
            except (json.JSONDecodeError, RecursionError) as error:
                raise PlanError(f"the plan is not valid JSON ({error}).") from error
        if not isinstance(data, Mapping) or set(data) != {"version", "keep"}:
            raise PlanError("a plan is a JSON object with exactly the fields 'version' and 'keep'.")
        if data["version"] != PLAN_VERSION:
            raise PlanError(
                f"the plan has version {data['version']!r}; this hf_compress reads version {PLAN_VERSION}. Upgrade "
                "hf_compress, or select again."
            )
        return cls(data["keep"], axes)


def _indices(name: Any, kept: Any) -> tuple[int, ...]:
    if not isinstance(name, str):
        raise PlanError(f"axis names are strings, got {name!r}.")
    if isinstance(kept, Tensor):
        kept = kept.tolist()
    if isinstance(kept, (str, bytes, Mapping)) or not hasattr(kept, "__iter__"):
        raise PlanError(f"axis {name!r}: the kept indices must be a sequence of integers, got {kept!r}.")
    kept = tuple(kept)
    if not kept:
        raise PlanError(f"axis {name!r} would vanish: a plan keeps at least one index of every axis.")
    for index in kept:
        if isinstance(index, bool) or not hasattr(index, "__index__"):
            raise PlanError(f"axis {name!r}: {index!r} is not an index; kept indices are integers.")
    indices = tuple(index.__index__() for index in kept)
    if indices[0] < 0 or any(a >= b for a, b in zip(indices, indices[1:], strict=False)):
        raise PlanError(
            f"axis {name!r}: kept indices must be non-negative and strictly increasing. Sort them and drop duplicates."
        )
    return indices
