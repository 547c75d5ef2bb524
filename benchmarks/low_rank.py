"""Accuracy at equal MACs: trained rank pruning against factorising afterwards and against removing channels.

A ResNet of the size of ResNet-20 and a small vision transformer are trained on Fashion-MNIST with each method, brought to
the same MACs by ``factorize`` (or, for channels, ``select`` and ``shrink``), tested without fine-tuning as in the tables
of Xu et al. 2020 (arXiv 2004.14566), and tested again after fine-tuning. All methods get the same initial weights,
batches, steps, optimizer and schedule for one seed. Energy and strength are chosen on a validation split and a seed that
is not reported, by the accuracy without fine-tuning. Whatever is finished stays in a JSON-lines file, so a run that was
killed goes on where it stopped.

    python benchmarks/low_rank.py --tune       # fill the grids
    python benchmarks/low_rank.py              # three seeds with what was chosen, then report
    python benchmarks/low_rank.py --plot-only  # table, JSON and plot again from what is finished
    python benchmarks/low_rank.py --quick      # everything once at a toy size: does it run?
"""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import fashion_mnist
import slimming_pareto
import torch
from fashion_mnist import DEFAULT_DATA, TUNING_SEED, Bench, Data, data_of, normalised
from records import Record, command_line, write, write_figure
from slimming_pareto import Protocol, build, cut, example, spread
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, ViTConfig, ViTForImageClassification

from hf_compress import NetworkSlimmingCallback, find_axes, magnitude_scores
from hf_compress.measurement import compare_latency
from hf_compress.measurement.latency import describe_machine
from hf_compress.methods.trained_rank_pruning import TrainedRankPruningCallback
from hf_compress.surgery.factorize import factorize

HERE = Path(__file__).resolve().parent
PERIOD = 20
CALIBRATION_IMAGES = 512
PROTOCOL = replace(Protocol(), budgets=(0.5, 0.33))
QUICK = replace(slimming_pareto.QUICK, budgets=(0.5,))


# -- models ---------------------------------------------------------------------------------------------------------


def build_vit(protocol: Protocol, seed: int) -> ViTForImageClassification:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
    return ViTForImageClassification(ViTConfig(image_size=28, patch_size=4, num_channels=1, num_labels=10, **sizes))


def train_vit(
    model: PreTrainedModel,
    data: Data,
    protocol: Protocol,
    seed: int,
    callbacks: Iterable[TrainerCallback] = (),
    *,
    steps: int | None = None,
    learning_rate: float | None = None,
) -> None:
    """AdamW, a short warm-up and a linear decay to zero."""
    rate = 1e-3 if learning_rate is None else learning_rate
    steps = steps or protocol.train_steps
    fashion_mnist.train(
        model, data, seed, callbacks, torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05), max_steps=steps,
        per_device_train_batch_size=protocol.batch_size, learning_rate=rate, lr_scheduler_type="linear",
        warmup_steps=steps // 20, max_grad_norm=1.0,
    )  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A kind of model: how it is made and trained, and which schemes are told apart on it."""

    build: Callable[..., PreTrainedModel]
    train: Callable[..., None]
    schemes: tuple[str, ...]
    finetune_rate: float


KINDS = {
    "resnet-20": Kind(build, slimming_pareto.train, ("channel", "spatial"), PROTOCOL.finetune_learning_rate),
    # all of its large weights belong to linear layers, which are one matrix for every scheme
    "vit": Kind(build_vit, train_vit, ("channel",), 2e-4),
}


# -- methods --------------------------------------------------------------------------------------------------------

Setting = tuple[float, float]  # energy and nuclear; strength and initial scale for slimming
PLAIN: Setting = (0.0, 0.0)


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        kinds: the models it is for.
        grid: per kind of model the settings that are tried.
        has_scheme: whether it is run once for every scheme.
    """

    label: str
    kinds: tuple[str, ...] = ("resnet-20", "vit")
    grid: dict[str, tuple[Setting, ...]] | None = None
    has_scheme: bool = True


