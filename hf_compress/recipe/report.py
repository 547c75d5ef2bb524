"""The report stage: dense against compressed, measured on test images; pictures and the model card."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ..surgery import Plan
from .folder import RunFolder, write_json
from .preparation import Prepared, method_callback
from .reload import reload_difference
from .schema import (
    MODEL_STAGES,
    ArchitectureSearchStage,
    DistillStage,
    Method,
    PushStage,
    ReportStage,
    SparseGroupStage,
)
from .stages import OUTPUTS_FILE, load_model, teacher_of, test_pixels, unpruned_stages

_INT8_IMAGES = 1000
_MOST_PIXELS = 1024  # of a feature map whose affinities are drawn


def report(prepared: Prepared, folder: RunFolder, index: int, partial: Path) -> dict[str, Any]:
    """Measure, and write metrics.json, the pictures and README.md into ``partial/publish``.

    Args:
        index: of the report stage.

    Returns:
        Notes for ``done.json``: which stage's model is the dense one, and its metrics.
    """
    from ..export import OnnxModel, export_onnx, int8_agreement, onnx_difference, onnx_outputs
    from ..measurement import checkpoint_bytes, compare_latency, count_macs, describe_machine

    stage = prepared.recipe.stages[index]
    assert isinstance(stage, ReportStage)
    made = partial / "publish"
    made.mkdir()
    chosen = dense_stage(prepared, folder, stage)
    paths = {"dense": folder.model(chosen), "compressed": folder.model(index)}
    models = {name: load_model(prepared, path) for name, path in paths.items()}
    image, pixels = prepared.example_inputs["pixel_values"], test_pixels(prepared)

    figures = {name: prepared.task.measure(model, prepared.split("test")) for name, model in models.items()}
    for model in models.values():
        model.to("cpu").eval()
    times = compare_latency({n: _caller(m, image) for n, m in models.items()}, stage.latency_rounds)
    onnx_times: dict[str, float | None] = {"dense": None, "compressed": None}
    onnx_max_abs_diff, int8 = None, None
    exported = _exported(prepared, folder)
    if exported is not None:
        dense_file = export_onnx(models["dense"], partial / "dense.onnx", {"pixel_values": image}, tolerance=1e-2)
        runners = {"dense": onnx_outputs(dense_file), "compressed": onnx_outputs(exported)}
        int8_file = exported.with_name("model_int8.onnx")
        if int8_file.exists():
            runners["int8"] = onnx_outputs(int8_file)
        onnx_times |= compare_latency({n: _caller(r, image) for n, r in runners.items()}, stage.latency_rounds)
        if int8_file.exists():
            int8 = {"latency_ms": onnx_times.pop("int8"), "bytes": int8_file.stat().st_size}
            int8 |= asdict(int8_agreement(models["compressed"], int8_file, _many_pixels(prepared)))
            int8 |= prepared.task.measure(OnnxModel(int8_file), prepared.split("test"))
        onnx_max_abs_diff = onnx_difference(models["compressed"], exported, pixels)
        dense_file.unlink()
    expected = load_file(paths["compressed"].parent / OUTPUTS_FILE)  # before it was saved

    metrics: dict[str, Any] = {
        name: {
            **figures[name],
            "params": sum(p.numel() for p in model.parameters()),
            "macs": count_macs(model, {"pixel_values": image}),
            "bytes": checkpoint_bytes(paths[name]),
            "latency_ms": times[name],
            "onnx_latency_ms": onnx_times[name],
        }
        for name, model in models.items()
    }
    for name, bits in _bits(models).items():
        metrics[name] |= bits
    metrics["reload_max_abs_diff"] = reload_difference(
        paths["compressed"], pixels, expected, prepared.task.auto_class.__name__
    )
    metrics["onnx_max_abs_diff"] = onnx_max_abs_diff
    if int8 is not None:
        metrics["int8"] = int8
    write_json(made / "metrics.json", metrics)
    pictures = draw(prepared, folder, index, metrics, made) | prepared.task.draw(prepared, models, made)
    pictures |= _draw_filters(prepared, models["compressed"], made)
    architecture = type(models["compressed"]).__name__.removesuffix(prepared.task.auto or "ForRegression")
    write_readme(prepared, stage, metrics, pictures, made, describe_machine(), architecture, chosen)
    return {"stage": "report", "dense": chosen, "metrics": metrics}


def _bits(models: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """In how many bits the models hold weights and activations; nothing where all of them are float."""
    from ..quantization import quantization_of

    schemes = {name: quantization_of(model) for name, model in models.items()}
    if not any(schemes.values()):
        return {}
    return {
        name: {f"{what}_bits": getattr(scheme, what, None) or 32 for what in ("weights", "activations")}
        for name, scheme in schemes.items()
    }


def _many_pixels(prepared: Prepared) -> Tensor:
    """As many test images as a share of agreement needs to mean something."""
    images = prepared.split("test")
    return images.pixels(min(_INT8_IMAGES, len(images)))


def dense_stage(prepared: Prepared, folder: RunFolder, stage: ReportStage) -> int:
    """Number of the stage whose model is called dense: as the recipe says, else the best on validation images."""
    candidates = unpruned_stages(prepared)
    if stage.dense is not None:
        stages = prepared.recipe.stages
        return next(n for n in candidates if stage.dense in (n - 1, stages[n - 1].stage))
    if not candidates:
        return 0
    figure = f"validation_{prepared.task.figures[0]}"
    return max(candidates, key=lambda n: ((folder.done(n) or {})[figure], -n))


def _name_of_dense(prepared: Prepared, stage: ReportStage, dense: int) -> str:
    """Which model the dense one is: with several stages before anything is removed, nothing else says so."""
    if dense == 0:
        return ""
    says = f"the model after stage {dense} ({prepared.recipe.stages[dense - 1].stage.replace('_', ' ')})"
    is_chosen = stage.dense is None and len(unpruned_stages(prepared)) > 1
    return f"{says}, the best of the full-sized ones on validation images" if is_chosen else says


def draw(prepared: Prepared, folder: RunFolder, index: int, metrics: dict[str, Any], made: Path) -> dict[str, str]:
    """The pictures that this run has data for.

    Returns:
        File name -> what it shows.
    """
    from ..measurement import TradeoffPoint, plot_sparsity, plot_tradeoff, plot_widths
    from ..measurement.plots import plot_dimensions
    from ..measurement.plots_sparse_group import plot_group_norms
    from ..methods.dimension_kinds import kind_of

    task, figure = prepared.task, prepared.task.figures[0]
    pictures: dict[str, str] = {}
    stages = prepared.recipe.stages[:index]
    prunes = [number for number, stage in enumerate(stages, 1) if stage.stage == "prune"]
    points = [TradeoffPoint("dense", metrics["dense"]["macs"], metrics["dense"][figure])]
    if prunes and prepared.axes is not None:
        after: dict[str, int] = {}
        for number in prunes:
            (file,) = (folder.stage(number) / "publish").glob("plan*.json")
            after |= Plan.from_json(json.loads(file.read_text(encoding="utf-8"))).sizes
        sizes = {axis.name: axis.size for axis in prepared.axes}
        plot_widths(made / "widths.png", sizes, after)
        pictures["widths.png"] = "Width of every axis before and after pruning."
        kinds = {axis.name: kind_of(axis, prepared.axes) for axis in prepared.axes}
        has_attention = bool(set(kinds.values()) & {"heads", "qk", "v"})
        if has_attention and any(after.get(name, size) < size for name, size in sizes.items()):
            plot_dimensions(made / "dimensions.png", sizes, after, kinds)
            pictures["dimensions.png"] = "Dimensions of every layer before and after pruning."
        last = prunes[-1]
        if folder.model(last) != folder.model(index):
            pruned = task.measure(load_model(prepared, folder.model(last)), prepared.split("test"))[figure]
            points.append(TradeoffPoint("pruned", (folder.done(last) or {})["macs"], pruned))
    pictures |= _draw_distillation(prepared, folder, index, made)
    pictures |= _draw_ranks([folder.stage(n) for n, other in enumerate(stages, 1) if other.stage == "factorize"], made)
    pictures |= _draw_cells(folder.model(index), made)
    points.append(TradeoffPoint("compressed", metrics["compressed"]["macs"], metrics["compressed"][figure]))
    plot_tradeoff(made / "tradeoff.png", points, measure=task.measured)
    pictures["tradeoff.png"] = f"{task.measured.capitalize()} on the test images against multiply-accumulates."
    for number, stage in enumerate(stages, 1):
        history = folder.stage(number) / "history.json"
        if isinstance(stage, Method):
            entries = json.loads(history.read_text(encoding="utf-8"))
            if len({entry["step"] for entry in entries if "sparsity" in entry}) > 1:  # one point is no curve
                plot_sparsity(made / "sparsity.png", entries)
                pictures["sparsity.png"] = "Share of indices close to zero while training."
        if isinstance(stage, SparseGroupStage):
            norms = [
                method_callback(prepared.recipe, number - 1, prepared.example_inputs).group_norms(
                    load_model(prepared, folder.model(n))
                )
                for n in (number - 1, number)
            ]
            plot_group_norms(made / "group_norms.png", *norms)
            pictures["group_norms.png"] = "Size of the groups of weights before and after training with sparse groups."
        if isinstance(stage, ArchitectureSearchStage):
            entries = json.loads(history.read_text(encoding="utf-8"))
            pictures |= _draw_search(load_model(prepared, folder.model(number)), entries, made)
    return pictures


def _draw_distillation(prepared: Prepared, folder: RunFolder, index: int, made: Path) -> dict[str, str]:
    """Pictures of the last distill stage before ``index``; none without one."""
    from ..measurement.plots_distillation import plot_affinities, plot_loss_parts

    numbers = [n for n, stage in enumerate(prepared.recipe.stages[:index], 1) if isinstance(stage, DistillStage)]
    if not numbers:
        return {}
    number, pictures = numbers[-1], {}
    stage = prepared.recipe.stages[number - 1]
    assert isinstance(stage, DistillStage)
    history = json.loads((folder.stage(number) / "history.json").read_text(encoding="utf-8"))
    if any("kd_loss" in entry or "affinity_loss" in entry for entry in history):
        plot_loss_parts(made / "loss_parts.png", history)
        pictures["loss_parts.png"] = "Parts of the loss of distillation while training."
    student = load_model(prepared, folder.model(number)).requires_grad_(False)
    pair = stage.wrap(student, teacher_of(prepared, folder, number - 1), prepared.example_inputs)
    pixels = test_pixels(prepared)[:1]
    found = [pair.affinities(pixels, i) for i in range(len(pair.pairs))]
    drawable = [both for both in found if both[0].shape[1] <= _MOST_PIXELS]
    if drawable:
        mine, its = max(drawable, key=lambda both: both[0].shape[1])
        (image,) = prepared.data.test.read([0])
        plot_affinities(made / "affinities.png", image, its[0], mine[0])
        pictures["affinities.png"] = (
            "Which pixels of a test image have alike features, to the teacher and to the student."
        )
    return pictures


def _draw_search(supernet: Any, history: list[dict[str, Any]], made: Path) -> dict[str, str]:
    """How the architecture came about; nothing where its matrices are no lists of one set of operators."""
    from ..measurement.plots_search import plot_architecture
    from ..models.darts.genotype_darts import choose, edges_of

    matrices = [entry["architecture"] for entry in history if entry.get("architecture")]
    if not matrices or any(not isinstance(row, list) for rows in matrices[0].values() for row in rows):
        return {}
    config = supernet.config
    if supernet.config.model_type != "darts_supernet":
        plot_architecture(made / "architecture.png", history)
    else:
        edges = edges_of(config.nodes)

        def kept(weights: list[list[float]]) -> list[int]:
            cell = choose(weights, config.nodes, config.operators, config.edges_per_node)
            return [edges.index((source, target)) for target, node in enumerate(cell) for _, source in node]

        nodes = ["k-2", "k-1", *map(str, range(config.nodes))]
        names = [f"{nodes[source]} \N{RIGHTWARDS ARROW} {target}" for source, target in edges]
        plot_architecture(made / "architecture.png", history, config.operators, names, kept)
    return {
        "architecture.png": "The operator that leads on every edge while searching; pale where the edge is left out."
    }


def _draw_filters(prepared: Prepared, model: Any, made: Path) -> dict[str, str]:
    """A picture of AFIDAF's masks for a test image, where a model has Fourier filters."""
    from ..measurement.plots_afidaf import plot_fourier_masks
    from ..models.afidaf.filters_afidaf import AfidafFourierFilter

    if not any(isinstance(module, AfidafFourierFilter) for module in model.modules()):
        return {}
    (image,) = prepared.data.test.read([0])
    plot_fourier_masks(made / "filters.png", model, test_pixels(prepared)[:1], image)
    return {
        "filters.png": "A test image, what the first Fourier filter lets through of it in four channels (low frequencies in "
        "the middle), and the kernels that this is a convolution with."
    }


