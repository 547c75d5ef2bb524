"""The model card: a README.md with metadata that the Hub reads and a page that people read.

What a card says was measured by the run that writes it; what was not measured is left out.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from ..errors import HubError


@dataclass(frozen=True)
class _Task:
    """What a card says of a task: names for the Hub and for readers, the figures, and how the model is used."""

    title: str
    kind: str
    auto_class: str
    call: str
    figures: Mapping[str, tuple[str, str]]  # key in metrics.json -> the Hub's type of the metric, name
    outputs: str
    is_share: bool = True  # figures are shares, shown in percent
    pipeline_tag: str | None = None  # where the Hub has none of the task's name, an empty one


_TASKS = {
    "image-classification": _Task(
        "Image Classification",
        "image classifier",
        "AutoModelForImageClassification",
        "classify",
        {"accuracy": ("accuracy", "Accuracy")},
        "any logit",
    ),
    "object-detection": _Task(
        "Object Detection",
        "object detector",
        "AutoModelForObjectDetection",
        "detect",
        {
            "map": ("mean_average_precision", "mAP"),
            "map_50": ("mean_average_precision", "mAP at overlap 0.5"),
        },
        "any logit or box",
    ),
    "image-segmentation": _Task(
        "Semantic Segmentation",
        "image segmenter",
        "AutoModelForSemanticSegmentation",
        "segment",
        {"mean_iou": ("mean_iou", "mIoU"), "pixel_accuracy": ("accuracy", "Pixel accuracy")},
        "any logit",
    ),
    "eye-openness": _Task(
        "Eye Openness",
        "estimator of eye openness",
        "AutoModel",
        "read",
        {
            "mae": ("mae", "Mean absolute error"),
            "mae_middle": ("mae", "Mean absolute error, half-open eyes"),
            "pearson": ("pearsonr", "Pearson correlation"),
            "auc": ("roc_auc", "Open against closed (AUC)"),
        },
        "any output",
        is_share=False,
        pipeline_tag="",
    ),
}
_FIGURES = (  # key in metrics.json, row of the table, whether the value takes k, M, G, unit
    ("params", "Parameters", True, ""),
    ("macs", "MACs, one image", True, ""),
    ("weights_bits", "Bits of weights", False, ""),
    ("activations_bits", "Bits of activations", False, ""),
    ("bytes", "Weights", True, "B"),
    ("latency_ms", "PyTorch", False, "ms"),
    ("onnx_latency_ms", "ONNX Runtime", False, "ms"),
)
_TAGS = {  # of a stage, where it is not the stage's own name
    "prune": "pruning",
    "quantize": "quantization",
    "distill": "knowledge-distillation",
    **dict.fromkeys(("train", "finetune", "derive", "export", "report", "push"), ""),
}
_PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}
_SPACE = "\N{NO-BREAK SPACE}"  # keeps a number and its unit on one line of a narrow table


@dataclass(frozen=True)
class CardContent:
    """Everything that a model card says. None and empty values are left out of the card.

    Attributes:
        title: heading, and the model's name in the metadata.
        dense, compressed: measured values by the keys of metrics.json: ``accuracy``, or ``map`` and ``map_50``, or
            ``mean_iou`` and ``pixel_accuracy`` (shares, 0 to 1), ``params``, ``macs``, ``bytes``, ``latency_ms``, ``onnx_latency_ms``.
        dataset_name: for readers.
        dataset_id: the Hub's id, or the name of a data set that is elsewhere.
        dataset_split: on which these were measured.
        task: ``image-classification``, ``object-detection``, ``image-segmentation`` or ``eye-openness``.
        dataset_is_on_hub: whether ``dataset_id`` may be linked from the metadata.
        description: a sentence or two about this model.
        architecture: class or family of the model.
        reference: what ``dense`` is, in words.
        stages: what was done, in order, for example ``("train", "network_slimming", "prune", "finetune")``.
        base_model: Hub id of the model that the run started from.
        license: identifier that the Hub knows, for example ``apache-2.0``.
        reload_max_abs_diff: largest difference of any output after ``from_pretrained`` in a new process.
        onnx_max_abs_diff: largest difference of any output between ONNX Runtime and PyTorch.
        int8: of model_int8.onnx: ``latency_ms``, ``argmax`` (share of images with PyTorch's class, or None), ``images``,
            ``relative_difference`` of outputs, and the task's figures.
        notes: sentences on limits and fairness.
        dense_is: which model the dense column is about, as the end of a sentence.
        plots: file name of a picture in the card's folder -> what it shows.
        recipe: the recipe as YAML.
        machine: what the times were measured on, see :func:`hf_compress.measurement.describe_machine`.
        latency_rounds: number of rounds whose median a latency is.
        repo_id: where the model will be, for the example of use.
        tags: more tags.
    """

    title: str
    dense: Mapping[str, float | None]
    compressed: Mapping[str, float | None]
    dataset_name: str
    dataset_id: str
    dataset_split: str = "test"
    task: str = "image-classification"
    dataset_is_on_hub: bool = False
    description: str = ""
    architecture: str = ""
    reference: str = "dense model"
    stages: Sequence[str] = ()
    base_model: str | None = None
    license: str | None = None
    reload_max_abs_diff: float | None = None
    onnx_max_abs_diff: float | None = None
    int8: Mapping[str, float | None] | None = None
    notes: Sequence[str] = ()
    dense_is: str = ""
    plots: Mapping[str, str] = field(default_factory=dict)
    recipe: str = ""
    machine: str = ""
    latency_rounds: int | None = None
    repo_id: str | None = None
    tags: Sequence[str] = ()


def write_card(folder: str | Path, card: CardContent) -> Path:
    """Write README.md into a model's folder.

    Args:
        folder: where the model and the pictures are.
        card: what to say.

    Returns:
        The path of README.md.

    Raises:
        HubError: when a picture is not directly in the folder, where `push` finds it.
    """
    folder = Path(folder)
    missing = [path for path in card.plots if Path(path).name != path or not (folder / path).is_file()]
    if missing:
        raise HubError(
            f"the card shows {', '.join(missing)}, which {folder} does not hold. Draw the pictures first, directly into "
            "that folder, and give their file names."
        )
    from huggingface_hub import ModelCard

    path, partial = folder / "README.md", folder / ".README.md.partial"
    text = f"---\n{_metadata(card)}\n---\n\n{_body(card)}"
    ModelCard(text)  # parses the metadata again, and raises where the Hub would
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
    return path


def _metadata(card: CardContent) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    task = _TASKS[card.task]
    results = [
        EvalResult(
            task_type=card.task,
            task_name=task.title,
            dataset_type=card.dataset_id,
            dataset_name=card.dataset_name,
            dataset_split=card.dataset_split,
            metric_type=kind,
            metric_name=name,
            metric_value=round(float(value), 6),
        )
        for key, (kind, name) in task.figures.items()
        if (value := card.compressed.get(key)) is not None
    ]
    methods = [_TAGS.get(stage, stage.replace("_", "-")) for stage in card.stages]
    methods = [tag for tag in dict.fromkeys(methods) if tag]
    data = ModelCardData(
        model_name=card.title,
        base_model=card.base_model,
        datasets=[card.dataset_id] if card.dataset_is_on_hub else None,
        eval_results=results or None,
        library_name="transformers",
        license=card.license,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        pipeline_tag=(card.task if task.pipeline_tag is None else task.pipeline_tag) or None,
        tags=["hf_compress", "model-compression", *methods, *card.tags],
    )
    return data.to_yaml().strip()


def _body(card: CardContent) -> str:
    parts = [f"# {_plain(card.title)}", _introduction(card), _table(card)]
    parts += [f"![{_plain(caption)}]({quote(path)})\n\n*{_plain(caption)}*" for path, caption in card.plots.items()]
    parts += [_limits(card), _usage(card), _checks(card), _measuring(card), _recipe(card)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _introduction(card: CardContent) -> str:
    dense, compressed = card.dense, card.compressed
    kind = _TASKS[card.task].kind
    kind = f"{_plain(card.architecture)} {kind}" if card.architecture else f"An {kind}"
    shares = []
    names = [("macs", "multiply-accumulates"), ("params", "parameters")]
    names += [("bytes", "bytes")] if "weights_bits" in compressed else []
    for key, name in names:
        whole, left = dense.get(key), compressed.get(key)
        if whole and left is not None:
            shares.append(f"{100 * left / whole:.0f} % of the {name}")
    sentence = f"{kind}, made smaller with `hf_compress`"
    listed = " and ".join([", ".join(shares[:-1]), shares[-1]] if len(shares) > 1 else shares)
    sentence += f": it has {listed} of the {card.reference}." if shares else "."
    lines = [sentence]
    if card.stages:
        lines.append("Stages: " + " → ".join(stage.replace("_", " ") for stage in card.stages) + ".")
    return "\n\n".join([_plain(card.description), " ".join(lines)]).strip()


def _table(card: CardContent) -> str:
    rows: list[tuple[str, ...]] = []
    for key, (_, name) in _TASKS[card.task].figures.items():
        dense, compressed = card.dense.get(key), card.compressed.get(key)
        if dense is not None and compressed is not None:
            if not _TASKS[card.task].is_share:
                rows.append((name, f"{dense:.4f}", f"{compressed:.4f}", f"{compressed - dense:+.4f}"))
                continue
            change = f"{100 * (compressed - dense):+.2f}{_SPACE}pt"
            rows.append((name, f"{100 * dense:.2f}{_SPACE}%", f"{100 * compressed:.2f}{_SPACE}%", change))
    for key, name, is_scaled, unit in _FIGURES:
        dense, compressed = card.dense.get(key), card.compressed.get(key)
        if dense is not None and compressed is not None:
            ratio = f"{compressed / dense:.2f}" if dense else ""
            prefix = next((p for p in "GMk" if is_scaled and dense >= _PREFIXES[p]), "")
            divisor = _PREFIXES[prefix]
            shown = [f"{value / divisor:#.3g}".rstrip(".") for value in (dense, compressed)]
            rows.append((name, *(f"{value}{_SPACE}{prefix}{unit}".strip() for value in shown), ratio))
    if not rows:
        return ""
    lines = [f"| | {card.reference.removesuffix(' model').capitalize()} | Small | Ratio |", "|:--|--:|--:|--:|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)


def _limits(card: CardContent) -> str:
    return "\n".join(["## Limits", "", *(f"- {_plain(note)}" for note in card.notes)]) if card.notes else ""


def _usage(card: CardContent) -> str:
    place, task = card.repo_id or "path/to/this/folder", _TASKS[card.task]
    return f"""## Use

```
pip install hf-compress
```

```python
import hf_compress
from transformers import pipeline

{task.call} = pipeline(
    "{card.task}",
    model={json.dumps(place)},
)
print({task.call}("image.png"))
```

`{task.auto_class}` loads it as well. Both need `import hf_compress`, which teaches
transformers to build the smaller model."""


def _checks(card: CardContent) -> str:
    lines, what = [], f"largest difference of {_TASKS[card.task].outputs}"
    if card.reload_max_abs_diff is not None:
        shown = _difference(card.reload_max_abs_diff)
        lines.append(f"- Reloaded with `from_pretrained` in a new process: {what} {shown}.")
    if card.onnx_max_abs_diff is not None:
        shown = _difference(card.onnx_max_abs_diff)
        lines.append(f"- `model.onnx` in ONNX Runtime against PyTorch: {what} {shown}.")
    if card.int8 is not None:
        lines.append(f"- {_int8(card.int8, _TASKS[card.task])}")
    return "\n".join(["## Checked", "", *lines]) if lines else ""


def _int8(found: Mapping[str, float | None], task: _Task) -> str:
    says = f"`model_int8.onnx` in ONNX Runtime, {found['latency_ms']:#.3g}{_SPACE}ms for one image: "
    for key, (_, name) in task.figures.items():
        value = found.get(key)
        if value is not None:  # the first is the one that models of the task are compared by
            shown = f"{100 * value:.2f}{_SPACE}%" if task.is_share else f"{value:.4f}"
            says += f"{name if name.startswith('m') else name[:1].lower() + name[1:]} {shown}; "
            break
    same, difference = found["argmax"], found["relative_difference"] or 0.0
    if same is not None:
        says += f"the same class as PyTorch for {100 * same:.1f}{_SPACE}% of {found['images']} test images; "
    return f"{says}outputs differ by {100 * difference:.1f}{_SPACE}% on average."


def _difference(value: float) -> str:
    return "0 (identical)" if value == 0 else f"{value:.1e}"


def _measuring(card: CardContent) -> str:
    lines = []
    figures = _TASKS[card.task].figures
    measured = [name for key, (_, name) in figures.items() if card.compressed.get(key) is not None]
    if measured:
        lines.append(f"- {measured[0]}: {_plain(card.dataset_name)}, {_plain(card.dataset_split)} images.")
    if card.dense_is:
        lines.append(f"- Dense: {_plain(card.dense_is)}.")
    if card.compressed.get("latency_ms") is not None:
        rounds = f", median of {card.latency_rounds} rounds in turns" if card.latency_rounds else ""
        lines.append(f"- Time: one image{rounds}.")
    if card.machine:
        lines.append(f"- Machine: {_plain(card.machine)}.")
    return "\n".join(["## How it was measured", "", *lines]) if lines else ""


def _recipe(card: CardContent) -> str:
    if not card.recipe.strip():
        return ""
    longest = max((len(run) for run in re.findall(r"`+", card.recipe)), default=0)
    fence = "`" * max(3, longest + 1)  # a recipe that holds a fence itself must not end the block
    return f"## Recipe\n\n`hf-compress run recipe.yaml`\n\n{fence}yaml\n{card.recipe.strip()}\n{fence}"


def _plain(text: str) -> str:
    """Text of a recipe as one line of text, with no markup that could break the page."""
    return re.sub(r"([\\`*\[\]<>|#])", r"\\\1", " ".join(text.split()))