TRP: tuple[Setting, ...] = ((0.02, 0.0), (0.05, 0.0), (0.1, 0.0))
# The subgradient is added at every step. The paper's 3e-4 is for 164 epochs of CIFAR-10; this is 2 epochs, so the norm has
# to pull the harder.
TRP_NUCLEAR: tuple[Setting, ...] = ((0.02, 3e-3), (0.02, 1e-2), (0.05, 1e-3), (0.05, 3e-3), (0.1, 1e-3))
# chosen in slimming_pareto for 50 % and 25 %
SLIMMING: tuple[Setting, ...] = ((8e-4, 0.1), (3.2e-3, 0.1))
METHODS = {
    "dense": Method("baseline", has_scheme=False),
    "trp": Method("TRP", grid={"resnet-20": TRP, "vit": TRP}),
    "trp_nuclear": Method("TRP + nuclear", grid={"resnet-20": TRP_NUCLEAR, "vit": TRP_NUCLEAR}),
    "svd": Method("plain training, SVD"),
    "data_aware": Method("plain training, data-aware SVD"),
    "slimming": Method("network slimming (channels)", ("resnet-20",), {"resnet-20": SLIMMING}, has_scheme=False),
    "magnitude": Method("magnitude pruning (channels, heads)", ("vit",), has_scheme=False),
}


def callback_for(method: str, scheme: str, setting: Setting) -> Any:
    if method == "slimming":
        return NetworkSlimmingCallback("l1", setting[0], grouping="axis")
    if method in ("trp", "trp_nuclear"):
        energy, nuclear = setting
        return TrainedRankPruningCallback(energy, PERIOD, scheme, nuclear, nuclear_steps="all")  # type: ignore[arg-type]
    return None


# -- units of work ------------------------------------------------------------------------------------------------


class LowRankBench(Bench):
    """Trains once for several budgets."""

    def run(self, kind: str, methods: list[tuple[str, str, Setting, tuple[float, ...]]], seed: int) -> None:
        """Train once and bring the model to every budget.

        Args:
            methods: method, scheme, setting and budgets; all of one training.
        """
        wanted = []
        for method, scheme, setting, budgets in methods:
            key = {"model": kind, "method": method, "scheme": scheme, "setting": list(setting), "seed": seed}
            wanted += [(method, {**key, "budget": budget}) for budget in budgets if not self.has(**key, budget=budget)]
        if not wanted:
            return
        since = time.process_time()
        method, scheme, setting, _ = methods[0]
        callback = callback_for(method, scheme, setting)
        start = {"scale_init": setting[1]} if method == "slimming" else {}
        model = KINDS[kind].build(self.protocol, seed, **start)
        dense_macs = find_axes(model, example()).macs
        KINDS[kind].train(model, self.data, self.protocol, seed, [callback] if callback else [])
        trained = self.measured(model, "trained", seed)
        for method, key in wanted:
            small = copy.deepcopy(model)
            facts = self.compress(small, method, key["scheme"], key["budget"], callback)
            axes = find_axes(small, example())
            record = {**key, **trained, **facts, "macs": axes.macs / dense_macs, "params": axes.params}
            record |= self.measured(small, "before", seed)
            if seed != TUNING_SEED:
                record["time"] = self.speed_up(model, small)
                rate = KINDS[kind].finetune_rate
                steps = self.protocol.finetune_steps
                KINDS[kind].train(small, self.data, self.protocol, seed + 10_000, steps=steps, learning_rate=rate)
                record |= self.measured(small, "after", seed)
            self.add({**record, "cpu_seconds": time.process_time() - since})
            since = time.process_time()

    def compress(self, model: PreTrainedModel, method: str, scheme: str, budget: float, callback: Any) -> Record:
        """In place; returns what else is worth a place in the record."""
        if method == "dense":
            return {}
        if method == "slimming":
            cut(model, callback.scores(model), budget)  # type: ignore[arg-type]
        elif method == "magnitude":
            cut(model, magnitude_scores(model, find_axes(model, example())), budget)  # type: ignore[arg-type]
        elif method == "data_aware":
            pixels = normalised(self.data.train[0][:CALIBRATION_IMAGES])
            batches = [{"pixel_values": part} for part in pixels.split(self.protocol.batch_size)]
            factorize(model, scheme=scheme, macs=budget, batches=batches)
        elif method == "svd":
            factorize(model, scheme=scheme, macs=budget)
        else:
            ranks = callback.ranks(model)
            factorize(model, scheme=scheme, macs=budget)
            return {"mean_rank": sum(ranks.values()) / len(ranks)}
        return {}

    def speed_up(self, dense: nn.Module, small: nn.Module) -> float:
        """How many times faster a batch of 64 images is."""
        pixels = torch.randn(64, 1, 28, 28)
        calls = {
            name: lambda model=model: model(pixel_values=pixels)
            for name, model in (("dense", dense.eval()), ("small", small.eval()))
        }
        found = compare_latency(calls, rounds=9)
        return found["dense"] / found["small"]


