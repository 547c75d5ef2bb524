"""Quantizers against closed forms and brute force, and their gradients against tables of cases."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_compress.quantization import clipped_relu, fake_quantized, in_own_range, in_range
from hf_compress.quantization.quantizers import FIRST_ALPHA, as_rows, codes_of, largest_code, scale_of

RULES = ["bcgd", "least_squares"]
BITS = range(1, 9)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(weight: torch.Tensor, bits: int, rule: str, channel_dim: int | None = None) -> float:
    quantized = fake_quantized(weight, bits, rule, channel_dim)
    return float((quantized - weight).square().sum() / weight.square().sum())


@pytest.mark.parametrize("channel_dim", [None, 0, 1])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bits", BITS)
def test_levels_and_idempotence(bits, rule, channel_dim):
    weight = gaussian(6, 5, 3, 3)
    once = fake_quantized(weight, bits, rule, channel_dim)
    rows = once.reshape(1, -1) if channel_dim is None else once.movedim(channel_dim, 0).flatten(1)
    for row in rows:
        levels = row.unique()
        assert len(levels) <= (2 if bits == 1 else 2**bits - 1)
        assert torch.equal(levels, -levels.flip(0)) or len(levels) < 2**bits - 1
        assert bits != 1 or (levels != 0).all()
    # a grid is its own best grid; the product of a scale and a code is rounded once more, hence not bit for bit
    torch.testing.assert_close(fake_quantized(once, bits, rule, channel_dim), once, rtol=1e-5, atol=1e-6)


def test_forms_of_the_papers():
    weight = torch.tensor([-1.0, -0.5, 0.1, 0.2, 0.9, 3.0])
    mean = weight.abs().mean()  # 0.95
    assert torch.equal(fake_quantized(weight, 1, "bcgd", None), mean * torch.tensor([-1.0, -1, 1, 1, 1, 1]))
    # support: |w| >= 0.7 * 0.95 = 0.665, so three weights, whose mean is 4.9 / 3
    ternary = torch.tensor([-1.0, 0, 0, 0, 1, 1])
    torch.testing.assert_close(fake_quantized(weight, 2, "bcgd", None), 4.9 / 3 * ternary)
    torch.testing.assert_close(fake_quantized(weight, 2, "bcgd_numel", None), 4.9 / 6 * ternary)
    # delta = 3 / 15 = 0.2; 1.0 is in (0.6, 1.0] -> 2, 0.5 in (0.2, 0.6] -> 1, 0.2 -> 0, 0.9 -> 2, 3.0 -> 7
    codes = torch.tensor([-2.0, -1, 0, 0, 2, 7])
    scale = (2 * 1.0 + 0.5 + 2 * 0.9 + 7 * 3.0) / (4 + 1 + 4 + 49)
    torch.testing.assert_close(fake_quantized(weight, 4, "bcgd", None), scale * codes)


def test_every_interval_of_four_bits():
    """j for (2j-1) delta < |w| <= (2j+1) delta, 7 above 13 delta; delta is a power of two, so the bounds are exact."""
    delta = 0.25
    inside = torch.tensor([(2 * j - 1) * delta + 1e-3 for j in range(1, 8)])
    bounds = torch.tensor([(2 * j + 1) * delta for j in range(7)])
    weight = torch.cat([inside, bounds, torch.tensor([15 * delta])])
    codes = codes_of(weight, torch.tensor(2 * delta), 4)
    assert codes.tolist() == [*range(1, 8), *range(7), 7]


@pytest.mark.parametrize(("rule", "expected"), [("bcgd", 0.191), ("bcgd_numel", 0.338), ("least_squares", 0.190)])
def test_ternary_error_of_gaussian_weights(rule, expected):
    assert relative_error(gaussian(200_000), 2, rule) == pytest.approx(expected, abs=0.003)


def test_binary_error_of_gaussian_weights():
    """1 - 2/pi."""
    assert relative_error(gaussian(200_000), 1, "bcgd") == pytest.approx(1 - 2 / math.pi, abs=0.003)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=9), st.integers(2, 4))
def test_least_squares_is_close_to_brute_force(values, bits):
    weight = torch.tensor(values)
    if weight.abs().max() < 1e-3:
        return
    steps = torch.linspace(0.02, 1.2, 4000)[:, None] * weight.abs().max()
    errors = (steps * codes_of(weight.expand(len(steps), -1), steps, bits) - weight).square().sum(1)
    found = (fake_quantized(weight, bits, "least_squares", None) - weight).square().sum()
    # of a few weights every local minimum counts; the search may end in another, never in a bad one
    assert found <= errors.min() * 1.5 + 2e-2 * weight.square().sum()
    assert found <= (fake_quantized(weight, bits, "bcgd", None) - weight).square().sum() * (1 + 1e-5) + 1e-9


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("heavy_tailed", [False, True])
def test_least_squares_of_many_weights_is_the_best_there_is(bits, heavy_tailed):
    weight = gaussian(20_000)
    weight = weight.pow(3) if heavy_tailed else weight
    steps = (
        torch.linspace(0.02, 2.4, 600)[:, None] * weight.abs().max() / largest_code(bits) * (0.5 if bits == 2 else 1)
    )
    least = min(float((s * codes_of(weight, s, bits) - weight).square().sum()) for s in steps)
    found = float((fake_quantized(weight, bits, "least_squares", None) - weight).square().sum())
    assert found <= least * 1.02


@pytest.mark.parametrize("bits", BITS)
def test_channels_are_quantized_one_by_one(bits):
    weight = gaussian(4, 3, 2, 2)
    whole = fake_quantized(weight, bits, "least_squares", 0)
    for i in range(4):
        assert torch.equal(whole[i], fake_quantized(weight[i], bits, "least_squares", None))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rule", RULES)
def test_nothing_but_zeros(rule, bits):
    assert torch.equal(fake_quantized(torch.zeros(3, 4), bits, rule, 0), torch.zeros(3, 4))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rule", RULES)
def test_gradient_of_weights_passes_unchanged(rule, bits):
    weight, grad = gaussian(4, 5).requires_grad_(), gaussian(4, 5, seed=1)
    fake_quantized(weight, bits, rule, 0).backward(grad)
    assert torch.equal(weight.grad, grad)


@pytest.mark.parametrize("channel_dim", [None, 0])
@pytest.mark.parametrize("bits", BITS)
def test_learned_step(bits, channel_dim):
    """Against the cases of eq. 2 and 3 of Esser et al., weight by weight."""
    weight = gaussian(3, 40).requires_grad_()
    grad = gaussian(3, 40, seed=1)
    count = 1 if channel_dim is None else 3
    unit = as_rows(weight.detach(), channel_dim).abs().mean(1) * 2 / math.sqrt(largest_code(bits))
    first = torch.full((count,), 1.0 / largest_code(bits)).mul_(torch.linspace(0.8, 1.1, count)) / unit
    learned = first.clone().requires_grad_()
    scales = (first * unit).tolist()
    most = largest_code(bits)
    quantized = fake_quantized(weight, bits, "learned", channel_dim, learned)
    quantized.backward(grad)
    expected, passed = torch.zeros(count), torch.zeros(3, 40)
    for i in range(3):
        for j in range(40):
            s = scales[0 if channel_dim is None else i]
            ratio = float(weight.detach()[i, j]) / s
            if bits == 1:
                slope, passed[i, j] = math.copysign(1, ratio), grad[i, j]
            elif abs(ratio) >= most:
                slope = math.copysign(most, ratio)
            else:
                slope, passed[i, j] = round(ratio) - ratio, grad[i, j]
            expected[0 if channel_dim is None else i] += float(grad[i, j]) * slope
    expected /= math.sqrt(weight.numel() / count * most) * unit
    torch.testing.assert_close(learned.grad, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad, passed)


@pytest.mark.parametrize("bits", BITS)
def test_scale_of_a_learned_step_begins_at_the_least_squares_one(bits):
    weight = gaussian(4, 50)
    assert torch.equal(scale_of(weight, bits, "learned", 0)[1], scale_of(weight, bits, "least_squares", 0)[1])


# -- activations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_clipped_relu(bits):
    """Against the definition, case by case; alpha is a power of two, so every bound is exact."""
    alpha, most = 0.25, 2**bits - 1
    bounds = [i * alpha for i in range(-1, min(most, 8) + 1)] + [most * alpha]
    values = sorted({*bounds, *(b + 0.01 for b in bounds), *(b - 0.01 for b in bounds), most * alpha + 7, -9.0})
    x = torch.tensor(values, requires_grad=True)
    resolution = torch.tensor(alpha, requires_grad=True)
    grad = gaussian(len(values))
    y = clipped_relu(x, resolution, bits)
    y.backward(grad)
    slope = 0.0
    for i, value in enumerate(x.detach().tolist()):
        if value <= 0:
            expected, passes, proxy = 0.0, 0, 0
        elif value <= most * alpha:
            expected, passes, proxy = alpha * math.ceil(value / alpha), 1, 2 ** (bits - 1)
        else:
            expected, passes, proxy = most * alpha, 0, most
        assert y[i].item() == expected, value
        assert float(x.grad[i]) == passes * float(grad[i]), value
        slope += 0.01 * float(grad[i]) * proxy
    assert float(resolution.grad) == pytest.approx(slope, rel=1e-4, abs=1e-5)
    assert torch.equal(clipped_relu(y, resolution, bits), y)  # idempotent
    assert len(clipped_relu(torch.linspace(-1, most * alpha + 1, 5000), resolution, bits).unique()) == most + 1


@pytest.mark.parametrize("bits", BITS)
def test_first_resolution_is_the_best_for_half_a_gaussian(bits):
    """With rounding to the nearest level; the papers' values are within 1 % of the best error."""
    x = gaussian(100_000).abs()
    error = lambda a: float((a * (x / a).round().clamp(0, 2**bits - 1) - x).square().sum())  # noqa: E731
    around = [FIRST_ALPHA[bits] * (0.7 + 0.02 * i) for i in range(31)]
    assert error(FIRST_ALPHA[bits]) <= min(map(error, around)) * 1.03


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bounds", [(-1.0, 2.0), (0.0, 3.0), (0.5, 3.0), (-2.0, -1.0)])
def test_range(bits, bounds):
    x = torch.linspace(-4, 4, 801).requires_grad_()
    ends = torch.tensor(bounds, requires_grad=True)
    y = in_range(x, ends, bits)
    low, high = min(bounds[0], 0.0), max(bounds[1], 0.0)
    step = (high - low) / (2**bits - 1)
    assert len(y.unique()) <= 2**bits and bool((y == 0).any())
    least, most = float(y.detach().min()), float(y.detach().max())
    # zero is a code, so the ends may lie up to half a step from where they were asked for
    assert abs(least - low) <= step / 2 + 1e-6 and abs(most - high) <= step / 2 + 1e-6
    inside = (x >= least) & (x <= most)
    assert float((y - x).abs()[inside].max()) <= step / 2 + 1e-6
    torch.testing.assert_close(in_range(y, ends, bits), y)
    y.sum().backward()
    assert set(x.grad.unique().tolist()) == {0.0, 1.0}
    outside = (x < least - step) | (x > most + step)
    assert not x.grad[outside].any() and bool(x.grad[inside].all())


