"""``export_onnx``: the file computes what the model computes, or there is no file."""

import sys
from types import SimpleNamespace

import onnx
import pytest
import torch
from families import FAMILIES, PlainCnn
from torch import nn

import hf_compress
from hf_compress.errors import ExportError
from hf_compress.export import export_onnx, onnx_difference, onnx_outputs, onnx_runner
from hf_compress.export import onnx as onnx_export


def images_like(images, number, seed=3):
    return torch.randn(number, *images.shape[1:], generator=torch.Generator().manual_seed(seed))


def logits(model, images):
    with torch.no_grad():
        output = model(images)
    return getattr(output, "logits", output)


@pytest.mark.parametrize("family", ["resnet_basic", "vit", "convnext", "timm_resnet", "plain_cnn"])
def test_same_function_at_any_batch_size(family, tmp_path, capfd):
    model, images = FAMILIES[family]()
    example = None if family == "vit" else images
    path = export_onnx(model, tmp_path / "new" / "model.onnx", example, check_inputs=images_like(images, 4))
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]  # one file, nothing left over
    run = onnx_runner(path)
    for number in (1, 2, 7):
        batch = images_like(images, number, seed=number)
        # float32 on both sides, in another order of summation
        assert torch.allclose(run(batch), logits(model, batch), atol=2e-5, rtol=0)
    printed = capfd.readouterr()
    assert printed.out == "" and "onnx" not in printed.err.lower()


@pytest.mark.parametrize("family", ["resnet_basic", "vit"])
def test_a_pruned_model(family, tmp_path):
    model, images = FAMILIES[family]()
    dense = export_onnx(model, tmp_path / "dense.onnx", images)
    hf_compress.prune(model, macs=0.5, example_inputs=images[:1])
    pruned = export_onnx(model, tmp_path / "pruned.onnx", images, check_inputs=images_like(images, 5))
    assert onnx_difference(model, pruned, images_like(images, 3)) < 2e-5
    assert onnx_difference(model, dense, images) > 1e-3  # the comparison tells models apart
    assert pruned.stat().st_size < dense.stat().st_size


class TwoOutputs(nn.Module):
    """Answers as a detector does; ``off_by`` makes the boxes of a copy wrong."""

    def __init__(self, off_by=0.0):
        super().__init__()
        self.layer, self.off_by = nn.Linear(4, 5), off_by

    def forward(self, pixel_values):
        rows = self.layer(pixel_values.flatten(2).transpose(1, 2))
        return SimpleNamespace(pred_boxes=rows[..., :4].sigmoid() + self.off_by, logits=rows, last_hidden_state=rows)


def test_a_detectors_boxes_are_written_and_compared(tmp_path):
    torch.manual_seed(0)
    model = TwoOutputs()
    pixels = torch.randn(3, 4, 6, 6)
    path = export_onnx(model, tmp_path / "m.onnx", pixels)
    assert [value.name for value in onnx.load(path).graph.output] == ["logits", "pred_boxes"]
    for number in (1, 3):
        expected = model(pixels[:number])
        found = onnx_outputs(path)(pixels[:number])
        assert torch.allclose(found["logits"], expected.logits, atol=1e-5)  # float32 in another order of summation
        assert torch.allclose(found["pred_boxes"], expected.pred_boxes, atol=1e-5)
        assert torch.equal(onnx_runner(path)(pixels[:number]), found["logits"])
    assert onnx_difference(model, path, pixels) < 1e-5
    moved = TwoOutputs(off_by=0.25)
    moved.load_state_dict(model.state_dict())
    assert onnx_difference(moved, path, pixels) == pytest.approx(0.25, abs=1e-5)  # the logits agree, the boxes do not


