"""The search for dimensions: where scores act, how they fall, what is left of them, and what the plan removes."""

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from families import FAMILIES, MORE_FAMILIES, perturb
from masking import zero_at_producers
from safetensors.torch import load_file
from slimming_training import (
    SCALED_INPUTS,
    Classifier,
    Images,
    largest_difference,
    make_trainer,
    scaled_classifier,
    weights,
)

from hf_compress.axes import find_axes
from hf_compress.errors import BudgetError, MethodError, ModelError, NothingToShrinkError
from hf_compress.methods import DimensionSearchCallback, NetworkSlimmingCallback
from hf_compress.methods.dimension_kinds import kind_of, places_of
from hf_compress.methods.dimension_plan import Lowest
from hf_compress.methods.dimension_scores import NAME, DimensionScores, scores_in
from hf_compress.surgery import Plan, shrink

ATTENTION = ("heads", "qk", "v", "mlp", "residual")


def detr():
    torch.manual_seed(0)
    config = transformers.DetrConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_ffn_dim=24, num_queries=5, use_timm_backbone=False, backbone=None, num_labels=3,
        backbone_config=transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", out_features=["stage2"]
        ),
    )  # fmt: skip
    return perturb(transformers.DetrForObjectDetection(config)), torch.randn(2, 3, 64, 64)


_SLOW = ("mobilenet_v2", "regnet_x", "regnet_y", "timm_resnet", "resnet_bottleneck")  # nothing that others lack
BUILDERS = {name: build for name, build in FAMILIES.items() if name not in _SLOW}
BUILDERS |= {name: MORE_FAMILIES[name] for name in ("deit", "dinov2_swiglu", "beit", "swinv2")}
BUILDERS["detr"] = detr


def built(family, dtype=torch.float32):
    model, images = BUILDERS[family]()
    model = model if isinstance(model, transformers.PreTrainedModel) else Classifier(model)
    return model.to(dtype), {"pixel_values": images.to(dtype)}


@torch.no_grad()
def outputs(model, inputs):
    found = model.eval()(**inputs)
    return torch.cat([found[key].flatten() for key in ("logits", "pred_boxes") if key in found])


def searched(model, inputs, **options):
    """A callback whose scores are in the model, all 1."""
    callback = DimensionSearchCallback(example_inputs=inputs, **options)
    return callback, callback.attach(model)


def set_scores(scores, values):
    """axis -> tensor; the others stay."""
    with torch.no_grad():
        for name, value in values.items():
            scores.norm[scores.names.index(name)].copy_(value)


def by_kind(scores, kind):
    return [name for name in scores.names if scores.kinds[name] == kind]


def train(model, callback, folder, **options):
    defaults = {
        "size": 32, "optim": "adamw_torch", "learning_rate": 1e-2, "weight_decay": 0.1, "max_steps": 12,
        "max_grad_norm": 1.0,
    }  # fmt: skip
    trainer = make_trainer(model, [callback], folder, **{**defaults, **options})
    trainer.train()
    return trainer


# -- where scores act --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", BUILDERS)
def test_scores_act_as_masks_and_fold_into_weights(family):
    """Ones change no bit; zeros are the axis masked at its producers; any scores are the weights that they fold into."""
    model, inputs = built(family, torch.float64)
    graph = find_axes(model, inputs)
    dense = outputs(model, inputs)
    keys = list(model.state_dict())
    axes = [axis for axis in graph if places_of(axis, graph)]
    scores = DimensionScores(model, graph, axes)
    scores.attach(model)
    # weights times one are the same bits elsewhere in memory, and on some CPUs kernels round by where weights begin
    torch.testing.assert_close(outputs(model, inputs), dense, rtol=1e-13, atol=1e-13)
    for axis in axes:
        if not axis.is_exact and kind_of(axis, graph) != "qk":
            continue  # masking before a statistic is not a factor behind it
        keep = torch.arange(axis.size) % 3 != 1
        masked = copy.deepcopy(model)
        scores_in(masked).detach_from(masked)
        expected = outputs(zero_at_producers(masked, graph, {axis.name: keep}), inputs)
        set_scores(scores, {axis.name: keep.double()})
        if "statistics" not in axis.reasons:  # float64; products in another order
            torch.testing.assert_close(outputs(model, inputs), expected, rtol=1e-9, atol=1e-9)
        set_scores(scores, {axis.name: torch.ones(axis.size)})
    generator = torch.Generator().manual_seed(0)
    set_scores(scores, {name: torch.randn(graph[name].size, generator=generator) for name in scores.names})
    soft = outputs(model, inputs)
    assert not torch.allclose(soft, dense)
    scores.fold(model)
    torch.testing.assert_close(outputs(model, inputs), soft, rtol=1e-12, atol=1e-12)
    assert list(model.state_dict()) == keys and not any("weight" in vars(module) for module in model.modules())


