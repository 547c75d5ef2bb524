"""Growing regularisation: exact gradients, the schedule, the budget, a cut that changes nothing, and digits."""

import copy

import pytest
import torch
import transformers
from families import FAMILIES
from sklearn.datasets import load_digits
from slimming_training import SCALED_INPUTS, Classifier, make_trainer, scaled_classifier, weights
from torch import nn

from hf_compress import find_axes, shrink
from hf_compress.errors import BudgetError, MethodError, ModelError, NothingToShrinkError
from hf_compress.methods import GrowingRegularizationCallback, NetworkSlimmingCallback, SparseGroupCallback
from hf_compress.methods.weight_groups import WeightGroups


class State:
    global_step = 0
    epoch = 0.0
    max_steps = 10


def built(family):
    model, x = FAMILIES[family]()
    model = model if isinstance(model, transformers.PreTrainedModel) else Classifier(model)
    return model.float(), {"pixel_values": x.float()}


def begun(model, callback, state):
    """The hooks' arguments, after those before the first step."""
    hooks = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    callback.on_init_end(State(), state, None, **hooks)
    callback.on_train_begin(State(), state, None, **hooks)
    return hooks


def members_of(model, axis, index):
    """The slices of parameters that leave with an index: (parameter, dim, positions)."""
    parameters = dict(model.named_parameters())
    return [(parameters[m.parameter], m.dim, m.positions[index]) for m in axis.members if m.parameter in parameters]


# -- what is decayed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lasso", [0.0, 0.1])
@pytest.mark.parametrize("family", ["plain_cnn", "resnet_basic", "vit", "plain_dense", "mobilenet_v2"])
def test_gradients_are_those_of_the_penalty(family, lasso):
    """Against autograd on the written penalty, over plain loops; without a lasso nothing else changes by a bit."""
    model, inputs = built(family)
    model.double()
    callback = GrowingRegularizationCallback(
        0.4, 0.7, warmup=0, hold=0.5, lasso=lasso, example_inputs={"pixel_values": inputs["pixel_values"].double()}
    )
    state = State()
    state.global_step = 2  # of 5 that it grows: the third step has three fifths
    hooks = begun(model, callback, state)
    kept = callback.kept(model)
    assert any(not mask.all() for mask in kept.values()) and any(mask.any() for mask in kept.values())
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    callback.on_pre_optimizer_step(State(), state, None, **hooks)
    found = {name: p.grad.clone() for name, p in model.named_parameters()}

    for parameter in model.parameters():
        parameter.grad = None
    penalty = 0.0
    touched = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    name_of = {id(p): name for name, p in model.named_parameters()}
    graph = callback.axes_
    for name in callback.scores(model):
        squares = []
        for index in range(graph[name].size):
            slices = members_of(model, graph[name], index)
            squares.append(sum(p.index_select(dim, positions).square().sum() for p, dim, positions in slices))
            if name in kept and not kept[name][index]:
                penalty = penalty + 0.6 * 0.7 / 2 * squares[-1]
                for p, dim, positions in slices:
                    touched[name_of[id(p)]].index_fill_(dim, positions, True)
        norms = torch.stack(squares).sqrt()
        penalty = penalty + lasso * norms.detach().square().mean().sqrt() * norms.sum()
    penalty.backward()
    for name, parameter in model.named_parameters():
        extra = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found[name], before[name] + extra, atol=1e-12, rtol=1e-9)
        if lasso == 0:
            assert torch.equal(found[name][~touched[name]], before[name][~touched[name]])
    assert any(mask.any() for mask in touched.values())


def test_the_lasso_never_exceeds_the_strength_and_ends_at_hold():
    model = scaled_classifier()
    with torch.no_grad():
        model.body.inner.weight[3] *= 1e-6
        model.body.inner.bias[3] = model.body.gamma[3] = 0
        model.body.outer.weight[:, 3] *= 1e-6
    callback = GrowingRegularizationCallback(
        {"macs": 1.0}, 0.3, warmup=0.2, hold=0.5, lasso=0.01, example_inputs=SCALED_INPUTS
    )
    state = State()
    hooks = begun(model, callback, state)
    for step, is_on in ((0, True), (4, True), (5, False), (9, False)):  # a budget of 1 removes nothing
        state.global_step = step
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        callback.on_pre_optimizer_step(State(), state, None, **hooks)
        weight = model.body.inner.weight
        assert bool(weight.grad.any()) == is_on
        if is_on:
            torch.testing.assert_close(weight.grad[3], 0.3 * weight.detach()[3], rtol=1e-6, atol=0)


