"""What each stage does: from the model that the stage before left to a folder of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..axes import AxisGraph, find_axes
from ..errors import HfCompressError
from ..measurement.latency_table import LatencyTable
from ..surgery import (
    Plan,
    factorize,
    factorize_report,
    magnitude_scores,
    replace_attention,
    replacement_report,
    select,
    shrink,
)
from .folder import RunFolder, write_json
from .preparation import Prepared, teacher_name
from .schema import (
    MODEL_STAGES,
    Compression,
    DeriveStage,
    DistillStage,
    ExportStage,
    FactorizeStage,
    Method,
    PruneStage,
    PushStage,
    QuantizeStage,
    ReplaceAttentionStage,
    Training,
    compresses,
    scoring_stage,
    teacher_number,
)

OUTPUTS_FILE = "logits.safetensors"


def load_model(prepared: Prepared, path: Path) -> Any:
    """A stage's model, the way that anybody else would load it."""
    return prepared.task.auto_class.from_pretrained(path)


def save_result(prepared: Prepared, model: Any, partial: Path) -> None:
    """What a stage leaves: the model with its image processor, and what it answers in this process (logits, and boxes of a
    detector), for the check of the reload."""
    from ..export import named_outputs

    model.to("cpu").save_pretrained(partial / "model")
    prepared.processor.save_pretrained(partial / "model")
    model.eval()
    with torch.no_grad():
        outputs = named_outputs(model(pixel_values=test_pixels(prepared)))
    save_file({name: value.float().contiguous() for name, value in outputs.items()}, partial / OUTPUTS_FILE)


def start_stage(prepared: Prepared, partial: Path) -> dict[str, Any]:
    """Keep the model from before the first stage, so that a continued run starts from the same weights."""
    save_result(prepared, prepared.model, partial)
    return {"stage": "start"}


def run_stage(prepared: Prepared, folder: RunFolder, number: int) -> dict[str, Any]:
    """Run stage ``number`` (from 1) in its partial folder.

    Returns:
        Notes for its ``done.json``.
    """
    index = number - 1
    stage = prepared.recipe.stages[index]
    partial = folder.begin(number, keep=isinstance(stage, Training))
    if isinstance(stage, Training):
        return _train(prepared, folder, index, partial)
    if isinstance(stage, Compression):
        return _COMPRESSIONS[type(stage)](prepared, folder, index, partial)
    if isinstance(stage, ExportStage):
        return _export(prepared, stage, folder.model(index), partial)
    if isinstance(stage, PushStage):
        from ..hub.upload import push

        return {"url": push(folder.path, stage.repo, private=stage.private)}
    from .report import report

    return report(prepared, folder, index, partial)


def _train(prepared: Prepared, folder: RunFolder, index: int, partial: Path) -> dict[str, Any]:
    from .training import train

    stage, teacher, source = prepared.recipe.stages[index], None, folder.model(index)
    if isinstance(stage, DistillStage):
        teacher = teacher_of(prepared, folder, index)
        source = folder.model(0) if stage.student == "start" else source
    model = load_model(prepared, source)
    callback, history = train(prepared, index, model, partial / "trainer", teacher)
    if isinstance(prepared.recipe.stages[index], Method):
        tensors = {f"scores/{name}": value for name, value in callback.scores(model).items()}
        tensors |= {f"support/{name}": mask for name, mask in (callback.kept(model) or {}).items()}
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, partial / "scores.safetensors")
    write_json(partial / "history.json", history)
    found = validate(prepared, model)
    save_result(prepared, model, partial)
    if (partial / "trainer" / "runs").exists():  # TensorBoard's files
        shutil.move(partial / "trainer" / "runs", partial / "runs")
    shutil.rmtree(partial / "trainer", ignore_errors=True)
    return {"stage": prepared.recipe.stages[index].stage, **found}


def teacher_of(prepared: Prepared, folder: RunFolder, index: int) -> str:
    """Where the teacher of a distill stage lies: a folder or a Hub id."""
    number = teacher_number(prepared.recipe, index)
    return teacher_name(prepared.recipe, index) if number is None else str(folder.model(number))


def validate(prepared: Prepared, model: Any) -> dict[str, float]:
    """``validation_<figure>`` of a model, for the notes of a stage."""
    figures = prepared.task.measure(model, prepared.split("validation"))
    return {f"validation_{name}": value for name, value in figures.items()}


