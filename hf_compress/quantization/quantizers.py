"""Low-bit values for weights and activations, and the gradients that pass through them.

Weights ``w`` become ``scale * code`` with symmetric integer codes: -1 and 1 for one bit, -K..K with K = 2^(b-1) - 1 for
b >= 2 bits (so two bits are ternary and four have 15 levels). How step and scale follow from the weights:

================  =================================================================================================
``bcgd``          Yin et al. 2019 (arXiv 1808.05240), also used by Li et al. 2023 (arXiv 2302.10899). 1 bit: mean |w|.
                  2 bits: support |w| >= 0.7 mean |w|, scale the mean of |w| over it (ternary weight networks, Li et al.
                  2016). b >= 3: delta = max |w| / (2^b - 1), code j for (2j-1) delta < |w| <= (2j+1) delta, scale
                  <|w|, q> / <q, q>.
``bcgd_numel``    the same; the ternary scale is the support's sum over the number of *all* weights, as the released
                  code of both papers has it. For Gaussian weights the squared error is 0.338 instead of 0.191.
``least_squares`` step and scale are one number, chosen for the least squared error by a short search.
``learned``       learned step size (Esser et al. 2020, arXiv 1902.08153): the scale is a parameter, in units of the
                  paper's first scale 2 mean |w| / sqrt(K), so that Adam moves it by parts of itself whatever its size.
================  =================================================================================================

All but the last are functions of the weights alone, so nothing but the weights needs saving while training. Their
gradient passes to the float weights unchanged (BinaryConnect, Courbariaux et al. 2015).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

SCALES = ("bcgd", "bcgd_numel", "least_squares", "learned")
SMALLEST_ALPHA = 1e-3
#: least squared error for the positive half of a standard normal; 1, 2 and 4 bits are the values of Yin et al. 2019
FIRST_ALPHA = {1: 1.2221, 2: 0.6511, 3: 0.3534, 4: 0.1946, 5: 0.1055, 6: 0.0573, 7: 0.0309, 8: 0.0165}

_TINY = torch.finfo(torch.float32).tiny
_LEAST_LEARNED = (
    1e-3  # a learned scale below it (in its unit) has every weight at the largest code; nearer 0 it would vanish
)
_HALFWAY = 2.0**-23  # the least relative change of a float32 that moves every k + 1/2 off itself


def largest_code(bits: int) -> int:
    """K: weights of ``bits`` bits have codes from -K to K (for one bit, without 0)."""
    return 1 if bits == 1 else 2 ** (bits - 1) - 1


def codes_of(weight: Tensor, step: Tensor, bits: int) -> Tensor:
    """The code of every weight: the nearest multiple of ``step``.

    Args:
        weight: float, any shape.
        step: broadcasts with it; at least 0.
        bits: 1 to 8.

    Returns:
        integers in the dtype and shape of ``weight``.
    """
    if bits == 1:
        return torch.where(weight >= 0, 1.0, -1.0).to(weight.dtype)
    # what lies halfway goes to zero, but the ternary support includes its threshold
    step = step.clamp_min(_TINY) * (1 - _HALFWAY if bits == 2 else 1 + _HALFWAY)
    most = largest_code(bits)
    return (weight / step).round_().clamp_(-most, most)


def step_and_scale(rows: Tensor, bits: int, rule: str) -> tuple[Tensor, Tensor]:
    """Step (what weights are divided by to find their codes) and scale (what codes are multiplied by).

    Args:
        rows: float [channels, n]; every row has its own.
        bits: 1 to 8.
        rule: one of :data:`SCALES` but "learned".

    Returns:
        step and scale, float [channels, 1] each.
    """
    size = rows.abs()
    mean = size.mean(1, keepdim=True)
    if bits == 1:
        return mean, mean
    step = 1.4 * mean if bits == 2 else 2 * size.amax(1, keepdim=True) / (2**bits - 1)
    codes = codes_of(size, step, bits)
    if bits == 2 and rule == "bcgd_numel":
        return step, (size * codes).mean(1, keepdim=True)
    scale = _best_scale(size, codes)
    if rule == "least_squares":
        step = scale = _least_squares(size, bits, scale)
    return step, scale


def _best_scale(size: Tensor, codes: Tensor) -> Tensor:
    return (size * codes).sum(1, keepdim=True) / codes.square().sum(1, keepdim=True).clamp_min(_TINY)


def _least_squares(size: Tensor, bits: int, first: Tensor) -> Tensor:
    """The best of a grid of steps and of finer ones around it, and at last the best scale for the codes that it gives.

    Never worse than ``first``, the scale of the papers' rule.
    """
    unit = size.mean(1, keepdim=True) if bits == 2 else size.amax(1, keepdim=True) / largest_code(bits)
    factors = (
        (1.0, 1.3, 1.7, 2.2, 3.0, 4.5, 7.0, 10.0)
        if bits == 2
        else (1.0, 0.85, 0.71, 0.59, 0.48, 0.39, 0.31, 0.24, 0.18)
    )
    best = first
    least = (size - codes_of(size, first, bits) * first).square_().sum(1, keepdim=True)
    for nearby in (factors, (0.93, 1.07), (0.97, 1.03)):
        center = unit if nearby is factors else best
        for factor in nearby:
            step = center * factor
            if bits > 2:
                step = torch.minimum(step, unit)  # above it the largest code has no use
            error = torch.addcmul(size, codes_of(size, step, bits), step, value=-1).square_().sum(1, keepdim=True)
            best, least = torch.where(error < least, step, best), torch.minimum(error, least)
    return _best_scale(size, codes_of(size, best, bits))


def as_rows(weight: Tensor, channel_dim: int | None) -> Tensor:
    """[channels, n]: one row for each index of ``channel_dim``, or one for the whole tensor when it is None."""
    return weight.reshape(1, -1) if channel_dim is None else weight.movedim(channel_dim, 0).flatten(1)


def for_broadcast(scale: Tensor, weight: Tensor, channel_dim: int | None) -> Tensor:
    """[channels] as a tensor that broadcasts with ``weight`` along ``channel_dim``."""
    shape = [1] * weight.dim()
    if channel_dim is not None:
        shape[channel_dim] = -1
    return scale.reshape(shape)


def scale_of(
    weight: Tensor, bits: int, rule: str, channel_dim: int | None, learned: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Step and scale of a weight tensor, float32 [channels] each ([1] when ``channel_dim`` is None).

    For the rule "learned": what ``learned`` says, or without it the scale to begin with.
    """
    if learned is not None:
        scale = learned.detach().float().clamp_min(_LEAST_LEARNED) * unit_of(weight, bits, channel_dim)
        return scale, scale
    rows = as_rows(weight.detach().float(), channel_dim)
    step, scale = step_and_scale(rows, bits, "least_squares" if rule == "learned" else rule)
    return step.flatten(), scale.flatten()