# -- what to run -----------------------------------------------------------------------------------------------------


def rows_of(kind: str) -> list[tuple[str, str]]:
    """Method and scheme of every row of a model's table."""
    return [
        (name, scheme)
        for name, method in METHODS.items()
        if kind in method.kinds
        for scheme in (KINDS[kind].schemes if method.has_scheme else ("-",))
    ]


Choice = dict[tuple[str, str, str, float], Setting]  # model, method, scheme and budget -> setting


def chosen_settings(records: list[Record], budgets: Iterable[float]) -> Choice:
    """The best setting of every finished grid by the validation accuracy without fine-tuning."""
    choice: Choice = {}
    for kind in KINDS:
        for name, scheme in rows_of(kind):
            grid = (METHODS[name].grid or {}).get(kind, (PLAIN,))
            for budget in (1.0,) if name == "dense" else budgets:
                key = (kind, name, scheme, budget)
                tried = {
                    tuple(r["setting"]): r["validation_before"]
                    for r in records
                    if r["seed"] == TUNING_SEED and (r["model"], r["method"], r["scheme"], r["budget"]) == key
                }
                if len(grid) == 1:
                    choice[key] = grid[0]
                elif set(grid) <= set(tried):
                    choice[key] = max(grid, key=lambda setting: tried[setting])
    return choice


def run(bench: LowRankBench, choice: Choice, kinds: list[str], seeds: Iterable[int], only: list[str]) -> None:
    """Seed by seed, so that what is there at any time compares all methods."""
    for seed in seeds:
        for kind in kinds:
            trainings: dict[tuple[Any, ...], dict[tuple[str, str, Setting], list[float]]] = {}
            for (model, name, scheme, budget), setting in choice.items():
                if model == kind and name in only:
                    # what starts from plain training shares it
                    training = (name, scheme, setting) if METHODS[name].grid else ("plain",)
                    trainings.setdefault(training, {}).setdefault((name, scheme, setting), []).append(budget)
            for parts in trainings.values():
                bench.run(kind, [(*part, tuple(budgets)) for part, budgets in parts.items()], seed)


def tune(bench: LowRankBench, kinds: list[str], only: list[str]) -> None:
    for kind in kinds:
        for name, scheme in rows_of(kind):
            grid = (METHODS[name].grid or {}).get(kind, ()) if name in only else ()
            for setting in grid:
                bench.run(kind, [(name, scheme, setting, bench.protocol.budgets)], TUNING_SEED)


# -- report -------------------------------------------------------------------------------------------------------