def _prune(prepared: Prepared, folder: RunFolder, index: int, partial: Path) -> dict[str, Any]:
    recipe, stage = prepared.recipe, prepared.recipe.stages[index]
    assert isinstance(stage, PruneStage) and prepared.axes is not None
    model = load_model(prepared, folder.model(index))
    axes = find_axes(model, prepared.example_inputs)
    slimming = scoring_stage(recipe, index) if stage.scores == "auto" else None
    scores: Mapping[str, Tensor] = magnitude_scores(model, axes)
    support: dict[str, Tensor] | None = None
    if slimming is not None:
        saved = load_file(folder.stage(slimming + 1) / "scores.safetensors")
        scores = {name.removeprefix("scores/"): value for name, value in saved.items() if name.startswith("scores/")}
        if stage.support:
            support = {name[8:]: value for name, value in saved.items() if name.startswith("support/")}
    try:
        table, share = _latency(prepared, folder, stage, model, axes)
        plan = choose(stage, axes, scores, dense=prepared.axes, support=support, latency_table=table, dense_share=share)
        shrink(model, plan, axes=axes, fold_shift=stage.fold_shift, example_inputs=prepared.example_inputs)
    except HfCompressError as error:
        raise type(error)(f"{recipe.where('stages', index)}: {error}") from error
    later = [other.stage for other in recipe.stages[index + 1 :]]
    name = f"plan-{index + 1}.json" if "prune" in later else "plan.json"
    (partial / "publish").mkdir()
    (partial / "publish" / name).write_text(json.dumps(plan.to_json()) + "\n", encoding="utf-8")
    macs, params = axes.cost(plan)
    found = validate(prepared, model)
    save_result(prepared, model, partial)
    return {"stage": "prune", "macs": macs, "params": params, **found}


def _factorize(prepared: Prepared, folder: RunFolder, index: int, partial: Path) -> dict[str, Any]:
    recipe, stage = prepared.recipe, prepared.recipe.stages[index]
    assert isinstance(stage, FactorizeStage) and prepared.axes is not None
    model = load_model(prepared, folder.model(index))
    try:
        factorize_by(stage, prepared, model)
    except HfCompressError as error:
        raise type(error)(f"{recipe.where('stages', index)}: {error}") from error
    report = factorize_report(model)
    factorised = [layer for layer in report.layers if layer.rank is not None]
    made = partial / "publish"
    made.mkdir()
    write_json(made / "ranks.json", {layer.name: [layer.scheme, layer.rank, layer.full_rank] for layer in factorised})
    spectra = {layer.name: layer.energies.sqrt().contiguous() for layer in factorised if layer.energies is not None}
    save_file(spectra, partial / "spectra.safetensors")
    left = find_axes(model, prepared.example_inputs)
    found = validate(prepared, model)
    save_result(prepared, model, partial)
    return {"stage": "factorize", "macs": left.macs, "params": left.params, **found}


def calibration_batches(prepared: Prepared, count: int) -> list[dict[str, Tensor]] | None:
    """The first training images, without augmentation; None for none."""
    images = prepared.split("train")
    count = min(count, len(images))
    return [{"pixel_values": pixels} for pixels in images.pixels(count).split(32)] if count else None


def _quantize(prepared: Prepared, folder: RunFolder, index: int, partial: Path) -> dict[str, Any]:
    from ..quantization import quantize, stored_bytes

    recipe, stage = prepared.recipe, prepared.recipe.stages[index]
    assert isinstance(stage, QuantizeStage)
    model = load_model(prepared, folder.model(index))
    scheme = stage.scheme()
    try:
        quantize(
            model, scheme, calibration_batches(prepared, stage.calibration_images) if scheme.needs_batches else None
        )
    except HfCompressError as error:
        raise type(error)(f"{recipe.where('stages', index)}: {error}") from error
    found = validate(prepared, model)
    save_result(prepared, model, partial)
    return {"stage": "quantize", "bytes": stored_bytes(model), **found}


