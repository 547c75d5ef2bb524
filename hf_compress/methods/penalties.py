"""Sparsity penalties on the scales of axes.

Each penalty is a value object with pure functions of a tensor: value, subgradient and, where a closed form exists, the
proximal operator. They know neither models nor training.

Sources: network slimming, Liu et al. 2017 (arXiv 1708.06519); the nonconvex penalties for it, Bui et al. 2021
(arXiv 2010.01242); transformed l1 and its proximal operator, Zhang & Xin 2017; half thresholding, Xu et al. 2012;
two-thirds thresholding, Cao, Sun & Xu 2013; SCAD, Fan & Li 2001; MCP, Zhang 2010.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_compress.errors import MethodError


class Penalty(ABC):
    """A function ``r`` of one number, symmetric, zero at zero and never falling with the magnitude.

    ``strength`` is the lambda of the papers. It multiplies ``r`` for l1, lp and transformed l1; MCP and SCAD carry it
    inside, as their papers do.
    """

    name: ClassVar[str]

    @abstractmethod
    def value(self, x: Tensor, strength: float) -> Tensor:
        """The penalty of every entry; same shape as ``x``. Sum it for the penalty of a whole tensor."""

    @abstractmethod
    def subgradient(self, x: Tensor, strength: float) -> Tensor:
        """The derivative at every entry; same shape as ``x``, and zero where an entry is zero."""

    @abstractmethod
    def proximal(self, v: Tensor, step: float, strength: float) -> Tensor:
        """``argmin_u step * value(u) + (u - v)^2 / 2`` at every entry.

        Where two minimisers tie, the smaller one.

        Args:
            v: any shape.
            step: at least 0; the step length of the method that calls.
            strength: the same as in :meth:`value`.
        """

    def to_json(self) -> dict[str, Any]:
        """``{"name": ..., parameters}``, which ``penalty_from(**data)`` reads back."""
        return {"name": self.name, **asdict(self)}  # type: ignore[call-overload]


@dataclass(frozen=True)
class L1(Penalty):
    """``|x|``: network slimming's own penalty."""

    name: ClassVar[str] = "l1"

    def value(self, x: Tensor, strength: float) -> Tensor:
        return strength * x.abs()

    def subgradient(self, x: Tensor, strength: float) -> Tensor:
        return strength * x.sign()

    def proximal(self, v: Tensor, step: float | Tensor, strength: float) -> Tensor:
        """Soft thresholding; ``step`` may also be a tensor that broadcasts with ``v``."""
        return v.sign() * (v.abs() - step * strength).clamp_min(0)


