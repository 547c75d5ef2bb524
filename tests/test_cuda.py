"""The same contracts on a CUDA device; everything here is skipped on a machine without one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES

import hf_compress

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("family", ["resnet_basic", "mobilenet_v2", "vit", "regnet_y"])
def test_pruning_on_the_device_equals_pruning_on_the_cpu(family: str) -> None:
    model, x = FAMILIES[family]()
    model, x = model.double(), x.double()
    on_device = copy.deepcopy(model).cuda()
    arguments = {"ratio": 0.4, "fold_shift": True}
    hf_compress.prune(model, example_inputs=x[:1], **arguments)
    hf_compress.prune(on_device, example_inputs=x[:1].cuda(), **arguments)
    assert all(tensor.is_cuda for tensor in [*on_device.parameters(), *on_device.buffers()])
    with torch.no_grad():
        expected, found = model(x).logits, on_device(x.cuda()).logits.cpu()
    assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()  # float64 in another order of additions


@pytest.mark.parametrize("precision", [{}, {"fp16": True}, {"bf16": True}], ids=str)
@pytest.mark.parametrize(
    "callback",
    [
        lambda: hf_compress.NetworkSlimmingCallback("l1", 0.05),
        lambda: hf_compress.ProximalSlimmingCallback(0.5, 1.0),
    ],
    ids=["network_slimming", "proximal_slimming"],
)
def test_callbacks_shrink_scales_in_every_precision(callback, precision: dict[str, bool], tmp_path: Path) -> None:
    model, x = FAMILIES["resnet_basic"]()
    data = [{"pixel_values": image, "labels": torch.tensor(i % 7)} for i, image in enumerate(x.repeat(16, 1, 1, 1))]
    method = callback()
    before = sum(float(s.sum()) for s in hf_compress.NetworkSlimmingCallback().scores(model).values())
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=20, per_device_train_batch_size=8, learning_rate=0.05, optim="sgd", report_to=[],
        save_strategy="no", max_grad_norm=0.0, **precision,
    )  # fmt: skip
    transformers.Trainer(model, arguments, train_dataset=data, callbacks=[method]).train()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    scores = method.scores(model)
    assert all(score.device.type == "cpu" and torch.isfinite(score).all() for score in scores.values())
    assert sum(float(score.sum()) for score in scores.values()) < before
    hf_compress.prune(model, scores=scores, ratio=0.3, fold_shift=True)


def test_a_checkpoint_loads_onto_the_device(tmp_path: Path) -> None:
    model, x = FAMILIES["resnet_basic"]()
    hf_compress.prune(model.cuda(), macs=0.6, example_inputs=x[:1].cuda())
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path, device_map="cuda")
    assert all(parameter.is_cuda for parameter in again.parameters())
    saved = model.state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in again.state_dict().items())


def test_measuring_on_the_device() -> None:
    model, x = FAMILIES["resnet_basic"]()
    found = hf_compress.measure(model.cuda(), x[:1].cuda(), rounds=3)
    assert found.latency_ms > 0 and found.macs == hf_compress.find_axes(model, x[:1].cuda()).macs
