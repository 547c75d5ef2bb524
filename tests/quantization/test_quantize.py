"""Quantizing a trained model: what is chosen, what the model computes, what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from families import FAMILIES
from torch import nn

import hf_compress
from hf_compress.axes import find_axes
from hf_compress.errors import DataError, MethodError, ModelError
from hf_compress.hub import HfCompressConfig
from hf_compress.quantization import (
    Quantization,
    dequantize,
    fake_quantized,
    freeze,
    prepare,
    quantizable_layers,
    quantization_of,
    quantize,
    resolve,
    unfreeze,
)

SCHEMES = {
    "weights": {"weights": 4},
    "binary": {"weights": "binary", "scale": "bcgd", "per_channel": False},
    "dynamic": {"weights": 8, "activations": 8},
    "static": {"weights": 4, "activations": 4, "activation_scheme": "static", "scale": "learned"},
    "activations": {"activations": 8, "activation_scheme": "static"},
}


def logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output = model(x)
    return output if isinstance(output, torch.Tensor) else output.logits


CASES = [*((family, "static") for family in FAMILIES), *((f, s) for f in ("resnet_basic", "vit") for s in SCHEMES)]


@pytest.mark.parametrize(("family", "scheme"), dict.fromkeys(CASES))
def test_every_family_and_back(family, scheme):
    model, x = FAMILIES[family]()
    state, types = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    before = logits(model, x)
    quantize(model, HfCompressConfig(**SCHEMES[scheme]), [x])
    held = quantization_of(model)
    chosen = held.layers or held.activation_layers
    assert 0 < len(chosen) <= len(quantizable_layers(model)) - 2 and quantizable_layers(model).keys() >= set(chosen)
    for path in held.layers:
        weight = model.get_submodule(path).weight
        dim = 1 if type(model.get_submodule(path)).__name__.endswith("Conv1D") or "Transpose" in repr(weight) else 0
        rows = weight.movedim(dim, 0) if held.per_channel else weight[None]
        assert all(len(row.unique()) <= (2 if held.weights == 1 else 2**held.weights - 1) for row in rows[:4])
        assert not weight.requires_grad
    found = logits(model, x)
    assert found.isfinite().all() and not torch.equal(found, before)
    if held.weights == 8 or held.weights is None:  # with eight bits the model still is what it was
        assert (found - before).norm() < 0.15 * before.norm()
    dequantize(model)
    assert quantization_of(model) is None and [type(module) for module in model.modules()] == types
    assert model.state_dict().keys() == state.keys() and all(p.requires_grad for p in model.parameters())
    untouched = [name for name in state if name.removesuffix(".weight") not in held.layers]
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in untouched)
    if not held.activation_layers:
        assert torch.equal(logits(model, x), found)  # only activations go back to float


@pytest.mark.parametrize("scale", ["bcgd", "least_squares", "learned"])
def test_frozen_training_and_plain_models_compute_the_same(scale):
    """Bit for bit, and the layers of a frozen model without activations are of their own class again."""
    model, x = FAMILIES["resnet_basic"]()
    plain = copy.deepcopy(model)
    scheme = resolve(model, Quantization(weights=3, scale=scale))
    prepare(model, scheme)
    training = logits(model, x)
    with torch.no_grad():
        for path in scheme.layers:
            weight = plain.get_submodule(path).weight
            weight.copy_(model.get_submodule(path).weight)
            if scale != "learned":
                raw = model.get_submodule(path)._parameters["weight"]
                assert torch.equal(weight, fake_quantized(raw, 3, scale, 0))
    assert torch.equal(logits(plain, x), training)
    freeze(model)
    assert torch.equal(logits(model, x), training)
    assert all(type(model.get_submodule(path)) is nn.Conv2d for path in scheme.layers)
    unfreeze(model)
    torch.testing.assert_close(logits(model, x), training, rtol=1e-5, atol=1e-5)


def test_what_stays_float_unless_asked():
    vit = FAMILIES["vit"]()[0]
    chosen = resolve(vit, Quantization(weights=4)).layers
    everything = [*quantizable_layers(vit)]
    assert everything[0].endswith("patch_embeddings.projection") and everything[-1] == "classifier"
    assert list(chosen) == everything[1:-1]
    assert list(resolve(vit, Quantization(weights=4, skip=())).layers) == everything
    assert list(resolve(vit, Quantization(weights=4, skip="last")).layers) == everything[:-1]
    some = resolve(vit, Quantization(weights=4, skip=["first", "*attention*"])).layers
    assert some and not any("attention" in path for path in some) and "classifier" in some


def test_two_heads_are_both_last():
    config = transformers.DeiTConfig(
        image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20,
        num_labels=5,
    )  # fmt: skip
    model = transformers.DeiTForImageClassificationWithTeacher(config)
    chosen = resolve(model, Quantization(weights=4)).layers
    assert chosen and not any("classifier" in path for path in chosen)


def test_shared_weights_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[2].weight
    assert [*quantizable_layers(model)] == ["0", "3"]


def test_clipped_relu_takes_the_place_of_relu_modules():
    model, x = FAMILIES["resnet_basic"]()
    quantize(model, HfCompressConfig(activations=2, activation_scheme="clipped_relu"), [{"pixel_values": x}])
    relus = [module for module in model.modules() if isinstance(module, nn.ReLU)]
    assert relus and quantization_of(model).layers == ()
    seen = []
    for module in relus:
        module.register_forward_hook(lambda module, inputs, output: seen.append(len(output.unique())))
    logits(model, x)
    assert len(seen) == len(relus) and max(seen) == 4


def test_calibration_finds_the_range_of_the_data():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    x = torch.rand(500, 6) * 3 - 1  # -1 to 2
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(6))
        model[0].bias.zero_()
    config = HfCompressConfig(activations=8, activation_scheme="static", skip=())
    quantize(model, config, [x[:200], (x[200:], None)])
    low, high = model[1].hf_compress_range.tolist()
    assert low == pytest.approx(-1, abs=0.06) and high == pytest.approx(2, abs=0.06)


def test_outliers_are_clipped_when_bits_are_few():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6))
    x = torch.randn(5000, 6)
    x[0, 0] = 10.0
    for bits, most in ((2, 5.0), (8, 11.0)):
        found = quantize(
            copy.deepcopy(model), HfCompressConfig(activations=bits, activation_scheme="static", skip=()), [x]
        )
        assert found[0].hf_compress_range[1] < most
    assert found[0].hf_compress_range[1] > 5


@pytest.mark.parametrize("family", ["resnet_basic", "vit", "swin"])
def test_axes_are_found_as_ever_while_training_in_low_bits(family):
    model, x = FAMILIES[family]()
    expected = find_axes(model, x[:1])
    scheme = Quantization(weights=4, activations=8, activation_scheme="static")
    prepare(model, resolve(model, scheme))
    found = find_axes(model, x[:1])
    describe = lambda graph: [(a.name, a.size, [*map(str, a.members)], a.is_exact) for a in graph]  # noqa: E731
    assert describe(found) == describe(expected) and found.macs == expected.macs


def test_module_level_features_still_work():
    """Hooks, deep copies, dtype casts, gradient checkpointing."""
    model, x = FAMILIES["vit"]()
    prepare(model, resolve(model, Quantization(weights=4, activations=8, scale="learned")))
    calls = []
    model.vit.layers[0].mlp.fc1.register_forward_hook(lambda *a: calls.append(1))
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, x), logits(model, x)) and len(calls) == 2
    model.train()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(x, labels=torch.tensor([1, 2])).loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert any("hf_compress_step" in name for name in grads[0])
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name
    half = logits(copy.deepcopy(twin).to(torch.bfloat16), x.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16 and half.isfinite().all()


# -- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weights", "activations"])
@pytest.mark.parametrize("bits", [0, 9, -1, 16, 4.0, True, "four", [4]])
def test_unsupported_bits(name, bits):
    with pytest.raises(MethodError, match="1 to 8"):
        HfCompressConfig(**{name: bits})


@pytest.mark.parametrize(
    "arguments",
    [
        {"scale": "lsq"}, {"activation_scheme": "moving"}, {"per_channel": 2}, {"skip": [3]}, {"skip": 7},
    ],
)  # fmt: skip
def test_unknown_rules(arguments):
    with pytest.raises(MethodError, match=next(iter(arguments))):
        HfCompressConfig(weights=4, **arguments)
    with pytest.raises(MethodError):
        HfCompressConfig(**arguments)


def test_skip_patterns_that_match_nothing_or_all():
    model, _ = FAMILIES["resnet_basic"]()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MethodError, match=r"'\*\.conv9' matches no layer.*resnet\.embedder"):
        quantize(model, HfCompressConfig(weights=4, skip=["first", "*.conv9"]))
    with pytest.raises(MethodError, match="leaves none"):
        quantize(model, HfCompressConfig(weights=4, skip="*"))
    with pytest.raises(MethodError, match="no ReLU module"):
        quantize(FAMILIES["vit"]()[0], HfCompressConfig(activations=4, activation_scheme="clipped_relu"))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "batches", [None, [], iter(()), [torch.zeros(0, 3, 32, 32)]], ids=["none", "list", "iterator", "empty"]
)
@pytest.mark.parametrize("scheme", ["static", "clipped_relu"])
def test_no_calibration_batches(scheme, batches):
    model, x = FAMILIES["resnet_basic"]()
    before, kind = logits(model, x), [type(module) for module in model.modules()]
    with pytest.raises(DataError, match="calibration"):
        quantize(model, HfCompressConfig(weights=4, activations=8, activation_scheme=scheme), batches)
    # the model is as it was
    assert torch.equal(logits(model, x), before) and [type(module) for module in model.modules()] == kind
    with pytest.raises(DataError, match="without images"):
        quantize(model, HfCompressConfig(activations=8, activation_scheme=scheme), [{"labels": torch.zeros(3)}])


def test_values_that_are_not_finite():
    model, x = FAMILIES["resnet_basic"]()
    with pytest.raises(ModelError, match="not finite on the calibration"):
        quantize(model, HfCompressConfig(activations=8, activation_scheme="static"), [x * float("nan")])
    path = next(iter(quantizable_layers(model)))
    model.get_submodule(path).weight.data[0, 0] = float("inf")
    with pytest.raises(ModelError, match=f"'{path}.weight' holds NaN or inf"):
        quantize(model, HfCompressConfig(weights=4))


def test_quantized_models_are_not_quantized_or_shrunk_again():
    model, x = FAMILIES["resnet_basic"]()
    quantize(model, HfCompressConfig(weights=4))
    with pytest.raises(ModelError, match="quantized already"):
        quantize(model, HfCompressConfig(weights=8))
    for change in (
        lambda: hf_compress.prune(model, macs=0.5, example_inputs=x[:1]),
        lambda: hf_compress.shrink(model, hf_compress.Plan({}), example_inputs=x[:1]),
    ):
        with pytest.raises(ModelError, match="dequantize"):
            change()
    dequantize(model)
    hf_compress.prune(model, macs=0.5, example_inputs=x[:1])
    with pytest.raises(ModelError, match="names no bits"):
        quantize(model, HfCompressConfig())
