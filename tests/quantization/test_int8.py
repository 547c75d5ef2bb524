"""int8 ONNX files against the PyTorch model, on real images (scikit-learn's handwritten digits)."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers
from families import FAMILIES
from sklearn.datasets import load_digits

from hf_compress.errors import DataError, ExportError
from hf_compress.export.int8 import export_int8_onnx, int8_agreement
from hf_compress.export.onnx import export_onnx, onnx_runner
from hf_compress.hub import HfCompressConfig
from hf_compress.quantization import quantize
from hf_compress.quantization.layers import quantization_of

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def digits():
    """A ResNet that reads digits, images to calibrate on and images it has not seen."""
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=10
    )
    model = transformers.ResNetForImageClassification(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(100):
        part = torch.arange(step * 64, step * 64 + 64) % 1200
        model(images[part], labels=labels[part]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        assert (model(images[1200:]).logits.argmax(1) == labels[1200:]).float().mean() > 0.85
    return model, images[:256], images[1200:]


def operators(path) -> set[str]:
    return {node.op_type for node in onnx.load(path).graph.node}


@pytest.mark.parametrize(
    "arguments", [None, {"weights": 8, "activations": 8, "activation_scheme": "static"}, {"weights": 4}]
)
def test_static_agrees_on_real_images(digits, arguments, tmp_path):
    model, calibration, unseen = digits
    model = copy.deepcopy(model)
    if arguments is not None:
        quantize(model, HfCompressConfig(**arguments), [calibration])
    path = export_int8_onnx(model, tmp_path / "m.onnx", unseen[:1], calibration=[calibration], reduce_range=False)
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators(path) and list(tmp_path.iterdir()) == [path]
    found = int8_agreement(model, path, unseen)
    assert found.images == len(unseen) and found.argmax >= 0.99 and found.relative_difference < 0.03
    full = export_onnx(digits[0], tmp_path / "full.onnx", unseen[:1])
    assert path.stat().st_size < 0.5 * full.stat().st_size  # scales, zero points and names count in a model this small
    run = onnx_runner(path)
    assert run(unseen[:1]).shape == (1, 10) and run(unseen[:5]).shape == (5, 10)


def test_layers_that_stay_float_stay_float_in_the_file(digits, tmp_path):
    model, calibration, unseen = digits
    model = quantize(copy.deepcopy(model), HfCompressConfig(weights=8))
    graph = onnx.load(export_int8_onnx(model, tmp_path / "m.onnx", unseen[:1], calibration=[calibration])).graph
    float_weights = {i.name for i in graph.initializer if i.data_type == onnx.TensorProto.FLOAT and len(i.dims) > 1}
    assert float_weights == {"model.resnet.embedder.embedder.convolution.weight", "model.classifier.1.weight"}


def test_the_file_has_the_models_own_codes_and_ranges(digits, tmp_path):
    """Weights of four bits stay on their grid of 15 values, though BatchNorm was folded into the convolutions."""
    model, calibration, unseen = digits
    scheme = HfCompressConfig(weights=4, activations=8, activation_scheme="static")
    model = quantize(copy.deepcopy(model), scheme, [calibration])
    path = export_int8_onnx(model, tmp_path / "m.onnx", unseen[:1], calibration=[calibration], reduce_range=False)
    held = {item.name: onnx.numpy_helper.to_array(item) for item in onnx.load(path).graph.initializer}
    layers = quantization_of(model).layers
    assert len(layers) > 4
    inputs = 0
    for name in layers:
        layer = model.get_submodule(name)
        codes = vars(layer)["hf_compress_weight"].codes(layer._parameters["weight"], name)
        found = torch.from_numpy(held[f"model.{name}.weight_quantized"].astype("float32"))
        signs = (found * codes).flatten(1).sum(1).sign()[:, None, None, None]  # of the BatchNorm's scale
        assert torch.equal(found, codes * signs)
        low, high = layer.hf_compress_range.tolist()
        step = (max(high, 0) - min(low, 0)) / 255
        inputs += any(
            abs(float(v) - step) < 1e-6 * step for k, v in held.items() if k.endswith("_scale") and not v.shape
        )
    assert inputs >= len(layers) - 2  # but where two layers that read one tensor have other ranges


def test_linear_layers_are_found_though_the_exporter_renames_them(tmp_path, monkeypatch):
    model, x = FAMILIES["vit"]()
    images = torch.randn(64, *x.shape[1:], generator=torch.Generator().manual_seed(0))
    scheme = HfCompressConfig(weights=4, activations=8, activation_scheme="static", skip=["first", "last", "*.mlp.fc2"])
    quantize(model, scheme, [images])
    monkeypatch.setattr("hf_compress.export.int8._is_mostly_linear", lambda model: False)  # the static form
    path = export_int8_onnx(
        model, tmp_path / "m.onnx", x[:1], calibration=[images], min_agreement=0, reduce_range=False
    )
    graph = onnx.load(path).graph
    held = [onnx.numpy_helper.to_array(item) for item in graph.initializer]
    codes = {name: v["hf_compress_weight"].codes(v["_parameters"]["weight"], name).numpy().T
             for name, v in ((name, vars(model.get_submodule(name))) for name in quantization_of(model).layers)}  # fmt: skip
    assert len(codes) == 10
    for code in codes.values():
        assert any(value.dtype == np.int8 and value.shape == code.shape and (value == code).all() for value in held)
    for layer in model.vit.layers:  # float in the model, float in the file
        weight = layer.mlp.fc2.weight.detach().numpy().T
        assert any(
            value.dtype == np.float32 and value.shape == weight.shape and (value == weight).all() for value in held
        )


def test_dynamic(tmp_path):
    model, x = FAMILIES["vit"]()
    quantize(model, HfCompressConfig(weights=8, activations=8))
    path = export_int8_onnx(model, tmp_path / "m.onnx", x[:1])
    assert "MatMulInteger" in operators(path)
    with torch.no_grad():
        expected = model(x[:1]).logits
    assert (onnx_runner(path)(x[:1]) - expected).norm() < 0.05 * expected.norm()
    model.eval()
    assert model.vit.layers[0].mlp.fc1.hf_compress_input.bits == 8  # the model is as it was


def test_few_levels_are_part_of_the_graph(digits, tmp_path):
    model, calibration, unseen = digits
    model = quantize(
        copy.deepcopy(model), HfCompressConfig(activations=4, activation_scheme="clipped_relu"), [calibration]
    )
    path = export_int8_onnx(model, tmp_path / "m.onnx", unseen[:1], calibration=[calibration], min_agreement=0.5)
    assert "Ceil" in operators(path)


def test_refusals(digits, tmp_path):
    model, calibration, unseen = digits
    for empty in ([], iter(()), [calibration[:0]]):
        with pytest.raises(DataError, match="no image"):
            export_int8_onnx(model, tmp_path / "m.onnx", unseen[:1], calibration=empty)
    with pytest.raises(ExportError, match="nothing was written"):  # nothing agrees to more than all
        export_int8_onnx(model, tmp_path / "m.onnx", unseen[:1], calibration=[calibration], min_agreement=1.1)
    assert not list(tmp_path.iterdir())


def test_export_onnx_writes_int8_when_asked(digits, tmp_path):
    model, calibration, unseen = digits
    path = export_onnx(
        model, tmp_path / "m.onnx", unseen[:1], check_inputs=unseen, int8=True, calibration=[calibration]
    )
    assert "QuantizeLinear" in operators(path) and int8_agreement(model, path, unseen).argmax >= 0.99
    with pytest.raises(ExportError, match=r"min_agreement=1\.1"):
        export_onnx(model, tmp_path / "n.onnx", unseen[:1], int8=True, calibration=[calibration], min_agreement=1.1)
    with pytest.raises(ExportError, match="int8=True"):
        export_onnx(model, tmp_path / "n.onnx", unseen[:1], calibration=[calibration])
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("winner", ["static", "dynamic"])
def test_of_a_transformer_the_faster_form_is_kept(winner, tmp_path, monkeypatch):
    model, x = FAMILIES["vit"]()
    images = torch.randn(16, *x.shape[1:], generator=torch.Generator().manual_seed(0))
    tried = []

    def timed(candidates, rounds):
        tried.extend(candidates)
        return {name: float(name.endswith("dynamic.onnx") == (winner == "static")) for name in candidates}

    monkeypatch.setattr("hf_compress.measurement.latency.compare_latency", timed)
    path = export_int8_onnx(model, tmp_path / "m.onnx", x[:1], calibration=[images], min_agreement=0.1)
    assert len(tried) == 2 and list(tmp_path.iterdir()) == [path]
    assert ("MatMulInteger" in operators(path)) == (winner == "dynamic")
    assert ("QuantizeLinear" in operators(path)) == (winner == "static")
