"""The weakly supervised objective: exact labels of rendered eyes, and of real ones open or closed.

Setting of Mequanint et al. 2019 (arXiv 1910.10845), whose losses are not public: what follows is a design of this package,
in the terms of its abstract. Sources of the parts: smooth l1 (Girshick 2015); interval hinge, our reading of a binary label;
gradient reversal and its schedule, Ganin et al. 2016 (arXiv 1505.07818).

Every function is a mean over its own valid entries; with none it is a zero that gradients can flow through.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

UNLABELLED = -100
KAPPA_RANGE = (4.0, 40.0)


def rho(difference: Tensor, beta: float = 0.05) -> Tensor:
    """Smooth l1, elementwise: ``d^2 / (2 beta)`` below beta, ``|d| - beta / 2`` above."""
    return F.smooth_l1_loss(difference, torch.zeros_like(difference), reduction="none", beta=beta)


def masked_mean(values: Tensor, valid: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean over the valid entries, weighted where there is a weight; 0 with zero gradient when none is valid.

    Args:
        values: finite, also where not valid.
        valid: bool, of the same shape.
        weight: of the same shape, 0 or more.
    """
    weights = valid.to(values.dtype) if weight is None else valid.to(values.dtype) * weight
    # the clamp only matters when all weights are 0, where the sum is 0 as well
    return (values * weights).sum() / weights.sum().clamp(min=torch.finfo(values.dtype).tiny)


def regression_loss(
    predicted: Tensor, target: Tensor, beta: float = 0.05, scale: float = 1.0, weight: Tensor | None = None
) -> Tensor:
    """Mean of rho(scale (predicted - target)) where there is a target; NaN says that there is none.

    Args:
        predicted, target: [batch, eyes].
        scale: 1 for openness, 2 for the aperture ratio, whose range is about half as wide.
        weight: [batch, eyes].
    """
    valid = target.isfinite()
    return masked_mean(rho(scale * (predicted - _fill(target, valid, predicted)), beta), valid, weight)


def interval_loss(
    openness: Tensor,
    state: Tensor,
    closed_max: float = 0.12,
    open_min: float = 0.45,
    beta: float = 0.05,
    weight: Tensor | None = None,
) -> Tensor:
    """The weak label taken at its word: nothing inside the interval that it allows, rho of the distance outside.

    Args:
        openness: [batch, eyes], 0 to 1.
        state: int64 [batch, eyes]: 1 open, 0 closed, -100 unlabelled.
        weight: [batch, eyes].
    """
    below, above = (open_min - openness).clamp(min=0), (openness - closed_max).clamp(min=0)
    distance = torch.where(state == 1, below, above)
    return masked_mean(rho(distance, beta), state != UNLABELLED, weight)


def link_logit(openness: Tensor, kappa: Tensor | float, theta: Tensor | float) -> Tensor:
    """Logit of the probability that an annotator says "open": kappa (openness - theta)."""
    return kappa * (openness - theta)


def kappa_of(raw: Tensor) -> Tensor:
    """The slope of the link from its unbounded parameter: softplus, clamped to 4..40."""
    return F.softplus(raw).clamp(*KAPPA_RANGE)


def raw_kappa(kappa: float) -> float:
    """The inverse of :func:`kappa_of` inside of its range."""
    return kappa + math.log(-math.expm1(-kappa))


def binary_loss(logit: Tensor, state: Tensor, weight: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of "open": of the link, or (naive control) of the openness' own logit."""
    valid = state != UNLABELLED
    losses = F.binary_cross_entropy_with_logits(logit, (state == 1).to(logit.dtype), reduction="none")
    return masked_mean(losses, valid, weight)


def ranking_loss(openness: Tensor, state: Tensor, margin: float = 0.3) -> Tensor:
    """Mean over pairs of an open i and a closed j of max(0, margin - (s_i - s_j)); 0 when a class is missing.

    Args:
        openness: [batch, eyes].
        state: int64 [batch, eyes].
    """
    opened, closed = openness[state == 1], openness[state == 0]
    if not len(opened) or not len(closed):
        return openness.sum() * 0.0
    return (margin - (opened[:, None] - closed[None, :])).clamp(min=0).mean()


def uncertainty_loss(openness: Tensor, target: Tensor, log_scale: Tensor) -> Tensor:
    """Negative log-likelihood (without its constant) of the error under a Laplace distribution of this scale.

    The openness is taken as given, so that this part teaches the scale alone. Ours.
    """
    valid = target.isfinite()
    error = (openness - _fill(target, valid, openness)).abs().detach()
    return masked_mean(error * torch.exp(-log_scale) + log_scale, valid)


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(context, features: Tensor, strength: float) -> Tensor:  # type: ignore[no-untyped-def, override]
        context.strength = strength
        return features.view_as(features)

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def, override]
        return -context.strength * gradient, None


def reverse_gradient(features: Tensor, strength: float) -> Tensor:
    """The identity whose gradient is multiplied by ``-strength``."""
    return _Reverse.apply(features, strength)  # type: ignore[no-any-return]


def reversal_strength(progress: float) -> float:
    """lambda_p = 2 / (1 + exp(-10 p)) - 1 of arXiv 1505.07818, for a progress p of the training from 0 to 1."""
    return 2.0 / (1.0 + math.exp(-10.0 * progress)) - 1.0


def _fill(target: Tensor, valid: Tensor, predicted: Tensor) -> Tensor:
    """Targets without NaN: a difference of zero, and no gradient, where there is none."""
    return torch.where(valid, target.to(predicted.dtype), predicted.detach())


__all__ = [
    "binary_loss",
    "interval_loss",
    "kappa_of",
    "link_logit",
    "masked_mean",
    "ranking_loss",
    "regression_loss",
    "reversal_strength",
    "reverse_gradient",
    "rho",
    "uncertainty_loss",
]