@dataclass(frozen=True)
class Lp(Penalty):
    """``|x|^p``.

    The slope grows without bound towards zero, and is undefined at zero; the subgradient is 0 there by convention (the
    papers' code gives NaN).

    Args:
        p: between 0 and 1, both excluded.
        epsilon: the slope is that at ``|x| = epsilon`` wherever ``|x|`` is smaller. 0 is the paper's penalty, whose
            subgradient throws a scale of 1e-8 away from zero with 5000 times ``strength`` (p = 1/2); 1e-4 holds that
            to 50 times.
    """

    p: float
    epsilon: float = 0.0
    name: ClassVar[str] = "lp"

    def __post_init__(self) -> None:
        _check(self, "p", 0 < _number(self, "p") < 1, "between 0 and 1, both excluded; for p = 1 use l1")
        _check(self, "epsilon", _number(self, "epsilon") >= 0, "at least 0")

    def value(self, x: Tensor, strength: float) -> Tensor:
        return strength * x.abs() ** self.p

    def subgradient(self, x: Tensor, strength: float) -> Tensor:
        # the smallest normal number in place of zero keeps the power finite; the sign makes the product zero there
        magnitude = x.abs().clamp_min(max(self.epsilon, torch.finfo(x.dtype).tiny))
        return strength * self.p * x.sign() * magnitude ** (self.p - 1)

    def proximal(self, v: Tensor, step: float, strength: float) -> Tensor:
        """Closed form for ``p`` = 1/2 and 2/3 alone.

        Raises:
            MethodError: for any other ``p``.
        """
        mu, size = step * strength, v.abs()
        if math.isclose(self.p, 1 / 2):
            threshold = 54 ** (1 / 3) / 4 * (2 * mu) ** (2 / 3)
        elif math.isclose(self.p, 2 / 3):
            threshold = 2 / 3 * 3**0.25 * (2 * mu) ** 0.75
        else:
            raise MethodError(
                f"the proximal operator of lp with p={self.p} has no closed form; it has one for p=1/2 and p=2/3. Use "
                "one of these, or another penalty."
            )
        if mu < 1e-18:  # what is kept moves by less than 1e-12, and the powers below would overflow
            kept = size
        elif self.p < 0.6:
            safe = size.clamp_min(threshold)
            angle = torch.acos((mu / 4 * (safe / 3) ** -1.5).clamp(max=1))
            kept = 2 / 3 * safe * (1 + torch.cos(2 * math.pi / 3 - 2 / 3 * angle))
        else:
            safe = size.clamp_min(threshold)
            angle = torch.acosh((27 / 16 * safe**2 * (2 * mu) ** -1.5).clamp_min(1))
            a = 2 / math.sqrt(3) * (2 * mu) ** 0.25 * torch.cosh(angle / 3).sqrt()
            kept = ((a + (2 * safe / a - a**2).clamp_min(0).sqrt()) / 2) ** 3
        return torch.where(size <= threshold, 0, v.sign() * torch.minimum(kept, size))  # never past v by rounding


@dataclass(frozen=True)
class TransformedL1(Penalty):
    """``(a + 1) |x| / (a + |x|)``: between l0 (a towards 0) and l1 (a towards infinity).

    Args:
        a: above 0.
    """

    a: float = 1.0
    name: ClassVar[str] = "transformed_l1"

    def __post_init__(self) -> None:
        _check(self, "a", _number(self, "a") > 0, "above 0")

    def value(self, x: Tensor, strength: float) -> Tensor:
        size = x.abs()
        return strength * (self.a + 1) * size / (self.a + size)

    def subgradient(self, x: Tensor, strength: float) -> Tensor:
        return strength * self.a * (self.a + 1) * x.sign() / (self.a + x.abs()) ** 2

    def proximal(self, v: Tensor, step: float, strength: float) -> Tensor:
        mu, a = step * strength, self.a
        if mu <= a**2 / (2 * (a + 1)):
            threshold = mu * (a + 1) / a  # continuous there, like soft thresholding
        else:
            threshold = math.sqrt(2 * mu * (a + 1)) - a / 2  # jumps there
        size = v.abs()
        safe = size.clamp_min(threshold)
        angle = torch.acos((1 - 27 * mu * a * (a + 1) / (2 * (a + safe) ** 3)).clamp(-1, 1))
        kept = 2 / 3 * (a + safe) * torch.cos(angle / 3) - 2 * a / 3 + safe / 3
        return torch.where(size <= threshold, 0, v.sign() * torch.minimum(kept, size))  # never past v by rounding


@dataclass(frozen=True)
class MCP(Penalty):
    """Minimax concave penalty: slope ``strength - |x| / a``, and flat beyond ``a * strength``.

    Acts only on scales within ``a * strength`` of zero: with scales that start at 0.5 and a strength of 1e-4, nothing
    happens unless ``a`` is at least 5000.

    Args:
        a: above 0 (the literature calls it gamma).
    """

    a: float
    name: ClassVar[str] = "mcp"

    def __post_init__(self) -> None:
        _check(self, "a", _number(self, "a") > 0, "above 0")

    def value(self, x: Tensor, strength: float) -> Tensor:
        size = x.abs().clamp_max(self.a * strength)
        return strength * size - size**2 / (2 * self.a)

    def subgradient(self, x: Tensor, strength: float) -> Tensor:
        return x.sign() * (strength - x.abs() / self.a).clamp_min(0)

    def proximal(self, v: Tensor, step: float, strength: float) -> Tensor:
        size = v.abs()
        if step >= self.a:  # too concave for an interior minimum: hard thresholding
            return torch.where(size <= strength * math.sqrt(self.a * step), 0, v)
        inner = v.sign() * (size - step * strength).clamp_min(0) / (1 - step / self.a)
        return torch.where(size <= self.a * strength, inner, v)


