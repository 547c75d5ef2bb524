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
    passed = sum(not outcome.failed for _, _, outcome, _ in rows)
    equal = sum(outcome.results.get("masked") == "" for _, _, outcome, _ in rows)
    lines = [
        PREFACE,
        *([ONNX] if onnx else []),
        f"{len(rows)} models: {equal} equal their masked model, {passed} pass every check that applies.\n",
    ]
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
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="file to write; standard output when not given")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--no-onnx", action="store_true", help="leave out the export, which takes most of the time")
    parser.add_argument("--only", help="architectures whose name matches this shell pattern")
    options = parser.parse_args()
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
    written = options.output.with_name(f".{options.output.name}.part")
    written.write_text(text)
    os.replace(written, options.output)


if __name__ == "__main__":
    main()
