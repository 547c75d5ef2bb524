"""Proximal network slimming: the laws of the algorithm on a deterministic problem, and its life under Trainer.

The problem is the smooth one for which the paper's convergence theory is stated: full batch, tanh, no BatchNorm, no
momentum, no weight decay, float64. The callback's own hooks are driven, with a plain SGD.
"""

import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from families import FAMILIES
from slimming_training import (
    SCALED_INPUTS,
    Classifier,
    Scaled,
    largest_difference,
    make_trainer,
    scaled_classifier,
    weights,
)
from torch import nn

from hf_compress.errors import MethodError, NothingToShrinkError
from hf_compress.methods import NetworkSlimmingCallback, ProximalSlimmingCallback
from hf_compress.methods.proximal_slimming import proximal_step
from hf_compress.surgery import shrink

SETTINGS = [(1.0, 0.01), (100.0, 0.01), (0.25, 0.01), (1.0, 0.05)]  # (beta, lambda)


class Toy(nn.Module):
    """12 scaled tanh units that fit 200 points made by 4 units."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.inner, self.outer = nn.Linear(3, 12, dtype=torch.float64), nn.Linear(12, 3, dtype=torch.float64)
        self.gamma = nn.Parameter(torch.full((12,), 0.5, dtype=torch.float64))
        with torch.no_grad():
            for parameter in (*self.inner.parameters(), *self.outer.parameters()):
                parameter.copy_(normal(*parameter.shape) * 0.7)
        self.x = normal(200, 3)
        self.y = torch.tanh(self.x @ normal(3, 4)) @ normal(4, 3)

    def forward(self, x):
        return self.outer(self.gamma * torch.tanh(self.inner(x)))

    def loss(self):
        return (self(self.x) - self.y).pow(2).mean() / 2


class Run:
    """The callback's hooks around a hand-written loop."""

    def __init__(self, alpha, beta, strength, momentum=0.0):
        self.model = Toy()
        self.alpha, self.beta, self.strength = alpha, beta, strength
        self.callback = ProximalSlimmingCallback(strength, beta, example_inputs=torch.zeros(1, 3, dtype=torch.float64))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1 / alpha, momentum=momentum)
        self.state = SimpleNamespaceState()
        self.hooks = {"model": self.model, "optimizer": self.optimizer}
        for event in ("on_init_end", "on_train_begin"):
            getattr(self.callback, event)(SimpleNamespace(), self.state, None, **self.hooks)

    @property
    def xi(self):
        (xi,) = (buffer for name, buffer in self.model.named_buffers() if name.startswith("hf_compress_xi_"))
        return xi

    def objective(self, xi=None):
        xi = self.xi if xi is None else xi
        gamma = self.model.gamma
        total = self.model.loss() + self.strength * xi.abs().sum() + self.beta / 2 * (gamma - xi).pow(2).sum()
        return total.item()

    def flat(self):
        return torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()])

    def step(self):
        self.optimizer.zero_grad()
        self.model.loss().backward()
        self.optimizer.step()
        self.callback.on_optimizer_step(SimpleNamespace(), self.state, None, **self.hooks)

    def gradients(self):
        return dict(
            zip(
                [name for name, _ in self.model.named_parameters()],
                torch.autograd.grad(self.model.loss(), list(self.model.parameters())),
                strict=True,
            )
        )

    def curvature(self):
        """The largest absolute eigenvalue of the loss's Hessian."""
        names = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        shapes = {name: parameter.shape for name, parameter in names.items()}

        def loss(flat):
            pieces = flat.split([math.prod(shape) for shape in shapes.values()])
            values = {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}
            return (torch.func.functional_call(self.model, values, (self.model.x,)) - self.model.y).pow(2).mean() / 2

        return torch.linalg.eigvalsh(torch.func.hessian(loss)(self.flat())).abs().max().item()


class SimpleNamespaceState:
    global_step = 0


