"""Scores that need no training: how much an index matters, from the weights and from a few calibration batches.

``w`` stands for the entries of the parameter slices that belong to an index, ``g`` for the gradient of one batch's loss:

==========  =====================================================  ===========================================
method      score of an index                                      source
==========  =====================================================  ===========================================
magnitude   mean over the matrices that make or read it of         Li et al. 2017 (arXiv 1608.08710), each
            |w| / mean of |w| over the axis                        matrix relative to itself
group_norm  |w| of everything that makes or reads it               Fang et al. 2023 (arXiv 2301.12900), eq. 4
taylor      mean over batches of abs(sum of w g), at producers     Molchanov et al. 2019 (arXiv 1906.10771), eq. 8
fisher      mean over batches of sum of (w g)^2 / 2, at producers  LeCun et al. 1990 (optimal brain damage) with
                                                                   the Fisher diagonal for the Hessian's
random      uniform in [0, 1)                                      the baseline that a score must beat
==========  =====================================================  ===========================================

``taylor`` is the first-order change of the loss when all producers of the index are set to zero; the paper squares it,
which ranks the same for one batch and keeps no unit. ``fisher`` is the empirical Fisher of single examples when batches
hold one example each, and smaller by about the batch size otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.axes import AxisGraph
from hf_compress.axes.finding import undisturbed
from hf_compress.axes.graph import Member
from hf_compress.errors import DataError, MethodError, ModelError

Loss = Callable[[nn.Module, Any], Tensor]
Batches = Iterable[Any] | None

METHODS = ("magnitude", "group_norm", "taylor", "fisher", "random")
WITH_BATCHES = ("taylor", "fisher")
NORMALIZATIONS = ("auto", "none", "mean", "max")


def importance(
    model: nn.Module,
    axes: AxisGraph,
    *,
    method: str = "magnitude",
    batches: Batches = None,
    loss: Loss | None = None,
    seed: int = 0,
    normalize: str = "auto",
) -> dict[str, Tensor]:
    """Score every index of every axis.

    The model is run in evaluation mode; modes, gradients, ``requires_grad``, buffers and the random state are left as
    they were. Frozen parameters are scored like others.

    Args:
        model: the model that the axes were found on.
        axes: from :func:`hf_compress.find_axes`.
        method: one of the table at the top of this module.
        batches: for ``"taylor"`` and ``"fisher"``: what a ``DataLoader`` gives, dicts of tensors with labels (or one
            such dict). All of them are used; a few hundred examples do. They are moved to the model's device.
        loss: ``loss(model, batch)`` -> scalar; :func:`loss_of` when not given.
        seed: for ``"random"``.
        normalize: what the scores of an axis are divided by, so that one ranking over all axes is fair: their
            ``"mean"``, their ``"max"``, or ``"none"``. ``"auto"`` is the mean for ``"group_norm"``, which grows with
            the size of the layers, and none for the others: ``"magnitude"`` is relative already, ``"taylor"`` and
            ``"fisher"`` are in units of the loss.

    Returns:
        axis name -> float64 [axis size] on the CPU, higher is more important, never negative.

    Raises:
        MethodError: for an unknown method or normalisation, or when batches are missing.
        DataError: when there is no batch.
        ModelError: when the model fails on a batch, has no loss, or a weight, the loss or a gradient is not finite.
    """
    check_method(method, batches)
    if normalize not in NORMALIZATIONS:
        raise MethodError(f"normalize={normalize!r} is not known; give one of {', '.join(NORMALIZATIONS)}.")
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        scores = {axis.name: torch.rand(axis.size, generator=generator, dtype=torch.float64) for axis in axes}
    elif method in WITH_BATCHES:
        scores = _gradient_scores(model, axes, method, batches, loss or loss_of)
    else:
        scores = magnitude_scores(model, axes) if method == "magnitude" else _group_norms(model, axes)
    if normalize == "auto":
        normalize = "mean" if method == "group_norm" else "none"
    if normalize == "none":
        return scores
    return {
        name: _relative(score, score.mean() if normalize == "mean" else score.max()) for name, score in scores.items()
    }


def check_method(method: str, batches: Batches) -> None:
    """Refuse an unknown method, or one that lacks its batches, before time is spent.

    Raises:
        MethodError: naming what is possible.
    """
    if method not in METHODS:
        raise MethodError(f"the scores {method!r} are not known; give one of {', '.join(map(repr, METHODS))}.")
    if method in WITH_BATCHES and batches is None:
        raise MethodError(
            f"the scores {method!r} come from gradients and need batches=, for example a DataLoader over a few hundred "
            "training examples. 'magnitude' and 'group_norm' need none."
        )


def _relative(score: Tensor, unit: Tensor) -> Tensor:
    return score / unit.clamp_min(torch.finfo(score.dtype).tiny)


# -- from the weights alone ---------------------------------------------------------------------------------------


def magnitude_scores(model: nn.Module, axes: AxisGraph) -> dict[str, Tensor]:
    """The norm of everything that hangs on an index, relative to the other indices of its axis.

    Every matrix or kernel that makes or reads the axis gives the Euclidean norm of its slice at each index, divided by
    the mean over the axis, so that layers of different width and scale are comparable; the score is the mean over
    these. One-dimensional parameters count only where an axis has no other. Norms as a criterion: Li et al. 2017
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
            norms = _squares(parameters, member).sqrt()
            parts.append(_relative(norms, norms.mean()))
        if parts:
            scores[axis.name] = torch.stack(parts).mean(0)
    return scores


