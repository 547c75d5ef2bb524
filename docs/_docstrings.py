"""What mkdocstrings needs to know about the docstrings of this package (an extension of griffe, named in ``mkdocs.yml``).

Roles (``:func:`find_axes```) become links, to places that are in these pages; elsewhere they become code. Arguments that
share a description get an entry each.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`(~?)([\w.]+)`")
_SECTIONS = ("Args:", "Attributes:")
_ENTRY = re.compile(r"    ((?:\*{0,2}\w+,\s+)+\*{0,2}\w+): ")


class Docstrings(griffe.Extension):
    """Rewrites every docstring once its object is known."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = _ROLE.sub(lambda role: _link(obj, role[2], is_short=bool(role[1])), obj.docstring.value)
            obj.docstring.value = _one_by_one(_of_fields(text) if _has_fields_only(obj) else text)


def _link(obj: griffe.Object, target: str, is_short: bool) -> str:
    shown = target.strip(".").rpartition(".")[2] if is_short else target.lstrip(".")
    return f'<autoref identifier="{_path(obj, target)}" optional><code>{shown}</code></autoref>'


def _path(obj: griffe.Object, target: str) -> str:
    """The full name of what a docstring calls by a short one."""
    if target.startswith("."):  # beside the module, as in an import
        package = obj.module if obj.module.is_init_module else obj.module.parent
        return f"{package.path}{target}" if package is not None else target
    if target.startswith("hf_compress."):
        return target
    first, _, rest = target.partition(".")
    try:
        found = obj.resolve(first)
    except griffe.NameResolutionError:
        return target
    return f"{found}.{rest}" if rest else found


def _has_fields_only(obj: griffe.Object) -> bool:
    """Whether a class, such as a configuration of transformers, makes its constructor of its fields, unseen by griffe."""
    return obj.is_class and "__init__" not in obj.members and "dataclass" not in obj.labels


def _of_fields(text: str) -> str:
    return re.sub("^Args:$", "Attributes:", text, flags=re.MULTILINE)


def _one_by_one(text: str) -> str:
    lines = text.split("\n")
    written: list[str] = []
    is_inside = False
    while lines:
        line = lines.pop(0)
        if line and not line.startswith(" "):
            is_inside = line in _SECTIONS
        if not is_inside or not line.startswith("    ") or line.startswith("     "):
            written.append(line)
            continue
        entry = [line]
        while lines and lines[0].startswith("     "):
            entry.append(lines.pop(0))
        whole = "\n".join(entry)
        names = _ENTRY.match(whole)
        if names is None:
            written += entry
        else:
            for name in re.split(r",\s+", names[1]):
                written += f"    {name}: {whole[names.end() :]}".split("\n")
    return "\n".join(written)