@pytest.mark.parametrize(("beta", "strength"), SETTINGS)
def test_objective_falls_as_the_theory_says(beta, strength):
    run = Run(10.0, beta, strength)
    lipschitz = length = 0.0
    for t in range(600):
        if t % 60 == 0:
            lipschitz = max(lipschitz, 1.2 * run.curvature())  # 1.2: between the points where it is measured
            assert run.alpha > lipschitz
        z, gamma, xi = run.flat(), run.model.gamma.detach().clone(), run.xi.clone()
        before = run.objective()
        run.step()
        between, after = run.objective(xi), run.objective()
        moved, gamma_moved = (run.flat() - z).pow(2).sum(), (run.model.gamma - gamma).pow(2).sum()
        xi_moved = (run.xi - xi).pow(2).sum()
        slack = 1e-14  # rounding of an objective of order 0.1
        assert between <= before - (run.alpha - lipschitz / 2) * moved - beta / 2 * gamma_moved + slack
        assert after <= between - (run.alpha + beta / 2) * xi_moved + slack
        length += moved.sqrt().item()
    assert length < 15  # a finite path


def test_too_long_steps_do_not_descend():
    run = Run(0.3, 1.0, 0.01)
    assert run.curvature() > 2 * run.alpha
    values = []
    for _ in range(300):
        values.append(run.objective())
        run.step()
    # one that ends in NaN is no descent either
    assert sum(not later <= earlier for earlier, later in zip(values, values[1:], strict=False)) > 10


@pytest.mark.parametrize(("beta", "strength", "momentum"), [(1.0, 0.03, 0.0), (0.25, 0.03, 0.0), (5.0, 0.3, 0.9)])
def test_stationary_point(beta, strength, momentum):
    """The relations of gamma, xi and the loss's gradient where the iteration stands still.

    Momentum m amplifies the loss's gradient by 1 / (1 - m) and not the coupling, so (1 - m) lambda takes lambda's place
    in what the loss feels.
    """
    run = Run(10.0, beta, strength, momentum)
    for _ in range(2500):
        run.step()
    supports = set()
    for _ in range(500):
        run.step()
        supports.add(tuple((run.xi != 0).tolist()))
    assert len(supports) == 1  # it no longer changes
    gamma, xi, felt = run.model.gamma.detach(), run.xi, (1 - momentum) * strength
    gradients = run.gradients()
    kept = xi != 0
    assert 0 < kept.sum() < 12
    # sublinear convergence: what is left after 3000 steps
    torch.testing.assert_close(gamma[kept], xi[kept] + strength / beta * xi[kept].sign(), atol=2e-3, rtol=0)
    assert gamma[~kept].abs().max() <= strength / beta + 1e-4
    assert gamma.ne(0).all()  # the scales are not the sparse variable, xi is
    torch.testing.assert_close(gradients["gamma"][kept].abs(), torch.full_like(gamma[kept], felt), atol=2e-3, rtol=0)
    assert gradients["gamma"].abs().max() <= felt + 2e-3
    residual = torch.cat([value.flatten() for name, value in gradients.items() if name != "gamma"])
    assert residual.abs().max() < 1e-2  # from 0.46 at the start; the product of two layers makes this one slow


@pytest.mark.parametrize("beta", [0.25, 1.0, 100.0])
@pytest.mark.parametrize("lr", [0.1, 0.001])
def test_step_minimises_what_the_paper_minimises(beta, lr):
    """gamma and xi are the minimisers of their proximal subproblems, by search; alpha = 1 / lr."""
    alpha, strength = 1 / lr, 0.3
    moved, xi = torch.tensor([0.31, -0.02, 0.7], dtype=torch.float64), torch.tensor([0.3, 0.0, -0.1]).double()

    def shrink(v, step):
        return v.sign() * (v.abs() - step * strength).clamp_min(0)

    gamma, new = proximal_step(moved, xi, lr, beta, shrink)
    grid = torch.linspace(-1, 1, 400001, dtype=torch.float64)[:, None]
    best = grid[(alpha / 2 * (grid - moved) ** 2 + beta / 2 * (grid - xi) ** 2).argmin(0), 0]
    torch.testing.assert_close(gamma, best, atol=5e-6, rtol=0)  # the grid's spacing
    smooth = beta / 2 * (grid - gamma) ** 2 + alpha / 2 * (grid - xi) ** 2
    best = grid[(strength * grid.abs() + smooth).argmin(0), 0]
    torch.testing.assert_close(new, best, atol=5e-6, rtol=0)


