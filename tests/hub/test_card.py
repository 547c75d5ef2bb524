"""The model card: metadata that the Hub's own reader understands, a page that renders, and no figure that is not given."""

import re
from dataclasses import replace
from urllib.parse import unquote

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from markdown_it import MarkdownIt

from hf_compress.errors import HubError
from hf_compress.hub.card import CardContent, write_card

DENSE = {
    "accuracy": 0.975,
    "params": 301_234,
    "macs": 4_100_000,
    "bytes": 1_210_000,
    "latency_ms": 2.0,
    "onnx_latency_ms": 0.8,
}
SMALL = {
    "accuracy": 0.9722,
    "params": 98_765,
    "macs": 2_000_000,
    "bytes": 400_000,
    "latency_ms": 1.5,
    "onnx_latency_ms": None,
}
RECIPE = "name: quickstart\nstages:\n  - stage: train\n    epochs: 1\n"

FULL = CardContent(
    title="digits-resnet-small",
    dense=DENSE,
    compressed=SMALL,
    dataset_name="digits (scikit-learn)",
    dataset_id="digits",
    description="A small reader of digits.",
    architecture="ResNet",
    stages=("train", "network_slimming", "prune", "finetune"),
    base_model="user/dense",
    license="apache-2.0",
    reload_max_abs_diff=0.0,
    onnx_max_abs_diff=3.2e-7,
    plots={"widths.png": "Width of every axis.", "trade off (1).png": "Accuracy against MACs."},
    recipe=RECIPE,
    machine="Some CPU, 1 thread, torch 2",
    latency_rounds=15,
    repo_id="user/small",
    tags=("digits",),
)


@pytest.fixture
def folder(tmp_path):
    for name in FULL.plots:
        (tmp_path / name).write_bytes(b"picture")
    return tmp_path


def tokens(path):
    text = ModelCard.load(path).text
    found = MarkdownIt("gfm-like", {"linkify": False}).parse(text)
    return found + [child for token in found for child in token.children or ()]


def table(path):
    cells, rows = False, []
    for token in MarkdownIt("gfm-like", {"linkify": False}).parse(ModelCard.load(path).text):
        if token.type == "tr_open":
            rows.append([])
        elif token.type in ("td_open", "th_open"):
            cells = True
        elif token.type == "inline" and cells:
            rows[-1].append(token.content)
            cells = False
    return rows


def test_metadata_goes_round(folder):
    data = ModelCard.load(write_card(folder, FULL)).data
    assert data.library_name == "transformers" and data.pipeline_tag == "image-classification"
    assert data.base_model == "user/dense" and data.license == "apache-2.0" and data.metrics == ["accuracy"]
    assert data.tags == ["hf_compress", "model-compression", "network-slimming", "pruning", "digits"]
    assert data.model_name == FULL.title
    (result,) = data.eval_results
    assert (result.task_type, result.metric_type, result.metric_value) == ("image-classification", "accuracy", 0.9722)
    assert (result.dataset_name, result.dataset_type, result.dataset_split) == (FULL.dataset_name, "digits", "test")
    assert "datasets" not in data.to_dict()  # not a data set of the Hub
    on_hub = replace(FULL, dataset_id="zalando-datasets/fashion_mnist", dataset_is_on_hub=True)
    assert ModelCard.load(write_card(folder, on_hub)).data.datasets == ["zalando-datasets/fashion_mnist"]


def test_the_model_index_is_valid(folder):
    data = ModelCard.load(write_card(folder, FULL)).data
    index = data.to_dict()["model-index"]
    name, results = model_index_to_eval_results(index)
    assert eval_results_to_model_index(name, results) == index
    (entry,) = index[0]["results"]
    assert set(entry) == {"task", "dataset", "metrics"} and {"type", "name", "split"} == set(entry["dataset"])


def test_the_table(folder):
    rows = table(write_card(folder, FULL))
    assert [[cell.replace("\N{NO-BREAK SPACE}", "_") for cell in row] for row in rows] == [
        ["", "Dense", "Small", "Ratio"],
        ["Accuracy", "97.50_%", "97.22_%", "-0.28_pt"],
        ["Parameters", "301_k", "98.8_k", "0.33"],
        ["MACs, one image", "4.10_M", "2.00_M", "0.49"],
        ["Weights", "1.21_MB", "0.400_MB", "0.33"],
        ["PyTorch", "2.00_ms", "1.50_ms", "0.75"],
    ]  # no row for ONNX Runtime, which was measured for one model only


