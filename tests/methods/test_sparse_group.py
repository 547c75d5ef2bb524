"""The sparse-group callback: closed forms against brute force, the splitting's theory, groups that shrink exactly."""

import copy
import json
import math

import pytest
import torch
import transformers
from families import FAMILIES
from slimming_training import SCALED_INPUTS, Classifier, Images, make_trainer, scaled_classifier, weights
from torch import nn

from hf_compress import find_axes, shrink
from hf_compress.errors import MethodError, NothingToShrinkError
from hf_compress.methods import NetworkSlimmingCallback, ProximalSlimmingCallback, TransformedL1
from hf_compress.methods.sparse_group import (
    ELEMENTS,
    KeepZerosCallback,
    SparseGroupCallback,
    element_from,
    group_factors,
    weight_zeros,
)
from hf_compress.methods.weight_groups import WeightGroups
from hf_compress.models.lenet import LeNetConfig, LeNetForImageClassification

# penalty of every entry, at mu = 1 times the value for l0, l1 and tl1; SCAD carries mu inside
VALUES = {
    "l0": lambda x, mu: mu * (x != 0),
    "l1": lambda x, mu: mu * x.abs(),
    "tl1": lambda x, mu: mu * 2 * x.abs() / (1 + x.abs()),
    "scad": lambda x, mu: torch.where(
        x.abs() <= mu,
        mu * x.abs(),
        torch.where(
            x.abs() <= 3.7 * mu, (2 * 3.7 * mu * x.abs() - x**2 - mu**2) / (2 * 2.7), torch.tensor(mu**2 * 4.7 / 2)
        ),
    ),
}


def prox(element, v, mu):
    out = v.clone()
    element_from(element).proximal_(out, mu)
    return out