@dataclass(frozen=True)
class SCAD(Penalty):
    """Smoothly clipped absolute deviation: l1 up to ``strength``, bending to flat at ``a * strength``.

    Acts only on scales within ``a * strength`` of zero; see :class:`MCP`.

    Args:
        a: above 2; Fan & Li use 3.7.
    """

    a: float = 3.7
    name: ClassVar[str] = "scad"

    def __post_init__(self) -> None:
        _check(self, "a", _number(self, "a") > 2, "above 2")

    def value(self, x: Tensor, strength: float) -> Tensor:
        size, end = x.abs(), self.a * strength
        bent = (2 * end * size - size**2 - strength**2) / (2 * (self.a - 1))
        flat = strength**2 * (self.a + 1) / 2
        return torch.where(size <= strength, strength * size, torch.where(size <= end, bent, flat))

    def subgradient(self, x: Tensor, strength: float) -> Tensor:
        return x.sign() * ((self.a * strength - x.abs()) / (self.a - 1)).clamp(0, strength)

    def proximal(self, v: Tensor, step: float, strength: float) -> Tensor:
        size, a = v.abs(), self.a
        soft = v.sign() * (size - step * strength).clamp_min(0)
        if step >= a - 1:  # too concave for a minimum on the bend: soft thresholding jumps to the identity
            jump = strength * ((a + 1 + step) / 2 if step <= a + 1 else math.sqrt(step * (a + 1)))
            return torch.where(size <= jump, soft, v)
        bent = ((a - 1) * v - v.sign() * step * a * strength) / (a - 1 - step)
        return torch.where(size <= (1 + step) * strength, soft, torch.where(size <= a * strength, bent, v))


PENALTIES: Mapping[str, type[Penalty]] = {kind.name: kind for kind in (L1, Lp, TransformedL1, MCP, SCAD)}


def penalty_from(name: str, **parameters: float) -> Penalty:
    """A penalty by its name.

    Args:
        name: ``"l1"``, ``"lp"``, ``"transformed_l1"``, ``"mcp"`` or ``"scad"``.
        parameters: those of the penalty's class.

    Raises:
        MethodError: for an unknown name or parameter, a missing one, or one out of range.
    """
    if not isinstance(name, str) or name not in PENALTIES:
        raise MethodError(f"there is no penalty {name!r}; choose one of {', '.join(PENALTIES)}.")
    kind = PENALTIES[name]
    fields = kind.__dataclass_fields__  # type: ignore[attr-defined]
    known = [key for key in fields if key != "name"]
    if unknown := [key for key in parameters if key not in known]:
        takes = f"takes {', '.join(known)}" if known else "takes no parameter"
        raise MethodError(f"penalty {name!r} has no parameter {unknown[0]!r}; it {takes}.")
    try:
        return kind(**parameters)
    except TypeError:
        raise MethodError(f"penalty {name!r} needs its parameter {known[0]!r}: give it a number.") from None


def as_penalty(penalty: str | Mapping[str, Any] | Penalty) -> Penalty:
    """A penalty from what callbacks take: a name, a mapping ``{"name": ..., parameters}`` or a Penalty.

    Raises:
        MethodError: as :func:`penalty_from`.
    """
    if isinstance(penalty, Penalty):
        return penalty
    return penalty_from(**{"name": None, **penalty}) if isinstance(penalty, Mapping) else penalty_from(penalty)


def _number(penalty: Penalty, field: str) -> float:
    value = getattr(penalty, field)
    valid = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    _check(penalty, field, valid, "a finite number")
    return float(value)


def _check(penalty: Penalty, field: str, valid: bool, wanted: str) -> None:
    if not valid:
        raise MethodError(f"penalty {penalty.name!r}: {field}={getattr(penalty, field)!r} must be {wanted}.")