def _draw_cells(model: Path, made: Path) -> dict[str, str]:
    """A picture of the cells of the checkpoint in ``model``; none when its configuration has no genotype."""
    from ..measurement.plots_cells import plot_cells

    genotype = json.loads((model / "config.json").read_text(encoding="utf-8")).get("genotype")
    if genotype is None:
        return {}
    plot_cells(made / "cells.png", genotype)
    return {"cells.png": "Operators of the cells: an arc for every edge, from the inputs (k-2, k-1) to the nodes."}


def _draw_ranks(folders: list[Path], made: Path) -> dict[str, str]:
    """Pictures of what the factorize stages in ``folders`` did; none without such a stage."""
    from ..measurement.plots_low_rank import plot_ranks, plot_spectra

    full: dict[str, int] = {}
    kept: dict[str, int] = {}
    spectra: dict[str, Any] = {}
    for folder in folders:
        layers = json.loads((folder / "publish" / "ranks.json").read_text(encoding="utf-8"))
        kept |= {name: rank for name, (_, rank, _) in layers.items()}
        full |= {name: most for name, (_, _, most) in layers.items()}
        spectra |= load_file(folder / "spectra.safetensors")
    if not kept:
        return {}
    plot_ranks(made / "ranks.png", full, kept)
    plot_spectra(made / "spectra.png", spectra, ranks=kept)
    return {
        "ranks.png": "Full rank of every layer in two factors, and the rank that was kept.",
        "spectra.png": "Singular values of every layer before it was replaced by two factors.",
    }


