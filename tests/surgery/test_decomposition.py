import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from hf_compress.errors import MethodError, ModelError
from hf_compress.surgery import decomposition
from hf_compress.surgery.decomposition import (
    SCHEMES,
    can_decompose,
    factors,
    fold,
    full_rank,
    rank_for_energy,
    svd,
    unfold,
)

# weight shape, groups
WEIGHTS = {
    "square": ((8, 8, 3, 3), 1),
    "wide kernel": ((6, 4, 1, 5), 1),
    "1x1": ((5, 9, 1, 1), 1),
    "two groups": ((12, 4, 3, 5), 2),
    "depthwise": ((6, 1, 3, 5), 6),
    "depthwise, two filters each": ((6, 1, 3, 3), 3),
    "one dimension": ((6, 4, 5), 1),
    "one dimension, groups": ((6, 2, 3), 3),
    "linear": ((7, 5), 1),
}
CASES = list(itertools.product(WEIGHTS, SCHEMES))


def weight_of(name):
    shape, groups = WEIGHTS[name]
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), groups


def in_two_layers(x, first, second, scheme, groups, stride, padding, dilation):
    """What the docstring of factors says that the two convolutions do."""
    convolve = F.conv1d if x.ndim == 3 else F.conv2d
    whole = {"stride": stride, "padding": padding, "dilation": dilation}
    alone = {key: tuple(int(key != "padding") for _ in stride) for key in whole}
    if scheme == "channel" or (scheme == "spatial" and x.ndim == 3):
        a, b, second_groups = whole, alone, groups
    elif scheme == "spatial":
        a = {key: (value[0], alone[key][1]) for key, value in whole.items()}
        b = {key: (alone[key][0], value[1]) for key, value in whole.items()}
        second_groups = groups
    else:
        a, b, second_groups = alone, whole, second.shape[0]
    return convolve(convolve(x, first, groups=groups, **a), second, groups=second_groups, **b)


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_fold_undoes_unfold(name, scheme):
    weight, groups = weight_of(name)
    matrices = unfold(weight, scheme, groups)
    assert torch.equal(fold(matrices, weight.shape, scheme), weight)
    assert matrices.numel() == weight.numel() and full_rank(weight.shape, scheme, groups) == min(matrices.shape[-2:])


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_factors_of_full_rank_are_the_same_function(name, scheme):
    weight, groups = weight_of(name)
    generator = torch.Generator().manual_seed(1)
    first, second = factors(weight, scheme, full_rank(weight.shape, scheme, groups), groups)
    if weight.ndim == 2:
        x = torch.randn(3, weight.shape[1], dtype=torch.float64, generator=generator)
        found, expected = F.linear(F.linear(x, first), second), F.linear(x, weight)
    else:
        dims = weight.ndim - 2
        stride, padding, dilation = (2, 1)[:dims], (1, 3)[:dims], (1, 2)[:dims]
        x = torch.randn(2, weight.shape[1] * groups, *(11, 13)[:dims], dtype=torch.float64, generator=generator)
        convolve = F.conv1d if dims == 1 else F.conv2d
        expected = convolve(x, weight, stride=stride, padding=padding, dilation=dilation, groups=groups)
        found = in_two_layers(x, first, second, scheme, groups, stride, padding, dilation)
    assert first.is_contiguous() and second.is_contiguous()
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)  # float64, sums of up to 72 products


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_truncated_factors_are_the_nearest_of_their_rank(name, scheme):
    """Eckart and Young: no matrix of that rank is nearer than the tail of the singular values."""
    weight, groups = weight_of(name)
    values = torch.linalg.svdvals(unfold(weight, scheme, groups))
    for rank in range(1, full_rank(weight.shape, scheme, groups) + 1):
        first, second = factors(weight, scheme, rank, groups)
        if weight.ndim == 2:
            product = second @ first
        else:  # an impulse at every input channel gives the weight back
            c = weight.shape[1] * groups
            size = [2 * k - 1 for k in weight.shape[2:]]
            x = torch.zeros(c, c, *size, dtype=torch.float64)
            x[(range(c), range(c), *([k - 1] * c for k in weight.shape[2:]))] = 1
            none, one = (0,) * len(size), (1,) * len(size)
            answer = in_two_layers(x, first, second, scheme, groups, one, none, one).flip(tuple(range(2, weight.ndim)))
            rows = torch.arange(len(weight)) // (len(weight) // groups)  # the group of every filter
            product = torch.stack(
                [answer[g * weight.shape[1] : (g + 1) * weight.shape[1], i] for i, g in enumerate(rows)]
            )
        error = (product - weight).square().sum()
        torch.testing.assert_close(error, values[..., rank:].square().sum(), atol=1e-12, rtol=1e-9)


def test_rank_out_of_range_is_refused():
    weight, _ = weight_of("linear")
    for rank in (0, 6, -1, True):
        with pytest.raises(MethodError, match="from 1 to 5"):
            factors(weight, "channel", rank)
    with pytest.raises(MethodError, match="channel, spatial, decoupled"):
        unfold(weight, "tucker")