@pytest.mark.parametrize("family", ["vit", "deit", "swin", "timm_vit", "detr"])
def test_kinds_of_transformers(family):
    model, inputs = built(family)
    _, scores = searched(model, inputs, axes="*", inexact=True)
    kinds = {kind: by_kind(scores, kind) for kind in (*ATTENTION, "channels")}
    assert all(name.endswith(":heads") for name in kinds["heads"]) and kinds["heads"]
    assert all(name.endswith(":head_dim") for name in kinds["qk"]) and len(kinds["qk"]) == len(kinds["heads"])
    assert all(name.endswith(":value_dim") for name in kinds["v"])
    assert bool(kinds["v"]) != (family == "timm_vit")  # packed there
    assert all(any(part in name for part in ("mlp", "bbox")) for name in kinds["mlp"]) and kinds["mlp"]
    assert bool(kinds["residual"]) == (family != "detr") and bool(kinds["channels"]) == (family == "detr")


def test_kinds_of_convolutional_networks():
    for family in ("resnet_basic", "plain_cnn", "plain_dense"):
        _, scores = searched(*built(family), kinds="channels")
        assert set(scores.kinds.values()) == {"channels"} and len(scores.names) == len(scores.graph)


def test_scores_are_where_the_documentation_says():
    model, inputs = built("vit")
    _, scores = searched(model, inputs, kinds=ATTENTION, inexact=True)
    expected = {"qk": {"q_proj.weight", "q_proj.bias"}, "v": {"o_proj.weight"}, "heads": {"o_proj.weight"}}
    expected |= {"mlp": {"fc2.weight"}}
    for name in scores.names:
        places = places_of(scores.graph[name], scores.graph)
        found = {".".join(place.parameter.split(".")[-2:]) for place in places}
        if scores.kinds[name] in expected:
            assert found == expected[scores.kinds[name]]
        else:
            assert {place.dim for place in places} == {1} and len(
                places
            ) == 2 * 4 + 1  # q, k, v, fc1 and the classifier


def test_packed_projection_scores_queries_and_values():
    model, inputs = built("timm_vit")
    _, scores = searched(model, inputs, kinds=("qk",), inexact=True)
    place, bias, reader = places_of(scores.graph[scores.names[0]], scores.graph)
    width = 24
    assert place.parameter.endswith("qkv.weight") and bias.parameter.endswith("qkv.bias")
    assert place.positions.shape == (8, 3) and int(place.positions.max()) < width  # the first third: queries
    assert reader.parameter.endswith("attn.proj.weight") and reader.dim == 1


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    gradients = []
    for is_checkpointed in (False, True):
        model, inputs = built("vit")
        _, scores = searched(model, inputs, kinds=ATTENTION, inexact=True)
        set_scores(scores, {name: torch.linspace(0.5, 1.5, scores.graph[name].size) for name in scores.names})
        if is_checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.train()
        pixels = inputs["pixel_values"].requires_grad_(True)
        model(pixel_values=pixels).logits.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert not any("weight" in vars(module) for module in model.modules())
    assert sum(name.startswith(NAME) for name in gradients[0]) == len(scores.names)
    assert largest_difference(*gradients) < 1e-6  # the residual scores add up over the layers in another order


def test_an_error_in_the_forward_pass_leaves_the_parameters():
    model, inputs = built("vit")
    searched(model, inputs)
    hook = model.vit.layers[1].mlp.fc2.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**inputs)
    hook.remove()
    assert not any("weight" in vars(module) or "bias" in vars(module) for module in model.modules())


def test_a_copy_has_scores_of_its_own():
    """An average of the weights kept beside the training can be folded like the model."""
    model, inputs = built("vit")
    callback, scores = searched(model, inputs)
    other = copy.deepcopy(model)
    set_scores(scores_in(other), {name: torch.linspace(0, 1, scores.graph[name].size) for name in scores.names})
    expected = outputs(other, inputs)
    assert not torch.allclose(outputs(model, inputs), expected)
    callback.fold(other)
    torch.testing.assert_close(outputs(other, inputs), expected, rtol=0, atol=1e-6)  # float32
    assert callback.scores(other)[scores.names[0]].min() == 0 and callback.scores(model)[scores.names[0]].min() == 1
    assert scores_in(other) is None and scores_in(model) is scores


def test_half_precision_scores_stay_in_float32():
    model, inputs = built("vit", torch.bfloat16)
    dense = outputs(model, inputs)
    _, scores = searched(model, inputs)
    assert {parameter.dtype for parameter in scores.norm} == {torch.float32}
    found = outputs(model, inputs)
    assert found.dtype == torch.bfloat16 and torch.equal(found, dense)


