"""A shrunk model is an ordinary checkpoint: the stock Auto classes rebuild it in a new process, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES
from reloading import LOAD_ALL
from torch import Tensor, nn

import hf_compress
from hf_compress.errors import RecordError
from hf_compress.hub import HfCompressConfig
from hf_compress.recipe.reload import in_own_memory
from hf_compress.surgery import record_of

RELOADED = [name for name in FAMILIES if not name.startswith("plain")]


def python(*arguments: str) -> str:
    result = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def pruned(family: str) -> tuple[nn.Module, Tensor]:
    model, x = FAMILIES[family]()
    hf_compress.prune(model, ratio=0.4, fold_shift=True, example_inputs=x[:1])
    return model, x


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """family -> a folder with the checkpoint and what its model computed, reloaded and saved again elsewhere."""
    root = tmp_path_factory.mktemp("checkpoints")
    for family in RELOADED:
        model, x = pruned(family)
        model.save_pretrained(root / family / "model")
        with torch.no_grad():
            torch.save((x, model(x).logits), root / family / "expected.pt")
    assert f"all {len(RELOADED)}" in python("-c", LOAD_ALL, *(str(root / family) for family in RELOADED))
    return {family: root / family for family in RELOADED}


@pytest.mark.parametrize("family", RELOADED)
def test_new_process_gives_the_same_logits_and_the_same_bytes(family: str, folders: dict[str, Path]) -> None:
    folder = folders[family]  # the comparison of logits was made there, in the other process
    for name in ("config.json", "model.safetensors"):
        assert (folder / "again" / name).read_bytes() == (folder / "model" / name).read_bytes(), name


def load(folder: Path, **arguments: object) -> nn.Module:
    model = transformers.AutoModelForImageClassification.from_pretrained(folder / "model", **arguments)
    return in_own_memory(model)


def test_loaded_model_is_an_ordinary_one(folders: dict[str, Path]) -> None:
    model = load(folders["vit"])
    assert type(model) is transformers.ViTForImageClassification
    assert not model.is_quantized and not hasattr(model, "hf_quantizer")
    assert isinstance(model.config.quantization_config, HfCompressConfig)
    assert record_of(model) == model.config.quantization_config.record
    assert model.half().dtype == torch.float16 and model.float().dtype == torch.float32
    x, logits = torch.load(folders["vit"] / "expected.pt")
    for implementation in ("eager", "sdpa"):
        model = load(folders["vit"], attn_implementation=implementation)
        with torch.no_grad():
            # another order of float32 additions
            assert torch.allclose(model(x).logits, logits, atol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"dtype": torch.bfloat16},
        {"dtype": "auto"},
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"low_cpu_mem_usage": True},
    ],
    ids=str,
)
def test_loading_options_work(folders: dict[str, Path], arguments: dict[str, object]) -> None:
    model = load(folders["resnet_basic"], **arguments)
    x, logits = torch.load(folders["resnet_basic"] / "expected.pt")
    with torch.no_grad():
        found = model(x.to(model.dtype).to(model.device)).logits
    if arguments.get("dtype") is torch.bfloat16:
        assert model.dtype == torch.bfloat16
        assert (found.float() - logits).abs().max() < 0.05 * logits.abs().max()  # bfloat16 has 8 bits of mantissa
    else:
        assert torch.equal(found.cpu(), logits)


def test_shards_work(folders: dict[str, Path], tmp_path: Path) -> None:
    model = load(folders["mobilenet_v2"])
    model.save_pretrained(tmp_path / "model", max_shard_size="200KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    x, logits = torch.load(folders["mobilenet_v2"] / "expected.pt")
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(x).logits, logits)


def test_loaded_model_can_be_pruned_again(folders: dict[str, Path], tmp_path: Path) -> None:
    model = load(folders["swin"])
    before = sum(p.numel() for p in model.parameters())
    hf_compress.prune(model, ratio=0.3, example_inputs=torch.zeros(1, 3, 32, 32))
    assert sum(p.numel() for p in model.parameters()) < before
    model.save_pretrained(tmp_path / "model")
    x, _ = torch.load(folders["swin"] / "expected.pt")
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(x).logits, model.eval()(x).logits)


@pytest.mark.parametrize("family", ["resnet_basic", "vit"])
def test_loaded_model_trains_under_trainer(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = load(folders[family])
    x, _ = torch.load(folders[family] / "expected.pt")
    data = [{"pixel_values": image, "labels": torch.tensor(0)} for image in x]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = transformers.TrainingArguments(
        tmp_path / "run", max_steps=2, per_device_train_batch_size=2, report_to=[], save_steps=1, learning_rate=1e-2
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    trainer.train()
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "checkpoint-2")
    trainer.save_model(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(x).logits, model.eval()(x).logits)


def test_weights_of_other_sizes_than_the_record_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """The stock loader finds it from 5.23 on; before that the quantizer does."""
    model, _ = FAMILIES["resnet_basic"]()
    smaller = load(folders["resnet_basic"])
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text((folders["resnet_basic"] / "model" / "config.json").read_text())
    assert smaller.config.quantization_config.record.shapes
    with pytest.raises((RuntimeError, RecordError), match=r"mismatch|do not belong together"):
        load(tmp_path)


def test_a_compressed_model_takes_a_new_classifier(folders: dict[str, Path], tmp_path: Path) -> None:
    dense_head = load(folders["vit"]).classifier.weight
    model = load(folders["vit"], num_labels=3, ignore_mismatched_sizes=True)
    assert model.classifier.weight.shape == (3, dense_head.shape[1])
    model.save_pretrained(tmp_path / "model")
    again = load(tmp_path)
    x, _ = torch.load(folders["vit"] / "expected.pt")
    with torch.no_grad():
        assert torch.equal(again(x).logits, model(x).logits) and again(x).logits.shape[1] == 3


# -- importing ----------------------------------------------------------------------------------------------------

ORDERS: dict[str, str] = {
    "ours first": "import hf_compress; from transformers import AutoModelForImageClassification as A",
    "transformers first": "from transformers import AutoModelForImageClassification as A; import hf_compress",
    "modeling first": "import transformers.modeling_utils; import hf_compress; from transformers import AutoModelForImageClassification as A",
    "pipelines last": "import hf_compress, transformers.pipelines; from transformers import AutoModelForImageClassification as A",
    "quantizer first": "import hf_compress.hub.quantizer; from transformers import AutoModelForImageClassification as A",
    "twice": "import hf_compress, importlib; from transformers import AutoModelForImageClassification as A; importlib.reload(hf_compress)",
}


@pytest.mark.parametrize("order", ORDERS)
def test_any_order_of_imports_registers(order: str, folders: dict[str, Path]) -> None:
    folder = folders["resnet_basic"] / "model"
    assert "True" in python(
        "-c", f"{ORDERS[order]}\nprint(type(A.from_pretrained({str(folder)!r})).__name__.startswith('ResNet'))"
    )


def test_importing_is_cheap() -> None:
    """No torch and no model of transformers behind ``import hf_compress``; seconds are measured in benchmarks/."""
    script = (
        "import sys, hf_compress; print(sorted({'torch', 'transformers', 'pydantic', 'matplotlib'} & set(sys.modules)))"
    )
    assert python("-c", script).strip() == "[]"


def test_every_public_name_exists() -> None:
    for name in hf_compress.__all__:
        assert getattr(hf_compress, name) is not None
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = hf_compress.nothing_like_it


def test_without_hf_compress_loading_fails_and_never_gives_a_wrong_model(folders: dict[str, Path]) -> None:
    script = f"from transformers import AutoModelForImageClassification as A\nA.from_pretrained({str(folders['vit'] / 'model')!r})"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert result.returncode != 0 and "mismatch" in result.stderr