def test_undefended_scales_fall_at_the_documented_rate():
    gamma = xi = torch.tensor(0.5, dtype=torch.float64)
    lr, beta, strength = 0.1, 0.25, 0.002
    path = []
    for _ in range(1000):
        gamma, xi = proximal_step(gamma, xi, lr, beta, lambda v, step: (v - step * strength).clamp_min(0))
        path.append(xi.item())
    assert (path[499] - path[999]) / 500 == pytest.approx(strength * lr / (2 + beta * lr), rel=5e-3)


def test_a_learning_rate_of_zero_changes_nothing(tmp_path):
    model = scaled_classifier()
    before = weights(model)
    callback = ProximalSlimmingCallback(1.0, 1.0, example_inputs=SCALED_INPUTS, zero_on_removal=False)
    make_trainer(model, [callback], tmp_path, learning_rate=0.0).train()
    assert largest_difference(before, weights(model)) == 0.0
    assert torch.equal(callback.auxiliary_, before["body.gamma"])


def train(tmp_path, strength=2.0, coupling=1.0, model=None, **arguments):
    options = {key: arguments.pop(key) for key in ("zero_on_removal", "axes", "grouping") if key in arguments}
    model = model or scaled_classifier()
    callback = ProximalSlimmingCallback(strength, coupling, example_inputs=SCALED_INPUTS, **options)
    trainer = make_trainer(model, [callback], tmp_path, **arguments)
    trainer.train()
    return model, callback, trainer


def test_after_training(tmp_path):
    """The model is ordinary again; support, scores and plan agree; the scales of what goes are zero."""
    model, callback, trainer = train(tmp_path)
    assert not [name for name in model.state_dict() if "hf_compress" in name]
    (support,), (scores,) = callback.support(model).values(), callback.scores(model).values()
    assert 0 < support.sum() < 24
    assert torch.equal(support, scores > 0) and torch.equal(support, model.body.gamma != 0)
    plan = callback.plan(model)
    assert list(plan.keep.values()) == [tuple(support.nonzero().flatten().tolist())]
    assert trainer.state.log_history[-1]["sparsity"] == pytest.approx(1 - support.float().mean().item())
    # another callback object, as after a resumed run, reads the same support off the scales
    other = ProximalSlimmingCallback(1.0, 1.0, example_inputs=SCALED_INPUTS)
    assert torch.equal(other.support(model)["body.gamma"], support)
    # a second training starts afresh
    trainer.train()
    assert not [name for name in model.state_dict() if "hf_compress" in name]


def test_without_zeroing_the_scales_of_removed_indices_stay_within_the_bound(tmp_path):
    model, callback, _ = train(tmp_path, strength=0.5, zero_on_removal=False, max_steps=100)
    (support,) = callback.support(model).values()
    gamma = model.body.gamma[~support].detach().abs()
    assert len(gamma) > 0 and gamma.max() > 0
    assert gamma.max() < 0.5  # strength / coupling


def test_an_axis_never_vanishes(tmp_path):
    model, callback, _ = train(tmp_path, strength=1e4)
    (support,) = callback.support(model).values()
    assert support.sum() == 1 and (model.body.gamma != 0).sum() == 1
    assert callback.scores(model)["body.gamma"].eq(0).all()


def test_axis_grouping_removes_whole_indices():
    """With several scales per index, thresholding each alone leaves some indices half alive."""
    partly = {}
    for grouping in ("axis", "scale"):
        model, inputs = FAMILIES["resnet_basic"]()
        callback = ProximalSlimmingCallback(0.2, 1.0, grouping=grouping, example_inputs=inputs)
        callback._validate()
        scales = callback.scales_ = callback._scales(model)
        xi = callback._shrink(scales.read(), 4.9)
        zeros = scales.sum((xi == 0).float())
        partly[grouping] = ((zeros > 0) & (zeros < scales.counts)).sum().item()
        single = scales.spread(scales.counts) == 1  # both are the paper's where an index has one scale
        expected = scales.read().sub(0.2 * 4.9).clamp_min(0)
        torch.testing.assert_close(xi[single], expected[single])
    assert partly["axis"] == 0 and partly["scale"] > 0


class SkipAll(transformers.TrainerCallback):
    """Mixed precision found an overflow in every step."""

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        optimizer._is_overflow = True
        optimizer.optimizer.step = lambda *args, **kwargs: None


