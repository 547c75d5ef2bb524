"""The command line: what a user types, sees, and gets as an exit code."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from hf_compress import __version__
from hf_compress.cli import app

MODEL = {
    "model_type": "resnet",
    "layer_type": "basic",
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
}
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "model": {"config": MODEL},
    "data": {"name": "digits", "image_size": 16, "train_limit": 64, "validation_limit": 16, "test_limit": 16},
    "training": {"per_device_train_batch_size": 16},
    "stages": [
        {"stage": "train", "steps": 2},
        {"stage": "prune", "macs": 0.5},
        {"stage": "report", "latency_rounds": 1},
    ],
}


def call(*arguments: object, code: int = 0) -> str:
    result = CliRunner(env={"COLUMNS": "80", "TERM": "dumb"}).invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout + (result.stderr if code else "")  # log lines of other packages are not ours to check


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

    folder = tmp_path_factory.mktemp("models") / "resnet"
    settings = {name: value for name, value in MODEL.items() if name != "model_type"}
    ResNetForImageClassification(ResNetConfig(**settings, num_labels=10)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def recipe_file(folder: Path, **changes: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, **changes}, sort_keys=False))
    return path


def test_run_dry_run_and_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = recipe_file(tmp_path)
    output = call("run", path, "--dry-run", "--set", "stages.train.steps=3")
    assert "3 steps" in output and "nothing is written" in output
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]

    output = call("run", path)
    lines = output.splitlines()
    assert any(line.startswith("[1/3] train: 2 steps") for line in lines)
    assert "accuracy (test images)" in output and "not exported" in output and "bit-identical" in output
    assert max(map(len, lines)) <= 80
    assert json.loads((tmp_path / "runs" / "tiny" / "metrics.json").read_text())["reload_max_abs_diff"] == 0

    again = call("run", path)
    assert "finished before" in again and "accuracy (test images)" in again and "[1/3]" not in again
    assert "seed was 0 and is 7" in call("run", path, "--set", "seed=7", code=1)
    shorter = "stages=[{stage: train, steps: 1}]"
    assert "[1/1] train: 1 step" in call("run", path, "--set", "seed=7", "--set", shorter, "--restart")


def test_errors_are_one_line_without_a_traceback(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, stages=[{"stage": "train", "epoch": 2}])
    command = [sys.executable, "-m", "hf_compress.cli"]
    quiet = subprocess.run([*command, "run", str(path)], capture_output=True, text=True)
    assert quiet.returncode == 1 and quiet.stdout == ""
    assert quiet.stderr.startswith("error: ") and len(quiet.stderr.splitlines()) == 1
    assert "line " in quiet.stderr and "Did you mean 'epochs'?" in quiet.stderr
    loud = subprocess.run([*command, "--debug", "run", str(path)], capture_output=True, text=True)
    assert loud.returncode == 1 and "Traceback" in loud.stderr and "RecipeError" in loud.stderr


def test_inspect_lists_every_axis(model: Path) -> None:
    from transformers import AutoModelForImageClassification

    from hf_compress import find_axes

    output = call("inspect", model)
    axes = find_axes(AutoModelForImageClassification.from_pretrained(model), torch.zeros(1, 3, 32, 32))
    text = "".join(line.strip().split(" ")[0] for line in output.splitlines())  # long names go over several lines
    for axis in axes:
        assert axis.name in text
        assert f"{axis.params:,}" in output and f"{axis.macs:,}" in output
    assert f"{len(axes)} axes; {axes.params:,} parameters" in output
    # the image processor beside the model says 32 pixels; 224 would cost 49 times as much
    small, large = (int(text.split(" MACs for one")[0].split()[-1].replace(",", "")) for text in (
        output, call("inspect", model, "--image-size", 224)
    ))  # fmt: skip
    assert small < large / 40


def test_prune_measure_and_export(model: Path, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    small = tmp_path / "small"
    output = call("prune", model, "--macs", 0.5, "--output", small)
    assert "MACs" in output and str(small) in output.replace("\n", "")
    assert AutoImageProcessor.from_pretrained(small).size["height"] == 32
    parameters = sum(p.numel() for p in AutoModelForImageClassification.from_pretrained(small).parameters())
    assert f"{parameters:,}" in call("measure", small, "--rounds", 1)
    assert "not an empty folder" in call("prune", model, "--output", small, code=1)

    fast = tmp_path / "fast"
    call("prune", model, "--latency", 0.95, "--output", fast)
    dense = AutoModelForImageClassification.from_pretrained(model)
    left = AutoModelForImageClassification.from_pretrained(fast)
    assert sum(p.numel() for p in left.parameters()) < sum(p.numel() for p in dense.parameters())

    call("export", small)
    assert (small / "model.onnx").exists()
    call("export", small, "--output", tmp_path / "other.onnx")
    assert (tmp_path / "other.onnx").read_bytes() == (small / "model.onnx").read_bytes()


def test_images_of_a_folder_calibrate(model: Path, tmp_path: Path) -> None:
    import onnx
    from PIL import Image

    generator = np.random.default_rng(0)
    for number in range(3):
        (tmp_path / "images" / str(number)).mkdir(parents=True)
        pixels = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / str(number) / "picture.PNG")
    (tmp_path / "images" / "notes.txt").write_text("no picture")

    said = call("export", model, "--int8", "--images", tmp_path / "images", "--output", tmp_path / "int8.onnx")
    assert "the same class as PyTorch for" in said
    operators = {node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators
    call("factorize", model, "--macs", 0.7, "--images", tmp_path / "images", "--output", tmp_path / "factors")
    call("factorize", model, "--macs", 0.7, "--output", tmp_path / "plain")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("factors", "plain")]
    assert weights[0] != weights[1]

    (tmp_path / "empty").mkdir()
    asked = ("export", model, "--output", tmp_path / "no.onnx")
    assert "Add --int8" in call(*asked, "--images", tmp_path / "images", code=1)
    assert "holds no image" in call(*asked, "--int8", "--images", tmp_path / "empty", code=1)
    assert "no folder" in call(*asked, "--int8", "--images", tmp_path / "nowhere", code=1)
    (tmp_path / "empty" / "broken.png").write_bytes(b"no picture")
    assert "broken.png cannot be read" in call(*asked, "--int8", "--images", tmp_path / "empty", code=1)
    assert not (tmp_path / "no.onnx").exists()


def test_a_model_without_a_classifier(tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetModel

    settings = {name: value for name, value in MODEL.items() if name != "model_type"}
    ResNetModel(ResNetConfig(**settings)).save_pretrained(tmp_path / "bare")
    assert "axes;" in call("inspect", tmp_path / "bare", "--image-size", 32)


def test_a_detector(tmp_path: Path) -> None:
    from transformers import AutoModelForObjectDetection

    from hf_compress.models.pruned_vit import PrunedViTConfig
    from hf_compress.models.sidt import SidtConfig, SidtForObjectDetection, SidtImageProcessor

    vit = PrunedViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=32,
                          patch_size=8)  # fmt: skip
    config = SidtConfig(backbone_config=vit, pyramid_channels=16, group_size=4, head_layers=1, num_labels=3)
    SidtForObjectDetection(config).save_pretrained(tmp_path / "dense")
    SidtImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "dense")
    assert "axes;" in call("inspect", tmp_path / "dense")
    call("prune", tmp_path / "dense", "--macs", 0.7, "--output", tmp_path / "small")
    small = AutoModelForObjectDetection.from_pretrained(tmp_path / "small")
    assert f"{sum(p.numel() for p in small.parameters()):,}" in call("measure", tmp_path / "small", "--rounds", 1)
    call("export", tmp_path / "small")
    assert (tmp_path / "small" / "model.onnx").exists()


def test_what_cannot_be_done(model: Path, tmp_path: Path) -> None:
    assert "no folder" in call("inspect", tmp_path / "nowhere", code=1)
    (tmp_path / "empty").mkdir()
    assert "cannot be loaded" in call("measure", tmp_path / "empty", code=1)
    assert "latency" in call("prune", model, "--latency", 1e-6, "--output", tmp_path / "out", code=1)
    assert "smallest model" in call("prune", model, "--macs", 0.0001, "--output", tmp_path / "out", code=1)
    assert not (tmp_path / "out").exists()
    assert "magnitude" in call("prune", model, "--scores", "luck", "--output", tmp_path / "out", code=1)


def test_push_without_a_token(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "token" in call("push", model, "someone/something", code=1)


def test_help_and_version_answer_at_once() -> None:
    # the fastest of three, since other processes may hold the cores
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "hf_compress.cli", "--help"], capture_output=True, text=True
        )
        seconds.append(time.perf_counter() - start)
        assert result.returncode == 0 and "prune" in result.stdout
        assert not {"torch", "transformers"} & {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
        if seconds[-1] < 1:
            break
    assert min(seconds) < 1
    assert call("--version").strip() == f"hf-compress {__version__}"
    for command in ("run", "inspect", "prune", "measure", "export", "push", "eye-openness"):
        assert "Usage" in call(command, "--help")
