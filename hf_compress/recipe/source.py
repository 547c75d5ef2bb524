"""Where every value of a recipe was written: YAML with line numbers, and overrides from the command line.

A recipe is checked long after it was read (does the model fit the data? can the budget be reached?), so the file
position of every field is kept beside the data, and every message can say where to look.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml

from ..errors import RecipeError

Location = tuple[str | int, ...]  # ("stages", 1, "macs")


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads ``1e-4`` as a number, as YAML 1.2 does (PyYAML follows 1.1 and gives the text)."""

    yaml_implicit_resolvers: ClassVar = {  # type: ignore[misc]
        key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9_]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def closest(word: object, possible: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` with a leading blank, or nothing when no name is near."""
    found = difflib.get_close_matches(str(word), list(possible), n=1, cutoff=0.6)
    return f" Did you mean {found[0]!r}?" if found else ""


def dotted(location: Iterable[str | int]) -> str:
    """``("stages", 1, "macs")`` as ``stages.1.macs``."""
    return ".".join(str(part) for part in location)


@dataclass
class Source:
    """The plain data of a recipe and where each part of it stands.

    Attributes:
        name: the file, as shown in messages.
        data: what the YAML says, after overrides.
        folder: what relative paths in the recipe may be relative to.
        positions: location -> "line 12" or "--set a.b=c".
    """

    name: str
    data: dict[str, Any]
    folder: Path | None = None
    positions: dict[Location, str] = field(default_factory=dict)

    def position(self, *location: str | int) -> str:
        """ "line 12" or "--set a.b=c" of a value or of what holds it; empty when unknown."""
        for end in range(len(location), -1, -1):
            if location[:end] in self.positions:
                return self.positions[location[:end]]
        return ""

    def where(self, *location: str | int) -> str:
        """File, line and field, for the start of a message."""
        parts = [self.name, self.position(*location), f"field {dotted(location)}" if location else ""]
        return ", ".join(part for part in parts if part)

    def override(self, assignments: Iterable[str]) -> None:
        """Apply ``a.b=c`` in place; the value is read as YAML, a stage may be named instead of numbered.

        Raises:
            RecipeError: when an assignment cannot be read or leads nowhere.
        """
        for assignment in assignments:
            key, equals, text = assignment.partition("=")
            if not equals or not key.strip():
                raise RecipeError(
                    f"--set {assignment}: expected FIELD=VALUE, for example --set stages.train.epochs=2 or --set seed=1."
                )
            try:
                value = yaml.load(text, Loader=_Loader)  # a subclass of SafeLoader
            except yaml.YAMLError as error:
                raise RecipeError(f"--set {assignment}: the value is not YAML: {_reason(error)}.") from error
            location = self._assign(key.strip().split("."), value, assignment)
            for old in [known for known in self.positions if known[: len(location)] == location]:
                del self.positions[old]
            self.positions[location] = f"--set {assignment}"

    def _assign(self, keys: Sequence[str], value: Any, assignment: str) -> Location:
        holder: Any = self.data
        location: list[str | int] = []
        for depth, key in enumerate(keys):
            is_last = depth == len(keys) - 1
            if isinstance(holder, list):
                index = self._index(holder, key, location, assignment)
                location.append(index)
                if is_last:
                    holder[index] = value
                else:
                    holder = holder[index]
            elif isinstance(holder, dict):
                location.append(key)
                if is_last:
                    holder[key] = value
                else:
                    if holder.get(key) is None:
                        holder[key] = {}
                    holder = holder[key]
            else:
                raise RecipeError(
                    f"--set {assignment}: {dotted(location)} is the value {holder!r}, which has no field {key!r}."
                )
        return tuple(location)

    @staticmethod
    def _index(holder: list[Any], key: str, location: Sequence[str | int], assignment: str) -> int:
        if re.fullmatch(r"\d+", key):
            if int(key) < len(holder):
                return int(key)
            raise RecipeError(
                f"--set {assignment}: {dotted(location)} has {len(holder)} entries, numbered from 0; there is no {key}."
            )
        names = [entry.get("stage") if isinstance(entry, dict) else entry for entry in holder]
        found = [index for index, name in enumerate(names) if name == key]
        if len(found) == 1:
            return found[0]
        if found:
            raise RecipeError(
                f"--set {assignment}: {len(found)} stages are called {key!r}; number the one you mean: "
                + " or ".join(f"{dotted(location)}.{index}" for index in found)
                + "."
            )
        known = [str(name) for name in names]
        raise RecipeError(
            f"--set {assignment}: {dotted(location)} has no entry {key!r}.{closest(key, known)} "
            f"Entries: {', '.join(known) or 'none'}."
        )


def read_source(path: Path) -> Source:
    """Read a YAML file, with the line of every field.

    Raises:
        RecipeError: when the file cannot be read, is not YAML, repeats a key or holds no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        hint = closest(path.name, near) or (f" Recipes there: {', '.join(sorted(near))}." if near else "")
        raise RecipeError(f"{path}: there is no such file.{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as text ({error}).") from error
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise RecipeError(f"{path}: expected fields such as `name:`, `model:`, `stages:`; found {_kind(node)}.")
        positions: dict[Location, str] = {}
        _positions(node, (), positions, str(path), ())
        data = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise RecipeError(f"{path}{place}: not readable as YAML: {_reason(error)}.") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not readable as YAML: {error}.") from error
    return Source(str(path), data, path.parent, positions)


def _positions(
    node: yaml.Node, location: Location, found: dict[Location, str], name: str, ancestors: tuple[int, ...]
) -> None:
    if id(node) in ancestors:
        raise RecipeError(f"{name}, line {node.start_mark.line + 1}: an alias that contains itself.")
    ancestors = (*ancestors, id(node))
    found.setdefault(location, f"line {node.start_mark.line + 1}")
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            _positions(child, (*location, index), found, name, ancestors)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[Hashable, int] = {}
        for key_node, child in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else str(key_node.start_mark.line)
            line = key_node.start_mark.line + 1
            if key in seen and key != "<<":
                raise RecipeError(
                    f"{name}, line {line}, field {dotted((*location, key))}: written twice, first in line {seen[key]}. "
                    "Keep one of the two."
                )
            seen[key] = line
            here = (*location, key)
            found[here] = f"line {line}"
            _positions(child, here, found, name, ancestors)


def _kind(node: yaml.Node | None) -> str:
    if node is None:
        return "an empty file"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a single value"


def _reason(error: yaml.YAMLError) -> str:
    parts = [getattr(error, "context", None), getattr(error, "problem", None)]
    return ", ".join(part for part in parts if part) or str(error).splitlines()[0]
