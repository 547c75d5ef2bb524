"""Relaxed architecture search, and the DARTS solvers that it is compared with, for any two losses.

Weights and architecture variables of a network are found together. With L_val and L_train two losses of weights and
architecture alpha, DARTS (Liu, Simonyan & Yang 2019, arXiv 1806.09055) alternates descent steps of a bilevel problem:

    min over alpha of L_val(w*(alpha), alpha)   such that   w*(alpha) minimises L_train(w, alpha)

RARTS (Xue, Qi & Xin, "RARTS: An Efficient First-Order Relaxed Architecture Search Method", arXiv 2008.03901) splits the
weights into two copies w and y and minimises one function by Gauss-Seidel steps, without second derivatives:

    F(w, y, alpha) = L_val(w, alpha) + lambda L_train(y, alpha) + beta/2 ||w - y||^2

Only the paper's abstract was available here. That there are two networks, one architecture, both data halves and
Gauss-Seidel iterations is from it; F as written, which copy sees which half, and the order w, y, alpha are a
reconstruction, and the other orders are options.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_compress.errors import MethodError

Loss = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
"""Weights and architecture variables -> a scalar."""
Gradient = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""The gradient of some loss, where everything is now, with respect to the tensors given."""
Schedule = float | Callable[[int], float]
"""A number, or the number at iteration t."""
Step = float | Callable[[list[Tensor]], Optimizer]
"""Length of gradient steps, or what makes a torch optimizer of the tensors of a block."""
Order = Literal["gauss-seidel", "jacobi"]
Passes = Literal["fresh", "shared"]

#: DARTS's finite differences move the weights by this length in total
RADIUS = 0.01


class Progress(NamedTuple):
    """Where a search was before an iteration.

    ``distance`` is ||w - y||; the last three are norms of the gradients that the blocks were stepped with (without what
    an optimizer adds, such as weight decay). Scalars on the device of the tensors; of :class:`BilevelSearch`,
    ``objective`` is L_val, ``weights`` stays zero and so does ``distance``.
    """

    objective: Tensor
    validation: Tensor
    training: Tensor
    distance: Tensor
    weights: Tensor
    training_weights: Tensor
    architecture: Tensor


class StepBounds(NamedTuple):
    """Lengths of gradient steps below which F does not increase; see :func:`step_bounds`."""

    weights: float
    training_weights: float
    architecture: float


def step_bounds(
    training_weight: float,
    coupling: float,
    *,
    validation_weights: float,
    training_weights: float,
    validation_architecture: float,
    training_architecture: float,
) -> StepBounds:
    """The steps of the descent lemma: a block whose gradient has Lipschitz constant l descends with steps below 2 / l.

    Args:
        training_weight: lambda.
        coupling: beta, above 0.
        validation_weights: Lipschitz constant of L_val's gradient in w.
        training_weights: of L_train's in y.
        validation_architecture, training_architecture: of L_val's and L_train's in alpha.

    Returns:
        2 / (l + beta), 2 / (lambda l + beta) and 2 / (l_val + lambda l_train); infinity for a block that is linear.
    """
    constants = (
        validation_weights + coupling,
        training_weight * training_weights + coupling,
        validation_architecture + training_weight * training_architecture,
    )
    return StepBounds(*(2 / constant if constant > 0 else float("inf") for constant in constants))


# -- the pieces that solvers and callback share -----------------------------------------------------------------------


@torch.no_grad()
def add_coupling(gradients: Sequence[Tensor], these: Sequence[Tensor], others: Sequence[Tensor], beta: float) -> None:
    """Add ``beta (these - others)``, the gradient of beta/2 ||these - others||^2, to gradients in place."""
    if beta and gradients:
        torch._foreach_add_(list(gradients), list(these), alpha=beta)
        torch._foreach_sub_(list(gradients), list(others), alpha=beta)