def test_the_decay_grows_linearly_after_clipping_once_per_step(tmp_path):
    """A loss that has no gradient: what goes shrinks by lr lambda_t alone, under accumulation and clipping."""
    model = scaled_classifier()
    nn.init.zeros_(model.body.gamma)  # no gradient reaches the first layer
    model.body.gamma.requires_grad_(False)
    callback = GrowingRegularizationCallback(
        0.5, 2.0, warmup=0.2, hold=0.6, lasso=0.0, refresh=3, example_inputs=SCALED_INPUTS
    )
    before = weights(model)["body.inner.weight"]
    make_trainer(
        model, [callback], tmp_path, max_steps=10, learning_rate=0.1, max_grad_norm=1e-6, gradient_accumulation_steps=4
    ).train()
    gone = ~callback.kept(model)["body.gamma"]
    factor = 1.0
    for strength in (0, 0, 0.5, 1, 1.5, 2, 2, 2, 2, 2):
        factor *= 1 - 0.1 * strength
    after = model.body.inner.weight.detach()
    assert gone.sum() == 12
    torch.testing.assert_close(after[gone], factor * before[gone], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(after[~gone], before[~gone], rtol=0, atol=1e-6)


def test_what_goes_is_chosen_anew_at_its_steps():
    model = scaled_classifier()
    callback = GrowingRegularizationCallback(
        0.25, warmup=0.2, hold=0.9, lasso=0.0, refresh=3, example_inputs=SCALED_INPUTS
    )
    state = State()
    hooks = begun(model, callback, state)
    names = [name for name in model._buffers if name.startswith("hf_compress_growing_")]
    assert len(names) == 1
    sets = []
    for step in range(8):
        state.global_step = step
        with torch.no_grad():  # another quarter is the smallest at every step
            for parameter in (model.body.inner.weight, model.body.inner.bias, model.body.gamma):
                parameter.fill_(1)
                parameter[3 * step : 3 * step + 6] = 0.1
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        callback.on_pre_optimizer_step(State(), state, None, **hooks)
        sets.append(model._buffers[names[0]][1].nonzero().flatten().tolist())
    assert sets[0] == sets[1] == []
    assert sets[2] == list(range(6, 12)) and sets[3] == sets[4] == sets[5] == list(range(9, 15))
    assert sets[6] == sets[7] == list(range(18, 24))


def test_a_skipped_step_of_loss_scaling_adds_to_unscaled_gradients():
    """The decay is not multiplied by the loss scale."""
    model = scaled_classifier()
    callback = GrowingRegularizationCallback(0.5, warmup=0, hold=0.1, lasso=0, example_inputs=SCALED_INPUTS)
    state = State()
    hooks = begun(model, callback, state)

    class Scaled:
        optimizer = hooks["optimizer"]

        class scaler:
            is_enabled = staticmethod(lambda: True)

            @staticmethod
            def unscale_(optimizer):
                for parameter in model.parameters():
                    parameter.grad /= 1024

    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1024.0)
    callback.on_pre_optimizer_step(State(), state, None, model=model, optimizer=Scaled())
    weight, gone = model.body.inner.weight, ~callback.kept(model)["body.gamma"]
    torch.testing.assert_close(weight.grad, 1 + 0.3 * weight.detach() * gone[:, None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_floating_point_types(dtype):
    model = scaled_classifier().to(dtype)
    callback = GrowingRegularizationCallback(
        0.5, warmup=0, hold=0.1, example_inputs={"pixel_values": torch.zeros(1, 3, 4, 4, dtype=dtype)}
    )
    state = State()
    hooks = begun(model, callback, state)
    model(torch.randn(2, 3, 4, 4, dtype=dtype), torch.tensor([0, 1]))["loss"].backward()
    before = model.body.inner.weight.grad.clone()
    callback.on_pre_optimizer_step(State(), state, None, **hooks)
    callback.on_train_end(State(), state, None, **hooks)
    assert not torch.equal(model.body.inner.weight.grad, before) and model.body.inner.weight.grad.dtype == dtype
    assert not model._buffers


# -- what it leads to -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_trained_and_cut_to_its_share(family, tmp_path):
    model, inputs = built(family)
    callback = GrowingRegularizationCallback(0.3, warmup=0, inexact=True, refresh=1, example_inputs=inputs)
    arguments = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.01}
    trainer = make_trainer(model, [callback], tmp_path, size=inputs["pixel_values"].shape[-1], **arguments)
    trainer.train()
    assert not any("hf_compress" in key for key in model.state_dict())
    graph, scores = callback.axes_, callback.scores(model)
    for name, score in scores.items():
        assert score.shape == (graph[name].size,) and score.dtype == torch.float32 and score.device.type == "cpu"
        assert float(score.mean()) == pytest.approx(1, abs=1e-4) and score.ge(0).all()
    plan = callback.plan(model)
    shrink(model, plan, axes=graph)
    assert find_axes(model, inputs).macs == graph.cost(plan).macs < graph.macs
    assert model.eval()(**inputs)["logits"].isfinite().all()


@pytest.mark.parametrize("target", [{"macs": 0.5}, {"params": 0.4}, {"macs": 0.6, "params": 0.5}])
def test_the_budget_is_met_as_closely_as_indices_allow(target):
    model, inputs = built("resnet_basic")
    callback = GrowingRegularizationCallback(target, example_inputs=inputs)
    plan, graph = callback.plan(model), callback.axes_
    found, limits = graph.cost(plan), {name: share * getattr(graph, name) for name, share in target.items()}
    assert all(getattr(found, name) <= limit for name, limit in limits.items())
    for name, size in plan.sizes.items():  # nothing that went could have stayed
        more = graph.cost({**plan.sizes, name: size + 1})
        is_tied = any(name in tied for tied in graph.sizes_tied)
        assert is_tied or any(getattr(more, kind) > limit for kind, limit in limits.items())
    rounded = GrowingRegularizationCallback(target, round_to=4, min_keep=4, example_inputs=inputs).plan(model)
    assert all(size % 4 == 0 or size == graph[name].size for name, size in rounded.sizes.items())


class Digits(torch.utils.data.Dataset):
    """scikit-learn's handwritten digits, 8 x 8."""

    def __init__(self, part):
        digits = load_digits()
        order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))[part]
        self.pixels = torch.as_tensor(digits.images, dtype=torch.float32)[order, None] / 16 - 0.3
        self.labels = torch.as_tensor(digits.target)[order]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return {"pixel_values": self.pixels[i], "labels": self.labels[i]}