def test_tied_weights_are_scored_once():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(6, 8), torch.nn.Linear(6, 8)
            self.read, self.also = torch.nn.Linear(8, 3), torch.nn.Linear(8, 3)
            self.also.weight = self.read.weight

        def forward(self, x):
            return self.read(torch.relu(self.first(x))) + self.also(torch.tanh(self.second(x)))

    torch.manual_seed(0)
    model, x = Tied().double(), torch.randn(4, 6, dtype=torch.float64)
    callback = DimensionSearchCallback(axes="*", example_inputs=x)
    scores = callback.attach(model)
    (name,) = scores.names  # the shared weight makes the hidden units one axis
    alpha = torch.linspace(0.5, 2, 8, dtype=torch.float64)
    expected = model.read(alpha * torch.relu(model.first(x))) + model.also(alpha * torch.tanh(model.second(x)))
    set_scores(scores, {name: alpha})
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    callback.fold(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert model.also.weight is model.read.weight


# -- removal -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["vit", "swin", "timm_vit", "detr", "resnet_basic"])
def test_zero_scores_are_removed_without_a_change(family):
    """Different indices of qk and v, and half of them, so that a softmax scale of the new size would show."""
    model, inputs = built(family, torch.float64)
    kinds = ("channels",) if family == "resnet_basic" else ("heads", "qk", "v", "mlp")
    kinds = tuple(kind for kind in kinds if family != "timm_vit" or kind != "v")
    graph = find_axes(model, inputs)
    is_exact = all(axis.is_exact for axis in graph if kind_of(axis, graph) in kinds)
    callback, scores = searched(model, inputs, kinds=kinds, inexact=True, min_keep=1)
    dense = outputs(model, inputs)
    for i, name in enumerate(scores.names):
        size = scores.graph[name].size
        values = torch.linspace(0.5, 1.5, size, dtype=torch.float64)
        values[torch.randperm(size, generator=torch.Generator().manual_seed(i))[: size // 2]] = 0
        set_scores(scores, {name: values})
    callback.fold(model)
    expected = outputs(model, inputs)
    assert not torch.allclose(expected, dense, atol=1e-6)
    plan = callback.plan(model)
    assert all(plan.sizes[name] == math.ceil(graph[name].size / 2) for name in scores.names if graph[name].size > 1)
    shrink(model, plan, example_inputs=inputs)
    if is_exact:  # eager attention runs its softmax in float32, whatever the dtype
        torch.testing.assert_close(outputs(model, inputs), expected, rtol=0, atol=1e-5)
    else:
        assert family == "timm_vit"


def test_trained_cut_and_trained_on(tmp_path):
    model, inputs = built("vit")
    callback = DimensionSearchCallback(0.5, target=0.5, min_keep=2)
    trainer = train(model, callback, tmp_path, max_steps=30, logging_steps=10)
    log = [entry for entry in trainer.state.log_history if "sparsity" in entry]
    assert 0.0 <= log[0]["sparsity"] < log[-1]["sparsity"] <= 1.0
    scores = callback.scores(model)
    sizes = {"sparsity_qk": 16, "sparsity_v": 16, "sparsity_mlp": 80}
    assert sum(log[-1][kind] * size for kind, size in sizes.items()) / 112 == pytest.approx(log[-1]["sparsity"])
    zeros = sum(int((score == 0).sum()) for score in scores.values())
    assert zeros / 112 == pytest.approx(log[-1]["sparsity"]) and zeros > 20
    plan = callback.plan(model)
    kept = {kind: sum(plan.sizes[n] for n in scores if n.endswith(kind)) for kind in ("head_dim", "value_dim", "fc1")}
    assert kept == {"head_dim": 8, "value_dim": 8, "fc1": 40}
    shrink(model, plan)
    with pytest.raises(ModelError, match="do not belong"):
        callback.scores(model)
    model.save_pretrained(tmp_path / "final")
    make_trainer(model, [], tmp_path, size=32, max_steps=2).train()
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "final")
    assert outputs(again, inputs).isfinite().all()


# -- how scores fall ---------------------------------------------------------------------------------------------


def bare(model, callback, lr, momentum=0.0, optimizer=torch.optim.SGD):
    """The callback and an optimizer on the scores alone, driven by hand: no loss, no gradient but what a test sets."""
    state = transformers.TrainerState(max_steps=100)
    hooks = {"model": model, "optimizer": None}
    callback.on_init_end(SimpleNamespace(), state, None, **hooks)
    scores = scores_in(model)
    hooks["optimizer"] = optimizer(scores.norm, lr=lr)

    def step(gradient=0.0):
        for parameter in scores.norm:
            parameter.grad = torch.full_like(parameter, gradient)
        callback.on_pre_optimizer_step(SimpleNamespace(), state, None, **hooks)
        hooks["optimizer"].step()
        callback.on_optimizer_step(SimpleNamespace(), state, None, **hooks)
        state.global_step += 1

    callback.on_train_begin(SimpleNamespace(), state, None, **hooks)
    return scores, step, hooks


@pytest.mark.parametrize(("lr", "strength", "factor"), [(0.1, 0.5, 1.0), (0.01, 0.7, 10.0), (0.3, 0.4, 1.0)])
def test_undefended_scores_reach_zero_exactly_on_time(lr, strength, factor):
    model = scaled_classifier().double()
    inputs = {"pixel_values": SCALED_INPUTS["pixel_values"].double()}
    callback = DimensionSearchCallback(strength, warmup=0, kinds="mlp", lr_factor=factor, example_inputs=inputs)
    scores, step, _ = bare(model, callback, lr)
    fall = lr * factor * strength
    needed = math.ceil(1 / fall - 1e-9)
    for done in range(1, needed + 1):
        step()
        expected = 1 - done * fall if done < needed else 0.0
        torch.testing.assert_close(scores.norm[0].detach(), torch.full((24,), max(expected, 0)).double())
        assert bool((scores.norm[0] == 0).all()) == (done == needed)


def test_a_step_is_the_soft_threshold_of_the_optimizers_step():
    model = scaled_classifier()
    callback = DimensionSearchCallback(0.3, warmup=0, kinds="mlp", lr_factor=2.0, example_inputs=SCALED_INPUTS)
    scores, step, _ = bare(model, callback, 0.1)
    step(gradient=-1.5)
    moved = 1 + 2.0 * 0.1 * 1.5
    torch.testing.assert_close(scores.norm[0].detach(), torch.full((24,), moved - 0.1 * 2.0 * 0.3))


@pytest.mark.parametrize(
    "penalty", [{"name": "transformed_l1", "a": 1.0}, {"name": "mcp", "a": 20.0}, {"name": "lp", "p": 0.5}]
)
def test_nonconvex_penalties(penalty):
    model = scaled_classifier()
    callback = DimensionSearchCallback(
        0.5, warmup=0, kinds="mlp", penalty=penalty, lr_factor=1.0, example_inputs=SCALED_INPUTS
    )
    scores, step, _ = bare(model, callback, 0.1)
    expected = callback.penalty_.proximal(torch.ones(24), 0.1, 0.5)
    step()
    torch.testing.assert_close(scores.norm[0].detach(), expected)
    assert not torch.equal(expected, torch.ones(24))
    for _ in range(60):
        step()
    assert torch.equal(scores.norm[0], torch.zeros(24))


def test_subgradient_leaves_small_scores():
    model = scaled_classifier()
    callback = DimensionSearchCallback(0.5, warmup=0, kinds="mlp", update="subgradient", penalty={"name": "lp", "p": 0.7}, lr_factor=1.0, example_inputs=SCALED_INPUTS
    )  # fmt: skip
    scores, step, _ = bare(model, callback, 0.1)
    step(gradient=0.25)
    torch.testing.assert_close(scores.norm[0].detach(), torch.full((24,), 1 - 0.1 * (0.5 * 0.7 + 0.25)))


@pytest.mark.parametrize("update", ["proximal", "subgradient"])
def test_only_the_share_that_goes_is_penalised(update):
    """Trimmed l1: what the plan would remove falls, the rest stays where it is."""
    model, inputs = built("vit")
    callback = DimensionSearchCallback(
        1.0, 0.5, 0, min_keep=2, lr_factor=1.0, update=update, example_inputs=inputs
    )  # fmt: skip
    scores, step, _ = bare(model, callback, 0.05)
    generator = torch.Generator().manual_seed(0)
    before = {name: 0.2 + torch.rand(scores.graph[name].size, generator=generator) for name in scores.names}
    set_scores(scores, before)
    masks = callback.plan(model).masks(scores.graph)
    step()
    for name, parameter in zip(scores.names, scores.norm, strict=True):
        torch.testing.assert_close(parameter.detach(), before[name] - 0.05 * ~masks[name])
    for _ in range(30):
        step()
    for name, parameter in zip(scores.names, scores.norm, strict=True):
        assert torch.equal(parameter[masks[name]], before[name][masks[name]])
        if update == "proximal":
            assert torch.equal(parameter != 0, masks[name])
    assert sum(int(mask.sum()) for mask in masks.values()) == 8 + 8 + 40


@pytest.mark.parametrize("family", ["vit", "swin", "dinov2_swiglu", "detr"])
@pytest.mark.parametrize("target", [0.3, {"mlp": 0.5, "heads": 0.4}])
def test_the_mask_while_training_is_the_plan(family, target):
    model, inputs = built(family)
    floors = {"qk": 2, "v": 2, "mlp": 18 if family == "vit" else 2}
    callback, scores = searched(model, inputs, target=target, min_keep=floors, kinds=("heads", "qk", "v", "mlp"))
    random_scores(scores, levels=10**6)
    floors = {name: callback._floor(name, scores.graph) for name in scores.names}
    shares = callback._shares(scores.kinds)
    lowest = Lowest(scores.graph, scores.names, floors, shares, torch.device("cpu"))
    found = lowest(torch.cat([callback.scores(model)[name] for name in scores.names]))
    masks = callback.plan(model).masks(scores.graph)
    expected = [~masks.get(name, torch.ones(scores.graph[name].size, dtype=torch.bool)) for name in scores.names]
    assert torch.equal(found, torch.cat(expected)) and found.any() and not found.all()


def test_warmup_in_steps_and_as_a_share():
    for warmup, free in ((4, 4), (0.05, 5)):
        model = scaled_classifier()
        callback = DimensionSearchCallback(0.1, warmup=warmup, kinds="mlp", example_inputs=SCALED_INPUTS)
        scores, step, _ = bare(model, callback, 0.1)
        for _ in range(free):
            step()
        assert torch.equal(scores.norm[0], torch.ones(24))
        step()
        assert (scores.norm[0] < 1).all()


def test_hold_brings_what_goes_to_zero_on_a_line():
    """Also without any penalty; the rest stays where it is."""
    model, inputs = built("vit")
    callback = DimensionSearchCallback(0.0, 0.5, 10, hold=0.4, min_keep=2, example_inputs=inputs)
    scores, step, _ = bare(model, callback, 0.05)  # 100 steps are announced
    generator = torch.Generator().manual_seed(0)
    before = {name: 0.2 + torch.rand(scores.graph[name].size, generator=generator) for name in scores.names}
    set_scores(scores, before)
    masks = callback.plan(model).masks(scores.graph)
    for done in range(1, 61):
        step()
        bound = math.inf if done <= 10 else max(0.0, (40 - done) / 30)
        for name, parameter in zip(scores.names, scores.norm, strict=True):
            expected = torch.where(masks[name], before[name], before[name].clamp(max=bound))
            torch.testing.assert_close(parameter.detach(), expected)
            if done >= 40:
                assert torch.equal(parameter == 0, ~masks[name])


def test_with_hold_the_removal_changes_nothing(tmp_path, caplog):
    def left_by_removal(folder, **options):
        model, inputs = built("vit", torch.float64)
        callback = DimensionSearchCallback(0.1, target=0.5, min_keep=2, **options)
        train(model, callback, folder, max_steps=30)
        before = outputs(model, inputs)
        shrink(model, callback.plan(model))
        return float((outputs(model, inputs) - before).abs().max())

    transformers.utils.logging.enable_propagation()
    try:
        assert left_by_removal(tmp_path / "held", hold=0.8) < 1e-12  # float64, other orders of summation
        assert "became zero" not in caplog.text
        assert left_by_removal(tmp_path / "free") > 1e-3
        assert "Give hold=0.9" in caplog.text
    finally:
        transformers.utils.logging.disable_propagation()


def test_hold_needs_a_target_in_shares_and_steps_after_the_warmup(tmp_path):
    for options in ({}, {"target": {"macs": 0.5}}, {"target": 0.5, "update": "subgradient"}):
        with pytest.raises(MethodError, match="hold needs a target in shares"):
            make_trainer(scaled_classifier(), [DimensionSearchCallback(hold=0.5, **options)], tmp_path)
    callback = DimensionSearchCallback(
        target=0.5, warmup=6, hold=0.5, kinds="mlp", min_keep=2, example_inputs=SCALED_INPUTS
    )
    trainer = make_trainer(scaled_classifier(), [callback], tmp_path, max_steps=10)
    with pytest.raises(MethodError, match=r"hold=0.5 .* of 10 steps it is step 5, and the warm-up .* ends at step 6"):
        trainer.train()


def test_strength_by_kind():
    model, inputs = built("vit")
    callback = DimensionSearchCallback({"mlp": 0.5, "qk": 0.1}, warmup=0, lr_factor=1.0, example_inputs=inputs)
    scores, step, _ = bare(model, callback, 0.1)
    step()
    for name, parameter in zip(scores.names, scores.norm, strict=True):
        fallen = {"mlp": 0.05, "qk": 0.01, "v": 0.0}[scores.kinds[name]]
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, 1 - fallen))


