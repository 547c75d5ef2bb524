"""How much of a layer a rank keeps, and the weight of that rank: from the weight alone, or from what the layer reads.

Without data the distance is that of the weights, and the truncated singular value decomposition is closest. With the
second moments ``G = E[x x^T]`` of a layer's inputs x the distance is that of the outputs, ``E |(W - W') x|^2 = tr((W - W') G
(W - W')^T)``, as in Zhang et al. 2016 (arXiv 1505.06798, PCA of responses), DRONE (Chen et al. 2021) and SVD-LLM (Wang et al.
2024, arXiv 2403.07378). Whitening is avoided: the closest W' of rank R is ``U U^T W``, with U the R leading eigenvectors
of ``W G W^T``, so that a singular G does no harm. For the schemes "spatial" and "decoupled", whose first layer sees less
than the whole input, the same projection with the moments of what it sees is a heuristic (a reconstruction of this
package); where it does worse than the plain decomposition, the plain one is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.axes.finding import run_examples, undisturbed
from hf_compress.errors import ModelError

from .decomposition import Scheme, fold, svd, unfold
from .importance import Batches, batches_for

_RIDGE = 1e-9  # of the mean moment: orders directions in which the inputs say nothing
_MOST_NUMBERS = 2**24  # unfolded at once


def energies(weight: Tensor, scheme: Scheme, groups: int, moment: Tensor | None = None, name: str = "") -> Tensor:
    """Energy of every component, largest first: the squared singular values, summed over the matrices of a layer.

    Args:
        weight: of a linear layer or convolution.
        scheme: how it is unfolded.
        groups: of the convolution.
        moment: float64 [groups, K, K] from :func:`input_moments`; energies are then those of the output.
        name: of the layer, for messages.

    Returns:
        float64 [full rank].
    """
    matrices = unfold(weight.detach().double(), scheme, groups)
    if moment is None:
        squares = svd(matrices, method="gram", names=[name] if name else ())[1].square()
    else:
        squares = torch.linalg.eigvalsh(_weighted(matrices, weight, scheme, groups, moment)).flip(-1)
        squares = squares[..., : min(matrices.shape[-2:])].clamp_min(0)
    return squares.reshape(-1, squares.shape[-1]).sum(0)


def shares_lost(energy: Tensor) -> Tensor:
    """Share of the energy that goes when the first 1, 2, ... components stay: [full rank], falling to zero."""
    total = energy.sum()
    dropped = torch.cat([energy.flip(0).cumsum(0).flip(0)[1:], energy.new_zeros(1)])
    return dropped / total if total > 0 else torch.zeros_like(dropped)


def numerical_rank(weight: Tensor, scheme: Scheme, groups: int, energy: Tensor | None = None) -> int:
    """How many components of a weight are more than rounding, as ``torch.linalg.matrix_rank`` says it; at least 1.

    A component counts where its singular value (the root of its energy, where a layer has several matrices) is above
    ``max(m, n) * eps`` of the largest. ``eps`` is that of float32 for halves too: their own would call real components
    rounding.

    Args:
        weight, scheme, groups: as for :func:`energies`.
        energy: of the weight, where it is known already.
    """
    energy = energies(weight, scheme, groups) if energy is None else energy
    eps = torch.finfo(torch.promote_types(weight.dtype, torch.float32)).eps
    longest = max(unfold(weight.detach(), scheme, groups).shape[-2:])
    return max(1, int((energy > (longest * eps) ** 2 * energy[0]).sum()))


def low_rank_weight(weight: Tensor, scheme: Scheme, groups: int, rank: int, moment: Tensor | None = None) -> Tensor:
    """The weight of the given rank that is closest, by weights or by outputs.

    Args:
        weight: of a linear layer or convolution.
        scheme: how it is unfolded.
        groups: of the convolution.
        rank: of every matrix.
        moment: as for :func:`energies`.

    Returns:
        float64, of the weight's shape.
    """
    wide = weight.detach().double()
    matrices = unfold(wide, scheme, groups)
    left, values, right = svd(matrices, method="exact")
    plain = fold((left[..., :rank] * values[..., None, :rank]) @ right[..., :rank, :], weight.shape, scheme)
    if moment is None:
        return plain
    vectors = torch.linalg.eigh(_weighted(matrices, weight, scheme, groups, moment)).eigenvectors.flip(-1)[..., :rank]
    if _reads_columns(weight, scheme):
        projected = vectors @ (vectors.mT @ matrices)
    else:
        projected = (matrices @ vectors) @ vectors.mT
    found = fold(projected, weight.shape, scheme)
    return min((found, plain), key=lambda new: output_error(wide - new, groups, moment))


def output_error(difference: Tensor, groups: int, moment: Tensor) -> float:
    """Mean square of what a change of the weight does to the output: the sum over output channels.

    Args:
        difference: of two weights.
        groups: of the convolution.
        moment: as for :func:`energies`.
    """
    rows = difference.double().reshape(groups, difference.shape[0] // groups, -1)
    return float(((rows @ moment) * rows).sum().clamp_min(0))


def _reads_columns(weight: Tensor, scheme: Scheme) -> bool:
    """Whether the columns of the matrices are the layer's inputs, and their rows its outputs."""
    return weight.ndim == 2 or scheme == "channel"