# -- the energy rule ---------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.lists(st.floats(0, 1e3, width=32), min_size=1, max_size=30),
    st.floats(1e-6, 1 - 1e-6),
    st.floats(1e-6, 1 - 1e-6),
)
def test_energy_rule(values, energy, other):
    s = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    k, squares = int(rank_for_energy(s, energy)), [value**2 for value in s.tolist()]
    total = math.fsum(squares)
    assert 1 <= k <= len(s)
    # a relative 1e-12 either way: the sums are rounded
    assert math.fsum(squares[k:]) <= energy * total * (1 + 1e-12)
    assert k == 1 or math.fsum(squares[k - 1 :]) >= energy * total * (1 - 1e-12)
    low, high = sorted([energy, other])
    assert rank_for_energy(s, high) <= rank_for_energy(s, low)
    assert torch.equal(rank_for_energy(torch.stack([s, s * 2]), energy), torch.tensor([k, k]))


def test_zero_matrix_keeps_one_rank():
    assert rank_for_energy(torch.zeros(2, 4), 0.5).tolist() == [1, 1]
    for method in ("gram", "gram64", "exact"):
        u, s, vh = svd(torch.zeros(2, 3, 4), method=method)
        assert not (u * s[..., None, :] @ vh).any() and vh.isfinite().all()


@pytest.mark.parametrize("seed", range(5))
def test_rank_never_rises_when_steps_are_short(seed):
    """Theorem 2: while ||step|| <= G < sqrt(e) / m ||W||, the rank after m steps is not above the rank before."""
    generator = torch.Generator().manual_seed(seed)
    energy, period = 0.05, 20
    weight = torch.randn(24, 40, dtype=torch.float64, generator=generator)
    before, ranks = 24, []
    for _ in range(15):
        u, s, vh = svd(weight)
        k = int(rank_for_energy(s, energy))
        assert k <= before
        before = k
        ranks.append(k)
        weight = (u[:, :k] * s[:k]) @ vh[:k]
        # the steps cannot take more than sqrt(e) of the norm away, so this bounds G by the norm that they end in
        length = math.sqrt(energy) / period * float(weight.norm()) / (1 + math.sqrt(energy)) * 0.999
        for _ in range(period):
            step = torch.randn(24, 40, dtype=torch.float64, generator=generator)
            weight = weight - length * step / step.norm()
        assert length < math.sqrt(energy) / period * weight.norm()
    assert ranks[-1] < ranks[0]


# -- decompositions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gram64", "gram", "exact"])
@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (3, 7, 7), (4, 9, 30), (2, 3, 8, 5)])
def test_svd_against_lapack_in_float64(method, shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vh = svd(matrices, method=method)
    expected = torch.linalg.svdvals(matrices.double())
    # float32; the Gram matrix of these well-conditioned matrices loses a digit
    torch.testing.assert_close(s.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close((u * s[..., None, :]) @ vh, matrices, atol=1e-5, rtol=1e-5)
    one = torch.eye(s.shape[-1])
    for product in (u.mT @ u, vh @ vh.mT):
        torch.testing.assert_close(product, one.expand_as(product), atol=1e-4, rtol=0)
    assert s.dtype == torch.float32 and svd(matrices.double(), method=method)[1].dtype == torch.float64
    assert svd(matrices.bfloat16(), method=method)[0].dtype == torch.float32


def test_small_singular_values_survive_gram64():
    """From 1 to 1e-6, where the Gram matrix in float32 sees nothing below 3e-4."""
    generator = torch.Generator().manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(40, 60, dtype=torch.float64, generator=generator), full_matrices=False)
    values = torch.logspace(0, -6, 40, dtype=torch.float64)
    found = svd(((u * values) @ vh).double(), method="gram64")
    torch.testing.assert_close(found[1], values, rtol=1e-6, atol=0)
    torch.testing.assert_close(found[0] @ found[2], u @ vh, atol=1e-3, rtol=0)


def test_subspace_iteration_finds_the_leading_part():
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(3, 50, 8, generator=generator) @ torch.randn(3, 8, 70, generator=generator)
    matrices = low + 0.01 * torch.randn(3, 50, 70, generator=generator)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    best = (u[..., :8] * s[..., None, :8]) @ vh[..., :8, :]
    moved = matrices + 0.005 * torch.randn(3, 50, 70, generator=generator)
    for options in ({"rank": 12}, {"start": svd(moved)[0][..., :10]}):
        a, b, c = svd(matrices, method="subspace", **options)
        assert b.shape == (3, options.get("rank", 10))
        found = (a[..., :8] * b[..., None, :8]) @ c[..., :8, :]
        assert (found - best).norm() < 1e-4 * best.norm()  # (0.1 / 30)^4 of the noise is left, and rounding
        assert all(
            torch.equal(x, y) for x, y in zip((a, b, c), svd(matrices, method="subspace", **options), strict=True)
        )
    with pytest.raises(MethodError, match="rank=None"):
        svd(matrices, method="subspace")
    with pytest.raises(MethodError, match="gram64, gram, exact, subspace"):
        svd(matrices, method="jacobi")


@pytest.mark.parametrize("wrong", ["raises", "not finite"])
def test_failed_decomposition_falls_back_loudly(wrong, monkeypatch):
    matrices = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0))
    eigh = torch.linalg.eigh

    def broken(a):
        if wrong == "raises":
            raise torch.linalg.LinAlgError("did not converge")
        values, vectors = eigh(a)
        vectors[0] = math.nan
        return torch.return_types.linalg_eigh((values, vectors))

    monkeypatch.setattr(torch.linalg, "eigh", broken)
    with pytest.warns(RuntimeWarning, match="gram.*'conv.a', 'conv.b' failed"):
        u, s, vh = svd(matrices, method="gram", names=["conv.a", "conv.b"])
    torch.testing.assert_close((u * s[..., None, :]) @ vh, matrices, atol=1e-5, rtol=1e-5)
    with pytest.warns(RuntimeWarning, match="a layer"):
        assert svd(matrices[0], method="gram")[1].shape == (5,)
    with pytest.warns(RuntimeWarning):
        start = torch.eye(5)[:, :2].expand(2, 5, 2)
        assert svd(matrices, method="subspace", start=start)[0].shape == (2, 5, 2)

    monkeypatch.setattr(decomposition, "_decompose", lambda *args: broken(torch.full((1, 1), math.nan)))
    if wrong == "raises":
        with pytest.warns(RuntimeWarning), pytest.raises(ModelError, match=r"no decomposition .*'conv.a' converges"):
            svd(matrices, names=["conv.a", "conv.b"])