def write_readme(
    prepared: Prepared,
    stage: ReportStage,
    metrics: dict[str, Any],
    pictures: dict[str, str],
    made: Path,
    machine: str,
    architecture: str,
    dense: int,
) -> None:
    """The model card; ``dense`` is the number of the stage whose model is called so."""
    from ..hub.card import CardContent, write_card
    from .data import local_folder

    recipe = prepared.recipe
    builtin = {"digits": "scikit-learn digits", "scenes": "composed scenes", "rendered_eyes": "rendered eyes"}
    is_builtin = recipe.data.name in builtin
    is_on_hub = not is_builtin and local_folder(recipe, recipe.data.name) is None
    base = recipe.model.pretrained
    write_card(
        made,
        CardContent(
            title=stage.title or recipe.name,
            task=recipe.task,
            dense=metrics["dense"],
            compressed=metrics["compressed"],
            dataset_name=builtin.get(recipe.data.name, Path(recipe.data.name).name),
            dataset_id=recipe.data.name if is_on_hub else Path(recipe.data.name).name,
            dataset_split=recipe.data.test_split or "test",
            dataset_is_on_hub=is_on_hub,
            description=recipe.description,
            architecture=architecture,
            reference="supernet" if any(other.stage == "derive" for other in recipe.stages) else "dense model",
            stages=[other.stage for other in recipe.stages if other.stage in MODEL_STAGES],
            base_model=base if base is not None and local_folder(recipe, base) is None else None,
            reload_max_abs_diff=metrics["reload_max_abs_diff"],
            onnx_max_abs_diff=metrics["onnx_max_abs_diff"],
            int8=metrics.get("int8"),
            plots=pictures,
            notes=prepared.task.notes(metrics),
            dense_is=_name_of_dense(prepared, stage, dense),
            recipe=recipe.as_yaml(),
            machine=machine,
            latency_rounds=stage.latency_rounds,
            repo_id=next((other.repo for other in recipe.stages if isinstance(other, PushStage)), None),
        ),
    )


def _exported(prepared: Prepared, folder: RunFolder) -> Path | None:
    for number, stage in enumerate(prepared.recipe.stages, 1):
        if stage.stage == "export":
            return folder.stage(number) / "publish" / "model.onnx"
    return None


def _caller(model: Callable[[Tensor], Any], image: Tensor) -> Callable[[], Any]:
    return lambda: model(image)
