"""``run_recipe``: check everything, then run the stages that are not finished yet."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .folder import RunFolder, write_text
from .schema import Compression, Recipe, ReportStage, Training, load_recipe

if TYPE_CHECKING:
    from .preparation import Prepared

Say = Callable[[str], None]


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Attributes:
        output: the folder with the model, metrics.json and the model card.
        metrics: the content of metrics.json; None without a report stage, and for a dry run.
        was_finished: whether all stages had been finished before.
        steps: number of a stage (from 1) -> optimizer steps; empty when nothing was left to do.
        description: of a dry run: the stages, steps, sizes and budgets, as text.
    """

    output: Path
    metrics: dict[str, Any] | None = None
    was_finished: bool = False
    steps: dict[int, int] = field(default_factory=dict)
    description: str = ""


def run_recipe(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    overrides: Iterable[str] = (),
    output: str | Path | None = None,
    dry_run: bool = False,
    *,
    restart: bool = False,
    say: Say | None = None,
) -> RunResult:
    """Run a recipe, or continue it where it was interrupted.

    Everything that can be wrong is checked before any training. A run that was killed and started again with the same
    arguments ends with the same weights, bit by bit on the same machine and number of threads.

    Args:
        recipe: a YAML file, its content, or a :class:`Recipe`.
        overrides: ``a.b=c`` assignments.
        output: folder of the result; the recipe's own, or ``runs/<name>``, when not given.
        dry_run: check and describe, write nothing.
        restart: throw away what an earlier run left in the folder.
        say: called with a line of text when a stage begins; nothing is printed without it.

    Raises:
        HfCompressError: saying what does not fit and what to do.
    """
    loaded = load_recipe(recipe, overrides)
    folder = RunFolder(Path(output or loaded.output or Path("runs") / loaded.name).expanduser(), loaded)
    folder.check(restart)
    say = say or (lambda line: None)
    if not dry_run and not restart and folder.is_finished():
        with folder.opened():
            _publish(folder, loaded)
            return RunResult(folder.path, _metrics(folder), was_finished=True)

    from .preparation import prepare

    with _reproducible(), _without_small_bars():
        prepared = prepare(loaded)
        if dry_run:
            return _describe(prepared, folder)
        with folder.opened(restart):  # only now: a recipe that cannot run leaves no trace
            return _run(prepared, folder, say)


def _run(prepared: Prepared, folder: RunFolder, say: Say) -> RunResult:
    from .stages import run_stage, start_stage

    recipe = prepared.recipe
    if folder.done(0) is None:
        folder.begin(0)
        folder.finish(0, start_stage(prepared, folder.stage(0).with_suffix(".partial")))
    total = len(recipe.stages)
    for number, stage in enumerate(recipe.stages, 1):
        title = f"[{number}/{total}] {stage.stage}"
        if folder.done(number) is not None:
            say(f"{title}: finished before")
            continue
        if stage.stage == "push":
            _publish(folder, recipe)  # what is uploaded is what lies at the top of the folder
        details = f": {_steps(prepared.steps[number - 1])}" if isinstance(stage, Training) else ""
        details = f": {prepared.goals[number - 1]}" if isinstance(stage, Compression) else details
        say(f"{title}{details}")
        folder.finish(number, run_stage(prepared, folder, number))
    _publish(folder, recipe)
    return RunResult(folder.path, _metrics(folder), steps=_by_number(prepared.steps))


def _describe(prepared: Prepared, folder: RunFolder) -> RunResult:
    recipe = prepared.recipe
    model, data = prepared.model, prepared.data
    shape = "x".join(str(n) for n in prepared.example_inputs["pixel_values"].shape[1:])
    params = sum(p.numel() for p in model.parameters())
    macs = f", {prepared.axes.macs:,} MACs" if prepared.axes is not None else ""
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in data.splits().items())
    lines = [
        f"{recipe.name}: would run into {folder.path}; nothing is written",
        f"data    {recipe.data.name}: {sizes} images as {shape}, {len(data.label_names)} classes",
        f"model   {type(model).__name__}: {params:,} parameters{macs}",
    ]
    for number, stage in enumerate(recipe.stages, 1):
        text: str = stage.stage
        if number - 1 in prepared.steps:
            text += f": {_steps(prepared.steps[number - 1])}"
        elif number - 1 in prepared.goals:
            text += f": {prepared.goals[number - 1]}"
        if folder.done(number) is not None:
            text += " (finished)"
        lines.append(f"{f'[{number}]':<7} {text}")
    total = sum(prepared.steps.values())
    lines.append(f"total   {total:,} training steps")
    return RunResult(folder.path, steps=_by_number(prepared.steps), description="\n".join(lines))


def _steps(count: int) -> str:
    return f"{count:,} step{'s' if count != 1 else ''}"


def _by_number(steps: Mapping[int, int]) -> dict[int, int]:
    return {index + 1: count for index, count in steps.items()}


def _publish(folder: RunFolder, recipe: Recipe) -> None:
    folder.publish()
    path, text = folder.path / "recipe.yaml", recipe.as_yaml()
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def _metrics(folder: RunFolder) -> dict[str, Any] | None:
    has_report = any(isinstance(stage, ReportStage) for stage in folder.recipe.stages)
    return json.loads((folder.path / "metrics.json").read_text(encoding="utf-8")) if has_report else None


@contextmanager
def _reproducible() -> Iterator[None]:
    """Deterministic operators, where torch has them, and all cores that the user leaves to us."""
    import torch

    from .preparation import use_all_cores

    threads = torch.get_num_threads()
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    use_all_cores()
    torch.use_deterministic_algorithms(True, warn_only=True)
    # filling new tensors guards against reading them uninitialised and costs time
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.set_num_threads(threads)


@contextmanager
def _without_small_bars() -> Iterator[None]:
    """Hide the bars of loading and saving, which take no time here; Trainer's own bar stays."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