def test_gradient_of_a_range():
    """Outside 1 for the bound; inside the rounding error over the number of steps; over sqrt(features * steps)."""
    bits, most = 2, 3
    ends = torch.tensor([-1.0, 2.0], requires_grad=True)  # step 1, zero at code 1
    x = torch.tensor([[-5.0, 0.3, 1.2, 9.0]])
    grad = torch.tensor([[2.0, 3.0, 5.0, 7.0]])
    in_range(x, ends, bits).backward(grad)
    rounding = (3 * -0.3 + 5 * -0.2) / most
    expected = torch.tensor([2 - rounding, 7 + rounding]) / math.sqrt(4 * most)
    torch.testing.assert_close(ends.grad, expected)


@pytest.mark.parametrize("bits", BITS)
def test_own_range_looks_at_one_example_at_a_time(bits):
    x = gaussian(5, 7, 3) * torch.arange(1, 6).view(-1, 1, 1)
    y = in_own_range(x, bits)
    for i in range(5):
        assert torch.equal(y[i : i + 1], in_own_range(x[i : i + 1], bits))
        step = float(x[i].max().clamp_min(0) - x[i].min().clamp_max(0)) / (2**bits - 1)
        assert float((y[i] - x[i]).abs().max()) <= step * (1 + 1e-5)
        assert len(y[i].unique()) <= 2**bits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype_and_computes_in_float32(dtype):
    x = gaussian(4, 9)
    for function in (
        lambda x: fake_quantized(x, 4, "least_squares", 0),
        lambda x: fake_quantized(x, 4, "learned", None, torch.tensor([0.3])),
        lambda x: clipped_relu(x, torch.tensor(0.2), 4),
        lambda x: in_range(x, torch.tensor([-1.0, 1.0]), 8),
        lambda x: in_own_range(x, 8),
    ):
        low = x.to(dtype).requires_grad_()
        y = function(low)
        assert y.dtype == dtype and torch.equal(y, function(low.float()).to(dtype))
        y.sum().backward()
        assert low.grad.dtype == dtype and low.grad.isfinite().all()


@pytest.mark.parametrize("learned", [-3.0, 0.0, 1e-30])
def test_a_learned_scale_that_vanished_leaves_a_grid(learned):
    """Weights are finite, on a few levels, and come back from their codes: nothing of it is subnormal."""
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    step = torch.full((6,), learned)
    quantized = fake_quantized(weight, 4, "learned", 0, step)
    assert quantized.isfinite().all() and quantized.abs().min() > 1e-20
    _, scale = scale_of(weight, 4, "learned", 0, step)
    assert torch.equal(codes_of(quantized, scale[:, None], 4) * scale[:, None], quantized)
