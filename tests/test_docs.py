"""What the guides show runs: every Python block of a page, one after another, on small models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.data import Dataset
from transformers import TrainingArguments

from hf_compress.measurement import count_macs

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
# page -> the class of its model
PAGES = {
    "afidaf": "vit",
    "architecture_search": "vit",
    "darts": "resnet",
    "dimension_search": "vit",
    "low_rank": "resnet",
    "quantization": "resnet",
    "slimming": "resnet",
}
OTHERS = {
    "eye_openness",  # needs a trained model, videos and folders
    "latency",  # how far time falls with so few channels differs from machine to machine
}


class Images(Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"pixel_values": torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(i)), "labels": i % 4}


def small(kind: str) -> transformers.PreTrainedModel:
    """Those in families.py have no dimensions to spare: a search keeps at least eight in a head."""
    torch.manual_seed(0)
    if kind == "vit":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        config: Any = transformers.ViTConfig(image_size=32, patch_size=4, num_labels=4, **sizes)
    else:
        sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
        config = transformers.ResNetConfig(num_labels=4, layer_type="basic", image_size=32, **sizes)
    return transformers.AutoModelForImageClassification.from_config(config)


class Fresh(dict):
    """Names of a page's blocks. Every block begins with new models, as every section of a page does."""

    def __init__(self, kind: str, folder: Path):
        arguments = TrainingArguments(
            str(folder / "trainer"), max_steps=8, per_device_train_batch_size=8, learning_rate=1e-3, report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        small(kind).save_pretrained(folder / "float")
        batches = [{"pixel_values": torch.stack([Images()[i]["pixel_values"] for i in range(8)])}]
        super().__init__(
            model=small(kind), other=small(kind), student=small(kind), teacher=small(kind), name=str(folder / "float"),
            arguments=arguments, images=Images(), dataset=Images(), batches=batches,
            loader=batches,
        )  # fmt: skip


def blocks(page: str) -> list[str]:
    return BLOCK.findall((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("page", "kind"), PAGES.items())
def test_what_a_page_shows_runs(page: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = blocks(page)
    assert found
    for number, code in enumerate(found):
        before = count_macs(small(kind))
        names = Fresh(kind, tmp_path / str(number))
        exec(compile(code, f"{page}.md, block {number}", "exec"), names)
        for name in ("model", "student"):
            assert all(p.isfinite().all() for p in names[name].parameters()), (page, number)
        if re.search(r'macs"?[=:]|target=', code):  # a budget; what penalties alone empty in so few steps is nothing
            assert count_macs(names["model"]) < before, code


def test_every_page_is_run_or_known() -> None:
    pages = {path.stem for path in (ROOT / "docs").glob("*.md") if blocks(path.stem)}
    assert pages == {*PAGES, *OTHERS}
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    missing = [path.name for path in (ROOT / "docs").glob("*.md") if path.name not in nav]
    assert not missing, f"not in mkdocs.yml: {missing}"


def test_links_between_pages_lead_somewhere() -> None:
    """Pages, sections and files of the repository that the guides name."""
    for path in (ROOT / "docs").glob("*.md"):
        text = path.read_text(encoding="utf-8")
        for target, anchor in re.findall(r"\]\(([\w/]+\.md)?(#[\w-]+)?\)", text):
            other = path.parent / target if target else path
            assert other.exists(), (path.name, target)
            if anchor:
                titles = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.MULTILINE)
                slugs = {re.sub(r"[^\w\s-]", "", title).strip().lower().replace(" ", "-") for title in titles}
                assert anchor[1:] in slugs, (path.name, target, anchor)
        for name in re.findall(r"`((?:recipes|benchmarks)/[\w./]+)`", text):
            assert (ROOT / name).exists(), (path.name, name)
