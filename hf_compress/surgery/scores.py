"""Scores that need no training: how much an index matters, from the weights alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_compress.axes import AxisGraph
from hf_compress.errors import ModelError


def magnitude_scores(model: nn.Module, axes: AxisGraph) -> dict[str, Tensor]:
    """The norm of everything that hangs on an index, relative to the other indices of its axis.

    Every matrix or kernel that makes or reads the axis gives the Euclidean norm of its slice at each index, divided by
    the mean over the axis, so that layers of different width and scale are comparable; the score is the mean over
    these. One-dimensional parameters count only where an axis has no other. Group norms as a criterion: Li et al. 2017
    (arXiv 1608.08710); over all coupled layers: Fang et al. 2023 (arXiv 2301.12900).

    Returns:
        axis name -> float64 [axis size], mean about 1.

    Raises:
        ModelError: when a parameter holds NaN or infinity.
    """
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.is_floating_point()}
    scores: dict[str, Tensor] = {}
    for axis in axes:
        members = [member for member in axis.members if member.parameter in parameters]
        members = [member for member in members if parameters[member.parameter].dim() > 1] or members
        parts = []
        for member in members:
            values = parameters[member.parameter]
            others = [dim for dim in range(values.dim()) if dim != member.dim]
            wide = torch.promote_types(values.dtype, torch.float32)  # half precision would overflow when squared
            along = torch.linalg.vector_norm(values, dim=others, dtype=wide) if others else values.abs()
            norms = along.to("cpu", torch.float64).square()[member.positions].sum(1).sqrt()
            if not bool(torch.isfinite(norms).all()):
                raise ModelError(
                    f"parameter {member.parameter!r} holds NaN or infinity. Look for a training run that diverged, and "
                    "load weights from before it did."
                )
            parts.append(norms / norms.mean().clamp_min(torch.finfo(torch.float64).tiny))
        if parts:
            scores[axis.name] = torch.stack(parts).mean(0)
    return scores
