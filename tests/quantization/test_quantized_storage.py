"""A quantized checkpoint is as small as its bits, comes back bit for bit, and is not trusted."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES
from safetensors.torch import load_file, save_file
from torch import nn

import hf_compress
from hf_compress.errors import HfCompressError, ModelError, RecordError
from hf_compress.hub import HfCompressConfig
from hf_compress.quantization import packed_size, quantization_of, quantize, stored_bytes
from hf_compress.surgery import record_of

Load = transformers.AutoModelForImageClassification.from_pretrained

SCHEMES = {
    "binary": {"weights": 1, "scale": "bcgd", "per_channel": False},
    "ternary": {"weights": 2},
    "three": {"weights": 3},
    "four_and_dynamic": {"weights": 4, "activations": 8},
    "four_and_static": {"weights": 4, "activations": 4, "activation_scheme": "static"},
    "eight_all": {"weights": 8, "skip": ()},
    "activations": {"activations": 8, "activation_scheme": "static"},
}


def logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x).logits


def saved(
    family: str, scheme: dict[str, Any], folder: Path, macs: float | None = None
) -> tuple[nn.Module, torch.Tensor]:
    model, x = FAMILIES[family]()
    if macs is not None:
        hf_compress.prune(model, macs=macs, example_inputs=x[:1])
    quantize(model, HfCompressConfig(**scheme), [x])
    model.save_pretrained(folder)
    return model, x


CASES = [
    *(("resnet_basic", scheme) for scheme in SCHEMES),
    ("vit", "ternary"),
    ("swin", "four_and_static"),
    ("convnext", "binary"),
]


@pytest.mark.parametrize(("family", "scheme"), CASES)
def test_round_trip_bit_for_bit(family, scheme, tmp_path):
    model, x = saved(family, SCHEMES[scheme], tmp_path / "first", macs=0.6 if scheme == "ternary" else None)
    again, report = Load(tmp_path / "first", output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(logits(again, x), logits(model, x))
    assert quantization_of(again) == quantization_of(model)
    assert [*again.state_dict()] == [*model.state_dict()]
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    again.save_pretrained(tmp_path / "second")
    for file in (tmp_path / "first").iterdir():
        assert (tmp_path / "second" / file.name).read_bytes() == file.read_bytes()


NEW_PROCESS = """
import sys, torch, hf_compress
from transformers import AutoModelForImageClassification
x, logits = torch.load(sys.argv[1] + "/expected.pt")
model = AutoModelForImageClassification.from_pretrained(sys.argv[1])
with torch.no_grad():
    assert torch.equal(model(x).logits, logits)
