"""Penalties against brute force: the derivative by differences, the proximal operator by search."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_compress.errors import HfCompressError, MethodError
from hf_compress.methods import L1, MCP, SCAD, Lp, TransformedL1, penalty_from

positive = st.floats(0.05, 5.0)
PENALTIES = st.one_of(
    st.just(L1()),
    st.builds(Lp, st.floats(0.1, 0.9)),
    st.sampled_from([Lp(1 / 2), Lp(2 / 3)]),
    st.builds(TransformedL1, positive),
    st.builds(MCP, positive),
    st.builds(SCAD, st.floats(2.1, 6.0)),
)
WITH_PROXIMAL = PENALTIES.filter(lambda penalty: not isinstance(penalty, Lp) or penalty.p in (1 / 2, 2 / 3))
strengths = st.floats(0.01, 3.0)


@given(PENALTIES, strengths, st.floats(0.01, 10.0), st.booleans())
@settings(deadline=None, max_examples=300)
def test_subgradient_is_the_derivative_of_the_value(penalty, strength, size, is_negative):
    x = torch.tensor([-size if is_negative else size], dtype=torch.float64)
    step = 1e-6
    difference = (penalty.value(x + step, strength) - penalty.value(x - step, strength)) / (2 * step)
    # slopes are continuous away from zero with a curvature below 1e4 here, so the difference is off by less than 1e-2
    # times the step's share of it; rounding of the values adds about 1e-16 / step
    assert torch.allclose(penalty.subgradient(x, strength), difference, rtol=1e-5, atol=1e-5)


@given(PENALTIES, strengths)
@settings(deadline=None)
def test_zero_is_a_fixed_point_and_the_penalty_is_even(penalty, strength):
    zero = torch.zeros(3)
    assert penalty.value(zero, strength).eq(0).all() and penalty.subgradient(zero, strength).eq(0).all()
    x = torch.linspace(1e-30, 4, 200)
    assert torch.equal(penalty.value(-x, strength), penalty.value(x, strength))
    assert torch.equal(penalty.subgradient(-x, strength), -penalty.subgradient(x, strength))
    assert penalty.subgradient(x, strength).isfinite().all() and penalty.subgradient(x, strength).ge(0).all()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert penalty.subgradient(x.to(dtype), strength).dtype == dtype


@given(WITH_PROXIMAL, strengths, st.one_of(st.floats(0.0, 6.0), st.floats(0.0, 1e-6)), st.floats(-12.0, 12.0))
@settings(deadline=None, max_examples=400)
def test_proximal_operator_is_the_global_minimum(penalty, strength, step, v):
    v = torch.tensor(v, dtype=torch.float64)

    def objective(u):
        return step * penalty.value(u, strength) + (u - v) ** 2 / 2

    found = penalty.proximal(v, step, strength)
    # penalties never fall with the magnitude, so the minimum lies between zero and v
    grid = torch.linspace(0, 1, 20001, dtype=torch.float64) * v
    assert objective(found) <= objective(grid).min() + 1e-9


@given(WITH_PROXIMAL, strengths, st.floats(0.0, 3.0))
@settings(deadline=None)
def test_proximal_operator_never_reverses_the_order(penalty, strength, step):
    v = torch.linspace(-9, 9, 1801, dtype=torch.float64)
    assert penalty.proximal(v, step, strength).diff().ge(-1e-9).all()


@given(WITH_PROXIMAL, st.floats(1e-30, 3.0), st.floats(-9.0, 9.0, width=32))
@settings(deadline=None, max_examples=300)
def test_proximal_operator_in_single_precision(penalty, step, v):
    """Finite, never past v, and close to the double-precision result unless v sits on a jump."""
    found = penalty.proximal(torch.tensor(v), step, 0.7).double()
    v = torch.tensor(v, dtype=torch.float64)
    near = [penalty.proximal(v * factor, step, 0.7) for factor in (1 - 1e-5, 1.0, 1 + 1e-5)]
    assert found.isfinite() and found.abs() <= v.abs() * (1 + 1e-6)
    assert min(near) - 1e-4 <= found <= max(near) + 1e-4


def test_tie_goes_to_zero():
    half = Lp(1 / 2)
    threshold = 54 ** (1 / 3) / 4 * 2 ** (2 / 3)
    assert half.proximal(torch.tensor(threshold, dtype=torch.float64), 1.0, 1.0) == 0


def test_limits_of_transformed_l1():
    x = torch.arange(-50, 51, dtype=torch.float64) / 25
    assert torch.allclose(TransformedL1(1e9).value(x, 1.0), L1().value(x, 1.0))  # a to infinity: l1
    assert torch.allclose(TransformedL1(1e-9).value(x, 1.0), (x != 0).double())  # a to 0: l0


def test_epsilon_bounds_the_slope_of_lp():
    x = torch.tensor([1e-12, 1e-3])
    bounded, exact = Lp(0.5, epsilon=1e-4).subgradient(x, 1.0), Lp(0.5).subgradient(x, 1.0)
    assert bounded[0] == pytest.approx(50) and exact[0] == pytest.approx(5e5) and bounded[1] == exact[1]


@given(PENALTIES)
def test_penalties_survive_json(penalty):
    assert penalty_from(**json.loads(json.dumps(penalty.to_json()))) == penalty


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: penalty_from("l3"), "l1, lp, transformed_l1, mcp, scad"),
        (lambda: penalty_from("mcp"), "needs its parameter 'a'"),
        (lambda: penalty_from("lp", q=1), "has no parameter 'q'; it takes p"),
        (lambda: penalty_from("l1", a=1), "takes no parameter"),
        (lambda: penalty_from(3), "there is no penalty 3"),
        (lambda: Lp(1.0), "p=1.0 must be between 0 and 1"),
        (lambda: Lp(0.5, epsilon=-1), "epsilon=-1 must be at least 0"),
        (lambda: Lp("0.5"), "must be a finite number"),
        (lambda: TransformedL1(0), "a=0 must be above 0"),
        (lambda: MCP(math.nan), "must be a finite number"),
        (lambda: SCAD(2.0), "a=2.0 must be above 2"),
        (lambda: SCAD(True), "must be a finite number"),
        (lambda: Lp(0.4).proximal(torch.ones(1), 1.0, 1.0), "p=1/2 and p=2/3"),
    ],
)
def test_errors_name_what_is_possible(make, message):
    with pytest.raises(MethodError, match="(?s).*" + message.replace("(", r"\(")) as caught:
        make()
    assert isinstance(caught.value, HfCompressError) and isinstance(caught.value, ValueError)