def unit_of(weight: Tensor, bits: int, channel_dim: int | None) -> Tensor:
    """What a learned scale counts in: 2 mean |w| / sqrt(K), float32 [channels]."""
    rows = as_rows(weight.detach().float(), channel_dim)
    return rows.abs().mean(1) * (2 / largest_code(bits) ** 0.5)


def fake_quantized(
    weight: Tensor, bits: int, rule: str, channel_dim: int | None, learned: Tensor | None = None
) -> Tensor:
    """``scale * code`` in place of the weights, with a gradient for them.

    Args:
        weight: float weights, any shape.
        bits: 1 to 8.
        rule: one of :data:`SCALES`.
        channel_dim: dimension whose indices have scales of their own; None for one scale.
        learned: for "learned": the scale in units of :func:`unit_of`, float [channels], which gets a gradient too.

    Returns:
        a tensor like ``weight``.
    """
    if learned is not None:
        return _LearnedStep.apply(weight, learned, bits, channel_dim)
    with torch.no_grad():
        step, scale = scale_of(weight, bits, rule, channel_dim)
        codes = codes_of(weight.float(), for_broadcast(step, weight, channel_dim), bits)
        quantized = dequantized(codes, scale, channel_dim, weight.dtype)
    return _StraightThrough.apply(weight, quantized)


def dequantized(codes: Tensor, scale: Tensor, channel_dim: int | None, dtype: torch.dtype) -> Tensor:
    """``scale * code``, computed in float32. The one expression that training, freezing and loading share."""
    return (codes.float() * for_broadcast(scale.float(), codes, channel_dim)).to(dtype)