def test_a_skipped_step_moves_nothing():
    """fp16 training whose gradients overflowed."""
    model = scaled_classifier()
    callback = DimensionSearchCallback(0.5, warmup=0, kinds="mlp", example_inputs=SCALED_INPUTS)
    scores, step, hooks = bare(model, callback, 0.1)
    step()
    before = scores.norm[0].detach().clone()
    hooks["optimizer"].step_was_skipped = True
    hooks["optimizer"].step = lambda: None
    step()
    assert torch.equal(scores.norm[0], before)


# -- training ----------------------------------------------------------------------------------------------------


def test_optimizer_holds_the_scores_without_weight_decay(tmp_path):
    model, inputs = built("vit")
    trainer = make_trainer(model, [DimensionSearchCallback(example_inputs=inputs)], tmp_path, weight_decay=0.3)
    optimizer = trainer.create_optimizer()
    scores = {id(parameter) for parameter in scores_in(model).norm}
    decayed, free = optimizer.param_groups
    assert decayed["weight_decay"] == 0.3 and free["weight_decay"] == 0
    assert scores <= {id(p) for p in free["params"]} and not scores & {id(p) for p in decayed["params"]}


def test_accumulated_gradients_give_the_same_weights(tmp_path):
    found = []
    for batch, accumulation in ((8, 1), (4, 2)):
        model, _ = built("vit")
        callback = DimensionSearchCallback(0.5, target=0.3, min_keep=2)
        train(
            model, callback, tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
            optim="sgd", learning_rate=0.05,
        )  # fmt: skip
        found.append(weights(model) | callback.scores(model))
    assert largest_difference(*found) < 2e-5  # float32 sums in another order, over 12 steps
    assert any((found[0][name] == 0).any() for name in callback.scores(model))


