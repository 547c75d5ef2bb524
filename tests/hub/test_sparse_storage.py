"""Sparse storage: bit-exact, smaller, the same bytes every time, and nothing believed that a checkpoint says."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

import hf_compress
from hf_compress.errors import ModelError, RecordError
from hf_compress.hub import HfCompressConfig
from hf_compress.hub.sparse_storage import compact, decode, encode, pays_off
from hf_compress.models.lenet import LeNetConfig, LeNetForImageClassification
from hf_compress.quantization import quantization_of, quantize

LOAD = AutoModelForImageClassification.from_pretrained
RESNET = transformers.ResNetConfig(
    embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=7, image_size=16
)
# ViT's parameters have older names in checkpoints: the renaming and the encoding must not disturb each other
VIT = transformers.ViTConfig(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48, image_size=16, patch_size=4,
    num_labels=7,
)  # fmt: skip
CONFIGS = {
    "resnet": RESNET,
    "vit": VIT,
    "lenet": LeNetConfig(widths=[4, 6], hidden_size=12, image_size=16, num_labels=7),
}


def sparse(name, share=0.2):
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(CONFIGS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.masked_fill_(torch.rand_like(parameter) > share, 0)
    return model


def digest(folder):
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("model.safetensors", "config.json")
    }


def assert_same(found, expected):
    found, expected = found.state_dict(), expected.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


# -- one tensor ---------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(0, 7), min_size=1, max_size=3),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
)
def test_round_trip_is_bit_exact(shape, share, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < share)
    flat = tensor.to(dtype).flatten()
    for i, special in enumerate([-0.0, float("nan"), float("inf"), torch.finfo(dtype).tiny]):
        if len(flat) > 5:
            flat[i] = special
    tensor = flat.view(shape)
    bitmask, values = encode(tensor)
    again = decode(bitmask, values, tensor.shape, dtype)
    assert again.shape == tensor.shape and again.dtype == dtype
    assert torch.equal(again.view(torch.uint8), tensor.view(torch.uint8)) if tensor.numel() else True
    assert bitmask.dtype == torch.uint8 and len(bitmask) == -(-tensor.numel() // 8) and values.dtype == dtype
    for other in (torch.float32, torch.bfloat16, torch.float16):  # transformers casts what it loads
        assert torch.equal(decode(bitmask.to(other), values, tensor.shape, dtype).isnan(), tensor.isnan())


@pytest.mark.parametrize(
    ("bitmask", "values", "said"),
    [
        ([7], [1.0, 2.0, 3.0], "1 bytes"),
        ([7, 0, 0], [1.0, 2.0, 3.0], "3 bytes"),
        ([7, 0], [1.0, 2.0], "3 bits and there are 2"),
        ([7, 0], [1.0] * 4, "3 bits and there are 4"),
        ([7, 4], [1.0] * 4, "behind the last entry"),
        ([[7, 0]], [1.0] * 3, "dimensions"),
        ([7, 0], [[1.0] * 3], "dimensions"),
        ([7, 0], [1, 2, 3], "dtype"),
        ([7.5, 0.0], [1.0] * 3, "whole numbers"),
        ([263.0, 0.0], [1.0] * 3, "whole numbers"),
        ([float("nan"), 0.0], [1.0] * 3, "whole numbers"),
    ],
)
def test_parts_that_do_not_fit_are_refused(bitmask, values, said):
    bitmask = torch.tensor(bitmask, dtype=None if isinstance(bitmask[0], float) else torch.uint8)
    with pytest.raises(RecordError, match=said):
        decode(bitmask, torch.tensor(values), (2, 5), torch.float32)


def test_stored_sparsely_only_where_it_is_smaller():
    dense = torch.randn(64, 64)
    for kept in (0.0, 0.5, 0.9, 0.96, 0.98, 1.0):
        tensor = dense.masked_fill(torch.rand(64, 64) > kept, 0)
        is_smaller = sum(part.nbytes for part in encode(tensor)) < tensor.nbytes
        assert pays_off(tensor) == is_smaller
    assert not pays_off(torch.zeros(64, 64, dtype=torch.int64)) and not pays_off(torch.zeros(100))


# -- a model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_checkpoints_are_smaller_exact_and_stable(name, tmp_path):
    model = sparse(name)
    model.save_pretrained(tmp_path / "dense")
    compact(model).save_pretrained(tmp_path / "a")
    loaded, report = LOAD(tmp_path / "a", output_loading_info=True)
    assert not any(report.values())
    assert_same(loaded, model)
    loaded.save_pretrained(tmp_path / "b")
    model.save_pretrained(tmp_path / "c")
    assert digest(tmp_path / "a") == digest(tmp_path / "b") == digest(tmp_path / "c")
    sizes = {kind: (tmp_path / kind / "model.safetensors").stat().st_size for kind in ("dense", "a")}
    weights = sum(p.nbytes for p in model.parameters() if p.dim() > 1)
    # a fifth of the weights and one bit for each, and a little more in the header
    assert sizes["a"] < sizes["dense"] - 0.6 * weights + 200 * len(model.state_dict())
    assert json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]["storage"] == "sparse"
    half = LOAD(tmp_path / "a", dtype=torch.bfloat16)
    assert all(torch.equal(p, q.bfloat16()) for p, q in zip(half.parameters(), model.parameters(), strict=True))


def test_a_dense_checkpoint_can_be_loaded_to_be_stored_sparsely(tmp_path):
    model = sparse("resnet")
    model.save_pretrained(tmp_path / "dense")
    loaded = LOAD(tmp_path / "dense", quantization_config=hf_compress.HfCompressConfig(storage="sparse"))
    loaded.save_pretrained(tmp_path / "a")
    compact(model).save_pretrained(tmp_path / "b")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


@pytest.mark.parametrize("first", ["compact", "prune"])
def test_with_a_pruned_model(first, tmp_path):
    model = sparse("resnet")
    if first == "compact":
        compact(model)
    hf_compress.prune(model, macs=0.5)
    compact(model)
    model.save_pretrained(tmp_path / "a")
    loaded = LOAD(tmp_path / "a")
    assert_same(loaded, model)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(x).logits, model.eval()(x).logits)
    loaded.save_pretrained(tmp_path / "b")
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_in_a_fresh_process_and_in_shards(tmp_path):
    model = compact(sparse("vit"))
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    code = (
        "import hf_compress, torch; from transformers import AutoModelForImageClassification as Auto; "
        f"m = Auto.from_pretrained({str(tmp_path)!r}); print(float(sum(p.double().sum() for p in m.parameters())))"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=200)
    assert float(result.stdout.split()[-1]) == float(sum(p.double().sum() for p in model.parameters()))


def test_trainer_resumes_from_sparse_checkpoints(tmp_path):
    """Bit for bit; load_state_dict decodes."""

    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 32

        def __getitem__(self, i):
            pixels = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(i))
            return {"pixel_values": pixels, "labels": i % 7}

    def trained(**resume):
        model = compact(sparse("resnet"))
        arguments = TrainingArguments(
            str(tmp_path), max_steps=4, save_strategy="steps", save_steps=2, per_device_train_batch_size=8,
            report_to=[], disable_tqdm=True, use_cpu=True, learning_rate=1e-3,
        )  # fmt: skip
        model.resnet.requires_grad_(False)  # so that its zeros remain
        Trainer(model, arguments, train_dataset=Data()).train(**resume)
        return model

    expected = trained()
    stored = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert any(name.endswith(":bitmask") for name in stored)
    assert_same(trained(resume_from_checkpoint=str(tmp_path / "checkpoint-2")), expected)


def drop_value(state, name):
    state[f"{name}:values"] = state[f"{name}:values"][:-1].clone()


def drop_values(state, name):
    del state[f"{name}:values"]


def drop_bitmask(state, name):
    del state[f"{name}:bitmask"]


def lengthen(state, name):
    state[f"{name}:bitmask"] = torch.cat([state[f"{name}:bitmask"], torch.zeros(1000, dtype=torch.uint8)])


@pytest.mark.parametrize("damage", [drop_value, drop_values, drop_bitmask, lengthen])
def test_damaged_checkpoints_are_refused(damage, tmp_path):
    compact(sparse("resnet")).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    damage(state, "classifier.1.weight")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecordError, match=r"classifier\.1\.weight"):
        LOAD(tmp_path)
    model = compact(sparse("resnet"))
    if damage in (drop_value, lengthen):
        with pytest.raises(RecordError, match=r"classifier\.1\.weight"):
            model.load_state_dict(state)
    else:
        with pytest.raises(RuntimeError, match="Unexpected key"):
            model.load_state_dict(state)


def test_unknown_storages_and_other_modules_are_refused(tmp_path):
    for storage in ("zip", 1, None, ["sparse"]):
        with pytest.raises(RecordError, match="storage="):
            hf_compress.HfCompressConfig(storage=storage)
    with pytest.raises(ModelError, match="no save_pretrained"):
        compact(torch.nn.Linear(2, 2))
    plain = LeNetForImageClassification(LeNetConfig(num_labels=7))
    plain.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("order", ["quantized first", "compact first"])
@pytest.mark.parametrize("name", CONFIGS)
def test_low_bits_and_sparse_tensors_in_one_checkpoint(name, order, tmp_path):
    """Codes are stored packed, the float layers with zeros as bitmask and values; both come back, and can be undone."""
    model = sparse(name)
    steps = [lambda: quantize(model, HfCompressConfig(weights=4)), lambda: compact(model)]
    for step in steps if order == "quantized first" else steps[::-1]:
        step()
    model.save_pretrained(tmp_path / "saved")
    names = load_file(tmp_path / "saved" / "model.safetensors").keys()
    assert sum(n.endswith("hf_compress_codes") for n in names) == len(quantization_of(model).layers)
    assert any(n.endswith(":bitmask") for n in names) and not any("codes:" in n for n in names)
    again = LOAD(tmp_path / "saved")
    assert_same(again, model)
    assert quantization_of(again).weights == 4 and again.config.quantization_config.storage == "sparse"
    again.save_pretrained(tmp_path / "twice")
    assert digest(tmp_path / "twice") == digest(tmp_path / "saved")
    again.dequantize()
    again.save_pretrained(tmp_path / "float")
    assert_same(LOAD(tmp_path / "float"), model)