def test_skipped_steps_are_skipped(tmp_path):
    model = scaled_classifier()
    before = weights(model)
    callback = ProximalSlimmingCallback(2.0, 1.0, example_inputs=SCALED_INPUTS)
    make_trainer(model, [SkipAll(), callback], tmp_path).train()
    assert largest_difference(before, weights(model)) == 0.0


def test_groups_of_the_optimizer_have_their_own_learning_rate():
    """Two scales in groups of different learning rates, and a frozen one, each get their own step."""
    model, inputs = FAMILIES["plain_cnn"]()
    first, second = model.features[1].weight, model.features[5].weight
    before = first.detach().clone(), second.detach().clone()
    callback = ProximalSlimmingCallback(0.5, 2.0, example_inputs=inputs)
    optimizer = torch.optim.SGD([{"params": [first], "lr": 0.2}, {"params": [second], "lr": 0.05}])
    hooks, state = {"model": model, "optimizer": optimizer}, SimpleNamespaceState()
    callback.on_train_begin(SimpleNamespace(), state, None, **hooks)  # added after the Trainer was made
    with torch.no_grad():
        first.add_(0.1)
        second.add_(0.1)
    callback.on_optimizer_step(SimpleNamespace(), state, None, **hooks)
    for found, start, lr in ((first, before[0], 0.2), (second, before[1], 0.05)):
        torch.testing.assert_close(found.detach(), (start + 0.1 + lr * 2.0 * start) / (1 + lr * 2.0))
    second.requires_grad_(False)
    callback.on_train_begin(SimpleNamespace(), SimpleNamespaceState(), None, **hooks)
    frozen = second.detach().clone()
    for _ in range(5):
        callback.on_optimizer_step(SimpleNamespace(), state, None, **hooks)
    assert torch.equal(second, frozen)
    callback.on_train_end(SimpleNamespace(), state, None, **hooks)
    assert torch.equal(second, frozen) and not [name for name, _ in model.named_buffers() if "hf_compress" in name]


@pytest.mark.parametrize("coupling", [0, -1.0, float("inf"), None])
def test_bad_coupling(coupling, tmp_path):
    with pytest.raises(MethodError, match=r"coupling=.* must be a number above 0"):
        train(tmp_path, coupling=coupling)


def test_incompatible_callbacks_are_refused(tmp_path):
    model, inputs = FAMILIES["plain_cnn"]()
    model, inputs = Classifier(model), {"pixel_values": inputs}

    def start(*callbacks):
        for callback in callbacks:
            callback.example_inputs = inputs
        make_trainer(model, callbacks, tmp_path, size=16, max_steps=1).train()

    with pytest.raises(
        MethodError, match=r"ProximalSlimmingCallback and NetworkSlimmingCallback would both act on 'body"
    ):
        start(ProximalSlimmingCallback(0.1, 1.0), NetworkSlimmingCallback())
    with pytest.raises(MethodError, match="cannot be combined"):
        start(ProximalSlimmingCallback(0.1, 1.0), ProximalSlimmingCallback(0.1, 1.0))
    # an aborted run leaves no claim behind; different axes are fine, each with its own auxiliary variable
    start(ProximalSlimmingCallback(0.1, 1.0, axes="*.0"), ProximalSlimmingCallback(0.1, 1.0, axes="*.4"))
    start(NetworkSlimmingCallback("l1"), NetworkSlimmingCallback({"name": "mcp", "a": 2.0}))  # these two add up
    start(ProximalSlimmingCallback(0.1, 1.0))
    assert not [name for name in model.state_dict() if "hf_compress" in name]


def test_nothing_to_shrink_is_reported_when_training_starts(tmp_path):
    model, inputs = FAMILIES["vit"]()
    trainer = make_trainer(model, [ProximalSlimmingCallback(0.1, 1.0, example_inputs=inputs)], tmp_path, size=32)
    with pytest.raises(NothingToShrinkError):
        trainer.train()