@pytest.mark.parametrize("method", ["gram64", "gram", "exact"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named(method, bad):
    matrices = torch.randn(3, 5, 9)
    matrices[1, 2, 3] = bad
    with pytest.raises(ModelError, match="'b' holds NaN"):
        svd(matrices, method=method, names=["a", "b", "c"])


# -- what can be decomposed --------------------------------------------------------------------------------------------


def test_reasons():
    assert can_decompose(nn.Conv2d(4, 8, 3), "channel") is None
    assert can_decompose(nn.Conv2d(4, 8, 3, groups=2), "spatial") is None
    assert can_decompose(nn.Conv1d(4, 8, 3), "decoupled") is None
    assert can_decompose(nn.Linear(4, 8), "spatial") is None
    depthwise = nn.Conv2d(8, 8, 3, groups=8)
    assert can_decompose(depthwise, "spatial") is None  # 3 x 3 per channel
    for scheme in ("channel", "decoupled"):
        assert "rank 1 already" in can_decompose(depthwise, scheme)
    assert "rank 1 already" in can_decompose(nn.Linear(4, 1), "channel")
    for module in (nn.ConvTranspose2d(4, 8, 3), nn.Conv3d(4, 8, 3), nn.BatchNorm2d(4), nn.Embedding(4, 8)):
        assert "neither a convolution" in can_decompose(module, "channel")
    assert "no weight yet" in can_decompose(nn.LazyLinear(4), "channel")
    quantized = nn.Linear(4, 4)
    quantized.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    assert "int8" in can_decompose(quantized, "channel")


def test_speed_up_of_resnet_20_is_the_papers():
    """The dossier of ranks behind table 1: stride-1 3 x 3 convolutions other than the first are factored."""
    dense, other = 0, 0
    layers: list[tuple[int, int]] = []  # channels, pixels
    for stage, (channels, size) in enumerate([(16, 32), (32, 16), (64, 8)]):
        before = max(channels // 2, 16)
        other += 3 * 16 * 9 * 32 * 32 if stage == 0 else before * channels * (9 + 1) * size * size
        layers += [(channels, size * size)] * (6 if stage == 0 else 5)
    dense = sum(9 * n * n * pixels for n, pixels in layers)
    assert dense / (dense + other) == pytest.approx(0.925, abs=0.001)

    def speed_up(scheme, fraction):
        small = 0
        for n, pixels in layers:
            weight = torch.zeros(n, n, 3, 3)
            rank = max(1, round(fraction * full_rank(weight.shape, scheme)))
            small += pixels * sum(part.numel() for part in factors(weight, scheme, rank))
        return (dense + other) / (small + other)

    assert (dense + other) / other == pytest.approx(13.3, abs=0.1)
    # ranks are whole numbers, so these are near the paper's 1.97, 2.17, 2.66 and 2.84, not equal
    assert speed_up("channel", 0.42) == pytest.approx(1.97, rel=0.03)
    assert speed_up("channel", 0.375) == pytest.approx(2.17, rel=0.03)
    assert speed_up("spatial", 0.163) == pytest.approx(2.66, rel=0.03)
    assert speed_up("spatial", 0.150) == pytest.approx(2.84, rel=0.03)
