"""Finished runs in a file, so that a benchmark that was stopped goes on where it was."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
Record = dict[str, Any]


class Records:
    """Records in a file of JSON lines, read anew whenever they are asked for: another process may write into it too.

    Args:
        file: made with its folder when the first record is added.
        common: what every record of this object has; others in the file are left out.
    """

    def __init__(self, file: Path, **common: Any):
        self.file, self.common = file, common

    @property
    def records(self) -> list[Record]:
        return [record for record in read_records(self.file) if record.items() >= self.common.items()]

    def has(self, **key: Any) -> bool:
        """Whether a record with these entries is there."""
        return any(all(record.get(name) == value for name, value in key.items()) for record in self.records)

    def add(self, record: Record) -> None:
        """Append a record and print it."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as stream:  # one short write: a kill leaves at most a last line that is not read
            stream.write(json.dumps({**self.common, **record}) + "\n")
        shown = " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in record.items())
        print(time.strftime("%H:%M:%S"), shown, flush=True)


def read_records(path: Path) -> list[Record]:
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # the last line of a killed run
    return records


def write(path: Path, text: str) -> None:
    """Write a whole file or none."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def write_figure(path: Path, figure: Any) -> None:
    """Write a figure of matplotlib as a PNG, whole or not at all, and close it."""
    from matplotlib import pyplot

    part = path.with_suffix(".part.png")
    figure.savefig(part, dpi=130)
    pyplot.close(figure)
    os.replace(part, path)


def command_line(
    description: str | None, data: str, methods: Iterable[str], is_tuned: bool = True
) -> argparse.ArgumentParser:
    """The options that benchmarks of methods share; ``--tune`` for those with settings to choose."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--data", default=data)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    if is_tuned:
        parser.add_argument("--tune", action="store_true", help="fill the grids on the validation split")
    parser.add_argument("--only", nargs="+", choices=sorted(methods), default=list(methods), help="these methods alone")
    parser.add_argument("--quick", action="store_true", help="one seed, few steps: a smoke test, results mean nothing")
    parser.add_argument("--plot-only", action="store_true", help="report what is finished")
    parser.add_argument("--seeds", nargs="+", type=int, help="run these of the seeds alone")
    parser.add_argument("--threads", type=int, default=1)
    return parser
