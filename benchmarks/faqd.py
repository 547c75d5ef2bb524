"""Low-bit students on Fashion-MNIST: what a teacher's logits, its affinities and labels are worth.

A float ResNet of the size of ResNet-20 is trained with labels. Students with weights of four bits and of one learn from
labels alone, from a teacher's logits alone, or from logits and affinities without labels (FAQD, Li et al. 2023, arXiv
2302.10899), with the exact and the fast affinity loss, in the squared form and in the paper's l1. That float network is the
teacher of students of its shape with new weights ("new"), and of itself cut to half of its MACs by magnitude ("pruned"). The
papers' teachers are larger and fit their training images: "small" students of its shape with new weights have a teacher
that is twice as wide and was trained three times as long. For one seed all students of a kind have the same first weights,
batches, steps, optimizer and schedule; "new" and "small" ones share them too. Weights of the affinity loss are chosen on a
validation split and a seed that is not reported. Whatever is finished stays in a JSON-lines file, so a run that was killed
goes on where it stopped.

    python benchmarks/faqd.py --tune       # fill the grids
    python benchmarks/faqd.py              # three seeds with what was chosen, then report
    python benchmarks/faqd.py --plot-only  # table, JSON and plot again from what is finished
    python benchmarks/faqd.py --quick      # everything once at a toy size: does it run?
"""

from __future__ import annotations

import copy
import itertools
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import fashion_mnist
import slimming_pareto
import torch
from fashion_mnist import DEFAULT_DATA, TUNING_SEED, Bench, Data, accuracy, data_of
from records import Record, command_line, write, write_figure
from slimming_pareto import Protocol, build, cut, example, spread
from torch import nn

from hf_compress import FeatureAffinityDistillation, QuantizationAwareTrainingCallback, find_axes, magnitude_scores
from hf_compress.measurement import checkpoint_bytes
from hf_compress.measurement.latency import describe_machine

HERE = Path(__file__).resolve().parent
PROTOCOL = replace(Protocol(), budgets=(0.5,))
QUICK = replace(slimming_pareto.QUICK, train_images=1_000, train_steps=15)
RATE, CLIP = 0.05, 20.0  # the papers' code clips at 20 where activations are quantized
STUDENTS = {"new": "teacher", "pruned": "teacher", "small": "large teacher"}  # kind -> its teacher
BITS = (4, 1)


@dataclass(frozen=True)
class Teacher:
    """A float network.

    Attributes:
        widths: of its three stages.
        lengths: its steps of training, as a multiple of the protocol's.
    """

    label: str
    widths: tuple[int, int, int]
    lengths: int