def _derive(prepared: Prepared, folder: RunFolder, index: int, partial: Path) -> dict[str, Any]:
    from transformers import set_seed

    from ..measurement import count_macs
    from .preparation import derive_by

    recipe, stage = prepared.recipe, prepared.recipe.stages[index]
    assert isinstance(stage, DeriveStage)
    supernet = load_model(prepared, folder.model(index))
    set_seed(recipe.seed + index)  # for new weights
    try:
        model = derive_by(stage, supernet)
    except HfCompressError as error:
        raise type(error)(f"{recipe.where('stages', index)}: {error}") from error
    made = partial / "publish"
    made.mkdir()
    if callable(getattr(supernet, "genotype", None)):
        write_json(made / "genotype.json", supernet.genotype())
    macs, params = count_macs(model, prepared.example_inputs), sum(p.numel() for p in model.parameters())
    found = validate(prepared, model)
    save_result(prepared, model, partial)
    return {"stage": "derive", "macs": macs, "params": params, **found}


def factorize_by(stage: FactorizeStage, prepared: Prepared, model: Any) -> None:
    """Factorise a model as a stage says; shares are of the recipe's dense model.

    Raises:
        HfCompressError: as :func:`hf_compress.factorize`.
    """
    assert prepared.axes is not None
    dense = {"macs": prepared.axes.macs, "params": prepared.axes.params}
    budget = {name: getattr(stage, name) for name in dense if getattr(stage, name) is not None}
    budget = {name: value * dense[name] if value < 1 else value for name, value in budget.items()}
    batches = calibration_batches(prepared, stage.calibration_images)
    factorize(
        model,
        energy=stage.energy,
        scheme=stage.scheme,
        targets=stage.targets,
        batches=batches,
        example_inputs=prepared.example_inputs,
        **budget,
    )


def _replace_attention(prepared: Prepared, folder: RunFolder, index: int, partial: Path) -> dict[str, Any]:
    recipe, stage = prepared.recipe, prepared.recipe.stages[index]
    assert isinstance(stage, ReplaceAttentionStage)
    model = load_model(prepared, folder.model(index)).to("cuda" if torch.cuda.is_available() else "cpu")
    try:
        replace_by(stage, prepared, model)
    except HfCompressError as error:
        raise type(error)(f"{recipe.where('stages', index)}: {error}") from error
    report = replacement_report(model)
    made = partial / "publish"
    made.mkdir()
    write_json(made / "attention.json", [_flat(asdict(row)) for row in report.rows])
    model.to("cpu")
    left = find_axes(model, prepared.example_inputs)
    found = validate(prepared, model)
    save_result(prepared, model, partial)
    return {"stage": stage.stage, "replaced": len(report.replaced), "macs": left.macs, "params": left.params, **found}


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    return {**row.pop("block"), **row}


def replace_by(stage: ReplaceAttentionStage, prepared: Prepared, model: Any, images: int | None = None) -> None:
    """Replace attention as a stage says; a share of MACs is of the recipe's dense model.

    Args:
        images: so many for matching and measuring, without steps of matching; those of the stage when not given.

    Raises:
        HfCompressError: as :func:`hf_compress.replace_attention`.
    """
    assert prepared.axes is not None
    split, size = prepared.split("train"), 32
    count = min(stage.calibration_images if images is None else images, len(split))
    batches = [split.__getitems__(range(i, min(i + size, count))) for i in range(0, count, size)]
    device = next(model.parameters()).device
    replace_attention(
        model,
        stage.layers,
        stage.filter,
        count=stage.count,
        macs=stage.macs * prepared.axes.macs if stage.macs is not None and stage.macs <= 1 else stage.macs,
        latency=stage.latency,
        batches=batches,
        match_steps=stage.match_steps if images is None else 0,
        learning_rate=stage.learning_rate,
        seed=prepared.recipe.seed,
        example_inputs={name: value.to(device) for name, value in prepared.example_inputs.items()},
    )


def _latency(
    prepared: Prepared, folder: RunFolder, stage: PruneStage, model: Any, axes: AxisGraph
) -> tuple[LatencyTable | None, float]:
    """The table of times that a latency budget needs, and the time of the dense model over that of ``model``."""
    if stage.latency is None:
        return None, 1.0
    assert prepared.axes is not None
    table = LatencyTable.for_model(model, axes, prepared.example_inputs)
    if (prepared.axes.macs, prepared.axes.params) == (axes.macs, axes.params):
        return table, 1.0
    dense = LatencyTable.for_model(load_model(prepared, folder.model(0)), prepared.axes, prepared.example_inputs)
    return table, dense.dense_ms / table.dense_ms


