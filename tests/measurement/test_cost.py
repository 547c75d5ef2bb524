"""``measure``: every figure against another way of getting it."""

import pytest
import torch
from families import FAMILIES, PlainCnn
from torch import nn

from hf_compress.axes import find_axes
from hf_compress.errors import CheckpointError, ModelError
from hf_compress.measurement import checkpoint_bytes, count_macs, measure, state_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_macs_are_those_of_the_axes(family):
    """Two counters that share no code: torch's dispatcher counts what runs, the axes evaluate a polynomial."""
    model, images = FAMILIES[family]()
    assert count_macs(model, images) == find_axes(model, images[:1]).macs


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_macs_count_attention_whichever_implementation_runs(attention):
    model, images = FAMILIES["vit"]()
    model.set_attn_implementation(attention)
    tokens, width, hidden, labels, depth = 17, 24, 40, 7, 2
    layer = tokens * width * (4 * width + 2 * hidden) + 2 * tokens * tokens * width
    assert count_macs(model, images) == 16 * 3 * 8 * 8 * width + depth * layer + width * labels
    assert model.config._attn_implementation == attention


def test_macs_of_a_layer_by_hand():
    assert count_macs(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(5, 3, 6, 6)) == 8 * 36 * 3 * 9
    assert count_macs(nn.Linear(4, 6), (torch.zeros(5, 4),)) == 24


@pytest.mark.parametrize("family", ["resnet_basic", "vit", "convnext", "timm_resnet"])
def test_bytes_are_those_that_save_pretrained_writes(family, tmp_path):
    model, _ = FAMILIES[family]()
    model.save_pretrained(tmp_path)
    assert checkpoint_bytes(tmp_path) == (tmp_path / "model.safetensors").stat().st_size
    # transformers writes some architectures' tensors under older, longer names, which are part of the header
    assert 0 <= checkpoint_bytes(tmp_path) - state_bytes(model) <= 30 * len(model.state_dict())


def test_shards_are_added_up(tmp_path):
    model, _ = FAMILIES["vit"]()
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    tensors = sum(t.nbytes for t in model.state_dict().values())
    for folder in ("whole", "shards"):
        assert tensors < checkpoint_bytes(tmp_path / folder) < 1.2 * tensors


def test_shared_tensors_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(100, 100, bias=False), nn.Linear(100, 100, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x))

    model = Tied()
    assert 40_000 < state_bytes(model) < 40_200
    measurement = measure(model, torch.zeros(1, 100), rounds=1)
    assert (measurement.params, measurement.macs) == (10_000, 20_000)


@pytest.mark.parametrize("family", ["resnet_basic", "vit", "swin", "timm_vit", "plain_cnn"])
def test_the_model_is_left_as_it_was(family):
    model, images = FAMILIES[family]()
    model.train()
    list(model.modules())[-1].eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(5)
    random_state = torch.get_rng_state()
    measurement = measure(model, images, rounds=2)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert measurement.latency_ms > 0
    model.train()
    output = model(images)
    getattr(output, "logits", output).sum().backward()  # nothing kept from inference mode gets in the way
    assert measurement.params == sum(p.numel() for p in model.parameters())


def test_images_come_from_the_configuration_and_a_batch_counts_as_one():
    model, images = FAMILIES["vit"]()
    built, given = measure(model, rounds=1), measure(model, {"pixel_values": images}, rounds=1)
    assert (built.macs, built.params, built.bytes) == (given.macs, given.params, given.bytes)


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ModelError, match="has no config"):
        measure(PlainCnn())
    with pytest.raises(ModelError, match="failed on the example inputs"):
        measure(PlainCnn(), torch.zeros(1, 5, 16, 16))
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        checkpoint_bytes(tmp_path)
