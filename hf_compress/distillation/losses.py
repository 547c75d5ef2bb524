"""What a student learns from a teacher: its logits, and which pixels of its feature maps resemble which.

Source: Li, Yang, Yin, Qi & Xin 2023, "Feature affinity assisted knowledge distillation and quantization of deep neural
networks on label-free data" (arXiv 2302.10899); the affinity loss itself comes from Wang et al. 2020 (dual
super-resolution learning). The forms are those of the paper's released code; what differs is said at each function.

The affinity of a map with ``n`` pixels is ``S = F^T F`` [n, n], where the columns of ``F`` are its pixels scaled to unit
length, so that S holds cosines. It knows nothing of channels: student and teacher may differ in their number. With
``D = S_student - S_teacher``:

===========  ===============================  ==================================================================
norm         exact                            fast, with Z [n, k] of independent standard normal numbers
===========  ===============================  ==================================================================
``squared``  ``||D||_F^2 / n^2``              ``||D Z||_F^2 / (k n^2)``: the same in expectation, for any D
``l1``       ``sum |D_ij| / n^2`` (paper)     ``sum |(D Z)_ij| / (k n^2)`` (paper's code): sqrt(2/pi) times the sum of the
                                              lengths of D's rows over n^2, which is not the exact one
===========  ===============================  ==================================================================

So weights carry over from exact to fast with ``squared``, and do not with ``l1``. The relative standard deviation of the
fast squared form is at most sqrt(2/k). The released code also has the square root of ``squared``, which its scripts do
not use; it is left out.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.errors import MethodError

Norm = Literal["squared", "l1"]
LogitLoss = Literal["mse", "kl"]

NORMS: tuple[str, ...] = get_args(Norm)
LOGIT_LOSSES: tuple[str, ...] = get_args(LogitLoss)

# of the mean squared length of a map's pixels, added to the squared length of each: a pixel of length zero has affinity
# zero to all others, and a gradient of at most a thousand times that of a usual one
_FLOOR = 1e-6
_TINY = 1e-12  # the same for a map that is zero everywhere


def feature_affinity(student: Tensor, teacher: Tensor, norm: Norm = "squared") -> Tensor:
    """How far the affinities of two feature maps are apart, exactly.

    The released code adds 1e-5 to the length of a pixel, and sums over the batch; here the floor is relative to the map,
    so that its scale does not matter, and the mean is taken, so that a weight does not depend on the batch size.

    ``squared`` needs memory linear in the number of pixels: where there are more pixels than channels, ``||S||_F`` is found
    from the channels' products instead of the pixels'. ``l1`` forms the n x n matrix.

    Args:
        student: [batch, n, channels], in any float dtype; computed in float32 at least.
        teacher: [batch, n, channels of the teacher].
        norm: ``squared`` or ``l1``.

    Returns:
        scalar, the mean over the batch.

    Raises:
        MethodError: for another norm, or when the two have different numbers of pixels.
    """
    _check(student, teacher, norm)
    with full_precision(student):
        ours, theirs = unit_pixels(student), unit_pixels(teacher)
        pixels = ours.shape[1]
        if norm == "squared" and pixels > max(ours.shape[2], theirs.shape[2]):
            squares = _square(ours, ours) + _square(theirs, theirs) - 2 * _square(ours, theirs)
            return squares / (len(ours) * pixels**2)
        difference = ours @ ours.mT - theirs @ theirs.mT
        return (difference.square() if norm == "squared" else difference.abs()).mean()


def fast_feature_affinity(
    student: Tensor,
    teacher: Tensor,
    projections: int = 15,
    norm: Norm = "squared",
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The same by random projection: time and memory linear in the number of pixels, for both norms.

    Every call draws a new Z, which all examples of the batch share. The released code begins its generator anew at every
    call, so that Z is the same at every step, and resets the global random state by it.

    Args:
        student: [batch, n, channels], in any float dtype; computed in float32 at least.
        teacher: [batch, n, channels of the teacher].
        projections: columns of Z. Paper: k, 15 in its code.
        norm: ``squared`` (unbiased) or ``l1`` (see the table of this module).
        generator: on the device of the maps; torch's own when not given.

    Returns:
        scalar, the mean over the batch.

    Raises:
        MethodError: for another norm, fewer than one projection, or different numbers of pixels.
    """
    _check(student, teacher, norm)
    if isinstance(projections, bool) or not isinstance(projections, int) or projections < 1:
        raise MethodError(
            f"projections={projections!r} is not possible: it is an integer of at least 1; the paper's is 15."
        )
    with full_precision(student):
        ours, theirs = unit_pixels(student), unit_pixels(teacher)
        pixels = ours.shape[1]
        z = torch.randn(pixels, projections, generator=generator, device=ours.device, dtype=ours.dtype)
        difference = ours @ (ours.mT @ z) - theirs @ (theirs.mT @ z)
        return (difference.square() if norm == "squared" else difference.abs()).mean() / pixels


