"""What ``shrink`` and ``prune`` promise beyond exactness (see test_exactness_properties.py): in place, true, careful."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from families import FAMILIES
from torch import Tensor, nn

import hf_compress
from hf_compress.axes import find_axes
from hf_compress.errors import MethodError, ModelError, PlanError
from hf_compress.surgery import Plan, prune, record_of, select, shrink


def plan_for(model: nn.Module, x: Tensor, macs: float = 0.6) -> Plan:
    axes = find_axes(model, x[:1])
    generator = torch.Generator().manual_seed(0)
    return select(axes, {axis.name: torch.rand(axis.size, generator=generator) for axis in axes}, macs=macs)


@pytest.mark.parametrize("family", FAMILIES)
def test_prune_meets_the_budget_in_real_parameters_and_runs(family: str) -> None:
    model, x = FAMILIES[family]()
    dense = sum(p.numel() for p in model.parameters())
    axes = find_axes(model, x[:1])
    scores = hf_compress.magnitude_scores(model, axes)
    # the lowest that keeping two indices of every exact axis allows, as some families are mostly inexact
    floor = axes.cost({axis.name: min(2, axis.size) for axis in axes if axis.is_exact}).params / axes.params
    share = max(0.7, floor + 0.1)
    result = prune(model, scores=scores, params=share, example_inputs=x[:1])
    assert result is model
    assert sum(p.numel() for p in model.parameters()) <= share * dense
    with torch.no_grad():
        output = model(x)
    assert torch.isfinite(output if isinstance(output, Tensor) else output.logits).all()


def test_default_budget_is_half_of_the_macs() -> None:
    model, x = FAMILIES["resnet_basic"]()
    dense = find_axes(model, x[:1]).macs
    prune(model, example_inputs=x[:1])
    assert 0.4 * dense < find_axes(model, x[:1]).macs <= 0.5 * dense


def test_one_configuration_may_build_several_models() -> None:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    first, second = (transformers.ResNetForImageClassification(config) for _ in range(2))
    prune(first, macs=0.5, example_inputs=torch.zeros(1, 3, 32, 32))
    assert record_of(first)
    assert record_of(second) is None and not hasattr(config, "quantization_config")
    assert first.resnet.config is first.config is not config


def test_plain_modules_hold_their_record_themselves() -> None:
    model, x = FAMILIES["plain_cnn"]()
    prune(model, macs=0.5, example_inputs=x[:1])
    fresh = type(model)()
    hf_compress.surgery.apply_record(fresh, record_of(model))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(x), model(x))


def test_dtype_requires_grad_and_tensor_classes_are_kept() -> None:
    class Marked(nn.Parameter):
        pass

    model, x = FAMILIES["resnet_basic"]()
    model.to(torch.bfloat16)
    stem = model.resnet.embedder.embedder.convolution
    stem.weight = Marked(stem.weight.data, requires_grad=False)
    plan = plan_for(model, x.to(torch.bfloat16))
    shrink(model, plan)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert type(stem.weight) is Marked and not stem.weight.requires_grad
    assert stem.out_channels == stem.weight.shape[0]


def test_shared_parameters_stay_shared() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.middle, self.last = nn.Linear(6, 10), nn.Linear(10, 10), nn.Linear(10, 3)
            self.again = nn.Linear(10, 10)
            self.again.weight = self.middle.weight

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.relu(self.middle(torch.relu(self.first(x))))
            return self.last(torch.relu(self.again(hidden)))

    model, x = Tied(), torch.randn(2, 6)
    shrink(model, plan_for(model, x))
    assert model.again.weight is model.middle.weight
    assert model.middle.weight.shape[0] < 10
    model(x).sum().backward()


def test_a_plan_for_another_model_changes_nothing() -> None:
    model, x = FAMILIES["resnet_basic"]()
    plan = plan_for(model, x)
    shrink(model, plan)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(PlanError, match="do not belong"):
        shrink(model, plan)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_axes_tied_by_an_attribute_must_keep_equally_many() -> None:
    model, x = FAMILIES["vit"]()
    axes = find_axes(model, x[:1])
    assert axes.sizes_tied
    name = axes.sizes_tied[0][0]
    with pytest.raises(PlanError, match="equally many"):
        Plan({name: (0,)}, axes)


def test_models_quantized_by_others_are_refused_before_they_change() -> None:
    model, x = FAMILIES["resnet_basic"]()
    model.config = copy.deepcopy(model.config)
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ModelError, match="another method"):
        prune(model, example_inputs=x[:1])


def test_unknown_scores_are_named() -> None:
    model, x = FAMILIES["resnet_basic"]()
    with pytest.raises(MethodError, match="'magnitude'"):
        prune(model, scores="tailor", example_inputs=x[:1])


def test_nan_weights_are_named() -> None:
    model, x = FAMILIES["resnet_basic"]()
    model.classifier[1].weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"classifier\.1\.weight"):
        prune(model, example_inputs=x[:1])


def test_pruning_again_and_again_stays_exact_and_keeps_one_record() -> None:
    model, x = FAMILIES["mobilenet_v2"]()
    for _ in range(3):
        prune(model, macs=0.8, fold_shift=True, example_inputs=x[:1])
        twin = transformers.MobileNetV2ForImageClassification(
            transformers.MobileNetV2Config(
                **{k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
            )
        )
        hf_compress.surgery.apply_record(twin, record_of(model))
        twin.load_state_dict(model.state_dict())
        with torch.no_grad():
            assert torch.equal(twin.eval()(x).logits, model(x).logits)
        model.train()
        model(x).logits.sum().backward()
        model.eval()


def test_a_deep_copy_shrinks_on_its_own() -> None:
    model, x = FAMILIES["vit"]()
    plan = plan_for(model, x)
    other = shrink(copy.deepcopy(model), plan)
    assert record_of(model) is None and record_of(other)
    assert model(x).logits.shape == other(x).logits.shape
