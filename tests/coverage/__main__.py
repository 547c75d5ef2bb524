"""Write docs/coverage.md from the outcomes of all checks: ``python -m tests.coverage --output docs/coverage.md``."""

from __future__ import annotations

import argparse
import fnmatch
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from checks import Outcome, Row, architectures, run, start_worker  # noqa: E402

SECTIONS = {
    "classification": "Image classification (transformers)",
    "detection": "Object detection (transformers)",
    "segmentation": "Segmentation and dense prediction (transformers)",
    "backbones": "Backbones and vision towers (transformers)",
    "timm_models": "timm and torchvision",
}

PREFACE = """\
# Coverage

Which architectures can be shrunk, and what was checked. Written by `python -m tests.coverage --output docs/coverage.md`
from the outcomes of the checks; the same checks run in the test suite, without the ONNX export.

Every model is a small one with random weights, built from its configuration class. So the shares below are those of the
small models: wide embeddings and classifiers weigh more in them than in published sizes.

- **axes**: sets of indices that can be removed together. **exact**: removing an index of these equals masking it.
- **exact params**: share of the parameters that lie on an exact axis (they disappear as exact axes shrink to nothing).
  **all params**: the same for every axis; what is missing to 100 % stays whole, for the reason given.
- **masked**: 30 % of every exact axis was removed at random in float64, and every tensor that the model returns equals that
  of the dense model with the removed indices masked, to 1e-9 of its largest value (1e-5 where the model itself computes in
  float32). The number is the largest difference found.
- **reload**: a model that had lost 30 % of every axis, inexact ones too, was saved, loaded in another process by the stock
  Auto class (by its own class where there is none) and returned the same, bit for bit.
- **train**: it took a step of SGD; every parameter that gets a gradient in the dense model got a finite one.
- *dense cannot*: the dense model does not pass that check either.

Integers that a forward pass reads from the *configuration* (`config.hidden_sizes[-1]`) keep the axis that they measure
whole: the saved configuration has to build the dense model, to which the record of the removal is then applied.
"""

ONNX = """\
**ONNX**: the model that had lost 30 % of every axis was exported, and ONNX Runtime agrees with it at two batch sizes.
"""


def _jobs(only: str | None) -> Iterator[tuple[str, str]]:
    for module in SECTIONS:
        try:
            names = architectures(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
            continue  # this part of the tests is not there
        yield from ((module, name) for name in names if only is None or fnmatch.fnmatch(name, only))


def _cell(outcome: Outcome, check: str) -> str:
    if outcome.results.get(check):
        return "**no**"
    if check in outcome.results:
        return f"{outcome.difference:.0e}" if check == "masked" else "yes"
    return "dense cannot" if check in outcome.notes and check != "masked" else "-"


def table(rows: Iterable[Row], cannot: dict[str, dict[str, str]], onnx: bool) -> str:
    """The document."""
    rows = list(rows)
    lines: list[str] = []
    checks = ["masked", "reload", "train", *(["onnx"] if onnx else [])]
    titles = ["axes", "exact", "exact params", "all params", *(check.replace("onnx", "ONNX") for check in checks)]
    for module, section in SECTIONS.items():
        mine = [(name, outcome) for source, name, outcome, _ in rows if source == module]
        if not mine:
            continue
        lines += [f"## {section}\n", f"| architecture | {' | '.join(titles)} | whole or not exact, and why |"]
        lines.append("|---" * (len(titles) + 2) + "|")
        for name, outcome in mine:
            cells = [name, str(outcome.axes), str(outcome.exact), f"{outcome.exact_share:.0%}", f"{outcome.share:.0%}"]
            cells += [_cell(outcome, check) for check in checks]
            failed = [f"**{check}: {reason}**" for check, reason in outcome.failed.items()]
            notes = [f"{check}: {note}" for check, note in outcome.notes.items()]
            cells.append("; ".join(part for part in (*failed, outcome.whole, *notes) if part))
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
        if cannot.get(module):
            lines += ["Not built:\n", *(f"- {name}: {reason}" for name, reason in cannot[module].items()), ""]
    return "\n".join([PREFACE, *([ONNX] if onnx else []), _summary(lines), "", *lines]).rstrip() + "\n"


def _summary(lines: Iterable[str]) -> str:
    """What all rows of the tables come to."""
    rows = [line.split(" | ") for line in lines if _name(line)]
    equal = sum(cells[5][:1].isdigit() for cells in rows)  # the size of the difference
    passed = sum("**" not in " ".join(cells) for cells in rows)
    return f"{len(rows)} models: {equal} equal their masked model, {passed} pass every check that applies."


def _name(line: str) -> str:
    """Of the architecture that a line of the document is about; empty for all other lines."""
    name = line[2:].partition(" | ")[0] if line.startswith("| ") else ""
    return "" if name == "architecture" else name


def updated(document: str, later: str) -> str:
    """A document with the rows of a later one in place of its own.

    Raises:
        ValueError: when the later one has other columns, or a row that the document lacks.
    """
    lines, place = document.split("\n"), {}
    section = ""
    for number, line in enumerate(lines):
        section = line if line.startswith("## ") else section
        place[section, _name(line) or line] = number
    for line in later.split("\n"):
        section = line if line.startswith("## ") else section
        if _name(line) or line.startswith("| architecture"):
            if (section, _name(line) or line) not in place:
                raise ValueError(
                    f"the document has no such row or columns, so it must be written as a whole: {line[:80]}"
                )
            lines[place[section, _name(line) or line]] = line
    summary = next(number for number, line in enumerate(lines) if " pass every check that applies." in line)
    lines[summary] = _summary(lines)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="file to write; standard output when not given")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--no-onnx", action="store_true", help="leave out the export, which takes most of the time")
    parser.add_argument("--only", help="architectures whose name matches this shell pattern")
    parser.add_argument("--update", action="store_true", help="replace these rows of the file and leave its others")
    options = parser.parse_args()
    if options.update and (options.output is None or not options.output.exists()):
        parser.error("--update needs an --output that exists")
    jobs = list(_jobs(options.only))
    if not jobs:
        parser.error(f"no architecture is called {options.only!r} (a shell pattern, such as 'resnet*')")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, context, start_worker) as pool:
        futures = [pool.submit(run, *job, not options.no_onnx) for job in jobs]
        rows = []
        for future in futures:
            rows.append(future.result())
            _, name, outcome, seconds = rows[-1]
            print(f"{name}: {dict(outcome.failed) or 'passed'} ({seconds:.1f} s)", file=sys.stderr, flush=True)
    cannot = {module: getattr(sys.modules.get(module), "CANNOT", {}) for module in SECTIONS}
    text = table(rows, cannot, not options.no_onnx)
    if options.output is None:
        print(text, end="")
        return
    if options.update:
        text = updated(options.output.read_text(), text)
    written = options.output.with_name(f".{options.output.name}.part")
    written.write_text(text)
    os.replace(written, options.output)


if __name__ == "__main__":
    main()
