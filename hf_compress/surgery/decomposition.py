"""Weights as matrices and their low-rank factors: what rank pruning in training and factorisation afterwards share.

A weight is unfolded into a matrix (or a batch of them) by a scheme, decomposed, truncated, and folded back, or split
into the weights of two layers. For a convolution weight ``[N, C / groups, kh, kw]``:

| scheme | matrices | first layer | second layer | source |
|---|---|---|---|---|
| channel | ``[groups, N / groups, C / groups * kh * kw]`` | kh x kw, R filters | 1 x 1 | Zhang et al. 2016 |
| spatial | ``[groups, C / groups * kh, N / groups * kw]`` | kh x 1, R filters | 1 x kw | Jaderberg et al. 2014 |
| decoupled | ``[N, C / groups, kh * kw]`` | 1 x 1, N R filters | depthwise kh x kw | Guo et al. 2018 |

All three as used by Xu et al. 2020, "TRP: Trained Rank Pruning for Efficient Deep Neural Networks" (arXiv 2004.14566).
With ``groups=1`` the first two are one matrix without a batch dimension. The matrix of a linear layer is its weight for
every scheme. Groups are this package's extension: every group is a matrix of its own, all with the same rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from hf_compress.errors import MethodError, ModelError

Scheme = Literal["channel", "spatial", "decoupled"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
Method = Literal["gram64", "gram", "exact", "subspace"]

#: kinds of layer that can be decomposed
DECOMPOSABLE: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Linear)


def unfold(weight: Tensor, scheme: Scheme, groups: int = 1) -> Tensor:
    """The matrices whose rank the scheme lowers.

    Args:
        weight: ``[N, C / groups, kh, kw]``, ``[N, C / groups, k]`` (its kernel counts as k x 1) or ``[out, in]``.
        scheme: one of SCHEMES.
        groups: of the convolution.

    Returns:
        ``[..., m, n]``, see the table above.

    Raises:
        MethodError: for an unknown scheme or a weight of another number of dimensions.
    """
    check_scheme(scheme)
    if weight.ndim == 2:
        return weight
    n, c, kh, kw = _conv_shape(weight.shape)
    if scheme == "decoupled":
        return weight.reshape(n, c, kh * kw)
    if scheme == "channel":
        matrices = weight.reshape(groups, n // groups, c * kh * kw)
    else:
        matrices = weight.reshape(groups, n // groups, c, kh, kw).permute(0, 2, 3, 1, 4)
        matrices = matrices.reshape(groups, c * kh, n // groups * kw)
    return matrices[0] if groups == 1 else matrices


def fold(matrix: Tensor, shape: Sequence[int], scheme: Scheme) -> Tensor:
    """Undo :func:`unfold`.

    Args:
        matrix: what it returned, or a matrix of the same shape.
        shape: of the weight. The number of groups follows from the two shapes.
        scheme: as for :func:`unfold`.

    Returns:
        The weight.
    """
    check_scheme(scheme)
    if scheme == "spatial" and len(shape) > 2:
        n, c, kh, kw = _conv_shape(shape)
        groups = 1 if matrix.ndim == 2 else matrix.shape[0]
        matrix = matrix.reshape(groups, c, kh, n // groups, kw).permute(0, 3, 1, 2, 4)
    return matrix.reshape(tuple(shape))


def full_rank(shape: Sequence[int], scheme: Scheme, groups: int = 1) -> int:
    """The largest rank that the matrices of a weight can have."""
    return min(unfold(torch.empty(tuple(shape), device="meta"), scheme, groups).shape[-2:])


def can_decompose(module: nn.Module, scheme: Scheme) -> str | None:
    """Why the rank of a layer cannot be lowered.

    Args:
        module: any layer.
        scheme: one of SCHEMES.

    Returns:
        The reason, or None when it can.
    """
    check_scheme(scheme)
    kind = type(module).__name__
    if not isinstance(module, DECOMPOSABLE):
        return f"{kind} is neither a convolution in one or two dimensions nor a linear layer"
    weight = module.weight
    if not isinstance(weight, Tensor) or isinstance(weight, nn.UninitializedParameter):
        return f"{kind} has no weight yet"
    if not weight.is_floating_point():
        return f"its weight holds {weight.dtype} numbers"
    if full_rank(weight.shape, scheme, getattr(module, "groups", 1)) <= 1:
        return f"its matrices have rank 1 already under the scheme {scheme!r}"
    return None


def rank_for_energy(singular_values: Tensor, energy: float) -> Tensor:
    """The smallest rank k whose dropped energy is within the share: ``sum_{j>k} s_j^2 <= energy * sum_j s_j^2``.

    Source: TRP, equation 3. Never below 1.

    Args:
        singular_values: ``[..., r]``, in descending order.
        energy: share of the squared singular values that may go, in (0, 1); paper: e.

    Returns:
        int64 ``[...]``, between 1 and r.
    """
    squares = singular_values.double().square()
    # [..., j]: the energy dropped when the first j values stay; summed from the small end, where the decision falls
    dropped = squares.flip(-1).cumsum(-1).flip(-1)
    return (dropped > energy * dropped[..., :1]).sum(-1).clamp(min=1)


def factors(weight: Tensor, scheme: Scheme, rank: int, groups: int = 1) -> tuple[Tensor, Tensor]:
    """The weights of the two layers that stand for one.

    Neither has a bias by itself; that of the layer goes to the second. Stride, padding and dilation of a convolution:
    for "channel" all with the first (the second is 1 x 1, stride 1); for "spatial" the vertical parts with the first and
    the horizontal parts with the second; for "decoupled" all with the second. Exact when the rank is full.

    Args:
        weight: as for :func:`unfold`.
        scheme: one of SCHEMES.
        rank: R, of every matrix; from 1 to :func:`full_rank`.
        groups: of the convolution.

    Returns:
        first and second weight, of the weight's dtype:

        - linear: ``[R, in]`` and ``[out, R]``;
        - channel: ``[groups R, C / groups, kh, kw]`` with ``groups`` groups and ``[N, R, 1, 1]`` with ``groups`` groups;
        - spatial: ``[groups R, C / groups, kh, 1]`` and ``[N, R, 1, kw]``, both with ``groups`` groups;
        - decoupled, a sum of R branches: ``[N R, C / groups, 1, 1]`` with ``groups`` groups and ``[N, R, kh, kw]`` with N.

        A convolution in one dimension gets weights in one dimension.

    Raises:
        MethodError: for a rank out of range.
        ModelError: when the weight is not finite.
    """
    highest = full_rank(weight.shape, scheme, groups)
    if isinstance(rank, bool) or not 1 <= rank <= highest:
        raise MethodError(f"rank={rank!r} is not possible for a weight {tuple(weight.shape)}: from 1 to {highest}.")
    matrices = unfold(weight.detach(), scheme, groups).double()
    left, values, right = svd(matrices, method="exact")
    left, values, right = left[..., :rank], values[..., :rank], right[..., :rank, :]
    if scheme == "spatial" and weight.ndim > 2:  # the authors' code puts all of S into the second factor here
        right = values[..., :, None] * right
    else:
        left, right = left * values[..., None, :].sqrt(), values[..., :, None].sqrt() * right
    if weight.ndim == 2:
        first, second = right, left
    else:
        n, c, kh, kw = _conv_shape(weight.shape)
        if scheme == "channel":
            first = right.reshape(groups * rank, c, kh, kw)
            second = left.reshape(n, rank, 1, 1)
        elif scheme == "spatial":
            first = left.reshape(groups, c, kh, rank).permute(0, 3, 1, 2).reshape(groups * rank, c, kh, 1)
            second = right.reshape(groups, rank, n // groups, kw).transpose(1, 2).reshape(n, rank, 1, kw)
        else:
            first = left.transpose(-2, -1).reshape(n * rank, c, 1, 1)
            second = right.reshape(n, rank, kh, kw)
        if weight.ndim == 3:  # kw is 1
            first, second = first.squeeze(-1), second.squeeze(-1)
    return first.to(weight.dtype).contiguous(), second.to(weight.dtype).contiguous()


def svd(
    matrices: Tensor,
    *,
    method: Method = "gram64",
    rank: int | None = None,
    start: Tensor | None = None,
    names: Sequence[str] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition of a batch of matrices.

    Measured on one CPU core, float32 matrices of 512 x 4608, singular values from 1 to 0.01, energy 0.02: "exact" 710
    ms, error of the truncated matrix 2e-6 and of U Vh 3e-6 (against float64); "gram64" 150 ms and exact to float32;
    "gram" 75 ms, 1e-6 and 3e-6; "subspace" 63 ms with a start of a third of the rank. At energy 1e-4, the kept singular
    values reach further down and the errors of "gram" are 2e-4 and 6e-3 at worst, where "gram64" stays exact. Hence the
    default. A truncation by U U^T M is a projection with every method, so that the energy it drops is what the S say.

    A decomposition that fails or comes out non-finite is repeated with slower exact ones, with a warning.

    Args:
        matrices: ``[..., m, n]``, floating point; half precision is worked on in float32.
        method: "gram64" takes the eigenvectors of the Gram matrix of the smaller side in float64; "gram" does so in the
            dtype of the matrices, where TF32 must be off; "exact" is ``torch.linalg.svd``, on CUDA with
            PyTorch's own choice of driver (gesvdj, or gesvd where that fails); "subspace" finds the leading triples by two steps of subspace iteration.
        rank: q, for "subspace" without start: begins with q random directions, the same in every call.
        start: ``[..., m, q]``, for "subspace": columns that span roughly the leading left singular vectors, such as
            those of a former decomposition.
        names: of the layers, along the first dimension or one for all, for messages.

    Returns:
        U ``[..., m, r]``, S ``[..., r]`` in descending order (up to rounding) and Vh ``[..., r, n]``; r = min(m, n), or q for
        "subspace".

    Raises:
        MethodError: for an unknown method or rank.
        ModelError: when the matrices hold NaN or infinite values, or no method succeeds.
    """
    work = matrices.float() if matrices.dtype in (torch.float16, torch.bfloat16) else matrices
    if method == "subspace" and start is None:
        start = _random_start(work, rank)
    try:
        found = _decompose(work, method, start)
        if all(part.isfinite().all() for part in found):
            return found
        problem = "the result is not finite"
    except torch.linalg.LinAlgError as error:
        problem = str(error).split("\n")[0]
    batch = work if work.ndim > 2 else work[None]
    finite = batch.isfinite().flatten(1).all(1)
    if not finite.all():
        bad = int((~finite).nonzero()[0])
        raise ModelError(
            f"the weight of {_layer(names, bad)} holds NaN or infinite values; the training diverged. Lower the "
            "learning rate."
        )
    warnings.warn(
        f"the decomposition ({method}) of {_layer(names, None)} failed ({problem}); it is repeated by a slower exact "
        "one.",
        RuntimeWarning,
        stacklevel=2,
    )
    parts = [_decompose_slowly(batch[i], _layer(names, i)) for i in range(len(batch))]
    rank = start.shape[-1] if method == "subspace" and start is not None else min(work.shape[-2:])
    u, s, vh = (torch.stack(part).to(work) for part in zip(*parts, strict=True))
    u, s, vh = u[..., :rank], s[..., :rank], vh[..., :rank, :]
    return (u, s, vh) if work.ndim > 2 else (u[0], s[0], vh[0])