def digits_net():
    torch.manual_seed(0)
    return Classifier(
        nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
        )
    )  # fmt: skip


@torch.no_grad()
def answers(model, data):
    return model.eval()(data.pixels)["logits"]


def test_digits_are_learned_and_the_cut_changes_nothing(tmp_path):
    """At a quarter of the MACs, without fine-tuning; magnitude pruning of the same network falls apart."""
    train, test = Digits(slice(0, 1400)), Digits(slice(1400, None))
    inputs = {"pixel_values": torch.zeros(1, 1, 8, 8)}
    found = {}
    for name in ("dense", "growing"):
        model = digits_net()
        callback = GrowingRegularizationCallback({"macs": 0.25}, example_inputs=inputs)
        trainer = make_trainer(
            model, [callback] if name == "growing" else [], tmp_path, max_steps=300, per_device_train_batch_size=64,
            lr_scheduler_type="linear", optim_args="momentum=0.9",
        )  # fmt: skip
        trainer.train_dataset = train
        trainer.train()
        before = answers(model, test)
        plan = callback.plan(model)
        dense_macs = find_axes(model, inputs).macs
        shrink(model, plan)
        after = answers(model, test)
        assert 0.2 < find_axes(model, inputs).macs / dense_macs <= 0.25
        found[name] = [(logits.argmax(1) == test.labels).float().mean().item() for logits in (before, after)]
        if name == "growing":
            # what goes was multiplied by less than 0.97 in each of 150 steps, so less than 1 % of it is left, and twice on
            # its way through the network; logits are of the order of 10
            assert (after - before).abs().max() < 1e-2
            assert trainer.state.log_history[-1]["sparsity"] > 0.3
    assert found["dense"][0] > 0.95 and found["dense"][1] < 0.8
    assert found["growing"][0] > 0.94 and found["growing"][1] == found["growing"][0]


def test_a_transformer_under_adam_is_cut_without_a_trace(tmp_path):
    """Adam turns the decay into steps of about the learning rate, which bring weights of this size to nothing too."""
    train, test = Digits(slice(0, 1400)), Digits(slice(1400, None))
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=8, patch_size=2,
            num_channels=1, num_labels=10,
        )
    )  # fmt: skip
    callback = GrowingRegularizationCallback({"macs": 0.6}, strength=1.0, hold=0.4)
    trainer = make_trainer(
        model, [callback], tmp_path, max_steps=200, per_device_train_batch_size=64, optim="adamw_torch",
        learning_rate=2e-3, lr_scheduler_type="linear",
    )  # fmt: skip
    trainer.train_dataset = train
    trainer.train()
    before = answers(model, test)
    shrink(model, callback.plan(model))
    # a few per cent of a norm are left at most, and twice on the way through a layer
    assert (answers(model, test) - before).abs().max() < 1e-2 * before.abs().max()
    assert (before.argmax(1) == test.labels).float().mean() > 0.5