@pytest.mark.parametrize("kind", ["sidt", "yolos"])
def test_detectors(kind, tmp_path):
    import transformers

    from hf_compress.models.pruned_vit import PrunedViTConfig
    from hf_compress.models.sidt import SidtConfig, SidtForObjectDetection

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "patch_size": 8,
    }
    if kind == "sidt":
        vit = PrunedViTConfig(image_size=32, **sizes)
        model = SidtForObjectDetection(
            SidtConfig(backbone_config=vit, pyramid_channels=16, group_size=4, head_layers=1)
        )
    else:
        config = transformers.YolosConfig(image_size=[32, 32], num_detection_tokens=5, **sizes)
        model = transformers.YolosForObjectDetection(config)
    model.eval()
    pixels = torch.randn(3, 3, 32, 32)
    run = onnx_outputs(export_onnx(model, tmp_path / "m.onnx", pixels))
    for number in (1, 3):
        with torch.no_grad():
            expected = model(pixels[:number])
        for name, found in run(pixels[:number]).items():
            # batch 1 and float32 in another order of summation
            torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-4)


def test_the_model_is_left_as_it_was(tmp_path):
    model, images = FAMILIES["plain_cnn"]()
    model.train()
    model.head.eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    export_onnx(model, tmp_path / "m.onnx", images)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_the_file_says_nothing_about_the_machine(tmp_path):
    model, images = FAMILIES["plain_cnn"]()
    path = export_onnx(model, tmp_path / "m.onnx", images)
    content = path.read_bytes()
    for trace in (b"site-packages", b".py", str(tmp_path).encode()):
        assert trace not in content
    graph = onnx.load(path).graph
    assert [value.name for value in graph.input] == ["pixel_values"]
    assert [value.name for value in graph.output] == ["logits"]
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_a_difference_beyond_the_tolerance_keeps_the_old_file(tmp_path):
    model, images = FAMILIES["plain_cnn"]()
    path = tmp_path / "m.onnx"
    path.write_bytes(b"what was there before")
    with pytest.raises(ExportError, match=r"differ by \d\.\d+e-\d+ on 1 image.*tolerance=1e-12"):
        export_onnx(model, path, images, tolerance=1e-12)
    assert path.read_bytes() == b"what was there before"
    assert list(tmp_path.iterdir()) == [path]


def test_not_a_number_is_a_difference(tmp_path):
    model, images = FAMILIES["plain_cnn"]()
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    with pytest.raises(ExportError, match="differ by nan"):
        export_onnx(model, tmp_path / "m.onnx", images)
    assert not list(tmp_path.iterdir())


class DependsOnTheBatch(PlainCnn):
    """Divides by the batch size, which a file exported for one batch size would take for a constant."""

    def forward(self, x):
        return super().forward(x) / x.shape[0]


def test_the_batch_size_is_no_constant(tmp_path):
    model, images = DependsOnTheBatch().eval(), torch.randn(2, 3, 16, 16)
    path = export_onnx(model, tmp_path / "m.onnx", images)
    assert onnx_difference(model, path, torch.randn(6, 3, 16, 16)) < 1e-5


class DependsOnValues(PlainCnn):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


class WithoutLogits(PlainCnn):
    def forward(self, x):
        return {"scores": super().forward(x)}


@pytest.mark.parametrize(
    ("kind", "message"), [(DependsOnValues, "must be traceable"), (WithoutLogits, "dict without logits")]
)
def test_what_cannot_be_exported_is_explained(kind, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        export_onnx(kind(), tmp_path / "m.onnx", torch.randn(2, 3, 16, 16))
    assert not list(tmp_path.iterdir())


def test_more_than_one_input_is_refused(tmp_path):
    with pytest.raises(ExportError, match="2 inputs were given"):
        export_onnx(nn.Identity(), tmp_path / "m.onnx", (torch.zeros(1, 3), torch.zeros(1, 3)))


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportError, match=rf"package {package}, .*pip install hf-compress\[export\]"):
        export_onnx(PlainCnn(), tmp_path / "m.onnx", torch.zeros(1, 3, 16, 16))
    assert not list(tmp_path.iterdir())


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"not a model")
    with pytest.raises(ExportError, match=r"cannot read .*m\.onnx"):
        onnx_runner(tmp_path / "m.onnx")


def test_large_weights_go_beside_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "_ONE_FILE_LIMIT", 1000)
    model, images = FAMILIES["plain_cnn"]()
    path = export_onnx(model, tmp_path / "m.onnx", images)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert onnx_difference(model, path, images) < 1e-5
