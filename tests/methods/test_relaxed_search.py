"""The solvers on the model of which every figure is known in closed form.

L_val = alpha w - 2 alpha + 1 and L_train = (w - alpha)^2, started at alpha = 2, w = -2 (DARTS, figure 2): the bilevel
optimum is alpha = w = 1. F is a quadratic function, so its minimiser is the solution of three linear equations and every
solver is an affine map, whose spectral radius says whether it converges.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_compress.errors import MethodError
from hf_compress.methods.relaxed_search import BilevelSearch, RelaxedSearch, second_order_gradient, step_bounds


def validation(w, alpha) -> Tensor:
    return (alpha[0] * w[0] - 2 * alpha[0] + 1).sum()


def training(w, alpha) -> Tensor:
    return (w[0] - alpha[0]).square().sum()


def number(value: float) -> list[Tensor]:
    return [torch.tensor([value], dtype=torch.float64)]


def relaxed(strength, coupling, step=0.01, start=(2.0, -2.0, -2.0), **options) -> RelaxedSearch:
    steps = {name: step for name in ("weights_step", "training_weights_step", "architecture_step")}
    alpha, w, y = map(number, start)
    return RelaxedSearch(
        validation,
        training,
        w,
        alpha,
        training_weights=y,
        training_weight=strength,
        coupling=coupling,
        **steps,
        **options,
    )


def bilevel(xi, step=0.01, start=(2.0, -2.0)) -> BilevelSearch:
    return BilevelSearch(
        validation,
        training,
        number(start[1]),
        number(start[0]),
        inner_step=xi,
        weights_step=step,
        architecture_step=step,
    )


def point(search) -> np.ndarray:
    """(alpha, w, y), or (alpha, w)."""
    blocks = [search.architecture, search.weights, getattr(search, "training_weights", [])]
    return np.array([float(tensor.detach()) for block in blocks for tensor in block])


def iteration_matrix(make, size=3) -> np.ndarray:
    """The linear part of one iteration, column by column."""

    def image(start):
        search = make(tuple(start))
        search.step()
        return point(search)

    origin = image(np.zeros(size))
    return np.stack([image(unit) - origin for unit in np.eye(size)], axis=1)


def radius(make, size=3) -> float:
    return float(abs(np.linalg.eigvals(iteration_matrix(make, size))).max())


EQUILIBRIA = {  # lambda, beta -> alpha, w, y
    (1, 1): (4, -2, 2),
    (1, 10): (1.428571, 0.571429, 0.714286),
    (5, 5): (1.176471, 0.823529, 1.058824),
    (10, 10): (1.081081, 0.918919, 1.027027),
    (20, 50): (1.023018, 0.976982, 0.997442),
    (100, 100): (1.007557, 0.992443, 1.002519),
}


@pytest.mark.parametrize("numbers", EQUILIBRIA, ids=str)
def test_equilibria(numbers):
    """The point where all three blocks rest is the table's, the closed form's and the one that iterations reach."""
    strength, coupling = map(float, numbers)
    expected = np.array(EQUILIBRIA[numbers])
    bounds = step_bounds(
        strength, coupling, validation_weights=0, training_weights=2, validation_architecture=0, training_architecture=2
    )
    step = 0.5 * min(bounds)
    matrix = iteration_matrix(lambda start: relaxed(strength, coupling, step, start))
    search = relaxed(strength, coupling, step, (0.0, 0.0, 0.0))
    search.step()
    rest = np.linalg.solve(np.eye(3) - matrix, point(search))
    alpha = 1 / (1 - 1 / (2 * coupling) - 1 / (4 * strength))
    np.testing.assert_allclose(rest, [alpha, 2 - alpha, alpha * (1 - 1 / (2 * strength))], rtol=1e-9)
    np.testing.assert_allclose(rest, expected, atol=5e-7)  # the table has six decimals
    search = relaxed(strength, coupling, step, tuple(rest))
    before = search.step()
    assert max(float(norm) for norm in before[4:]) < 1e-9  # the equilibrium equations
    assert float(before.objective) == pytest.approx(1 - alpha, abs=1e-9)
    search = relaxed(strength, coupling, step)
    search.run(300)
    slowest = radius(lambda start: relaxed(strength, coupling, step, start))
    distance = np.linalg.norm(np.array([2.0, -2.0, -2.0]) - rest)
    # the iteration contracts by its spectral radius; 100 covers that its eigenvectors are not orthogonal
    assert slowest < 1 and np.linalg.norm(point(search) - rest) < 100 * distance * slowest**300 + 1e-9


TRAJECTORY = {  # iterations -> alpha, w, y; lambda = beta = 10, steps 0.01
    1: (1.3998, -2.02, -1.202),
    10: (0.0606, -1.0624, -0.2747),
    100: (0.351, 0.194, 0.2822),
    500: (1.0426, 0.8807, 0.9877),
    1000: (1.0801, 0.918, 1.026),
    2000: (1.0811, 0.9189, 1.027),
}


def test_trajectory_and_monotone_decrease():
    search, values = relaxed(10, 10), []
    for iteration in range(1, 2001):
        values.append(float(search.step().objective))
        if iteration in TRAJECTORY:
            np.testing.assert_allclose(point(search), TRAJECTORY[iteration], atol=6e-5)  # four decimals
    assert search.iteration == 2000
    drops = -np.diff([*values, float(search.objective())])
    assert (drops > -1e-14).all() and (drops[:1000] > 0).all()


def test_every_block_step_below_its_bound_decreases_the_objective():
    bounds = step_bounds(
        10, 10, validation_weights=0, training_weights=2, validation_architecture=0, training_architecture=2
    )
    assert bounds == pytest.approx((2 / 10, 2 / 30, 2 / 20))

    def largest_rise(factor: float) -> float:
        search = relaxed(10, 10)
        for optimizer, bound in zip(search._optimizers, bounds, strict=True):
            optimizer.param_groups[0]["lr"] = factor * bound
        values = [float(progress.objective) for progress in search.run(60)]
        return max(np.diff(values))

    assert largest_rise(0.99) <= 1e-12
    assert largest_rise(1.3) > 1  # the bound is not an empty one
    linear = step_bounds(
        1, 1, validation_weights=0, training_weights=0, validation_architecture=0, training_architecture=0
    )
    assert linear == (2, 2, float("inf"))


@pytest.mark.parametrize(("step", "expected"), [(0.01, 0.9927), (0.05, 0.9346), (0.09, 0.8018), (0.1, 1.086)])
def test_spectral_radius_of_gauss_seidel(step, expected):
    assert radius(lambda start: relaxed(10, 10, step, start)) == pytest.approx(
        expected, abs=6e-5 if expected < 1 else 6e-4
    )


def test_simultaneous_steps_diverge_where_gauss_seidel_converges():
    def jacobi(start, step):
        return relaxed(10, 10, step, start, order="jacobi")

    assert radius(lambda start: jacobi(start, 0.05)) == pytest.approx(1.379, abs=6e-4)
    assert radius(lambda start: jacobi(start, 0.042)) < 1 < radius(lambda start: jacobi(start, 0.0425))
    search = jacobi((2.0, -2.0, -2.0), 0.05)
    search.run(100)
    assert abs(point(search)).max() > 1e10
    search = relaxed(10, 10, 0.05)
    search.run(500)
    np.testing.assert_allclose(point(search), EQUILIBRIA[10, 10], atol=1e-6)
    # gradient descent on all blocks at once, from the Hessian: [[2L, 1, -2L], [1, B, -B], [-2L, -B, 2L + B]]
    hessian = np.array([[20.0, 1, -20], [1, 10, -10], [-20, -10, 30]])
    np.testing.assert_allclose(
        iteration_matrix(lambda start: jacobi(start, 0.05)), np.eye(3) - 0.05 * hessian, atol=1e-12
    )


def test_shared_passes_take_alphas_gradient_one_step_earlier():
    fresh, shared = relaxed(10, 10), relaxed(10, 10, architecture_passes="shared")
    fresh.step(), shared.step()
    assert point(fresh)[1:].tolist() == point(shared)[1:].tolist()
    # alpha - 0.01 (w - 2 + 20 (alpha - y)) at the old w and y
    assert point(shared)[0] == pytest.approx(2 - 0.01 * (-2 - 2 + 20 * 4))
    shared.run(1800)
    np.testing.assert_allclose(point(shared), EQUILIBRIA[10, 10], atol=2e-5)  # 1800 steps


@pytest.mark.parametrize("xi", [0.0, 0.01, 0.1, 0.25, 0.5, 1.0])
def test_darts_lands_where_theory_says(xi):
    """First order at (2, 2); second order at 2 / (1 + 2 xi), right for one tuned xi alone."""
    search = bilevel(xi, step=0.1)
    search.run(150)  # errors shrink by a tenth or more per iteration
    expected = 2 / (1 + 2 * xi)
    np.testing.assert_allclose(point(search), [expected, expected], atol=1e-5)
    table = {0.0: 2.0, 0.01: 1.9608, 0.1: 1.6667, 0.25: 1.3333, 0.5: 1.0, 1.0: 0.6667}
    assert expected == pytest.approx(table[xi], abs=5e-5)


def test_larger_numbers_come_nearer_to_the_bilevel_solution_than_any_order_of_darts():
    errors = [abs(EQUILIBRIA[numbers][0] - 1) for numbers in ((5, 5), (10, 10), (100, 100))]
    assert errors == sorted(errors, reverse=True)
    # the bias is 1 / (2 beta) + 1 / (4 lambda) to first order
    assert errors[-1] == pytest.approx(1 / 200 + 1 / 400, rel=0.02)


def test_the_mixed_derivative_is_exact_on_quadratics_and_weights_return_to_the_same_bits():
    generator = torch.Generator().manual_seed(0)
    a, b, c, d = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (5, 3, 5, 3))
    mixing = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    w, alpha = a.clone().requires_grad_(), b.clone().requires_grad_()

    def train():
        return w @ mixing @ alpha + (w - c).square().sum() + (alpha - d).square().sum()

    def validate():
        return (w + c).square().sum() + torch.sin(alpha).sum() * w.sum()

    def gradient_of(loss):
        return lambda inputs: torch.autograd.grad(loss(), list(inputs))

    xi = 0.07
    (found,) = second_order_gradient(gradient_of(train), gradient_of(validate), [w], [alpha], xi)
    assert torch.equal(w.detach(), a)
    moved = w - xi * torch.autograd.grad(train(), w, create_graph=True)[0]
    value = (moved + c).square().sum() + torch.sin(alpha).sum() * moved.sum()
    (expected,) = torch.autograd.grad(value, alpha)  # through the inner step, exactly
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)  # rounding over 2 epsilon = 0.02 / ||direction||


def test_schedules_and_optimizers_of_blocks():
    """beta grows tenfold over the run, and the solution follows; torch's Adam steps alpha."""
    seen = []

    def adam(block):
        optimizer = torch.optim.Adam(block, lr=0.01)
        seen.append([tuple(tensor.shape) for tensor in block])
        return optimizer

    search = RelaxedSearch(
        validation, training, number(-2.0), number(2.0),
        training_weight=lambda t: min(10.0, 1 + t / 20), coupling=lambda t: min(10.0, 1 + t / 20),
        weights_step=0.05, training_weights_step=0.05, architecture_step=adam,
    )  # fmt: skip
    search.run(800)
    assert seen == [[(1,)]]
    np.testing.assert_allclose(point(search), EQUILIBRIA[10, 10], atol=1e-3)  # Adam does not settle exactly


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "random"}, "order"),
        ({"architecture_passes": "none"}, "architecture_passes"),
        ({"training_weights": [torch.zeros(2)]}, "shapes"),
        ({"weights_step": -1.0}, "weights_step"),
        ({"weights_step": True}, "weights_step"),
    ],
)
def test_arguments_that_are_refused(options, message):
    with pytest.raises(MethodError, match=message):
        RelaxedSearch(validation, training, number(0.0), number(0.0), **options)


def test_tensors_and_numbers_that_are_refused():
    with pytest.raises(MethodError, match="leaf"):
        RelaxedSearch(validation, training, [torch.ones(1, requires_grad=True) * 2], number(0.0))
    with pytest.raises(MethodError, match="sequence of tensors"):
        BilevelSearch(validation, training, torch.zeros(1), number(0.0))
    with pytest.raises(MethodError, match="coupling"):
        relaxed(1.0, 0.0).step()
    with pytest.raises(MethodError, match="training_weight"):
        relaxed(float("nan"), 1.0).step()
    with pytest.raises(MethodError, match="inner_step"):
        bilevel(-0.1).step()


@pytest.mark.parametrize(("step", "fresh", "shared"), [(0.01, 0.9927, 0.9932), (0.05, 0.9346, 1.1746)])
def test_shared_passes_bear_smaller_steps(step, fresh, shared):
    """Half the cost, and at small steps the same speed; the lag of alpha takes part of Gauss-Seidel's stability."""
    for passes, expected in (("fresh", fresh), ("shared", shared)):
        found = radius(lambda start, passes=passes: relaxed(10, 10, step, start, architecture_passes=passes))
        assert found == pytest.approx(expected, abs=6e-5)