def test_an_unfinished_decay_is_told(tmp_path, caplog):
    model = scaled_classifier()
    callback = GrowingRegularizationCallback(0.5, 1e-3, example_inputs=SCALED_INPUTS)
    transformers.utils.logging.enable_propagation()
    try:
        make_trainer(model, [callback], tmp_path, max_steps=2).train()
    finally:
        transformers.utils.logging.disable_propagation()
    assert "12 of the 12 groups" in caplog.text and "Raise strength" in caplog.text


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target": 0}, "target"),
        ({"target": 1.0}, "below 1"),
        ({"target": None}, "target"),
        ({"target": {}}, "name macs, params or both"),
        ({"target": {"latency": 0.5}}, "name macs, params or both"),
        ({"target": {"macs": 0}}, "macs"),
        ({"target": 0.5, "round_to": 8}, "round_to"),
        ({"strength": 0}, "strength"),
        ({"lasso": -1}, "lasso"),
        ({"warmup": 0.5, "hold": 0.5}, "warmup"),
        ({"hold": 1.5}, "hold"),
        ({"refresh": 0}, "refresh"),
        ({"min_keep": 1.5}, "min_keep"),
        ({"threshold": "small"}, "threshold"),
    ],
)
def test_bad_settings_are_refused_before_training(options, said, tmp_path):
    callback = GrowingRegularizationCallback(**{"target": {"macs": 0.5}, "example_inputs": SCALED_INPUTS, **options})
    with pytest.raises(MethodError, match=said):
        make_trainer(scaled_classifier(), [callback], tmp_path)


def test_what_cannot_be_reached_is_refused_before_the_first_step(tmp_path):
    model, inputs = built("resnet_basic")
    before = weights(model)
    for target in ({"macs": 1e-4}, {"macs": 0.5, "params": 1e-4}):
        callback = GrowingRegularizationCallback(target, example_inputs=inputs)
        with pytest.raises(BudgetError, match="cannot be reached"):
            callback.first_scores(model)
        trainer = make_trainer(model, [callback], tmp_path, size=32)
        with pytest.raises(BudgetError, match="cannot be reached"):
            trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items() if name in before)
    callback = GrowingRegularizationCallback(0.5, min_keep=10**6, example_inputs=inputs)
    with pytest.raises(BudgetError, match="min_keep"):
        callback.plan(model)


def test_nothing_to_act_on_is_said(tmp_path):
    callback = GrowingRegularizationCallback(0.5, axes="nothing*", example_inputs=SCALED_INPUTS)
    with pytest.raises(NothingToShrinkError, match="matches no axis that can be used"):
        make_trainer(scaled_classifier(), [callback], tmp_path).train()
    model = scaled_classifier()
    with torch.no_grad():
        model.body.outer.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        GrowingRegularizationCallback(0.5, example_inputs=SCALED_INPUTS).scores(model)


def test_an_axis_tied_to_one_that_was_not_chosen_stays_whole():
    """The queries' dimensions in a head, without the values'."""
    model, inputs = built("vit")
    for target in (0.5, {"macs": 0.9}):
        callback = GrowingRegularizationCallback(target, axes="*q_proj:head_dim", example_inputs=inputs)
        with pytest.raises(NothingToShrinkError):
            callback.plan(model)
    callback = GrowingRegularizationCallback(0.5, axes=["*q_proj:head_dim", "*fc1"], example_inputs=inputs)
    assert all(name.endswith("fc1") for name in callback.plan(model).keep) and callback.plan(model).keep


def test_it_stands_beside_methods_on_scales_and_alone_on_weights(tmp_path):
    growing = GrowingRegularizationCallback(0.5, example_inputs=SCALED_INPUTS)
    slimming = NetworkSlimmingCallback("l1", 1e-3, example_inputs=SCALED_INPUTS)
    make_trainer(scaled_classifier(), [slimming, growing], tmp_path, max_steps=2).train()
    for other in (copy.deepcopy(growing), SparseGroupCallback("l0", example_inputs=SCALED_INPUTS)):
        trainer = make_trainer(scaled_classifier(), [growing, other], tmp_path)
        with pytest.raises(MethodError, match="cannot be combined"):
            trainer.train()


@pytest.mark.parametrize("family", ["plain_cnn", "resnet_basic", "convnext", "vit", "swin", "plain_dense"])
def test_norms_are_over_everything_that_leaves(family):
    """Against plain loops over members."""
    model, inputs = built(family)
    graph = find_axes(model, inputs)
    groups = WeightGroups(model, graph, [axis for axis in graph if axis.is_exact], "all")
    for (name, size), norms in zip(groups.sides, groups.by_side(groups.norms(groups.read())), strict=True):
        for index in range(size):
            slices = members_of(model, graph[name], index)
            expected = sum(p.detach().index_select(dim, at).square().sum() for p, dim, at in slices).sqrt()
            torch.testing.assert_close(norms[index], expected)