def test_the_page_renders(folder):
    path = write_card(folder, FULL)
    found = tokens(path)
    images = [token for token in found if token.type == "image"]
    assert [unquote(token.attrs["src"]) for token in images] == list(FULL.plots)
    assert all((folder / unquote(token.attrs["src"])).is_file() for token in images)
    assert all(token.content for token in images)  # alternative text
    fences = {token.info: token.content for token in found if token.type == "fence"}
    assert fences["yaml"] == RECIPE
    compile(fences["python"], "card", "exec")
    assert "import hf_compress" in fences["python"] and "user/small" in fences["python"]
    text = path.read_text()
    assert "3.2e-07" in text and "identical" in text and "median of 15 rounds" in text and "Some CPU" in text
    assert "49 % of the multiply-accumulates" in text and "33 % of the parameters" in text
    assert sorted(p.name for p in folder.iterdir()) == sorted([*FULL.plots, "README.md"])
    assert "Dense:" not in text
    assert "- Dense: as \\*published\\*.\n" in write_card(folder, replace(FULL, dense_is="as *published*")).read_text()


def test_what_is_not_given_is_not_said(tmp_path):
    bare = CardContent("x", {}, {}, dataset_name="digits", dataset_id="digits")
    path = write_card(tmp_path, bare)
    text = path.read_text()
    assert not re.search(r"None|nan|\b0\.0|Accuracy|latency|Checked|Recipe|Machine|\|", text)
    data = ModelCard.load(path).data
    assert not data.eval_results and not data.license and not data.base_model and not data.metrics


@pytest.mark.parametrize("missing", list(DENSE))
def test_a_missing_value_takes_its_row_away(missing, folder):
    dense = {key: value for key, value in DENSE.items() if key != missing}
    full = replace(FULL, compressed={**SMALL, "onnx_latency_ms": 0.5})
    rows = table(write_card(folder, replace(full, dense=dense)))
    assert len(rows) == len(table(write_card(folder, full))) - 1
    assert all(len(row) == 4 for row in rows)


@pytest.mark.parametrize(
    "text", ["a | b\n| c", "# not a heading", "![x](http://y)", "<script>alert(1)</script>", "*`_~[]", "---\nx: 1\n---"]
)
def test_text_from_a_recipe_cannot_break_the_page(text, folder):
    nasty = replace(
        FULL,
        title=f"t {text}",
        description=text,
        dataset_name=f"d {text}",
        machine=text,
        recipe=f"x: |\n  ```\n  {text}",
    )
    path = write_card(folder, nasty)
    found = tokens(path)
    assert len([token for token in found if token.type == "image"]) == 2
    assert [token.tag for token in found if token.type == "heading_open"] == ["h1", "h2", "h2", "h2", "h2"]
    assert not [token for token in found if token.type.startswith("html")]
    assert len(table(path)) == 6
    (yaml,) = [token.content for token in found if token.type == "fence" and token.info == "yaml"]
    assert yaml == nasty.recipe + "\n"
    assert ModelCard.load(path).data.model_name == nasty.title


@pytest.mark.parametrize("path", ["missing.png", "../outside.png", "/etc/hostname", "below/x.png"])
def test_pictures_must_be_in_the_folder(path, tmp_path):
    with pytest.raises(HubError, match="does not hold"):
        write_card(tmp_path, replace(FULL, plots={path: "x"}))
    assert not list(tmp_path.iterdir())


def test_a_detectors_card(tmp_path):
    figures = {key: value for key, value in DENSE.items() if key != "accuracy"}
    card = CardContent(
        title="digits-detector",
        task="object-detection",
        dense={**figures, "map": 0.41, "map_50": 0.6},
        compressed={**figures, "map": 0.4, "map_50": 0.59},
        dataset_name="composed scenes",
        dataset_id="scenes",
        architecture="Sidt",
        reload_max_abs_diff=0.0,
    )
    found = ModelCard.load(write_card(tmp_path, card))
    assert found.data.pipeline_tag == "object-detection"
    assert [(result.task_type, result.metric_value) for result in found.data.eval_results] == [
        ("object-detection", 0.4), ("object-detection", 0.59),
    ]  # fmt: skip
    assert "Sidt object detector" in found.text and "| mAP |" in found.text and "any logit or box" in found.text
    assert 'pipeline(\n    "object-detection"' in found.text and "AutoModelForObjectDetection" in found.text
    assert "ccuracy" not in found.text


def test_bits_and_int8_are_told(tmp_path):
    content = replace(
        FULL,
        plots={},
        dense={**DENSE, "weights_bits": 32, "activations_bits": 32},
        compressed={**SMALL, "weights_bits": 4, "activations_bits": 8},
        int8={"latency_ms": 0.25, "argmax": 0.9962, "relative_difference": 0.012, "images": 1000, "accuracy": 0.981},
    )
    text = write_card(tmp_path, content).read_text(encoding="utf-8").replace("\N{NO-BREAK SPACE}", " ")
    assert "| Bits of weights | 32 | 4 |" in text.replace("32.0", "32").replace("4.00", "4")
    assert "33 % of the parameters and 33 % of the bytes" in text
    assert "`model_int8.onnx` in ONNX Runtime, 0.250 ms" in text and "99.6 % of 1000 test images" in text
    assert "for one image: accuracy 98.10 %; the same class" in text