def _weighted(matrices: Tensor, weight: Tensor, scheme: Scheme, groups: int, moment: Tensor) -> Tensor:
    """``W G W^T``, on the side that is not the first layer's input: its eigenvectors are kept."""
    if _reads_columns(weight, scheme):
        seen, inputs_last = moment, matrices
    else:
        seen, inputs_last = _moment_of_first(weight, scheme, groups, moment), matrices.mT
    if inputs_last.ndim == 2:
        seen = seen[0]
    elif scheme == "decoupled" and weight.ndim > 2:
        seen = seen.repeat_interleave(len(inputs_last) // groups, dim=0)
    mean = seen.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return inputs_last @ seen @ inputs_last.mT + _RIDGE * mean * (inputs_last @ inputs_last.mT)


def _moment_of_first(weight: Tensor, scheme: Scheme, groups: int, moment: Tensor) -> Tensor:
    """Moments of what the first layer of a scheme reads, averaged over its places under the kernel."""
    c, kh, kw = weight.shape[1], weight.shape[2], (*weight.shape, 1)[3]
    whole = moment.reshape(groups, c, kh, kw, c, kh, kw)
    if scheme == "spatial":
        return torch.einsum("gcabdeb->gcade", whole).reshape(groups, c * kh, c * kh) / kw
    return torch.einsum("gcabdab->gcd", whole) / (kh * kw)


# -- moments of inputs ----------------------------------------------------------------------------------------------


def input_moments(model: nn.Module, layers: Mapping[str, nn.Module], batches: Batches) -> dict[str, Tensor]:
    """Second moments of what layers read, over all batches; the model is run in evaluation mode and left as it was.

    Args:
        model: called with the items of every batch as keywords (or with the batch, where that is no dict).
        layers: path -> linear layer or convolution.
        batches: what a ``DataLoader`` gives; labels are not needed. A few hundred examples do.

    Returns:
        path -> float64 [groups, K, K], the mean over positions of x x^T; K = in_features, or input channels of a group
        times kernel size, in the order of the weight. Layers that did not run are missing.

    Raises:
        DataError: when there is no batch.
        ModelError: when the model fails on a batch, or what a layer reads is not finite.
    """
    totals: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(path: str, layer: nn.Module, value: Tensor) -> None:
        for rows in _rows(layer, value.detach()):  # [positions, groups, K]
            product = torch.einsum("pgk,pgl->gkl", rows, rows)
            totals[path] = totals[path] + product if path in totals else product
            counts[path] = counts.get(path, 0) + len(rows)

    with undisturbed(model), torch.no_grad(), inputs_seen(layers, add):
        for batch in batches_for(model, batches):
            run_examples(model, batch)
    for path, total in totals.items():
        if not bool(total.isfinite().all()):
            raise ModelError(f"what {path!r} reads is not finite on these batches. Look at them for extreme values.")
    return {path: total / counts[path] for path, total in totals.items()}


@contextmanager
def inputs_seen(layers: Mapping[str, nn.Module], see: Callable[[str, nn.Module, Tensor], None]) -> Iterator[None]:
    """For the duration, ``see(path, layer, input)`` at every call of a layer."""

    def hook(path: str) -> Callable[..., None]:
        def call(layer: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
            see(path, layer, args[0] if args else kwargs["input"])

        return call

    handles = [layer.register_forward_pre_hook(hook(path), with_kwargs=True) for path, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(layer: nn.Module, value: Tensor) -> Iterable[Tensor]:
    """What every position of the output is made of: float64 [positions, groups, K], in pieces."""
    if isinstance(layer, nn.Linear):
        rows = value.reshape(-1, 1, value.shape[-1])
        yield from (piece.double() for piece in rows.split(max(1, _MOST_NUMBERS // value.shape[-1])))
        return
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d))
    dims = len(layer.kernel_size)
    images = value.reshape(-1, *value.shape[-dims - 1 :])  # one image may come without a batch dimension
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padding = layer._reversed_padding_repeated_twice
    size = layer.in_channels // layer.groups
    for image in images.split(1):
        image = image.double()
        padded = F.pad(image, padding, mode=mode) if any(padding) else image
        kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
        if dims == 1:
            padded = padded[..., None]
            kernel, stride, dilation = (*kernel, 1), (*stride, 1), (*dilation, 1)
        patches = F.unfold(padded, kernel, dilation=dilation, stride=stride)[0]  # [channels * kernel, positions]
        patches = patches.reshape(layer.groups, -1, patches.shape[-1]).permute(2, 0, 1)
        assert patches.shape[-1] % size == 0
        yield patches