def check_scheme(scheme: str) -> None:
    """Raises MethodError for a name that is not in SCHEMES."""
    if scheme not in SCHEMES:
        raise MethodError(f"scheme={scheme!r} is not possible; choose one of {', '.join(SCHEMES)}.")


# -- inside ---------------------------------------------------------------------------------------------------------


def _conv_shape(shape: Sequence[int]) -> tuple[int, int, int, int]:
    if len(shape) == 3:
        return shape[0], shape[1], shape[2], 1
    if len(shape) != 4:
        raise MethodError(
            f"a weight {tuple(shape)} cannot be unfolded: linear layers and convolutions in one or two dimensions can."
        )
    return shape[0], shape[1], shape[2], shape[3]


def _decompose(matrices: Tensor, method: Method, start: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if method == "exact":
        u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
        return u, s, vh
    if method == "gram64":
        u, s, vh = _gram(matrices.double())
        return u.to(matrices.dtype), s.to(matrices.dtype), vh.to(matrices.dtype)
    if method == "gram":
        return _gram(matrices)
    if method != "subspace" or start is None:
        raise MethodError(f"method={method!r} is not possible; choose one of {', '.join(get_args(Method))}.")
    basis = start.to(matrices)
    for _ in range(2):
        basis = torch.linalg.qr(matrices @ (matrices.mT @ basis)).Q
    u, s, vh = _gram(basis.mT @ matrices)
    return basis @ u, s, vh


def _gram(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if matrices.shape[-2] > matrices.shape[-1]:
        v, s, uh = _gram(matrices.mT)
        return uh.mT, s, v.mT
    u = torch.linalg.eigh(matrices @ matrices.mT).eigenvectors.flip(-1)
    vh = u.mT @ matrices
    s = vh.norm(dim=-1)  # more exact than the square roots of the eigenvalues
    return u, s, vh / s.clamp(min=torch.finfo(s.dtype).tiny)[..., None]


def _random_start(matrices: Tensor, rank: int | None) -> Tensor:
    *batch, m, n = matrices.shape
    if rank is None or not 1 <= rank <= min(m, n):
        raise MethodError(f"rank={rank!r} is not possible for matrices of {m} x {n}: from 1 to {min(m, n)}.")
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*batch, m, rank, dtype=torch.float64, generator=generator).to(matrices)


def _decompose_slowly(matrix: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    # LAPACK's divide and conquer in float64 first; then the eigenvectors of the Gram matrix, another algorithm
    cpu = matrix.double().cpu()
    for method in ("exact", "gram64"):
        try:
            found = _decompose(cpu, method, None)
        except torch.linalg.LinAlgError:
            continue
        if all(part.isfinite().all() for part in found):
            return found
    raise ModelError(
        f"no decomposition of the weight of {name} converges. Lower the learning rate, or leave this layer out."
    )


def _layer(names: Sequence[str], index: int | None) -> str:
    if not names:
        return "a layer"
    if index is None or len(names) == 1:
        return ", ".join(repr(name) for name in dict.fromkeys(names))
    return repr(names[index]) if index < len(names) else "a layer"