def summary(bench: LowRankBench, choice: Choice) -> list[Record]:
    """One row per model, method, scheme and budget, over the reported seeds that are finished with the chosen setting."""
    rows = []
    for (kind, name, scheme, budget), setting in choice.items():
        found = [
            r
            for r in bench.records
            if (r["model"], r["method"], r["scheme"], r["budget"]) == (kind, name, scheme, budget)
            and tuple(r["setting"]) == setting
            and r["seed"] in bench.protocol.seeds
        ]
        if not found:
            continue
        row: Record = {"model": kind, "method": name, "scheme": scheme, "budget": budget, "setting": setting}
        row["label"], row["seeds"] = METHODS[name].label, sorted(r["seed"] for r in found)
        for key in ("macs", "params", "trained", "before", "after", "time", "mean_rank"):
            values = [r[key] for r in found if key in r]
            if values:
                row[key], row[f"{key}_std"] = spread(values)
        rows.append(row)
    return sorted(rows, key=lambda row: (list(KINDS).index(row["model"]), -row["budget"]))


def table(rows: list[Record]) -> str:
    """The paper's shape: accuracy after decomposition without fine-tuning, and speed-up in MACs; and more columns."""
    lines = [
        "| model | method | scheme | energy, nuclear | top-1 % | speed-up, MACs | speed-up, time | parameters | trained | "
        "fine-tuned |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]

    def cell(row: Record, key: str) -> str:
        return f"{row[key]:.2f} ± {row[f'{key}_std']:.2f}" if key in row else "-"

    for row in rows:
        setting = "-" if row["setting"] == PLAIN else f"{row['setting'][0]:g}, {row['setting'][1]:g}"
        lines.append(
            f"| {row['model']} | {row['label']} | {row['scheme']} | {setting} | {cell(row, 'before')} | "
            f"{1 / row['macs']:.2f} | {cell(row, 'time')} | {row['params'] / 1000:.0f} k | {cell(row, 'trained')} | "
            f"{cell(row, 'after')} |"
        )
    return "\n".join(lines)


def verdicts(rows: list[Record]) -> str:
    """The claim: without fine-tuning, TRP + nuclear loses at most 0.5 points at 2x, where plain SVD loses several."""
    lines = []
    dense = {row["model"]: row["before"] for row in rows if row["method"] == "dense"}
    for row in rows:
        if row["method"] not in ("trp", "trp_nuclear", "svd", "data_aware", "slimming", "magnitude"):
            continue
        if row["budget"] == 0.5 and row["model"] in dense:
            lost = dense[row["model"]] - row["before"]
            lines.append(f"- {row['model']}, {row['label']}, {row['scheme']}: loses {lost:.2f} points at 2x")
    return "\n".join(lines)


NEAR = 4.0  # points below dense that the lower row of panels shows


def plot(rows: list[Record], path: Path) -> None:
    """Accuracy without fine-tuning over the speed-up in MACs; a column for each model and scheme, the lower row near dense."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    done = {row["model"] for row in rows}
    columns = [(kind, scheme) for kind, model in KINDS.items() for scheme in model.schemes if kind in done]
    figure, axes = pyplot.subplots(2, len(columns), figsize=(4.4 * len(columns), 6.4), squeeze=False, sharex="col")
    colours = {name: f"C{number}" for number, name in enumerate(METHODS)}
    handles: dict[str, Any] = {}
    for (kind, scheme), pair in zip(columns, axes.T, strict=True):
        dense = next((r["before"] for r in rows if r["model"] == kind and r["method"] == "dense"), None)
        for panel in pair:
            if dense is not None:
                handles["dense"] = panel.axhline(dense, color="0.6", linewidth=1)
            for name, method in METHODS.items():
                shown = [r for r in rows if (r["model"], r["method"]) == (kind, name) and r["scheme"] in (scheme, "-")]
                if name == "dense" or not shown:
                    continue
                handles[method.label] = panel.errorbar(
                    [1 / row["macs"] for row in shown], [r["before"] for r in shown], [r["before_std"] for r in shown],
                    marker="o", capsize=3, color=colours[name],
                )  # fmt: skip
            panel.grid(alpha=0.3)
        pair[0].set_title(f"{kind}, {scheme}")
        pair[1].set_xlabel("speed-up in MACs")
        if dense is not None:
            pair[1].set_ylim(dense - NEAR, dense + 0.5)
    for panel in axes[:, 0]:
        panel.set_ylabel("test accuracy, %, no fine-tuning")
    figure.legend([*handles.values()], [*handles], loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    write_figure(path, figure)


def report(bench: LowRankBench, choice: Choice, results: Path, name: str) -> None:
    rows = summary(bench, choice)
    if not rows:
        print("nothing to report yet")
        return
    minutes = {
        "tuning": sum(r["cpu_seconds"] for r in bench.records if r["seed"] == TUNING_SEED) / 60,
        "run": sum(r["cpu_seconds"] for r in bench.records if r["seed"] != TUNING_SEED) / 60,
    }
    seeds = len({seed for row in rows for seed in row["seeds"]})
    text = (
        f"{seeds} seeds; {minutes['run']:.0f} minutes of one CPU core for these and {minutes['tuning']:.0f} for choosing "
        f"energy and strength. Top-1 is the accuracy in % on the 10,000 test images after decomposition, without "
        f"fine-tuning, mean ± standard deviation over seeds; time is of 64 images on {describe_machine()}.\n\n"
        f"{table(rows)}\n\nWithout fine-tuning:\n\n{verdicts(rows)}\n"
    )
    print(text)
    whole = {
        "protocol": asdict(bench.protocol),
        "grid": {key: method.grid for key, method in METHODS.items() if method.grid},
        "chosen_by": "validation accuracy after decomposition without fine-tuning, for each budget, seed 100",
        "cpu_minutes": minutes,
        "rows": rows,
        "records": bench.records,
    }
    write(results / f"{name}.json", json.dumps(whole, indent=1) + "\n")
    write(results / f"{name}.md", text)
    plot(rows, results / f"{name}.png")


def main() -> None:
    parser = command_line(__doc__, DEFAULT_DATA, METHODS)
    parser.add_argument("--models", nargs="+", choices=sorted(KINDS), default=list(KINDS))
    arguments = parser.parse_args()
    logging.getLogger("hf_compress").setLevel(logging.ERROR)  # it would warn of every folded shift
    name = "low_rank_quick" if arguments.quick else "low_rank"
    protocol = QUICK if arguments.quick else PROTOCOL
    data = data_of(arguments, protocol.train_images)
    bench = LowRankBench(protocol, data, arguments.results / f"{name}.jsonl")
    if arguments.tune:
        tune(bench, arguments.models, arguments.only)
    choice = chosen_settings(bench.records, protocol.budgets)
    if arguments.quick:
        choice = {
            (kind, method, scheme, 1.0 if method == "dense" else budget): (METHODS[method].grid or {}).get(
                kind, (PLAIN,)
            )[-1]
            for kind in KINDS
            for method, scheme in rows_of(kind)
            for budget in protocol.budgets
        }
    if arguments.tune:
        print("\n".join(f"{' '.join(map(str, key))}: {setting}" for key, setting in choice.items()))
        return
    missing = {
        (kind, method, scheme)
        for kind in arguments.models
        for method, scheme in rows_of(kind)
        if method in arguments.only and not any(key[:3] == (kind, method, scheme) for key in choice)
    }
    if missing and not arguments.plot_only:
        parser.error(f"no setting is chosen yet for {sorted(missing)}: run with --tune first")
    if not arguments.plot_only:
        run(bench, choice, arguments.models, arguments.seeds or protocol.seeds, arguments.only)
    report(bench, choice, arguments.results, name)


if __name__ == "__main__":
    main()