@pytest.mark.parametrize("mu", [0.01, 0.2, 1.0, 3.0])
@pytest.mark.parametrize("element", VALUES)
def test_closed_forms_minimise_by_brute_force(element, mu):
    v = torch.linspace(-4, 4, 161, dtype=torch.float64)
    grid = torch.cat([torch.linspace(-4, 4, 16001, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])

    def objective(u, v):
        return VALUES[element](u, mu) + (u - v) ** 2 / 2

    found = prox(element, v, mu)
    best = objective(grid[None], v[:, None]).min(1).values
    # no grid point is better; the grid's spacing of 5e-4 costs it at most a slope of 8 times that
    assert (objective(found, v) <= best + 1e-12).all() and (objective(found, v) >= best - 4e-3).all()
    assert torch.equal(prox(element, -v, mu), -found)  # symmetric


def test_tl1_is_the_penalty_of_the_slimming_papers():
    v = torch.randn(1000, dtype=torch.float64)
    for a in (0.1, 1.0, 5.0):
        for mu in (1e-4, 0.1, 2.0):
            expected = TransformedL1(a).proximal(v, mu, 1.0)
            torch.testing.assert_close(prox({"name": "tl1", "a": a}, v, mu), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_l1_minus_l2_minimises_by_brute_force(alpha):
    """In the plane, over a grid; the three branches all occur."""
    axis = torch.linspace(-2, 2, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    kinds = set()
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        v = torch.empty(2, dtype=torch.float64).uniform_(-1.5, 1.5, generator=generator)
        mu = float(torch.empty(1).uniform_(0.05, 1.5, generator=generator))

        def objective(u, v=v, mu=mu):
            return mu * (u.abs().sum(-1) - alpha * u.norm(dim=-1)) + ((u - v) ** 2).sum(-1) / 2

        found = prox({"name": "l1-l2", "alpha": alpha}, v, mu)
        kinds.add(int((found != 0).sum()))
        assert objective(found) <= objective(grid).min() + 1e-12
    assert kinds == ({0, 1, 2} if alpha < 1 else {1, 2})


@pytest.mark.parametrize("element", [None, "l1"])
def test_element_then_group_is_the_proximal_operator_of_the_sum(element):
    """Exact for l1: the optimality condition of the sum holds at what comes out."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        w = torch.randn(7, dtype=torch.float64, generator=generator)
        mu, threshold = torch.empty(2, dtype=torch.float64).uniform_(0, 1.2, generator=generator).tolist()
        mu = mu if element else 0.0
        v = prox(element, w, mu) if element else w.clone()
        u = v * group_factors(v.norm()[None], torch.tensor([threshold], dtype=torch.float64))

        def objective(x, w=w, mu=mu, threshold=threshold):
            return mu * x.abs().sum(-1) + threshold * x.norm(dim=-1) + ((x - w) ** 2).sum(-1) / 2

        others = (
            u + 0.3 * torch.randn(2000, 7, dtype=torch.float64, generator=generator) * torch.rand(2000, 1).double() ** 4
        )
        others = torch.cat([others, torch.zeros(1, 7, dtype=torch.float64), w[None], u[None] * (others != 0)[:50]])
        assert objective(u) <= objective(others).min() + 1e-12


def test_l0_then_group_errs_towards_keeping():
    """Against all subsets: never better than the best, and its support contains that of the best."""
    generator = torch.Generator().manual_seed(2)
    worst = 0.0
    for _ in range(100):
        w = torch.randn(6, dtype=torch.float64, generator=generator)
        mu, threshold = torch.empty(2, dtype=torch.float64).uniform_(0.05, 0.6, generator=generator).tolist()
        v = prox("l0", w, mu)
        u = v * group_factors(v.norm()[None], torch.tensor([threshold], dtype=torch.float64))
        candidates = []
        for subset in range(64):
            s = w * torch.tensor([subset >> i & 1 for i in range(6)])
            candidates.append(s * (1 - threshold / s.norm()).clamp_min(0) if s.any() else s)

        def objective(x, w=w, mu=mu, threshold=threshold):
            return float(mu * (x != 0).sum() + threshold * x.norm() + ((x - w) ** 2).sum() / 2)

        best = min(candidates, key=objective)
        worst = max(worst, objective(u) - objective(best))
        assert objective(u) >= objective(best) - 1e-12
        assert bool(((u != 0) | (best == 0)).all()) or not u.any()
    assert 0 < worst < 1  # it is an approximation; this bounds it for these numbers


# -- groups -------------------------------------------------------------------------------------------------------


def lenet(**options):
    torch.manual_seed(0)
    return LeNetForImageClassification(
        LeNetConfig(widths=[4, 6], hidden_size=12, num_labels=7, image_size=16, **options)
    )


def test_lenet_has_the_groups_of_the_papers_code():
    """Convolutions by output filters, linear layers by input units; every layer is in one of them."""
    model = lenet()
    graph = find_axes(model)
    groups = WeightGroups(model, graph, list(graph))
    assert groups.sides == [
        ("lenet.convolutions.0", 4), ("lenet.convolutions.1", 6), ("lenet.convolutions.1", 6), ("lenet.hidden", 12),
    ]  # fmt: skip
    assert set(groups.matrices) == {name for name, p in model.named_parameters() if p.dim() > 1}
    assert groups.by_side(groups.counts)[0].tolist() == [26.0] * 4  # 25 weights and a bias
    assert groups.by_side(groups.counts)[2].tolist() == [12.0] * 6  # one column for each of 1 x 1 positions
    assert groups.by_side(groups.counts)[3].tolist() == [7.0] * 12


@pytest.mark.parametrize("slices", ["auto", "producers", "readers"])
@pytest.mark.parametrize("family", ["plain_cnn", "vit", "resnet_basic", "plain_dense", "swin"])
def test_norms_and_factors_follow_the_members(family, slices):
    """Against plain loops over indices; overlapping groups multiply."""
    model, x = FAMILIES[family]()
    graph = find_axes(model, x)
    axes = [axis for axis in graph if axis.is_exact]
    try:
        groups = WeightGroups(model, graph, axes, slices)
    except NothingToShrinkError:
        assert slices == "readers"
        return
    flat = groups.read()
    norms = groups.norms(flat)
    expected, factors, scaled = [], torch.rand(len(norms), dtype=flat.dtype), flat.clone()
    views, end = groups.views(flat), int(groups._entries.max())
    for row in groups._entries.tolist():
        total = torch.zeros((), dtype=flat.dtype)
        for position in row:
            for slot in groups._slots:
                if slot.start <= position < slot.end:
                    total += views[slot.parameter].select(slot.dim, position - slot.start).square().sum()
            start = groups._vector_start + position - groups._first_vector
            if groups._first_vector <= position < end and start < groups.length:
                total += flat[start] ** 2
        expected.append(total.sqrt())
    torch.testing.assert_close(norms, torch.stack(expected))
    groups.scale_(scaled, torch.ones_like(factors))
    assert torch.equal(scaled, flat)
    groups.scale_(scaled, torch.zeros_like(factors))
    assert not groups.norms(scaled).any()
    one = torch.ones_like(factors)
    one[0] = 0
    groups.scale_(flat, one)
    assert groups.norms(flat)[0] == 0 and (groups.norms(flat)[1:] > 0).any()


@pytest.mark.parametrize("family", ["plain_cnn", "resnet_basic", "vit", "convnext", "mobilenet_v2", "plain_dense"])
def test_zero_groups_are_removed_without_a_trace(family, tmp_path):
    """After training the plan holds exactly the nonzero groups, and cutting changes the function by rounding alone."""
    model, x = FAMILIES[family]()
    model = model if isinstance(model, transformers.PreTrainedModel) else Classifier(model)
    model.float()
    inputs = {"pixel_values": x.float()}
    graph = find_axes(model, inputs)
    groups = WeightGroups(model, graph, [axis for axis in graph if axis.is_exact])
    middle = float((groups.norms(groups.read()) / groups.counts.sqrt()).median())  # half of the groups go
    callback = SparseGroupCallback(None, strength=0.1 * middle, split=0.1, example_inputs=inputs)
    trainer = make_trainer(model, [callback], tmp_path, size=x.shape[-1], max_steps=3, learning_rate=1e-3)
    trainer.train()
    support = callback.support(model)
    assert any(not mask.all() for mask in support.values()) and all(mask.any() for mask in support.values())
    model.eval()
    with torch.no_grad():
        before = model(**inputs)["logits"]
        plan = callback.plan(model)
        graph = callback.axes_
        for name, mask in support.items():
            assert len(plan.keep.get(name, range(len(mask)))) >= int(mask.sum())
        shrink(model, plan, axes=graph)
        after = model(**inputs)["logits"]
    assert (after - before).abs().max() <= 1e-5 * before.abs().max().clamp_min(1)  # float32 sums in another order
    assert find_axes(model, inputs).macs == graph.cost(plan).macs


def test_the_projection_keeps_values_and_the_support_of_v(tmp_path):
    """What is in V's support keeps its value, undiminished; all else is zero; nothing of the method stays behind."""
    model = lenet()
    callback = SparseGroupCallback("l1", strength=2e-3, split=0.1)
    seen = {}

    class Watch(transformers.TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            groups = callback.groups_
            seen["v"] = {
                name: v.clone()
                for name, v in zip(groups.names, groups.views(callback._values(model, groups)), strict=True)
            }
            seen["w"] = weights(model)

    trainer = make_trainer(model, [Watch(), callback], tmp_path, max_steps=8)
    trainer.train_dataset = Gray()
    trainer.train()
    final = weights(model)
    assert final.keys() == {name for name, _ in lenet().named_parameters()}
    assert any((v == 0).any() for v in seen["v"].values())
    for name, value in final.items():
        mask = seen["v"][name] != 0 if name in seen["v"] else torch.ones_like(value, dtype=torch.bool)
        assert torch.equal(value, seen["w"][name] * mask)


class Gray(Images):
    def __init__(self):
        super().__init__(16)

    def __getitem__(self, i):
        item = super().__getitem__(i)
        return {"pixel_values": item["pixel_values"][:1], "labels": item["labels"]}


def test_a_layer_never_loses_its_last_unit(tmp_path, caplog):
    """A strength that zeroes everything: warned of while training, and one unit of every axis comes through whole."""
    model = lenet()
    callback = SparseGroupCallback("l0", strength=100.0, split=0.1)
    trainer = make_trainer(model, [callback], tmp_path, max_steps=2, logging_steps=1)
    trainer.train_dataset = Gray()
    transformers.utils.logging.enable_propagation()
    try:
        trainer.train()
    finally:
        transformers.utils.logging.disable_propagation()
    assert "all groups of axis 'lenet.hidden' are zero in V" in caplog.text
    assert "all 12 groups of axis 'lenet.hidden' vanished" in caplog.text and "Lower strength" in caplog.text
    support = callback.support(model)
    assert {name: int(mask.sum()) for name, mask in support.items()} == dict.fromkeys(support, 1)
    shrink(model, callback.plan(model), axes=callback.axes_)
    assert all(p.numel() for p in model.parameters()) and model.lenet.hidden.weight.shape == (1, 1)
    assert model.lenet.hidden.weight.any() and model.lenet.convolutions[0].weight.any()


# -- the splitting ------------------------------------------------------------------------------------------------


class State:
    global_step = 0
    epoch = 0.0


@pytest.mark.parametrize("element", ["l1", None, "l0"])
def test_objective_never_rises_and_stationarity_holds(element):
    """Full-batch gradient steps with a small step and prox steps: F falls; the support settles.

    With l0 the group norm is off: element, then group is the exact minimiser for l1 and None alone.
    """
    torch.manual_seed(0)
    model = scaled_classifier().double()
    group = None if element == "l0" else "l2,1"
    strength, split = 2e-3, 0.2
    callback = SparseGroupCallback(
        element,
        group,
        strength,
        split,
        slices="readers",
        example_inputs={"pixel_values": torch.zeros(1, 3, 4, 4).double()},
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    state, hooks = State(), {"model": model, "optimizer": optimizer}
    callback.on_init_end(State(), state, None, **hooks)
    callback.on_train_begin(State(), state, None, **hooks)
    groups = callback.groups_
    flat = model._buffers[f"hf_compress_v_{groups.key}"]
    items = [Images(4)[i] for i in range(16)]
    batch = {
        "pixel_values": torch.stack([i["pixel_values"] for i in items]).double(),
        "labels": torch.tensor([i["labels"] for i in items]),
    }

    def objective():
        with torch.no_grad():
            v, w = flat, groups.read()
            value = model(**batch)["loss"] + split / 2 * ((w - v) ** 2).sum()
            matrices = v[: groups.matrix_length]
            if element == "l0":
                value += strength * (matrices != 0).sum()
            elif element == "l1":
                value += strength * matrices.abs().sum()
            if group:
                value += strength * (groups.counts.sqrt() * groups.norms(v)).sum()
            return float(value)

    values, supports = [objective()], []
    for _ in range(300):
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        callback.on_pre_optimizer_step(State(), state, None, **hooks)
        optimizer.step()
        values.append(objective())
        callback.on_optimizer_step(State(), state, None, **hooks)
        values.append(objective())
        supports.append((flat != 0).clone())
    assert all(b <= a + 1e-12 for a, b in zip(values[1:], values[2:], strict=False))
    changes = [int((a != b).sum()) for a, b in zip(supports, supports[1:], strict=False)]
    if element:  # without a penalty on entries only whole groups leave, late, as they shrink
        assert sum(changes[-50:]) <= sum(changes[:50])
    assert supports[-1].any() and (element is None or not supports[-1].all())
    if element == "l0":  # nonzero entries are those of W and above the threshold, zeros below it
        w, threshold = groups.read()[: groups.matrix_length], math.sqrt(2 * strength / split)
        v = flat[: groups.matrix_length]
        assert torch.equal(v[v != 0], w[v != 0]) and (v[v != 0].abs() > threshold).all()
        assert (w[v == 0].abs() <= threshold).all()


def test_the_gradient_gets_the_coupling_after_clipping_once_per_step(tmp_path):
    """Plain SGD with a loss that has no gradient: W moves by lr beta (V - W) alone, under accumulation and clipping."""
    model = scaled_classifier()
    nn.init.zeros_(model.body.gamma)  # no gradient reaches the first layer
    model.body.gamma.requires_grad_(False)
    callback = SparseGroupCallback(
        "l1", None, 0.01, 0.5, growth=2.0, growth_every=1, slices="producers", example_inputs=SCALED_INPUTS
    )
    before = model.body.inner.weight.detach().clone()
    make_trainer(
        model, [callback], tmp_path, max_steps=5, learning_rate=0.1, max_grad_norm=1e-6,
        gradient_accumulation_steps=4, per_device_train_batch_size=8,  # two steps in an epoch
    ).train()  # fmt: skip
    w = v = before
    for step in range(5):
        beta = 0.5 * 2.0 ** (step // 2)
        w = w - 0.1 * beta * (w - v)
        v = torch.nn.functional.softshrink(w, 0.01 / beta)
    torch.testing.assert_close(model.body.inner.weight.detach(), torch.where(v != 0, w, 0), atol=1e-6, rtol=0)


def test_a_skipped_step_leaves_v_alone():
    model = scaled_classifier()
    callback = SparseGroupCallback("l0", strength=0.1, split=0.5, example_inputs=SCALED_INPUTS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state, hooks = State(), {"model": model, "optimizer": optimizer}
    callback.on_init_end(State(), state, None, **hooks)
    callback.on_train_begin(State(), state, None, **hooks)
    flat = model._buffers[f"hf_compress_v_{callback.groups_.key}"]
    before = flat.clone()
    optimizer.step_was_skipped = True
    callback.on_optimizer_step(State(), state, None, **hooks)
    assert torch.equal(flat, before)
    optimizer.step_was_skipped = False
    callback.on_optimizer_step(State(), state, None, **hooks)
    assert not torch.equal(flat, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_floating_point_types(dtype):
    model = scaled_classifier().to(dtype)
    callback = SparseGroupCallback(
        "l0", strength=0.01, split=0.5, example_inputs={"pixel_values": torch.zeros(1, 3, 4, 4, dtype=dtype)}
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state, hooks = State(), {"model": model, "optimizer": optimizer}
    callback.on_init_end(State(), state, None, **hooks)
    callback.on_train_begin(State(), state, None, **hooks)
    assert callback.groups_.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    model(torch.randn(2, 3, 4, 4, dtype=dtype), torch.tensor([0, 1]))["loss"].backward()
    for hook in (callback.on_pre_optimizer_step, callback.on_optimizer_step, callback.on_train_end):
        hook(State(), state, None, **hooks)
    assert all(p.dtype == dtype and p.isfinite().all() for p in model.parameters()) and weight_zeros(model)["all"] > 0


# -- logs, fine-tuning, errors --------------------------------------------------------------------------------------


def test_logs_and_reports_agree_with_the_weights(tmp_path):
    model = lenet()
    callback = SparseGroupCallback("l0", strength=2e-3, split=0.1)
    trainer = make_trainer(model, [callback], tmp_path, max_steps=6)
    trainer.train_dataset = Gray()
    trainer.train()
    entry = trainer.state.log_history[-1]
    support = torch.cat([*callback.support(model).values()])
    assert entry["sparsity"] == pytest.approx(1 - support.float().mean().item())
    assert entry["weight_sparsity"] == pytest.approx(weight_zeros(model)["all"]) and 0 < entry["weight_sparsity"] < 1
    assert {f"sparsity/{name}" for name in callback.support(model)} <= set(entry)
    scores = callback.scores(model)
    assert all(torch.equal(score > 0, callback.support(model)[name]) for name, score in scores.items())


def test_zeros_stay_zero_in_fine_tuning(tmp_path):
    model = lenet()
    with torch.no_grad():
        model.lenet.hidden.weight[:, ::2] = 0
        model.lenet.convolutions[0].weight[1] = 0
    dense = copy.deepcopy(model)
    zeros = weight_zeros(model)
    trainer = make_trainer(model, [KeepZerosCallback()], tmp_path, optim_args="momentum=0.9", optim="sgd")
    trainer.train_dataset = Gray()
    trainer.train()
    assert weight_zeros(model) == zeros and zeros["lenet.hidden.weight"] == 0.5
    assert not torch.equal(model.lenet.hidden.weight, dense.lenet.hidden.weight)
    assert not (
        model.lenet.hidden.weight.signbit() & (model.lenet.hidden.weight == 0)
    ).any()  # +0, which takes no space


def test_other_methods_act_beside_it(tmp_path):
    """Network slimming and proximal slimming on the scales, sparse groups on the weights; not two on the same weights."""
    for other in (NetworkSlimmingCallback("l1", 1e-3), ProximalSlimmingCallback(0.01, 1.0)):
        model, x = FAMILIES["plain_cnn"]()
        model, inputs = Classifier(model).float(), {"pixel_values": x.float()}
        other.example_inputs = inputs
        callback = SparseGroupCallback("l0", strength=1e-3, split=0.1, example_inputs=inputs)
        make_trainer(model, [other, callback], tmp_path, size=x.shape[-1], max_steps=2).train()
        assert weight_zeros(model)["all"] > 0 and not any("hf_compress" in key for key in model.state_dict())
    model = lenet()
    twice = [SparseGroupCallback("l0"), SparseGroupCallback("l1")]
    trainer = make_trainer(model, twice, tmp_path)
    with pytest.raises(MethodError, match="cannot be combined"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"element": "l3"}, "l3"),
        ({"element": {"name": "tl1", "b": 1}}, "'b'"),
        ({"element": {"name": "scad", "a": 2}}, "above 2"),
        ({"element": {"name": "l1-l2", "alpha": 1.5}}, "between 0 and 1"),
        ({"element": None, "group": None}, "no penalty"),
        ({"group": "l1"}, "group="),
        ({"slices": "rows"}, "slices="),
        ({"strength": -1}, "strength"),
        ({"split": 0}, "split"),
        ({"growth": 0.9}, "growth"),
        ({"growth_every": 0}, "growth_every"),
    ],
)
def test_bad_settings_are_refused_before_training(options, said, tmp_path):
    with pytest.raises(MethodError, match=said):
        make_trainer(lenet(), [SparseGroupCallback(**options)], tmp_path)


def test_nothing_to_act_on_is_said(tmp_path):
    trainer = make_trainer(lenet(), [SparseGroupCallback(axes="nothing*")], tmp_path)
    with pytest.raises(NothingToShrinkError, match="matches no axis that can be used"):
        trainer.train()
    frozen = lenet().requires_grad_(False)
    with pytest.raises(NothingToShrinkError, match="can be trained"):
        WeightGroups(frozen, find_axes(frozen), list(find_axes(frozen)))


@pytest.mark.parametrize("element", [*ELEMENTS, {"name": "tl1", "a": 0.5}, None])
def test_arguments_are_json(element):
    state = json.loads(json.dumps(SparseGroupCallback(element).state()))
    assert SparseGroupCallback.from_state(state).element == element