print("the same")
"""


def test_a_new_process_loads_it_with_the_package_imported(tmp_path):
    model, x = saved("vit", SCHEMES["four_and_static"], tmp_path, macs=0.5)
    torch.save((x, logits(model, x)), tmp_path / "expected.pt")
    done = subprocess.run(
        [sys.executable, "-c", NEW_PROCESS, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "the same" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_file_is_within_five_percent_of_the_ideal(bits, tmp_path):
    """Ideal: every quantized weight in its bits (log2 of 3 for ternary), a float32 scale a channel, all else as it was."""
    config = transformers.ViTConfig(
        hidden_size=192, num_hidden_layers=4, num_attention_heads=3, intermediate_size=768, image_size=32, patch_size=4
    )
    model = transformers.ViTForImageClassification(config)
    dense = sum(p.numel() * 4 for p in model.parameters())
    quantize(model, HfCompressConfig(weights=bits))
    chosen = {f"{path}.weight" for path in quantization_of(model).layers}
    weights = sum(p.numel() for name, p in model.named_parameters() if name in chosen)
    channels = sum(p.shape[0] for name, p in model.named_parameters() if name in chosen)
    width = 1.585 if bits == 2 else bits
    ideal = weights * width / 8 + channels * 4 + (dense - weights * 4)
    model.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert ideal <= size <= 1.05 * ideal
    assert ideal <= stored_bytes(model) <= 1.01 * ideal
    stored = load_file(tmp_path / "model.safetensors")
    codes = [tensor for name, tensor in stored.items() if name.endswith(".hf_compress_codes")]
    assert {tensor.dtype for tensor in codes} == {torch.uint8}
    sizes = [packed_size(model.get_parameter(name).numel(), bits) for name in chosen]
    assert sorted(map(len, codes)) == sorted(sizes)


@pytest.mark.parametrize("is_pruned", [False, True], ids=["dense", "pruned"])
@pytest.mark.parametrize(
    "arguments", [{"weights": 4}, {"weights": 1, "per_channel": False}, {"weights": 8, "activations": 8}]
)
def test_float_checkpoints_are_quantized_while_they_load(arguments, is_pruned, tmp_path, recwarn):
    model, x = FAMILIES["resnet_basic"]()
    if is_pruned:
        hf_compress.prune(model, macs=0.5, example_inputs=x[:1])
    model.save_pretrained(tmp_path / "float")
    config = HfCompressConfig(**arguments)
    loaded = Load(tmp_path / "float", quantization_config=config)
    quantize(model, config)
    assert torch.equal(logits(loaded, x), logits(model, x))
    assert (record_of(loaded, may_be_quantized=True) or None) == (record_of(model, may_be_quantized=True) or None)
    loaded.save_pretrained(tmp_path / "quantized")
    again = Load(tmp_path / "quantized")
    assert torch.equal(logits(again, x), logits(model, x))
    assert (tmp_path / "quantized" / "model.safetensors").stat().st_size < stored_bytes(FAMILIES["resnet_basic"]()[0])


def test_dequantize_gives_an_ordinary_model_and_keeps_what_was_pruned(tmp_path):
    model, x = saved("vit", {"weights": 4}, tmp_path / "quantized", macs=0.5)
    expected, record = logits(model, x), record_of(model, may_be_quantized=True)
    again = Load(tmp_path / "quantized")
    assert not again.is_quantized and again.dequantize() is again
    assert torch.equal(logits(again, x), expected) and record_of(again) == record
    assert all(p.requires_grad for p in again.parameters()) and not hasattr(again, "hf_quantizer")
    again.save_pretrained(tmp_path / "float")
    assert "quantization" not in json.loads((tmp_path / "float" / "config.json").read_text())["quantization_config"]
    plain = Load(tmp_path / "float")
    assert torch.equal(logits(plain, x), expected)
    hf_compress.prune(plain, macs=0.7, example_inputs=x[:1])
    model, x = FAMILIES["resnet_basic"]()
    quantize(model, HfCompressConfig(weights=4)).dequantize()
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, tmp_path):
    model, _ = saved("vit", SCHEMES["four_and_static"], tmp_path / "first")
    low = Load(tmp_path / "first", dtype=dtype)
    assert {p.dtype for name, p in low.named_parameters() if "hf_compress" not in name} == {dtype}
    low.save_pretrained(tmp_path / "second")
    again = Load(tmp_path / "second", dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(low.parameters(), again.parameters(), strict=True))
    # the codes and scales are those of the float32 model
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    ours = [name for name in first if name.endswith(("_codes", "_scale"))]
    assert ours and all(torch.equal(first[name], second[name]) for name in ours)
    model.to(dtype).save_pretrained(tmp_path / "third")  # cast after loading
    third = load_file(tmp_path / "third" / "model.safetensors")
    assert all(torch.equal(first[name], third[name]) for name in ours)


def test_weights_that_left_their_grid_are_not_saved(tmp_path):
    model, _ = saved("resnet_basic", {"weights": 4}, tmp_path / "first")
    path = quantization_of(model).layers[2]
    with torch.no_grad():
        model.get_submodule(path).weight.add_(1e-2)
    with pytest.raises(ModelError, match=f"'{path}' are not on their 4-bit grid.*dequantize"):
        model.save_pretrained(tmp_path / "second")


def test_the_rest_of_a_quantized_model_can_be_trained_on(tmp_path):
    saved("resnet_basic", {"weights": 4}, tmp_path)
    model = Load(tmp_path).train()
    x = FAMILIES["resnet_basic"]()[1]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = model.classifier[1].weight.detach().clone()
    model(x, labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    assert not torch.equal(model.classifier[1].weight, before)
    model.save_pretrained(tmp_path / "trained")
    again = Load(tmp_path / "trained")
    assert torch.equal(logits(again, x), logits(model.eval(), x))


def test_another_width_is_refused_and_the_same_is_not(tmp_path):
    saved("resnet_basic", {"weights": 4}, tmp_path)
    with pytest.raises(ModelError, match=r"quantized already \(weights=4"):
        Load(tmp_path, quantization_config=HfCompressConfig(weights=8))
    Load(tmp_path, quantization_config=HfCompressConfig(weights=4))


def test_loading_cannot_calibrate(tmp_path):
    FAMILIES["resnet_basic"]()[0].save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"hf_compress.quantize\(model, config, batches\)"):
        Load(tmp_path, quantization_config=HfCompressConfig(weights=8, activations=8, activation_scheme="static"))


# -- hostile files ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("honest")
    saved("resnet_basic", SCHEMES["four_and_static"], folder)
    return folder


def load_changed(honest: Path, folder: Path, change: Any = None, tensors: Any = None) -> nn.Module:
    config = json.loads((honest / "config.json").read_text())
    state = load_file(honest / "model.safetensors")
    if change is not None:
        change(config["quantization_config"])
    if tensors is not None:
        tensors(state)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    started = time.perf_counter()
    try:
        return Load(folder)
    finally:
        assert time.perf_counter() - started < 5  # of which the model itself takes most


BAD = [-1, 0, 9, 10**30, 1.5, True, None, "8", [], [[]], [1], float("nan"), {"a": 1}]


@pytest.mark.parametrize("value", BAD, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize(
    "field",
    ["version", "weights", "scale", "per_channel", "activations", "activation_scheme", "skip", "format", "layers"],
)
def test_wrong_values_are_refused(honest, tmp_path, field, value):
    says_the_same = (field == "per_channel" and value is True) or (field == "skip" and value == [])
    if says_the_same:
        load_changed(honest, tmp_path, lambda q: q["quantization"].update({field: value}))
        return
    with pytest.raises((HfCompressError, RuntimeError)) as caught:
        load_changed(honest, tmp_path, lambda q: q["quantization"].update({field: value}))
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(quantization=[]), "must be a JSON object"),
        (lambda q: q["quantization"].update(version=2), "Upgrade"),
        (lambda q: q["quantization"].update(code="import os"), "'code' is not known"),
        (lambda q: q["quantization"]["layers"].append("../../etc/passwd"), "no linear layer or convolution"),
        (lambda q: q["quantization"]["layers"].append("a" * 10**6), "no linear layer or convolution"),
        (lambda q: q["quantization"]["layers"].append("resnet"), "no linear layer or convolution"),
        (lambda q: q["quantization"]["layers"].append(q["quantization"]["layers"][0]), "listed twice"),
        (lambda q: q["quantization"]["activation_layers"].append("resnet.__class__"), "no linear layer or convolution"),
        (lambda q: q["quantization"].update(layers=[str(i) for i in range(200_000)]), "more than the 100000"),
        (lambda q: q["quantization"].update(activation_scheme="clipped_relu"), "no ReLU module"),
        (lambda q: q["quantization"].pop("layers"), "are missing"),
    ],
)
def test_impossible_schemes_are_refused(honest, tmp_path, change, message):
    with pytest.raises(RecordError, match=message) as caught:
        load_changed(honest, tmp_path, change)
    assert len(str(caught.value)) < 1000


def _first(state: dict[str, torch.Tensor], suffix: str) -> str:
    return next(name for name in state if name.endswith(suffix))


@pytest.mark.parametrize(
    ("suffix", "change"),
    [
        ("_codes", lambda t: t[:-1]),
        ("_codes", lambda t: torch.cat([t, t])),
        ("_codes", lambda t: t.to(torch.int8)),
        ("_codes", lambda t: torch.full_like(t, 255)),
        ("_codes", None),
        ("_scale", lambda t: -t),
        ("_scale", lambda t: t * float("nan")),
        ("_scale", lambda t: t[:1]),
        ("_scale", lambda t: t.to(torch.int32)),
        ("_scale", None),
    ],
)
def test_impossible_tensors_are_refused(honest, tmp_path, suffix, change):
    def spoil(state):
        name = _first(state, suffix)
        tensor = state.pop(name)
        if change is not None:
            state[name] = change(tensor).contiguous()

    with pytest.raises((RecordError, RuntimeError), match=r"codes|scale|mismatch|packed"):
        load_changed(honest, tmp_path, tensors=spoil)


def test_random_mutations_end_well(honest, tmp_path):
    """Any change to the scheme: refused with an error of ours, or loaded."""
    draw = random.Random(0)
    original = json.loads((honest / "config.json").read_text())["quantization_config"]["quantization"]
    for _ in range(40):
        changed = copy.deepcopy(original)
        for _ in range(draw.randint(1, 3)):
            field = draw.choice([*changed])
            if isinstance(changed[field], list) and changed[field] and draw.random() < 0.7:
                changed[field][draw.randrange(len(changed[field]))] = draw.choice([*BAD, "resnet", "classifier.1"])
            else:
                changed[field] = draw.choice([*BAD, 4, 2, "bcgd", "dynamic", "dense", "training", ["classifier.1"]])
        try:
            load_changed(honest, tmp_path, lambda q, changed=changed: q.update(quantization=changed))
        except (HfCompressError, RuntimeError) as error:
            assert len(str(error)) < 20_000