@torch.no_grad()
def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of squares of all entries, a float32 or wider scalar."""
    tensors = [tensor for tensor in tensors if tensor.numel()]
    if not tensors:
        return torch.zeros(())
    norms = torch.stack([norm.to(tensors[0].device) for norm in torch._foreach_norm(tensors)])
    return norms.to(torch.promote_types(norms.dtype, torch.float32)).square().sum()


@torch.no_grad()
def squared_distance(these: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """||these - others||^2, with no more memory than the largest tensor."""
    parts = [(a - b).norm().to(these[0].device) for a, b in zip(these, others, strict=True)]
    return torch.stack(parts).square().sum() if parts else torch.zeros(())


def second_order_gradient(
    training: Gradient,
    validation: Gradient,
    weights: Sequence[Tensor],
    architecture: Sequence[Tensor],
    step: float,
    radius: float = RADIUS,
) -> list[Tensor]:
    """The gradient in alpha of ``L_val(w - step * grad_w L_train(w, alpha), alpha)`` (DARTS, equations 6 to 8).

    The product with the mixed second derivative is a central difference of length ``radius / ||grad_w' L_val||``. The
    weights move while it is computed and come back to the very same bits. Beside them it holds one copy and one gradient.
    The authors' code also puts the optimizer's momentum and weight decay into the inner step; the paper does not.

    Args:
        training: gradients of L_train at the present weights.
        validation: of L_val.
        weights: w, moved in place; no leaf is replaced.
        architecture: alpha.
        step: xi. 0 gives the first order.

    Returns:
        One tensor for each of ``architecture``.
    """
    if step == 0:
        return list(validation(architecture))
    weights = list(weights)
    before = [w.detach().clone() for w in weights]
    data = [w.detach() for w in weights]  # views: they share memory with the leaves
    try:
        torch._foreach_sub_(data, list(training(weights)), alpha=step)
        both = list(validation([*weights, *architecture]))
        direction, gradient = both[: len(weights)], both[len(weights) :]
        del both
        length = float(squared_norm(direction).sqrt())
        if length == 0:  # nothing that the inner step could change
            return gradient
        epsilon = radius / length
        differences = []
        for sign in (1.0, -1.0):
            torch._foreach_copy_(data, before)
            torch._foreach_add_(data, direction, alpha=sign * epsilon)
            differences.append(list(training(architecture)))
        mixed = torch._foreach_sub(differences[0], differences[1])
        return list(torch._foreach_sub(gradient, torch._foreach_mul(mixed, step / (2 * epsilon))))
    finally:
        with torch.no_grad():
            torch._foreach_copy_(data, before)


# -- solvers ----------------------------------------------------------------------------------------------------------


class RelaxedSearch:
    """Minimise F(w, y, alpha) by steps in the order w, y, alpha.

    Args:
        validation_loss: L_val, a function of weights and architecture.
        training_loss: L_train.
        weights: w, where the search starts; y starts as a copy. Stepped in place.
        architecture: alpha, stepped in place.
        training_weight: lambda, above 0; a number or a schedule ``t -> number``.
        coupling: beta, above 0; likewise.
        weights_step: eta_w, or what makes a torch optimizer of the tensors.
        training_weights_step: eta_y, for y.
        architecture_step: eta_alpha.
        order: ``"gauss-seidel"``: every block sees the newest values of the others. ``"jacobi"``: all see those from
            before the iteration; it needs much smaller steps and is there for comparison.
        architecture_passes: ``"fresh"``: alpha's gradient is taken at the new w and y, which costs two further
            evaluations; ``"shared"``: in the evaluations of w and y, so that it is one step behind in them. On the model
            that can be solved, with lambda = beta = 10, both converge equally fast at steps of 0.01 (spectral radius
            0.9927 and 0.9932), and at 0.05 only fresh ones do (0.93 and 1.17).
        training_weights: where y starts, when not at w.

    Attributes:
        weights, training_weights, architecture: w, y and alpha, lists of leaf tensors.
        iteration: how many iterations were done.

    Raises:
        MethodError: for an argument out of range.
    """

    def __init__(
        self,
        validation_loss: Loss,
        training_loss: Loss,
        weights: Sequence[Tensor],
        architecture: Sequence[Tensor],
        *,
        training_weight: Schedule = 1.0,
        coupling: Schedule = 1.0,
        weights_step: Step = 0.01,
        training_weights_step: Step = 0.01,
        architecture_step: Step = 0.01,
        order: Order = "gauss-seidel",
        architecture_passes: Passes = "fresh",
        training_weights: Sequence[Tensor] | None = None,
    ) -> None:
        if order not in ("gauss-seidel", "jacobi"):
            raise MethodError(f"order={order!r} is not possible; choose 'gauss-seidel' or 'jacobi'.")
        if architecture_passes not in ("fresh", "shared"):
            raise MethodError(
                f"architecture_passes={architecture_passes!r} is not possible; choose 'fresh' or 'shared'."
            )
        self.validation_loss = validation_loss
        self.training_loss = training_loss
        self.weights = _leaves("weights", weights)
        self.training_weights = _leaves(
            "training_weights",
            [w.detach().clone() for w in self.weights] if training_weights is None else training_weights,
        )
        if [y.shape for y in self.training_weights] != [w.shape for w in self.weights]:
            raise MethodError("training_weights must have the shapes of weights: they are two copies of one network.")
        self.architecture = _leaves("architecture", architecture)
        self.training_weight = training_weight
        self.coupling = coupling
        self.order = order
        self.architecture_passes = architecture_passes
        self.iteration = 0
        self._optimizers = [
            _optimizer(name, step, block)
            for name, step, block in (
                ("weights_step", weights_step, self.weights),
                ("training_weights_step", training_weights_step, self.training_weights),
                ("architecture_step", architecture_step, self.architecture),
            )
        ]

    def objective(self) -> Tensor:
        """F at the present point."""
        training_weight, coupling = self._numbers()
        with torch.no_grad():
            validation = self.validation_loss(self.weights, self.architecture)
            training = self.training_loss(self.training_weights, self.architecture)
            distance = squared_distance(self.weights, self.training_weights)
            return validation + training_weight * training + coupling / 2 * distance

    def step(self) -> Progress:
        """One iteration.

        Returns:
            F and its parts before it, and the norms of the gradients that were used.
        """
        training_weight, coupling = self._numbers()
        w, y, alpha = self.weights, self.training_weights, self.architecture
        validation, at_w, alpha_at_w = _evaluated(self.validation_loss, w, alpha)
        training, at_y, alpha_at_y = _evaluated(self.training_loss, y, alpha)
        distance = squared_distance(w, y)
        is_jacobi = self.order == "jacobi"
        with torch.no_grad():
            torch._foreach_mul_(at_y, training_weight)
        if is_jacobi:
            add_coupling(at_y, y, w, coupling)
        add_coupling(at_w, w, y, coupling)
        _step(self._optimizers[0], w, at_w)
        if not is_jacobi:
            add_coupling(at_y, y, w, coupling)
        _step(self._optimizers[1], y, at_y)
        if self.architecture_passes == "fresh" and not is_jacobi:
            _, _, alpha_at_w = _evaluated(self.validation_loss, w, alpha)
            _, _, alpha_at_y = _evaluated(self.training_loss, y, alpha)
        with torch.no_grad():
            torch._foreach_add_(alpha_at_w, alpha_at_y, alpha=training_weight)
        _step(self._optimizers[2], alpha, alpha_at_w)
        self.iteration += 1
        return Progress(
            validation + training_weight * training + coupling / 2 * distance,
            validation,
            training,
            distance.sqrt(),
            squared_norm(at_w).sqrt(),
            squared_norm(at_y).sqrt(),
            squared_norm(alpha_at_w).sqrt(),
        )

    def run(self, iterations: int) -> list[Progress]:
        """So many iterations."""
        return [self.step() for _ in range(iterations)]

    def _numbers(self) -> tuple[float, float]:
        """lambda and beta of this iteration."""
        found = []
        for name, value in (("training_weight", self.training_weight), ("coupling", self.coupling)):
            number = float(value(self.iteration) if callable(value) else value)
            if not 0 < number < float("inf"):
                raise MethodError(f"{name} is {number!r} at iteration {self.iteration}; it must be a number above 0.")
            found.append(number)
        return found[0], found[1]


class BilevelSearch:
    """DARTS: one step in alpha, then one in w.

    Args:
        validation_loss, training_loss, weights, architecture: as for :class:`RelaxedSearch`.
        inner_step: xi. 0: first order. Above 0: second order, by finite differences; the authors set it to the learning
            rate of the weights. A number or a schedule ``t -> number``.
        weights_step, architecture_step: as for :class:`RelaxedSearch`.

    Raises:
        MethodError: for an argument out of range.
    """

    def __init__(
        self,
        validation_loss: Loss,
        training_loss: Loss,
        weights: Sequence[Tensor],
        architecture: Sequence[Tensor],
        *,
        inner_step: Schedule = 0.0,
        weights_step: Step = 0.01,
        architecture_step: Step = 0.01,
    ) -> None:
        self.validation_loss = validation_loss
        self.training_loss = training_loss
        self.weights = _leaves("weights", weights)
        self.architecture = _leaves("architecture", architecture)
        self.inner_step = inner_step
        self.iteration = 0
        self._weights_optimizer = _optimizer("weights_step", weights_step, self.weights)
        self._architecture_optimizer = _optimizer("architecture_step", architecture_step, self.architecture)

    def objective(self) -> Tensor:
        """L_val at the present point."""
        with torch.no_grad():
            return self.validation_loss(self.weights, self.architecture)

    def step(self) -> Progress:
        """One iteration."""
        xi = float(self.inner_step(self.iteration) if callable(self.inner_step) else self.inner_step)
        if not 0 <= xi < float("inf"):
            raise MethodError(f"inner_step is {xi!r} at iteration {self.iteration}; it must be a number of at least 0.")
        w, alpha = self.weights, self.architecture
        validation = self.objective()

        def gradient_of(loss: Loss) -> Gradient:
            return lambda inputs: torch.autograd.grad(
                loss(w, alpha), list(inputs), allow_unused=True, materialize_grads=True
            )

        gradient = second_order_gradient(
            gradient_of(self.training_loss), gradient_of(self.validation_loss), w, alpha, xi
        )
        _step(self._architecture_optimizer, alpha, gradient)
        training, at_w, _ = _evaluated(self.training_loss, w, alpha)
        _step(self._weights_optimizer, w, at_w)
        self.iteration += 1
        zero = torch.zeros_like(validation)
        size = squared_norm(at_w).sqrt()
        return Progress(validation, validation, training, zero, zero, size, squared_norm(gradient).sqrt())

    def run(self, iterations: int) -> list[Progress]:
        """So many iterations."""
        return [self.step() for _ in range(iterations)]


def _leaves(name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    if isinstance(tensors, Tensor) or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise MethodError(f"{name} must be a sequence of tensors, not {type(tensors).__name__}.")
    for tensor in tensors:
        if not tensor.is_leaf or not tensor.is_floating_point():
            raise MethodError(f"{name} must hold floating-point leaf tensors, which steps can change in place.")
    return [tensor.requires_grad_(True) for tensor in tensors]


def _optimizer(name: str, step: Step, block: list[Tensor]) -> Optimizer:
    if callable(step):
        return step(block)
    if isinstance(step, bool) or not isinstance(step, (int, float)) or not 0 < step < float("inf"):
        raise MethodError(f"{name}={step!r} is not possible: it must be a number above 0, or make an optimizer.")
    return torch.optim.SGD(block, lr=step)


def _evaluated(
    loss: Loss, weights: list[Tensor], architecture: list[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """A loss, and its gradients in weights and architecture."""
    value = loss(weights, architecture)
    found = torch.autograd.grad(value, [*weights, *architecture], allow_unused=True, materialize_grads=True)
    # clones: autograd may hand out the same tensor twice, and these are changed in place
    gradients = [gradient.clone() for gradient in found]
    return value.detach(), gradients[: len(weights)], gradients[len(weights) :]


def _step(optimizer: Optimizer, block: list[Tensor], gradients: Sequence[Tensor]) -> None:
    for tensor, gradient in zip(block, gradients, strict=True):
        tensor.grad = gradient
    optimizer.step()
    for tensor in block:
        tensor.grad = None
