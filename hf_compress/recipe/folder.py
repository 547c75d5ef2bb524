"""The folder of a run: whose it is, which stages are finished, and how files get to their final place.

A stage works in ``stages/NN-name.partial`` and is renamed to ``stages/NN-name`` when it is complete, so a folder without
``.partial`` is whole at any moment. What a reader wants (model, report) is copied to the top by write-beside-and-rename.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .schema import MODEL_STAGES, Recipe
from .source import dotted

MARKER = ".hf_compress_run.json"
_LOCK = ".hf_compress_run.lock"
_OURS = ".hf_compress_run"  # what every name starts with that may exist before the marker does


class RunFolder:
    """Where a recipe's run keeps its stages and its result.

    Args:
        path: the output folder; need not exist.
        recipe: the recipe that runs there.
    """

    def __init__(self, path: Path, recipe: Recipe):
        self.path, self.recipe = path, recipe

    def check(self, restart: bool = False) -> None:
        """See that the folder is free, or holds a run of the same recipe. Nothing is written.

        Raises:
            CheckpointError: naming what is in the way, or the fields that changed.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path} is a file, so it cannot hold a run. Choose another --output.")
        if not (self.path / MARKER).exists():
            foreign = sorted(p.name for p in self.path.iterdir() if not p.name.startswith(_OURS))
            if foreign:
                shown = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
                raise CheckpointError(
                    f"{self.path} holds files that no run of hf_compress wrote ({shown}); they would be mixed up with "
                    "the result. Choose another --output, or an empty folder."
                )
            return
        if restart:
            return
        try:
            before = json.loads((self.path / MARKER).read_text(encoding="utf-8"))["recipe"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.path / MARKER} cannot be read ({error}). Start over with --restart, or choose another --output."
            ) from error
        changes = _changes(_completed(before), self._content())
        if changes:
            raise CheckpointError(
                f"{self.path} holds a run of another recipe: {'; '.join(self._changed(*c) for c in changes[:5])}"
                f"{f'; and {len(changes) - 5} more fields' if len(changes) > 5 else ''}. "
                "Choose another --output, undo the change, or start over with --restart."
            )

    @contextmanager
    def opened(self, restart: bool = False) -> Iterator[None]:
        """Take the folder for this process and mark it as ours.

        Raises:
            CheckpointError: as :meth:`check`, or when another process works in it.
        """
        from filelock import FileLock, Timeout  # released by the system when a process is killed

        self.check(restart)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / _LOCK, timeout=0)
            lock.acquire()
        except Timeout:
            raise CheckpointError(
                f"another process is running a recipe in {self.path}. Wait for it, or choose another --output."
            ) from None
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be written to ({error.strerror}). Choose another --output."
            ) from error
        try:
            self.check(restart)  # again, now that nobody else can change it
            if restart:
                self._clear()
            write_json(self.path / MARKER, {"format": 1, "recipe": self._content()})
            yield
        finally:
            lock.release()

    def stage(self, number: int) -> Path:
        """The folder of a finished stage; number 0 is the model before the first stage."""
        name = self.recipe.stages[number - 1].stage if number else "start"
        return self.path / "stages" / f"{number:02d}-{name}"

    def done(self, number: int) -> dict[str, Any] | None:
        """What a finished stage noted, or None when it is not finished."""
        file = self.stage(number) / "done.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def is_finished(self) -> bool:
        """Whether all stages are finished."""
        return all(self.done(number) is not None for number in range(len(self.recipe.stages) + 1))

    def begin(self, number: int, keep: bool = False) -> Path:
        """The folder in which a stage works; what an interrupted attempt left is dropped unless ``keep``."""
        partial = self.stage(number).with_suffix(".partial")
        if not keep:
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, exist_ok=True)
        return partial

    def finish(self, number: int, notes: dict[str, Any]) -> None:
        """Declare a stage complete."""
        final = self.stage(number)
        partial = final.with_suffix(".partial")
        write_json(partial / "done.json", notes)
        os.replace(partial, final)

    def model(self, number: int) -> Path:
        """The model as it is after a stage."""
        for before in range(number, 0, -1):
            if self.recipe.stages[before - 1].stage in MODEL_STAGES:
                return self.stage(before) / "model"
        return self.stage(0) / "model"

    def publish(self) -> None:
        """Copy the model and everything that stages made for the reader to the top of the folder.

        Files that are there already are left alone, so this may be repeated at any time.
        """
        last = len(self.recipe.stages)
        for number in range(last + 1):
            if self.done(number) is None:
                return
            made = self.stage(number) / "publish"
            sources = [made] if made.is_dir() else []
            if self.stage(number) / "model" == self.model(last):
                sources.append(self.model(last))
            for source in sources:
                for file in sorted(p for p in source.rglob("*") if p.is_file()):
                    _place(file, self.path / file.relative_to(source))

    def _content(self) -> dict[str, Any]:
        content = self.recipe.model_dump(mode="json", exclude={"output"})
        return json.loads(json.dumps(content, default=str))

    def _changed(self, location: tuple[str | int, ...], before: Any, now: Any) -> str:
        line = self.recipe._source.position(*location) if self.recipe._source and now is not _ABSENT else ""
        return f"{dotted(location)} was {_shown(before)} and is {_shown(now)}{f' ({line})' if line else ''}"

    def _clear(self) -> None:
        """Remove what an earlier run wrote, and nothing else."""
        stages = self.path / "stages"
        for source in [*stages.glob("*/publish"), *stages.glob("*/model")]:
            for file in source.rglob("*"):
                if file.is_file():
                    (self.path / file.relative_to(source)).unlink(missing_ok=True)
        shutil.rmtree(stages, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text so that a reader sees the old file or the new one."""
    beside = path.with_name(f"{path.name}.partial")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def _place(source: Path, target: Path) -> None:
    if target.exists() and filecmp.cmp(source, target, shallow=False):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f"{target.name}.partial")
    shutil.copyfile(source, beside)
    os.replace(beside, target)


_ABSENT: Any = type("_Absent", (), {"__repr__": lambda self: "absent"})()


def _changes(
    before: Any, now: Any, location: tuple[str | int, ...] = ()
) -> list[tuple[tuple[str | int, ...], Any, Any]]:
    """(location, before, now) of everything that differs. Stages added at the end are no difference: they come next."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = list(dict.fromkeys([*before, *now]))
        found = [_changes(before.get(k, _ABSENT), now.get(k, _ABSENT), (*location, k)) for k in keys]
        return [change for part in found for change in part]
    if isinstance(before, list) and isinstance(now, list) and location == ("stages",) and len(now) >= len(before):
        found = [_changes(old, new, (*location, i)) for i, (old, new) in enumerate(zip(before, now, strict=False))]
        return [change for part in found for change in part]
    return [] if before == now else [(location, before, now)]


def _completed(recipe: Any) -> Any:
    """The recipe of an earlier run with the defaults of fields that are newer than the run."""
    try:
        content = Recipe.model_validate(recipe).model_dump(mode="json", exclude={"output"})
    except ValueError:  # pydantic's error is one; what differs is then said field by field
        return recipe
    return json.loads(json.dumps(content, default=str))


def _shown(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[" + ", ".join(str(item.get("stage")) for item in value) + "]"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