def _group_norms(model: nn.Module, axes: AxisGraph) -> dict[str, Tensor]:
    """Norm over all parameters of an axis together, so that the largest of them say most."""
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.is_floating_point()}
    scores = {}
    for axis in axes:
        squares = [_squares(parameters, member) for member in axis.members if member.parameter in parameters]
        if squares:
            scores[axis.name] = torch.stack(squares).sum(0).sqrt()
    return scores


def _squares(parameters: Mapping[str, Tensor], member: Member) -> Tensor:
    """Sum of the squares of a member's slice at each index: float64 [axis size]."""
    values = parameters[member.parameter]
    others = [dim for dim in range(values.dim()) if dim != member.dim]
    wide = torch.promote_types(values.dtype, torch.float32)  # half precision would overflow when squared
    along = torch.linalg.vector_norm(values, dim=others, dtype=wide) if others else values.abs()
    squares = along.to("cpu", torch.float64).square()[member.positions].sum(1)
    if not bool(torch.isfinite(squares).all()):
        raise ModelError(
            f"parameter {member.parameter!r} holds NaN or infinity. Look for a training run that diverged, and load "
            "weights from before it did."
        )
    return squares


# -- from gradients -----------------------------------------------------------------------------------------------


def _gradient_scores(model: nn.Module, axes: AxisGraph, method: str, batches: Batches, loss: Loss) -> dict[str, Tensor]:
    tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    names = dict.fromkeys(m.parameter for axis in axes for m in axis.producers if m.parameter in tensors)
    needed = {name: tensors[name] for name in names if tensors[name].is_floating_point()}
    members = {axis.name: [m for m in axis.producers if m.parameter in needed] for axis in axes}
    members = {name: found for name, found in members.items() if found}
    dims = sorted({(member.parameter, member.dim) for found in members.values() for member in found})
    totals = {name: torch.zeros(axes[name].size, dtype=torch.float64) for name in members}
    count = 0
    with undisturbed(model), with_requires_grad(needed.values(), True):
        for count, batch in enumerate(batches_for(model, batches), 1):
            with torch.enable_grad():
                value = checked_loss(model, batch, loss, count)
                if not value.requires_grad:
                    raise ModelError(f"the loss of batch {count} does not depend on the parameters that make the axes.")
                gradients = torch.autograd.grad(value, list(needed.values()), allow_unused=True)
            products = {}
            for (name, tensor), gradient in zip(needed.items(), gradients, strict=True):
                if gradient is not None:
                    wide = torch.promote_types(tensor.dtype, torch.float32)
                    product = tensor.detach().to(wide) * gradient.to(wide)
                    products[name] = product if method == "taylor" else product.square() / 2
            along = {(name, dim): _along(name, products[name], dim, count) for name, dim in dims if name in products}
            for axis_name, found in members.items():
                parts = [along[m.parameter, m.dim][m.positions].sum(1) for m in found if m.parameter in products]
                if parts:
                    totals[axis_name] += torch.stack(parts).sum(0).abs()
    return {name: total / count for name, total in totals.items()}