def test_bf16_autocast(tmp_path):
    model, _ = built("vit")
    callback = DimensionSearchCallback(0.5, target=0.3, min_keep=2)
    train(model, callback, tmp_path, bf16=True)
    scores = callback.scores(model)
    assert all(score.isfinite().all() and (score != 1).any() for score in scores.values())
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("restore", [False, True])
def test_interrupted_search_ends_in_the_same_weights(restore, tmp_path):
    """Bit for bit, with Adam's moments, a schedule and a warm-up that the interruption falls into."""
    options = {
        "max_steps": 8, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "cosine",
        "restore_callback_states_from_checkpoint": restore,
    }  # fmt: skip
    arguments = {
        "target": 0.25,
        "warmup": 4,
        "hold": 0.9 if restore else None,
        "kinds": ["heads", "qk", "v", "mlp"],
        "min_keep": {"mlp": 4, "qk": 2, "v": 2},
    }
    model, _ = built("vit")
    callback = DimensionSearchCallback(0.9, **arguments)
    train(model, callback, tmp_path, **options)
    expected, scores, plan = weights(model), callback.scores(model), callback.plan(model)

    model, _ = built("vit")
    callback = DimensionSearchCallback(77.0 if restore else 0.9, **arguments)
    trainer = make_trainer(
        model, [callback], tmp_path, **{"size": 32, "optim": "adamw_torch", "learning_rate": 1e-2, "weight_decay": 0.1,
        "max_grad_norm": 1.0, **options},
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    found = weights(model)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert callback.plan(model) == plan and any((score < 0.9).any() for score in scores.values())
    for name, score in callback.scores(model).items():
        assert torch.equal(score, scores[name])


def test_checkpoints_hold_the_scores_and_the_final_model_does_not(tmp_path):
    model, inputs = built("vit")
    keys = set(model.state_dict())
    trainer = train(model, DimensionSearchCallback(0.5), tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.save_model(str(tmp_path / "final"))
    load = transformers.AutoModelForImageClassification.from_pretrained
    again, report = load(tmp_path / "final", output_loading_info=True)
    assert not report["unexpected_keys"] and not report["missing_keys"]
    assert set(model.state_dict()) == keys and torch.equal(outputs(again, inputs), outputs(model, inputs))
    _, report = load(tmp_path / "checkpoint-1", output_loading_info=True)
    assert not report["missing_keys"] and report["unexpected_keys"]
    assert all(NAME in key for key in report["unexpected_keys"])


def test_best_model_at_the_end_is_folded_with_its_own_scores(tmp_path):
    """The checkpoint that Trainer loads back has other scores than the last step."""
    model, inputs = built("vit")
    callback = DimensionSearchCallback(0.9, lr_factor=5.0)
    trainer = train(
        model, callback, tmp_path, max_steps=4, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    best = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
    assert best < 4  # the highest loss is taken for the best
    other, _ = built("vit")
    DimensionSearchCallback(0.9).attach(other)
    other.load_state_dict(load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors"))
    scores = callback.scores(model)
    for name, parameter in zip(scores_in(other).names, scores_in(other).norm, strict=True):
        assert torch.equal(scores[name], parameter.detach().abs()) and (scores[name] != 1).any()
    assert torch.equal(outputs(model, inputs), outputs(other, inputs))
    assert scores_in(model) is None and not any(NAME in key for key in model.state_dict())


def test_evaluation_alone_needs_nothing(tmp_path):
    """A Trainer that never trains neither complains nor changes what the model says."""
    model, inputs = built("resnet_basic")
    dense = outputs(model, inputs)
    callback = DimensionSearchCallback(axes="nothing*", example_inputs=inputs)
    trainer = make_trainer(model, [callback], tmp_path, size=32, eval_strategy="steps")
    trainer.evaluate()
    assert torch.equal(outputs(model, inputs), dense)
    with pytest.raises(NothingToShrinkError, match="matches no axis"):
        trainer.train()


def test_a_second_training_on_the_same_trainer_is_refused(tmp_path):
    model, _ = built("vit")
    trainer = train(model, DimensionSearchCallback(), tmp_path, max_steps=1)
    with pytest.raises(MethodError, match="new Trainer"):
        trainer.train()


def test_a_checkpoint_without_scores_is_noticed(tmp_path, caplog):
    options = {"size": 32, "max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    make_trainer(built("timm_vit")[0], [], tmp_path, **options).train()
    transformers.utils.logging.enable_propagation()
    try:
        model, inputs = built("timm_vit")
        callback = DimensionSearchCallback(kinds="mlp", example_inputs=inputs)
        trainer = make_trainer(model, [callback], tmp_path, **{**options, "save_strategy": "no"})
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    finally:
        transformers.utils.logging.disable_propagation()
    assert "holds no scores for these axes" in caplog.text


def test_together_with_another_method_on_the_same_model(tmp_path):
    """Either order is refused where they would meet, and fine where they do not."""
    for first, second in ((0, 1), (1, 0)):
        model, inputs = built("resnet_basic")
        both = [
            NetworkSlimmingCallback(example_inputs=inputs),
            DimensionSearchCallback(kinds="channels", example_inputs=inputs),
        ]
        trainer = make_trainer(model, [both[first], both[second]], tmp_path, size=32)
        with pytest.raises(MethodError, match="cannot be combined"):
            trainer.train()
    model, inputs = built("vit")
    with pytest.raises(MethodError, match=r"already carries scores|cannot be combined"):
        make_trainer(model, [DimensionSearchCallback(), DimensionSearchCallback()], tmp_path, size=32).train()


# -- plans -------------------------------------------------------------------------------------------------------


def random_scores(scores, seed=0, levels=5):
    """Few levels, so that there are ties."""
    generator = torch.Generator().manual_seed(seed)
    set_scores(
        scores, {n: torch.randint(levels, (scores.graph[n].size,), generator=generator) / levels for n in scores.names}
    )


@pytest.mark.parametrize("target", [0.0, 0.2, 0.4, 0.55, {"mlp": 0.3}, {"qk": 0.5, "v": 0.5}])
@pytest.mark.parametrize("family", ["vit", "swin", "dinov2_swiglu"])
def test_shares_are_met_exactly(family, target):
    model, inputs = built(family)
    for seed in range(3):
        callback, scores = searched(model, inputs, target=target, min_keep=2)
        random_scores(scores, seed)
        plan = callback.plan(model)
        assert plan == callback.plan(model) and plan == callback.plan(copy.deepcopy(model))
        for kind in ("qk", "v", "mlp"):
            share = target.get(kind, 0.0) if isinstance(target, dict) else target
            names = by_kind(scores, kind)
            total = sum(scores.graph[name].size for name in names)
            kept = {name: plan.sizes.get(name, scores.graph[name].size) for name in names}
            assert sum(kept.values()) == round((1 - share) * total) and min(kept.values()) >= 2
        for name, indices in plan.keep.items():
            found = callback.scores(model)[name]
            rest = [i for i in range(len(found)) if i not in indices]
            assert min(found[list(indices)]) >= max(found[rest])
            for i in rest:  # of equal scores the earlier index stays
                assert not any(j > i and found[j] == found[i] for j in indices)
        callback.fold(model)


def test_one_ranking_over_all_layers():
    model, inputs = built("vit")
    callback, scores = searched(model, inputs, target=0.25, kinds="mlp")
    low, high = scores.names
    set_scores(scores, {low: torch.linspace(0.0, 0.5, 40), high: torch.linspace(0.6, 1.0, 40)})
    assert callback.plan(model).sizes == {low: 20}
    set_scores(scores, {low: -torch.linspace(0.6, 1.0, 40), high: torch.linspace(0.0, 0.5, 40)})
    assert callback.plan(model).sizes == {high: 20}


def test_floors_hold_and_say_how_far_a_share_can_go():
    model, inputs = built("vit")
    callback, scores = searched(model, inputs, target=0.6, kinds="mlp")  # 16 of 40 stay at least
    set_scores(scores, {scores.names[0]: torch.zeros(40)})
    assert callback.plan(model).sizes == dict.fromkeys(scores.names, 16)
    callback.target = 0.61
    with pytest.raises(BudgetError, match=r"at most 0\.600"):
        callback.plan(model)
    callback.min_keep = {"mlp": 8}
    assert sum(callback.plan(model).sizes.values()) == round(0.39 * 80)


@pytest.mark.parametrize("budget", [{"macs": 0.8}, {"params": 0.75}, {"macs": 0.85, "params": 0.8}])
def test_budgets(budget):
    model, inputs = built("swin")
    callback, scores = searched(model, inputs, target=budget, min_keep=2)
    random_scores(scores, levels=1000)
    plan = callback.plan(model)
    cost, dense = scores.graph.cost(plan), scores.graph.cost()
    shares = {"macs": cost.macs / dense.macs, "params": cost.params / dense.params}
    assert all(shares[name] <= limit for name, limit in budget.items())
    assert any(shares[name] > limit - 0.02 for name, limit in budget.items())
    assert all(size >= 2 for size in plan.sizes.values())


def test_budget_below_the_floors_says_what_is_left():
    model, inputs = built("vit")
    callback, _ = searched(model, inputs, target={"macs": 0.3})
    with pytest.raises(BudgetError, match=r"macs=0\.3 cannot be met: .* leave 0\.\d+ of the dense macs"):
        callback.plan(model)


def test_latency_budget_asks_the_measure():
    model, inputs = built("vit")
    callback, scores = searched(model, inputs, target={"latency": 100.0}, kinds="mlp")
    random_scores(scores, levels=1000)

    def measure(plan: Plan) -> float:
        return 2.0 * sum(plan.sizes.get(name, 40) for name in scores.names)

    assert measure(callback.plan(model, measure=measure)) == 100.0
    callback.target = {"latency": 20.0}  # below the floors
    with pytest.raises(BudgetError, match="min_keep"):
        callback.plan(model, measure=measure)


def test_support_keeps_a_minimum():
    model, inputs = built("vit")
    callback, scores = searched(model, inputs, kinds="mlp")
    set_scores(scores, {scores.names[0]: torch.zeros(40), scores.names[1]: (torch.arange(40) % 2).float()})
    support = callback.support(model)
    assert support[scores.names[0]].tolist() == [i < 16 for i in range(40)]
    assert support[scores.names[1]].tolist() == [i % 2 == 1 for i in range(40)]
    plan = callback.plan(model)
    assert all(plan.keep[name] == tuple(mask.nonzero().flatten().tolist()) for name, mask in support.items())


# -- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -1.0}, "strength=-1.0"),
        ({"strength": {"mlp": float("nan")}}, "mlp"),
        ({"strength": {"tokens": 1.0}}, "tokens"),
        ({"target": 1.0}, "below 1"),
        ({"target": -0.1}, "target=-0.1"),
        ({"target": {"macs": 0.5, "mlp": 0.2}}, "mixes"),
        ({"target": {"flops": 0.5}}, "flops"),
        ({"target": {"macs": 0}}, "macs"),
        ({"warmup": -1}, "warmup"),
        ({"target": 0.5, "hold": 0.0}, "hold=0.0"),
        ({"target": 0.5, "hold": 1.5}, "hold=1.5"),
        ({"target": 0.5, "hold": 0.5, "warmup": 0.5}, "hold=0.5 is not possible with a warm-up of 0.5"),
        ({"kinds": ("tokens",)}, "no kind 'tokens'"),
        ({"update": "adam"}, "update"),
        ({"penalty": {"name": "lp", "p": 0.3}}, "closed form"),
        ({"min_keep": 0}, "min_keep"),
        ({"min_keep": {"mlp": 2.5}}, "min_keep"),
        ({"lr_factor": 0.0}, "lr_factor"),
        ({"threshold": -1.0}, "threshold"),
    ],
)
def test_arguments_out_of_range(options, message, tmp_path):
    with pytest.raises(MethodError, match=message):
        make_trainer(scaled_classifier(), [DimensionSearchCallback(**options)], tmp_path)


def test_kinds_that_a_model_lacks(tmp_path):
    model, inputs = built("resnet_basic")
    with pytest.raises(MethodError, match=r"no axis of kind 'qk'. No attention .* channels \(5 axes\)"):
        make_trainer(model, [DimensionSearchCallback(example_inputs=inputs)], tmp_path)
    assert scores_in(model) is None
    model, inputs = built("vit")
    with pytest.raises(MethodError, match="inexact=True"):
        searched(model, inputs, kinds="residual")
    with pytest.raises(MethodError, match="must keep as many indices"):
        searched(model, inputs, kinds="qk")
    model, inputs = built("timm_vit")
    with pytest.raises(MethodError, match="take 'qk'"):
        searched(model, inputs, kinds="v")


def test_targets_out_of_reach_are_refused_before_training(tmp_path):
    for target in (0.9, {"macs": 0.1}, {"params": 1000}, {"qk": 0.2, "v": 0.3}):
        model, _ = built("vit")
        trainer = make_trainer(model, [DimensionSearchCallback(target=target, min_keep=2)], tmp_path, size=32)
        with pytest.raises(BudgetError, match="target"):
            trainer.train()
        assert trainer.state.global_step == 0


def test_foreign_optimizers_and_other_searches(tmp_path):
    model, inputs = built("vit")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    arguments = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, max_steps=1)

    def trainer(optimizer, schedule, callback):
        return transformers.Trainer(
            model, arguments, train_dataset=Images(32), callbacks=[callback], optimizers=(optimizer, schedule)
        )

    with pytest.raises(MethodError, match="attach"):
        trainer(optimizer, schedule, DimensionSearchCallback()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)  # the scores are there now
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    with pytest.raises(MethodError, match="decays the scores"):
        trainer(optimizer, schedule, DimensionSearchCallback()).train()
    with pytest.raises(MethodError, match="already carries scores"):
        searched(model, inputs, kinds="mlp")
    callback = DimensionSearchCallback()
    callback.fold(model)
    assert scores_in(model) is None
    with pytest.raises(ModelError, match="was not searched"):
        callback.scores(built("vit")[0])


def test_a_diverged_search_says_so():
    model, inputs = built("vit")
    callback, scores = searched(model, inputs, kinds="mlp")
    set_scores(scores, {scores.names[0]: torch.full((40,), float("nan"))})
    with pytest.raises(ModelError, match="not finite"):
        callback.scores(model)


def test_arguments_survive_json():
    callback = DimensionSearchCallback(
        {"mlp": 0.1}, {"mlp": 0.2}, 0.1, kinds=("mlp",), penalty={"name": "mcp", "a": 3.0}, min_keep={"mlp": 4}
    )
    again = DimensionSearchCallback.from_state(json.loads(json.dumps(callback.state())))
    assert again.state() == callback.state()