def choose(
    stage: PruneStage,
    axes: AxisGraph,
    scores: Mapping[str, Tensor],
    *,
    dense: AxisGraph,
    support: Mapping[str, Tensor] | None = None,
    latency_table: LatencyTable | None = None,
    dense_share: float = 1.0,
) -> Plan:
    """The plan that a prune stage asks for.

    Args:
        axes: of the model that is cut.
        dense: of the model before the first stage, whose cost a share refers to.
        support: axis name -> bool [axis size], with ``support: true``.
        latency_table: of the model that is cut, for a ``latency``.
        dense_share: time of the dense model over that of the model that is cut.

    Raises:
        HfCompressError: as :func:`hf_compress.select`.
    """
    if stage.support:
        return plan_from_support(axes, support or {}, scores, stage.min_keep, stage.round_to)
    latency = stage.latency
    if latency is not None and latency <= 1:
        latency = min(latency * dense_share, 1.0)
    is_first = (dense.macs, dense.params) == (axes.macs, axes.params)

    def budget(asked: float | None, whole: int) -> float | int | None:
        if asked is None or (asked <= 1 and is_first):
            return asked
        return int(asked * whole) if asked <= 1 else int(asked)

    return select(
        axes,
        scores,
        macs=budget(stage.macs, dense.macs),
        params=budget(stage.params, dense.params),
        latency=latency,
        latency_table=latency_table if latency is not None else None,
        ratio=stage.ratio,
        round_to=stage.round_to,
        min_keep=stage.min_keep,
        inexact=stage.inexact,
    )


def plan_from_support(
    axes: AxisGraph, support: Mapping[str, Tensor], scores: Mapping[str, Tensor], min_keep: int = 1, round_to: int = 1
) -> Plan:
    """Keep what a method left nonzero, and of every axis at least ``min_keep`` indices, by score.

    Axes that must keep equally many indices keep as many as the largest of them needs.
    """
    counts = {}
    for name, mask in support.items():
        wanted = max(int(mask.sum()), min_keep)
        counts[name] = min(-(-wanted // round_to) * round_to, axes[name].size)
    for tied in axes.sizes_tied:
        most = max(counts.get(name, axes[name].size) for name in tied)
        counts.update({name: most for name in tied if name in counts})
    keep = {}
    for name, count in counts.items():
        ranked = sorted(
            range(axes[name].size), key=lambda i: (bool(support[name][i]), float(scores[name][i])), reverse=True
        )
        keep[name] = tuple(sorted(ranked[:count]))
    return Plan({name: kept for name, kept in keep.items() if len(kept) < axes[name].size}, axes)


_COMPRESSIONS: dict[type[Compression], Callable[[Prepared, RunFolder, int, Path], dict[str, Any]]] = {
    DeriveStage: _derive,
    FactorizeStage: _factorize,
    PruneStage: _prune,
    QuantizeStage: _quantize,
    ReplaceAttentionStage: _replace_attention,
}


def _export(prepared: Prepared, stage: ExportStage, source: Path, partial: Path) -> dict[str, Any]:
    from ..export import export_onnx

    made = partial / "publish"
    made.mkdir()
    pixels = test_pixels(prepared)
    export_onnx(
        load_model(prepared, source).eval(),
        made / "model.onnx",
        {"pixel_values": pixels[:1]},
        check_inputs={"pixel_values": pixels},
        tolerance=stage.tolerance,
    )
    if stage.int8:
        export_onnx(
            load_model(prepared, source).eval(),
            made / "model_int8.onnx",
            {"pixel_values": pixels[:1]},
            check_inputs={"pixel_values": pixels},
            int8=True,
            calibration=calibration_batches(prepared, stage.calibration_images),
            min_agreement=stage.min_agreement,
        )
    return {"stage": "export"}


def test_pixels(prepared: Prepared) -> Tensor:
    """Real test images [n, 3, height, width], on which checks compare what models answer."""
    return prepared.split("test").pixels(prepared.task.check_images)


def unpruned_stages(prepared: Prepared) -> list[int]:
    """Numbers of the training stages whose models are dense: nothing was removed or factorised before."""
    numbers = []
    for number, stage in enumerate(prepared.recipe.stages, 1):
        if compresses(stage):
            break
        if stage.stage in MODEL_STAGES:
            numbers.append(number)
    return numbers