TEACHERS = {
    "teacher": Teacher("labels, in float (teacher)", (16, 32, 64), 1),
    "large teacher": Teacher("labels, in float (larger teacher)", (32, 64, 128), 3),
}


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        settings: of :class:`FeatureAffinityDistillation`; None for labels alone, without a teacher.
        grid: weights of the affinity loss that are tried.
    """

    label: str
    settings: dict[str, Any] | None
    grid: tuple[float, ...] = field(default=(0.0,))


GRID = (3.0, 10.0, 30.0)
KL: dict[str, Any] = {"kd_loss": "kl", "temperature": 3.0}  # the other form of the paper's code; its first is mse
METHODS = {
    "labels": Method("labels alone", None),
    "kd": Method("logits, mse", {}),
    "fa": Method("logits, mse + FA, squared", {"fast": False, "norm": "squared"}, GRID),
    "ffa": Method("logits, mse + FFA, squared", {"fast": True, "norm": "squared"}, GRID),
    "fa_l1": Method("logits, mse + FA, l1 (paper)", {"fast": False, "norm": "l1"}, GRID),
    # its expectation is of another size, see hf_compress.distillation.losses; the maps here have 49 to 4 pixels
    "ffa_l1": Method("logits, mse + FFA, l1 (paper's code)", {"fast": True, "norm": "l1"}, (10.0, 30.0, 100.0)),
    "kd_kl": Method("logits, KL at T = 3", KL),
    "ffa_kl": Method("logits, KL at T = 3 + FFA, squared", {**KL, "fast": True, "norm": "squared"}, GRID),
    "ffa_labels": Method(
        "logits, mse + FFA, squared + labels", {"fast": True, "norm": "squared", "label_weight": 0.3}, GRID
    ),
}


class FaqdBench(Bench):
    """Trains teachers and students."""

    def __init__(self, protocol: Protocol, data: Data, file: Path):
        super().__init__(protocol, data, file)
        self.teachers: dict[tuple[str, int], Any] = {}

    def measured_with_bytes(self, model: nn.Module, seed: int) -> dict[str, float]:
        found = {"validation": accuracy(model, self.data.validation)}
        if seed != TUNING_SEED:
            found["test"] = accuracy(model, self.data.test)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)  # type: ignore[operator]
            found["bytes"] = checkpoint_bytes(folder)
        return found

    def teacher(self, name: str, seed: int) -> Any:
        """One of ``TEACHERS`` for a seed, trained when it is first asked for and kept beside the records."""
        if (name, seed) in self.teachers:
            return self.teachers[name, seed]
        known = TEACHERS[name]
        protocol = replace(self.protocol, train_steps=known.lengths * self.protocol.train_steps)
        model = build(protocol, seed, known.widths)
        file = self.file.with_suffix(f".{name.replace(' ', '-')}-{seed}.pt")
        if file.exists():
            model.load_state_dict(torch.load(file))
        else:
            slimming_pareto.train(model, self.data, protocol, seed)
            torch.save(model.state_dict(), file.with_suffix(".part"))
            os.replace(file.with_suffix(".part"), file)
        key = {"student": "-", "bits": 32, "method": name, "weight": 0.0, "seed": seed}
        if not self.has(**key):
            self.add({**key, **self.measured_with_bytes(model, seed)})
        self.teachers[name, seed] = model
        return model

    def student(self, kind: str, seed: int) -> Any:
        if kind != "pruned":
            return build(self.protocol, seed + 500)
        small = copy.deepcopy(self.teacher("teacher", seed)).requires_grad_()
        cut(small, magnitude_scores(small, find_axes(small, example())), self.protocol.budgets[0])  # type: ignore[arg-type]
        return small

    def run(self, kind: str, bits: int, name: str, weight: float, seed: int) -> None:
        key = {"student": kind, "bits": bits, "method": name, "weight": weight, "seed": seed}
        if self.has(**key):
            return
        teacher, student = self.teacher(STUDENTS[kind], seed), self.student(kind, seed)
        since = time.process_time()
        model, settings = student, METHODS[name].settings
        if settings is not None:
            model = FeatureAffinityDistillation(
                student, copy.deepcopy(teacher), affinity_weight=weight, example_inputs=example(), **settings
            )
        fashion_mnist.train(
            model, self.data, seed, [QuantizationAwareTrainingCallback(weights=bits)],
            max_steps=self.protocol.train_steps, per_device_train_batch_size=self.protocol.batch_size,
            optim="sgd", optim_args="momentum=0.9,nesterov=True", learning_rate=RATE, lr_scheduler_type="cosine",
            weight_decay=1e-4, max_grad_norm=CLIP,
        )  # fmt: skip
        seconds = time.process_time() - since
        self.add({**key, **self.measured_with_bytes(student, seed), "cpu_seconds": seconds})


Key = tuple[str, int, str]  # student, bits and method
Choice = dict[Key, float]  # weights of the affinity loss


def compared(students: Iterable[str], only: Iterable[str]) -> list[Key]:
    """What is trained at every seed that is reported; small students with labels alone are the new ones."""
    found = [(kind, bits, name) for kind in students for bits in BITS for name in only]
    return [key for key in found if (key[0], key[2]) != ("small", "labels")]


def chosen_weights(records: list[Record]) -> Choice:
    """The best weight of every finished grid, by the validation accuracy at the tuning seed."""
    choice: Choice = {}
    for key in compared(STUDENTS, METHODS):
        tried = {
            r["weight"]: r["validation"]
            for r in records
            if r["seed"] == TUNING_SEED and (r["student"], r["bits"], r["method"]) == key
        }
        grid = METHODS[key[2]].grid
        if len(grid) == 1:
            choice[key] = grid[0]
        elif set(grid) <= set(tried):
            choice[key] = max(grid, key=tried.__getitem__)
    return choice


def tune(bench: FaqdBench, students: Iterable[str], only: Iterable[str]) -> None:
    for kind in students:
        for bits in BITS:
            for name in only:
                for weight in METHODS[name].grid if len(METHODS[name].grid) > 1 else ():
                    bench.run(kind, bits, name, weight, TUNING_SEED)


# -- report -----------------------------------------------------------------------------------------------------------


def summary(bench: FaqdBench, choice: Choice) -> list[Record]:
    """One row per student, bits and method, over the reported seeds that are finished with the chosen weight."""
    rows: list[Record] = []
    wanted = {("-", 32, name): 0.0 for name in TEACHERS} | choice
    for (kind, bits, name), weight in wanted.items():
        found = [
            r
            for r in bench.records
            if (r["student"], r["bits"], r["method"], r["weight"]) == (kind, bits, name, weight)
            and r["seed"] in bench.protocol.seeds
        ]
        if not found:
            continue
        label = TEACHERS[name].label if name in TEACHERS else METHODS[name].label
        row: Record = {"student": kind, "bits": bits, "method": name, "label": label, "weight": weight}
        row["seeds"] = sorted(r["seed"] for r in found)
        for key in ("test", "bytes", "cpu_seconds"):
            values = [r[key] for r in found if key in r]
            if values:
                row[key], row[f"{key}_std"] = spread(values)
        rows.append(row)
    return rows


def table(rows: list[Record]) -> str:
    lines = [
        "| student | bits of weights | learns from | weight of affinity | top-1 % | bytes | CPU seconds | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seconds = f"{row['cpu_seconds']:.0f}" if "cpu_seconds" in row else "-"
        weight = f"{row['weight']:g}" if row["weight"] else "-"
        lines.append(
            f"| {row['student']} | {row['bits']} | {row['label']} | {weight} | {row['test']:.2f} ± {row['test_std']:.2f} | "
            f"{row['bytes']:,.0f} | {seconds} | {len(row['seeds'])} |"
        )
    return "\n".join(lines)


def verdicts(rows: list[Record]) -> str:
    """The claims: without labels four bits reach the float network of the same shape; fast is exact within noise."""
    found = {(row["student"], row["bits"], row["method"]): row for row in rows}
    own = found.get(("-", 32, "teacher"))
    lines = []
    for (kind, bits, name), row in found.items():
        if name in ("ffa", "ffa_kl") and own is not None:
            difference = row["test"] - own["test"]
            lines.append(
                f"- {kind}, {bits} bits, {METHODS[name].label}, no labels: {difference:+.2f} points from the float network"
            )
        exact = found.get((kind, bits, name.replace("ffa", "fa")))
        if name in ("ffa", "ffa_l1") and exact is not None:
            lines.append(
                f"- {kind}, {bits} bits, {METHODS[name].settings['norm']}: FFA {row['test'] - exact['test']:+.2f} points from "  # type: ignore[index]
                f"FA, in {row['cpu_seconds'] / exact['cpu_seconds']:.2f} of the CPU time of training"
            )
    return "\n".join(lines)


def plot(rows: list[Record], path: Path) -> None:
    """Test accuracy of every method; a panel for each student and number of bits, with the float network as a line
    and the teacher of small students as a dashed one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(BITS), len(STUDENTS), figsize=(11.5, 7), sharex="row", sharey=True)
    found = {(row["student"], row["bits"], row["method"]): row for row in rows}
    names = list(METHODS)
    for (bits, kind), panel in zip(itertools.product(BITS, STUDENTS), axes.flat, strict=True):
        lines = {"-": found.get(("-", 32, "teacher"))}
        if kind == "small":
            lines["--"] = found.get(("-", 32, "large teacher"))
        for style, row in lines.items():
            if row is not None:
                panel.axvline(row["test"], color="0.5", linewidth=1, linestyle=style)
        for place, name in enumerate(names):
            if row := found.get((kind, bits, name)):
                panel.errorbar([row["test"]], [place], xerr=[row["test_std"]], marker="o", capsize=3, color="#0072B2")
        panel.set_title(f"{kind} student, {bits} bit{'s' if bits > 1 else ''}", loc="left")
        panel.grid(axis="x", alpha=0.3)
    axes[0][0].set_yticks(range(len(names)), [METHODS[name].label for name in names])
    axes[0][0].invert_yaxis()
    for panel in axes[-1]:
        panel.set_xlabel("test accuracy, %")
    figure.tight_layout()
    write_figure(path, figure)