def test_plan_keeps_equally_many_on_tied_axes(monkeypatch):
    from dataclasses import replace

    model = Classifier(Scaled(6))
    callback = ProximalSlimmingCallback(0.1, 1.0, example_inputs=SCALED_INPUTS)
    graph = callback._graph(model)
    twin = replace(graph["body.gamma"], name="twin")
    graph.axes["twin"], graph.sizes_tied = twin, (("body.gamma", "twin"),)
    support = {"body.gamma": torch.tensor([0, 0, 1, 0, 0, 0]).bool(), "twin": torch.tensor([1, 0, 0, 0, 0, 1]).bool()}
    monkeypatch.setattr(callback, "support", lambda model: support)
    # filled up by the largest scale, the last
    assert dict(callback.plan(model).keep) == {"body.gamma": (2, 5), "twin": (0, 5)}


class Digits(torch.utils.data.Dataset):
    """Handwritten digits, 8 x 8: real images that need no download."""

    def __init__(self):
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        self.images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
        self.labels = torch.tensor(labels)

    def __len__(self):
        return 1400  # the rest is for testing

    def __getitem__(self, i):
        return {"pixel_values": self.images[i], "labels": self.labels[i]}

    def accuracy(self, model):
        with torch.no_grad():
            found = model.eval()(self.images[1400:])["logits"].argmax(-1)
        return (found == self.labels[1400:]).float().mean().item()


@pytest.mark.slow
def test_the_trained_support_is_a_small_model_without_fine_tuning(tmp_path):
    """No threshold, no fine-tuning: cutting to the support costs no accuracy, and there is something to cut."""
    pytest.importorskip("sklearn")
    data = Digits()
    torch.manual_seed(0)
    layers, channels = [], 1
    for width, stride in ((24, 1), (24, 1), (48, 2)):
        convolution = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    model = Classifier(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)))
    inputs = {"pixel_values": data.images[:2]}
    callback = ProximalSlimmingCallback(0.15, 30.0, gamma_init=0.25, zero_on_removal=False, example_inputs=inputs)
    trainer = make_trainer(
        model, [callback], tmp_path, max_steps=700, per_device_train_batch_size=64, optim_args="momentum=0.9",
        lr_scheduler_type="cosine", logging_steps=100,
    )  # fmt: skip
    trainer.train_dataset = data
    trainer.train()
    trained = data.accuracy(model)
    plan, graph = callback.plan(model), callback.axes_
    assert trained > 0.94  # 0.97 dense
    assert graph.cost(plan).params < 0.85 * graph.params
    shrink(model, plan, axes=graph, fold_shift=True, example_inputs=inputs)
    assert abs(data.accuracy(model) - trained) <= 0.0076  # 3 of the 397 test images
    sparsity = [entry["sparsity"] for entry in trainer.state.log_history if "loss" in entry]
    assert sparsity[0] == 0.0 < sparsity[-1]


@pytest.mark.parametrize("grouping", ["scale", "axis"])
def test_mcp_lets_go_of_large_scales_and_l1_does_not(grouping, tmp_path):
    """Without a gradient, l1 pulls every scale down, MCP only those within ``a * strength`` of zero."""
    strength, a = 0.2, 2.0
    found = {}
    for penalty in ("l1", {"name": "mcp", "a": a}):
        model = scaled_classifier()
        for parameter in model.parameters():
            parameter.requires_grad_(parameter is model.body.gamma)
        before = model.body.gamma.detach().clone()
        callback = ProximalSlimmingCallback(
            strength, 1.0, penalty=penalty, grouping=grouping, example_inputs=SCALED_INPUTS, zero_on_removal=False
        )
        trainer = make_trainer(model, [callback], tmp_path, max_steps=40)
        # the loss must not move the scales: only the penalty does
        model.body.gamma.register_hook(torch.zeros_like)
        trainer.train()
        found[penalty if isinstance(penalty, str) else "mcp"] = callback.auxiliary_
    far, near = before > a * strength, before < 0.5 * a * strength
    assert far.any() and near.any()
    # the operator is the identity there; averaging xi with an equal gamma rounds in float32, 40 times
    assert torch.allclose(found["mcp"][far], before[far], rtol=1e-5)
    assert (found["l1"][far] < before[far]).all()
    assert (found["mcp"][near] < before[near]).all()


def test_penalties_without_a_closed_form_are_refused(tmp_path):
    callback = ProximalSlimmingCallback(0.1, 1.0, penalty={"name": "lp", "p": 0.75}, example_inputs=SCALED_INPUTS)
    with pytest.raises(MethodError, match=r"closed form|p="):
        make_trainer(scaled_classifier(), [callback], tmp_path)
