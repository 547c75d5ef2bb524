"""AFIDAF in few bits: what is quantized, what stays float, and training that repairs what rounding did."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from hf_compress import QuantizationAwareTrainingCallback, quantize
from hf_compress.hub import HfCompressConfig
from hf_compress.models.afidaf import AfidafConfig, AfidafForImageClassification
from hf_compress.quantization.layers import quantization_of


def build() -> AfidafForImageClassification:
    torch.manual_seed(0)
    config = AfidafConfig(
        stem_channels=8, hidden_sizes=[8, 8, 16, 16, 16], depths=[1, 0, 1], expand_ratio=2, num_channels=1, num_labels=10,
        expansion_size=32,
    )  # fmt: skip
    return AfidafForImageClassification(config)


class Digits(Dataset[dict[str, Any]]):
    """Handwritten digits at 32 x 32 pixels."""

    def __init__(self, count: int):
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = torch.tensor(digits.images[:count], dtype=torch.float32)[:, None] / 8 - 1
        self.pixels = torch.nn.functional.interpolate(pixels, size=(32, 32), mode="bilinear", align_corners=False)
        self.labels = torch.tensor(digits.target[:count])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}

    @property
    def batch(self) -> dict[str, Any]:
        return {"pixel_values": self.pixels, "labels": self.labels}


def test_spectral_weights_stay_float(tmp_path: Path) -> None:
    model = build().eval()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    quantize(model, HfCompressConfig(weights=4, activations=8, activation_scheme="static"), [Digits(8).batch])
    layers = set(quantization_of(model).layers or ())
    assert any(name.endswith("image.pointwise") for name in layers) and not any("fourier" in name for name in layers)
    after = dict(model.named_parameters())
    spectral = [name for name in before if ".fourier." in name]
    assert len(spectral) == 8 and all(torch.equal(after[name], before[name]) for name in spectral)
    assert not torch.equal(after[f"{min(layers)}.weight"], before[f"{min(layers)}.weight"])
    model.save_pretrained(tmp_path)
    again = AfidafForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():  # maps of a single place; see the rounding in tests/models/test_afidaf.py
        torch.testing.assert_close(again(Digits(8).pixels).logits, model(Digits(8).pixels).logits, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_training_in_few_bits_repairs_the_rounding(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    images = Digits(256)

    def train(model: Any, steps: int, rate: float, callbacks: list[Any]) -> None:
        arguments = TrainingArguments(
            str(tmp_path), max_steps=steps, per_device_train_batch_size=32, learning_rate=rate, save_strategy="no",
            report_to=[], disable_tqdm=True, use_cpu=True, logging_strategy="no",
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=images, callbacks=callbacks).train()

    def loss(model: Any) -> float:
        with torch.no_grad():
            return float(model.eval()(**images.batch).loss)

    trained = build()
    train(trained, 80, 3e-3, [])
    rounded, repaired = copy.deepcopy(trained), copy.deepcopy(trained)
    settings: dict[str, Any] = {"activations": 8, "activation_scheme": "static"}
    quantize(rounded, HfCompressConfig(weights=2, **settings), [images.batch])
    callback = QuantizationAwareTrainingCallback(2, batches=[images.batch], **settings)
    train(repaired, 80, 3e-3, [callback])
    assert quantization_of(repaired).weights == 2
    # two bits cost most of what was learned, and training brings back more than half of it
    assert loss(rounded) - loss(trained) > 0.5
    assert loss(repaired) - loss(trained) < 0.5 * (loss(rounded) - loss(trained))