def report(bench: FaqdBench, choice: Choice, results: Path, name: str) -> None:
    rows = summary(bench, choice)
    if not rows:
        print("nothing to report yet")
        return
    minutes = sum(r.get("cpu_seconds", 0) for r in bench.records) / 60
    text = (
        f"Top-1 is the accuracy in % on the 10,000 test images, mean ± standard deviation over seeds; bytes are of the "
        f"checkpoint. {minutes:.0f} minutes of one CPU core for all students, choosing weights included; "
        f"{describe_machine()}.\n\n{table(rows)}\n\n{verdicts(rows)}\n"
    )
    print(text)
    whole = {
        "protocol": {**asdict(bench.protocol), "student_learning_rate": RATE, "max_grad_norm": CLIP},
        "grid": {key: method.grid for key, method in METHODS.items() if len(method.grid) > 1},
        "chosen_by": f"validation accuracy at seed {TUNING_SEED}",
        "rows": rows,
        "records": bench.records,
    }
    write(results / f"{name}.json", json.dumps(whole, indent=1) + "\n")
    write(results / f"{name}.md", text)
    plot(rows, results / f"{name}.png")


def main() -> None:
    parser = command_line(__doc__, DEFAULT_DATA, METHODS)
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    arguments = parser.parse_args()
    logging.getLogger("hf_compress").setLevel(logging.ERROR)  # it would warn of every folded shift
    name = "faqd_quick" if arguments.quick else "faqd"
    protocol = QUICK if arguments.quick else PROTOCOL
    data = data_of(arguments, protocol.train_images)
    bench = FaqdBench(protocol, data, arguments.results / f"{name}.jsonl")
    if arguments.tune:
        tune(bench, arguments.students, arguments.only)
    choice = chosen_weights(bench.records)
    if arguments.quick:
        choice = {key: METHODS[key[2]].grid[-1] for key in compared(arguments.students, METHODS)}
    if arguments.tune:
        print("\n".join(f"{' '.join(map(str, key))}: {weight:g}" for key, weight in choice.items()))
        return
    wanted = set(compared(arguments.students, arguments.only))
    if not arguments.plot_only:
        if wanted - choice.keys():
            parser.error(f"no weight is chosen yet for {sorted(wanted - choice.keys())}: run with --tune first")
        for seed in arguments.seeds or protocol.seeds:
            for key, weight in choice.items():
                if key in wanted:
                    bench.run(*key, weight, seed)
    report(bench, choice, arguments.results, name)


if __name__ == "__main__":
    main()