def _along(name: str, product: Tensor, dim: int, batch: int) -> Tensor:
    """Sum over all dimensions but one: float64 on the CPU."""
    others = [other for other in range(product.dim()) if other != dim]
    result = (product.sum(others) if others else product).to("cpu", torch.float64)
    if not bool(torch.isfinite(result).all()):
        raise ModelError(
            f"the gradient of {name!r} is not finite on batch {batch}, or its weights are not. Look at the batch for "
            "extreme values; run a half-precision model in float32 for its scores."
        )
    return result


@contextmanager
def with_requires_grad(tensors: Iterable[Tensor], value: bool) -> Iterator[None]:
    """``requires_grad`` of some leaf tensors for the duration."""
    before = [(tensor, tensor.requires_grad) for tensor in tensors]
    try:
        for tensor, _ in before:
            tensor.requires_grad_(value)
        yield
    finally:
        for tensor, was in before:
            tensor.requires_grad_(was)


# -- batches and losses -------------------------------------------------------------------------------------------


def batches_for(model: nn.Module, batches: Batches) -> Iterator[Any]:
    """Every batch, with its tensors on the model's device; a single dict is one batch.

    Raises:
        DataError: when there is no batch, or ``batches`` is not iterable.
    """
    if isinstance(batches, Mapping) or (hasattr(batches, "keys") and hasattr(batches, "__getitem__")):
        batches = [batches]
    if isinstance(batches, (str, bytes, Tensor)) or not hasattr(batches, "__iter__"):
        raise DataError(f"batches must be an iterable of dicts, as a DataLoader is; got {type(batches).__name__}.")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    is_empty = True
    for batch in batches:  # type: ignore[union-attr]
        is_empty = False
        yield _to(batch, device)
    if is_empty:
        raise DataError(
            "batches is empty; give at least one batch. A generator is used up after one pass: make it anew."
        )


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping) or (hasattr(value, "keys") and hasattr(value, "__getitem__")):
        return {key: _to(value[key], device) for key in value.keys()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_to(item, device) for item in value)
    return value


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    """The loss of a model of transformers on a batch.

    It is ``model(**batch).loss`` where there is one. Without labels it is the mean cross-entropy of the logits with the
    model's own most likely classes, which asks how firmly the model holds to its predictions.

    Args:
        model: called with the batch's items as keywords.
        batch: a dict.

    Returns:
        A scalar.

    Raises:
        ModelError: when there is neither a loss nor logits [batch, classes] or [batch, classes, height, width].
        DataError: when the batch is no dict.
    """
    if not isinstance(batch, Mapping):
        raise DataError(f"each batch must be a dict of keyword arguments, got {type(batch).__name__}; or pass loss=.")
    output = model(**batch)
    value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if value is not None:
        return value
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() not in (2, 4):
        raise ModelError(
            f"{type(model).__name__} returned no loss and no logits of classes for a batch with "
            f"{', '.join(map(str, batch))}. Put labels into the batches, or pass loss=, a function of model and batch."
        )
    return F.cross_entropy(logits, logits.detach().argmax(1))


def checked_loss(model: nn.Module, batch: Any, loss: Loss, number: int) -> Tensor:
    """The loss of one batch, which must be a finite scalar; ``number`` counts batches from 1, for messages.

    Raises:
        ModelError: when it is not, or the model fails on the batch.
    """
    try:
        value: Any = loss(model, batch)
    except (ModelError, DataError):
        raise
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} failed on batch {number} ({type(error).__name__}: {error}). Give batches that the "
            "model can be called with."
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        got: Sequence[int] | str = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ModelError(f"the loss of batch {number} must be one number in a tensor, got {got}.")
    if not bool(torch.isfinite(value)):
        raise ModelError(
            f"the loss of batch {number} is {float(value)}. Look at the batch and its labels; run a half-precision model "
            "in float32 for its scores."
        )
    return value.reshape(())