def logit_distillation(student: Tensor, teacher: Tensor, loss: LogitLoss = "mse", temperature: float = 1.0) -> Tensor:
    """How far the logits of a student are from a teacher's.

    Args:
        student: float [batch, classes], [batch, queries, classes] or [batch, classes, height, width].
        teacher: the same shape.
        loss: ``mse``: mean squared difference (the paper's default). ``kl``: ``T^2 KL(softmax(teacher / T) ||
            softmax(student / T))`` (Hinton et al. 2015), the mean over all but the classes; the released code sums over
            the batch.
        temperature: T of ``kl``; 3 or 5 in the released code.

    Returns:
        scalar.

    Raises:
        MethodError: for another loss, a temperature that is not above 0, or shapes that differ.
    """
    if loss not in LOGIT_LOSSES:
        raise MethodError(f"the loss {loss!r} of logits is not known; give one of {', '.join(LOGIT_LOSSES)}.")
    if not 0 < temperature < float("inf"):
        raise MethodError(f"temperature={temperature!r} is not possible: it is a number above 0, for example 3.")
    if student.shape != teacher.shape:
        raise MethodError(
            f"the student's logits are {list(student.shape)} and the teacher's {list(teacher.shape)}. Both need the same "
            "classes and, where they predict maps, the same size."
        )
    with full_precision(student):
        ours, theirs = as_wide(student), as_wide(teacher)
        if loss == "mse":
            return F.mse_loss(ours, theirs)
        dim = 1 if ours.dim() == 4 else -1
        log_ours, log_theirs = (F.log_softmax(x / temperature, dim) for x in (ours, theirs))
        divergence = F.kl_div(log_ours, log_theirs, reduction="none", log_target=True).sum(dim)
        return divergence.mean() * temperature**2


def box_distillation(student: Tensor, teacher: Tensor, confidence: Tensor) -> Tensor:
    """How far the boxes of a student are from a teacher's, where the teacher sees something.

    Most rows of a detector are background, and their boxes mean nothing, so that rows count by the teacher's confidence.
    Not in the FAQD paper, which has no detectors.

    Args:
        student, teacher: [batch, rows, 4], centre and size as shares of the image.
        confidence: [batch, rows], at least 0, of the teacher that a row is an object.

    Returns:
        scalar: the sum of the four absolute differences, its mean over rows weighted by confidence.

    Raises:
        MethodError: when the shapes differ.
    """
    if student.shape != teacher.shape:
        raise MethodError(
            f"the student's boxes are {list(student.shape)} and the teacher's {list(teacher.shape)}. Both need the same "
            "grid of points or number of queries; set box_weight=0 and kd_weight=0 to compare features alone."
        )
    with full_precision(student):
        distance = (as_wide(student) - as_wide(teacher)).abs().sum(-1)
        weight = as_wide(confidence)
        return (distance * weight).sum() / weight.sum().clamp(min=1e-6)  # all 0: nothing is seen, and nothing is far


def foreground(logits: Tensor, classes: int) -> Tensor:
    """How sure a detector is that a row is an object, [batch, rows], 0 to 1.

    Args:
        logits: [batch, rows, classes], of which each stands for itself (sigmoid); or one more, the last for nothing being
            there, as DETR has it (softmax).
        classes: number of classes.
    """
    wide = as_wide(logits)
    if logits.shape[-1] == classes + 1:
        return wide.softmax(-1)[..., :-1].amax(-1)
    return wide.sigmoid().amax(-1)


def unit_pixels(features: Tensor) -> Tensor:
    """Every pixel scaled to unit length, in float32 at least: [batch, n, channels]."""
    wide = as_wide(features)
    squares = wide.square().sum(-1, keepdim=True)
    floor = _FLOOR * squares.detach().mean((1, 2), keepdim=True) + _TINY
    return wide * (squares + floor).rsqrt()


def affinity(features: Tensor) -> Tensor:
    """S of every example, [batch, n, n]: to look at; no loss but the exact ``l1`` needs it."""
    with full_precision(features):
        pixels = unit_pixels(features)
        return pixels @ pixels.mT


def full_precision(tensor: Tensor) -> AbstractContextManager[None]:
    """Without autocast on the tensor's device: squares of fp16 features overflow, and differences of cosines vanish."""
    return torch.autocast(tensor.device.type, enabled=False)


def as_wide(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _square(left: Tensor, right: Tensor) -> Tensor:
    """Of the Frobenius norm of the channels' products, [channels, channels] for every example."""
    return (left.mT @ right).square().sum()


def _check(student: Tensor, teacher: Tensor, norm: str) -> None:
    if norm not in NORMS:
        raise MethodError(f"norm={norm!r} is not known; give one of {', '.join(NORMS)}.")
    if student.dim() != 3 or teacher.dim() != 3 or student.shape[:2] != teacher.shape[:2]:
        raise MethodError(
            f"affinities of {list(student.shape)} and {list(teacher.shape)} cannot be compared: both are [batch, pixels, "
            "channels], with equally many pixels. Resize one of the maps first."
        )