class _StraightThrough(Function):
    """Gives the second argument, and its gradient to the first."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, quantized: Tensor) -> Tensor:
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _LearnedStep(Function):
    """Esser et al. 2020, eq. 1-3, with symmetric codes; one bit passes the gradient of w like BinaryConnect.

    The gradient of the scale s = unit * learned is the paper's, divided by the unit once, so that a step of SGD changes
    s by the part that it changes it by in the paper.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, learned: Tensor, bits: int, channel_dim: int | None) -> Tensor:
        _, scale = scale_of(weight, bits, "learned", channel_dim, learned)
        ratio = weight.float() / for_broadcast(scale.clamp_min(_TINY), weight, channel_dim)
        codes = codes_of(ratio, torch.ones((), device=ratio.device), bits)
        ctx.save_for_backward(ratio, codes, unit_of(weight, bits, channel_dim))
        ctx.bits, ctx.channel_dim, ctx.dtype = bits, channel_dim, learned.dtype
        return dequantized(codes, scale, channel_dim, weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (grad,) = grads
        ratio, codes, unit = ctx.saved_tensors
        most = largest_code(ctx.bits)
        if ctx.bits == 1:
            inside, slope = torch.ones_like(codes, dtype=torch.bool), codes
        else:
            inside = ratio.abs() < most
            slope = torch.where(inside, codes - ratio, codes)
        rows = as_rows(grad.float() * slope, ctx.channel_dim)
        grad_scale = rows.sum(1) / (rows.shape[1] * most) ** 0.5
        grad_learned = torch.where(unit > 0, grad_scale / unit.clamp_min(_TINY), 0)
        return grad * inside, grad_learned.to(ctx.dtype), None, None


# -- activations --------------------------------------------------------------------------------------------------


class _ClippedReLU(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, bits: int) -> Tensor:
        used = alpha.float().clamp_min(SMALLEST_ALPHA)
        most = 2**bits - 1
        ctx.save_for_backward(x, used)
        ctx.bits, ctx.alpha_dtype = bits, alpha.dtype
        return (x.float() / used).ceil_().clamp_(0, most).mul_(used).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        x, alpha = ctx.saved_tensors
        most = 2**ctx.bits - 1
        above = x > most * alpha
        grad_inside = grad.masked_fill((x <= 0).logical_or_(above), 0.0)
        clipped = grad.flatten().float().dot(above.flatten().float())
        grad_alpha = 0.01 * (2 ** (ctx.bits - 1) * grad_inside.float().sum() + most * clipped)
        return grad_inside, grad_alpha.to(ctx.alpha_dtype).reshape(()), None


def clipped_relu(x: Tensor, alpha: Tensor, bits: int) -> Tensor:
    """ReLU with ``2^bits - 1`` positive levels, spaced by a trainable resolution (Yin et al. 2019).

    0 for x <= 0, ``alpha * ceil(x / alpha)`` up to ``L alpha``, and ``L alpha`` above, with L = 2^bits - 1. The gradient
    of x passes where 0 < x <= L alpha. That of alpha is the papers' coarse one, 0.01 times the sum of the output's
    gradient times 2^(bits-1) inside and L above; they clamp it to [-1, 1], which is left to the training loop since it
    must come after the sum over processes and micro-batches.

    Args:
        x: any shape.
        alpha: scalar; counts as at least 0.001.
        bits: 1 to 8.
    """
    return _ClippedReLU.apply(x, alpha, bits)


class _InRange(Function):
    # saves what the layers around it hold anyway, and walks over memory as few times as separate operators allow
    @staticmethod
    def forward(ctx: Any, x: Tensor, bounds: Tensor, bits: int) -> Tensor:
        quantized, step, zero = _asymmetric(x, bounds[0].float(), bounds[1].float(), bits)
        quantized = quantized.to(x.dtype)
        ctx.save_for_backward(x, quantized, step, zero)
        ctx.bits, ctx.bounds_dtype = bits, bounds.dtype
        return quantized

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, quantized, step, zero = ctx.saved_tensors
        (grad,) = grads
        most = 2**ctx.bits - 1
        is_above = x > ((most + 0.5 - zero) * step)
        is_outside = (x < ((-0.5 - zero) * step)).logical_or_(is_above)
        grad_inside = grad.masked_fill(is_outside, 0.0)
        outside = (grad - grad_inside).flatten().float()
        above = outside.dot(is_above.flatten().float())
        rounding = grad_inside.flatten().float().dot((quantized - x).flatten().float()) / (step * most)
        bounds = torch.stack([outside.sum() - above - rounding, above + rounding])
        bounds = bounds / (max(1, x[:1].numel()) * most) ** 0.5  # by the features of one example, as Esser et al.
        return grad_inside, bounds.to(ctx.bounds_dtype), None


def _asymmetric(x: Tensor, low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantized values in float32, the step, and which code is zero."""
    step, zero = _affine(low, high, bits)
    most = 2**bits - 1
    codes = (x.float() / step).round_()  # without the code of zero, which they are moved by
    return codes.clamp_(-zero, most - zero).mul_(step), step, zero


def _affine(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The step between levels, and which code is zero."""
    low, high = low.clamp_max(0), high.clamp_min(0)  # zero is a code, so that padding is exact
    step = ((high - low) / (2**bits - 1)).clamp_min(_TINY)
    return step, (-low / step).round()


def affine_of(bounds: Tensor, bits: int) -> tuple[float, int]:
    """Step and code of zero of :func:`in_range`, for other runtimes.

    Args:
        bounds: [2], as there.
        bits: 1 to 8.
    """
    step, zero = _affine(bounds[0], bounds[1], bits)
    return step.item(), int(zero.item())


def in_range(x: Tensor, bounds: Tensor, bits: int) -> Tensor:
    """Asymmetric uniform levels between two bounds; outside, the nearest bound.

    The gradient of x passes inside. That of the bounds is the learned step size's (Esser et al. 2020, for both ends of
    an asymmetric range): the rounding error inside, 1 outside, over the square root of features times levels.

    Args:
        x: [batch, ...].
        bounds: [2], the lowest and the highest value; 0 counts as inside.
        bits: 1 to 8.
    """
    return _InRange.apply(x, bounds, bits)


def in_own_range(x: Tensor, bits: int) -> Tensor:
    """Asymmetric uniform levels between the least and the greatest value of each example; gradients pass unchanged.

    Args:
        x: [batch, ...].
        bits: 1 to 8.
    """
    with torch.no_grad():
        wide = x.float()
        dims = tuple(range(1, x.dim()))
        low, high = (wide.amin(dims, keepdim=True), wide.amax(dims, keepdim=True)) if dims else (wide, wide)
        quantized = _asymmetric(wide, low, high, bits)[0].to(x.dtype)
    return _StraightThrough.apply(x, quantized)
