"""Accuracy at a fixed compute budget: the slimming family against torch-pruning on Fashion-MNIST.

A ResNet of 0.27 M parameters is trained with each method, cut to 50 % and 25 % of its MACs, and fine-tuned. Every method
gets the same initial weights, batches, steps, optimizer and schedule for one seed. The strength of every method, ours
and torch-pruning's, is chosen from a grid of equal length on a validation split of the training images and a seed that
is not reported; test images are used for the report alone. Whatever is finished stays in a JSON-lines file, so a run that
was killed goes on where it stopped.

    python benchmarks/slimming_pareto.py --tune       # fill the grids (about 25 minutes on one CPU core)
    python benchmarks/slimming_pareto.py              # three seeds with the chosen strengths (about an hour), then report
    python benchmarks/slimming_pareto.py --plot-only  # table, JSON and plot again from what is finished
    python benchmarks/slimming_pareto.py --quick      # everything once at a toy size: does it run?
"""

from __future__ import annotations

import copy
import json
import logging
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fashion_mnist
import torch
from fashion_mnist import DEFAULT_DATA, TUNING_SEED, Bench, Data, data_of
from records import Record, command_line, write, write_figure
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification, TrainerCallback

from hf_compress import (
    GrowingRegularizationCallback,
    NetworkSlimmingCallback,
    ProximalSlimmingCallback,
    find_axes,
    magnitude_scores,
    select,
    shrink,
)

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Protocol:
    """What all methods share."""

    seeds: tuple[int, ...] = (0, 1, 2)
    budgets: tuple[float, ...] = (0.5, 0.25)
    train_images: int = 55_000  # the other 5,000 images of the training set are the validation split
    batch_size: int = 128
    train_steps: int = 860
    finetune_steps: int = 290
    learning_rate: float = 0.1
    finetune_learning_rate: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 5e-4
    scale_init: float = 0.5


QUICK = Protocol(seeds=(0,), train_images=2_000, train_steps=30, finetune_steps=10)


# -- models and training ------------------------------------------------------------------------------------------


def build(
    protocol: Protocol, seed: int, widths: tuple[int, int, int] = (16, 32, 64), scale_init: float | None = None
) -> ResNetForImageClassification:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"num_channels": 1, "image_size": 28, "num_labels": 10, "layer_type": "basic"}
    config = ResNetConfig(embedding_size=widths[0], hidden_sizes=list(widths), depths=[3, 3, 3], **settings)
    model = ResNetForImageClassification(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, protocol.scale_init if scale_init is None else scale_init)
    return model


def example() -> Tensor:
    return torch.zeros(1, 1, 28, 28)


def train(
    model: ResNetForImageClassification,
    data: Data,
    protocol: Protocol,
    seed: int,
    callbacks: Iterable[TrainerCallback] = (),
    *,
    steps: int | None = None,
    learning_rate: float | None = None,
) -> None:
    """SGD with momentum and a linear decay to zero, by the ordinary Trainer."""
    nn.Module.to(model, memory_format=torch.channels_last)
    rate = protocol.learning_rate if learning_rate is None else learning_rate
    optimizer = torch.optim.SGD(
        model.parameters(), rate, protocol.momentum, nesterov=True, weight_decay=protocol.weight_decay
    )
    fashion_mnist.train(
        model,
        data,
        seed,
        callbacks,
        optimizer,
        max_steps=steps or protocol.train_steps,
        per_device_train_batch_size=protocol.batch_size,
        learning_rate=rate,
        lr_scheduler_type="linear",
        max_grad_norm=0,
        logging_nan_inf_filter=False,
    )


def finetune(model: ResNetForImageClassification, data: Data, protocol: Protocol, seed: int) -> None:
    train(
        model,
        data,
        protocol,
        seed + 10_000,
        steps=protocol.finetune_steps,
        learning_rate=protocol.finetune_learning_rate,
    )


# -- ours ---------------------------------------------------------------------------------------------------------


def cut(model: ResNetForImageClassification, scores: dict[str, Tensor], budget: float) -> None:
    """Select, shrink and carry the constants of removed channels into the next layers, in place."""
    axes = find_axes(model, example())
    shrink(model, select(axes, scores, macs=budget), axes=axes, fold_shift=True, example_inputs=example())


class Ours:
    """One of hf_compress's callbacks; ``callback`` makes it from a strength."""

    def __init__(self, callback: Callable[[float], Any]):
        self.callback = callback

    def train(self, model: ResNetForImageClassification, strength: float, run: Callable[..., None]) -> None:
        self.used = self.callback(strength)
        run(model, callbacks=[self.used])

    def prune(self, model: ResNetForImageClassification, budget: float) -> dict[str, Any]:
        scores = self.used.scores(model)
        facts = {}
        if hasattr(self.used, "support"):
            axes = find_axes(model, example())
            kept = {name: max(int(keep.sum()), 1) for name, keep in self.used.support(model).items()}
            facts["support_macs"] = axes.cost(kept).macs / axes.macs
        cut(model, scores, budget)
        return facts


class Growing:
    """Our growing regularisation, for one budget; the strength is that of its lasso on all groups."""

    def __init__(self, budget: float):
        self.budget = budget

    def train(self, model: ResNetForImageClassification, strength: float, run: Callable[..., None]) -> None:
        self.used = GrowingRegularizationCallback({"macs": self.budget}, lasso=strength, example_inputs=example())
        run(model, callbacks=[self.used])

    def prune(self, model: ResNetForImageClassification, budget: float) -> dict[str, Any]:
        shrink(model, self.used.plan(model), fold_shift=True, example_inputs=example())
        return {}


# -- torch-pruning ------------------------------------------------------------------------------------------------


class TorchPruningCallback(TrainerCallback):
    """Sparse training as torch-pruning documents it: groups anew each epoch, ``regularize`` between backward and step."""

    def __init__(self, pruner: Any):
        self.pruner = pruner

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pruner.update_regularizer()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.pruner.regularize(kwargs["model"])


class TorchPruning:
    """A pruner of torch-pruning, set up as in its authors' own reproduction script (``reproduce/main.py``).

    That is: global pruning towards a ratio of 1 in 400 steps, stopped as soon as the model is small enough, importance
    estimated anew at every step; BatchNorm-scale importance for slimming, group norms divided by the layer's largest for
    the group-norm pruner.
    """

    def __init__(self, kind: str):
        self.kind = kind

    def pruner(self, model: ResNetForImageClassification, strength: float) -> Any:
        import torch_pruning as tp

        common = {"global_pruning": True, "pruning_ratio": 1.0, "iterative_steps": 400, "reg": strength}
        ignored = [module for module in model.modules() if isinstance(module, nn.Linear)]
        if self.kind == "bn_scale":
            importance, kind = tp.importance.BNScaleImportance(), tp.pruner.BNScalePruner
        elif self.kind == "group_slimming":
            importance, kind = tp.importance.BNScaleImportance(), tp.pruner.BNScalePruner
            common["group_lasso"] = True
        else:
            importance = tp.importance.GroupMagnitudeImportance(p=2, normalizer="max")
            kind = tp.pruner.GroupNormPruner
        with plain_output(model):
            return kind(model, example(), importance=importance, ignored_layers=ignored, **common)

    def train(self, model: ResNetForImageClassification, strength: float, run: Callable[..., None]) -> None:
        self.strength = strength
        run(model, callbacks=[TorchPruningCallback(self.pruner(model, strength))])

    def prune(self, model: ResNetForImageClassification, budget: float) -> dict[str, Any]:
        model.eval()
        axes = find_axes(model, example())
        pruner = self.pruner(model, self.strength)

        def macs() -> int:
            parameters = dict(model.named_parameters())
            return axes.cost({a.name: parameters[a.producers[0].parameter].shape[0] for a in axes}).macs

        steps = 0
        while macs() > budget * axes.macs and steps < 400:
            pruner.step()
            steps += 1
        return {"pruning_steps": steps}


@contextmanager
def plain_output(model: ResNetForImageClassification) -> Iterator[None]:
    """Let torch-pruning's tracer see a tuple; it does not look into transformers' output objects."""
    before = model.config.return_dict
    model.config.return_dict = False
    try:
        yield
    finally:
        model.config.return_dict = before


# -- the methods --------------------------------------------------------------------------------------------------


Setting = tuple[float, float]


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        make: a fresh trainer-and-pruner; None for the baselines, which have no strength.
        grid: (strength, initial scale) pairs that are tried.
        is_for_one_budget: whether it must know the budget while it trains; ``make`` then takes it.
    """

    label: str
    family: str
    make: Callable[..., Any] | None = None
    grid: tuple[Setting, ...] = ()
    is_for_one_budget: bool = False


def slimming(penalty: str, **parameters: float) -> Callable[[], Ours]:
    return lambda: Ours(
        lambda strength: NetworkSlimmingCallback({"name": penalty, **parameters}, strength, grouping="axis")
    )


def bounded_slimming(penalty: str) -> Callable[[], Ours]:
    """MCP and SCAD act within ``a * strength`` of zero: ``a`` makes that 0.4, four times the smaller initial scale."""
    return lambda: Ours(
        lambda strength: NetworkSlimmingCallback({"name": penalty, "a": 0.4 / strength}, strength, grouping="axis")
    )


def proximal() -> Ours:
    return Ours(lambda strength: ProximalSlimmingCallback(strength, coupling=10.0))


def proximal_mcp() -> Ours:
    """The proximal scheme with the MCP in place of the l1 norm, flat beyond 0.4 as for :func:`bounded_slimming`."""
    return Ours(
        lambda strength: ProximalSlimmingCallback(strength, coupling=10.0, penalty={"name": "mcp", "a": 0.4 / strength})
    )


# Strength and initial value of the BatchNorm scales. What the l1 norm needs to bring a scale to zero within the schedule
# grows with where the scale starts.
LINEAR = ((2e-3, 0.5), (4e-3, 0.5), (8e-3, 0.5), (8e-4, 0.1), (1.6e-3, 0.1), (3.2e-3, 0.1))
# A method with a single setting was not tuned: the nonconvex penalties have about the slope of the l1 norm at its middle
# settings, and torch-pruning's group lasso is the same training as our l1, at the setting that is best for that at 25 %.
METHODS = {
    "dense": Method("dense", "baseline"),
    "magnitude": Method("magnitude of the dense model", "baseline"),
    "scratch": Method("small dense, from scratch", "baseline"),
    "l1": Method("network slimming, l1", "ours", slimming("l1"), LINEAR),
    "lp": Method("network slimming, l1/2", "ours", slimming("lp", p=0.5, epsilon=1e-3), ((8e-4, 0.1),)),
    "tl1": Method("network slimming, transformed l1", "ours", slimming("transformed_l1", a=0.2), ((4e-4, 0.1),)),
    "mcp": Method("network slimming, MCP", "ours", bounded_slimming("mcp"), ((2e-3, 0.1),)),
    "scad": Method("network slimming, SCAD", "ours", bounded_slimming("scad"), ((2e-3, 0.1),)),
    "proximal": Method(
        "proximal slimming", "ours", proximal, ((0.05, 0.5), (0.065, 0.5), (0.016, 0.1), (0.022, 0.1), (0.04, 0.1))
    ),
    "proximal_mcp": Method("proximal slimming, MCP", "ours", proximal_mcp, ((0.016, 0.1), (0.03, 0.1), (0.06, 0.1))),
    "growing": Method(
        "growing regularisation",
        "ours",
        Growing,
        ((0.0, 0.5), (5e-4, 0.5), (1e-3, 0.5), (2e-3, 0.5), (0.0, 0.1), (5e-4, 0.1)),
        is_for_one_budget=True,
    ),
    "tp_bn_scale": Method("BNScalePruner", "torch-pruning", lambda: TorchPruning("bn_scale"), LINEAR),
    "tp_group_slimming": Method(
        "BNScalePruner, group_lasso", "torch-pruning", lambda: TorchPruning("group_slimming"), ((3.2e-3, 0.1),)
    ),
    "tp_group_norm": Method(
        "GroupNormPruner",
        "torch-pruning",
        lambda: TorchPruning("group_norm"),
        ((5e-4, 0.5), (1.5e-3, 0.5), (5e-3, 0.5), (1.5e-3, 0.1)),
    ),
}


# -- units of work ------------------------------------------------------------------------------------------------
# A record is one line of the records file: a model at one stage, before and after fine-tuning. `before` and `after` are
# test accuracies (absent in tuning), `validation_before` and `validation_after` those on the held-out split.


class SlimmingBench(Bench):
    """Trains, prunes, fine-tunes."""

    def finish(self, model: ResNetForImageClassification, dense_macs: int, since: float, **record: Any) -> None:
        """Measure, fine-tune, measure again, and record."""
        seed = record["seed"]
        axes = find_axes(model, example())
        record |= {"macs": axes.macs / dense_macs, "params": axes.params, **self.measured(model, "before", seed)}
        finetune(model, self.data, self.protocol, seed)
        self.add({**record, **self.measured(model, "after", seed), "cpu_seconds": time.process_time() - since})

    def method(self, name: str, setting: Setting, seed: int, budgets: Iterable[float]) -> None:
        """Train once with one setting, then prune to every budget; once for each budget where the method must know it."""
        if METHODS[name].is_for_one_budget and len(budgets := list(budgets)) > 1:
            for budget in budgets:
                self.method(name, setting, seed, [budget])
            return
        strength, scale_init = setting
        key = {"seed": seed, "method": name, "strength": strength, "scale_init": scale_init}
        wanted = [budget for budget in budgets if not self.has(**key, budget=budget)]
        if not wanted:
            return
        since = time.process_time()
        make = METHODS[name].make
        assert make is not None
        method = make(*wanted) if METHODS[name].is_for_one_budget else make()
        model = build(self.protocol, seed, scale_init=scale_init)
        dense_macs = find_axes(model, example()).macs
        method.train(model, strength, lambda m, callbacks: train(m, self.data, self.protocol, seed, callbacks))
        trained = self.measured(model, "trained", seed)
        for budget in wanted:
            small = copy.deepcopy(model)
            facts = method.prune(small, budget)
            self.finish(small, dense_macs, since, **key, budget=budget, **trained, **facts)
            since = time.process_time()

    def dense(self, seed: int) -> None:
        """The dense model, and what magnitude pruning makes of it."""
        names = [("dense", 1.0), *(("magnitude", budget) for budget in self.protocol.budgets)]
        wanted = [(name, b) for name, b in names if not self.has(method=name, seed=seed, budget=b)]
        if not wanted:
            return
        since = time.process_time()
        model = build(self.protocol, seed)
        train(model, self.data, self.protocol, seed)
        dense_macs = find_axes(model, example()).macs
        for name, budget in wanted:
            small = copy.deepcopy(model)
            if name == "magnitude":
                cut(small, magnitude_scores(small, find_axes(small, example())), budget)
            self.finish(small, dense_macs, since, seed=seed, method=name, budget=budget)
            since = time.process_time()

    def scratch(self, seed: int, budget: float) -> None:
        """A narrower dense model, trained for as many steps as training and fine-tuning take together."""
        if self.has(method="scratch", seed=seed, budget=budget):
            return
        since = time.process_time()
        dense_macs = find_axes(build(self.protocol, seed), example()).macs
        scales = [step / 128 for step in range(16, 129)]  # of all widths; the largest that the budget allows
        widths = sorted({(round(16 * s), round(32 * s), round(64 * s)) for s in scales})
        fitting = [w for w in widths if find_axes(build(self.protocol, seed, w), example()).macs <= budget * dense_macs]
        model = build(self.protocol, seed, fitting[-1])
        axes = find_axes(model, example())
        train(
            model,
            self.data,
            self.protocol,
            seed,
            steps=self.protocol.train_steps + self.protocol.finetune_steps,
        )
        record = {"seed": seed, "method": "scratch", "budget": budget, "macs": axes.macs / dense_macs}
        self.add(
            record
            | {"params": axes.params, **self.measured(model, "after", seed), "cpu_seconds": time.process_time() - since}
        )


def merit(record: Record) -> float:
    """What a strength is chosen by: the mean of the validation accuracies before and after fine-tuning."""
    return (record["validation_before"] + record["validation_after"]) / 2


Choice = dict[str, dict[float, Setting]]


def chosen_settings(records: list[Record], budgets: Iterable[float]) -> Choice:
    """method -> budget -> setting, from the tuning records; methods whose grid is not finished are left out."""
    choice: Choice = {}
    for name, method in METHODS.items():
        best = {}
        for budget in budgets:
            tried = {
                (record["strength"], record["scale_init"]): merit(record)
                for record in records
                if (record["seed"], record["method"], record["budget"]) == (TUNING_SEED, name, budget)
            }
            if len(method.grid) == 1:
                best[budget] = method.grid[0]
            elif method.grid and set(method.grid) <= set(tried):
                best[budget] = max(method.grid, key=lambda setting: tried[setting])
        if best:
            choice[name] = best
    return choice


def tune(bench: SlimmingBench, only: Iterable[str]) -> None:
    for name in only:
        for setting in METHODS[name].grid if len(METHODS[name].grid) > 1 else ():
            bench.method(name, setting, TUNING_SEED, bench.protocol.budgets)


def run(bench: SlimmingBench, choice: Choice, seeds: Iterable[int], only: Iterable[str]) -> None:
    """Seed by seed, so that what is there at any time compares all methods."""
    for seed in seeds:
        if "dense" in only or "magnitude" in only:
            bench.dense(seed)
        for name, settings in choice.items():
            if name in only:
                for setting in dict.fromkeys(settings.values()):
                    bench.method(name, setting, seed, [b for b, chosen in settings.items() if chosen == setting])
        if "scratch" in only:
            for budget in bench.protocol.budgets:
                bench.scratch(seed, budget)


# -- report -------------------------------------------------------------------------------------------------------

COLOURS = {"ours": "tab:blue", "torch-pruning": "tab:orange", "baseline": "tab:gray"}


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds (0 for a single one)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def summary(bench: SlimmingBench, choice: Choice) -> list[dict[str, Any]]:
    """One row per method and budget, over the reported seeds that are finished with the chosen setting."""
    rows = []
    for budget in (1.0, *bench.protocol.budgets):
        for name, method in METHODS.items():
            setting = choice.get(name, {}).get(budget, (None, None))
            found = [
                r
                for r in bench.records
                if (r["method"], r["budget"]) == (name, budget)
                and r["seed"] in bench.protocol.seeds
                and (r.get("strength"), r.get("scale_init")) == setting
            ]
            if not found:
                continue
            row: dict[str, Any] = {"method": name, "label": method.label, "family": method.family, "budget": budget}
            row["seeds"] = sorted(r["seed"] for r in found)
            for key in ("macs", "params", "trained", "before", "after", "support_macs"):
                values = [r[key] for r in found if key in r]
                if values:
                    row[key], row[f"{key}_std"] = spread(values)
            row["strength"], row["scale_init"] = setting
            rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown."""

    def cell(row: dict[str, Any], key: str) -> str:
        return f"{row[key]:.2f} ± {row[f'{key}_std']:.2f}" if key in row else "-"

    lines = [
        "| budget | method | strength, initial scale | MACs | parameters | trained, uncut | cut, no fine-tuning | fine-tuned |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        strength = "-" if row["strength"] is None else f"{row['strength']:g}, {row['scale_init']:g}"
        lines.append(
            f"| {row['budget']:.0%} | {row['label']} | {strength} | {row['macs']:.1%} | {row['params'] / 1000:.0f} k | "
            f"{cell(row, 'trained')} | {cell(row, 'before')} | {cell(row, 'after')} |"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], budgets: Iterable[float], path: Path) -> None:
    """Mean (dot) and standard deviation (bar) per method; a panel for each budget and stage."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    budgets = list(budgets)
    figure, panels = pyplot.subplots(len(budgets), 2, figsize=(11, 3.6 * len(budgets)), squeeze=False, sharey="row")
    dense = next((row for row in rows if row["method"] == "dense"), None)
    for budget, pair in zip(budgets, panels, strict=True):
        shown = [row for row in rows if row["budget"] == budget][::-1]
        for panel, stage, title in zip(pair, ("before", "after"), ("without fine-tuning", "fine-tuned"), strict=True):
            if dense is not None:
                mean, deviation = dense[stage], dense[f"{stage}_std"]
                panel.axvspan(mean - deviation, mean + deviation, color="0.9")
                panel.axvline(mean, color="0.5", linewidth=1)
                panel.text(mean, 1.01, "dense", transform=panel.get_xaxis_transform(), ha="center", va="bottom", size=8)
            floor = max((row[stage] for row in shown if stage in row), default=0.0) - 12  # far below: named, not drawn
            for place, row in enumerate(shown):
                colour = COLOURS[row["family"]]
                if stage in row and row[stage] >= floor:
                    panel.errorbar(row[stage], place, xerr=row[f"{stage}_std"], fmt="o", capsize=3, color=colour)
                elif stage in row:
                    transform = panel.get_yaxis_transform()
                    panel.text(0.02, place, f"\u2190 {row[stage]:.1f}", transform=transform, va="center", color=colour)
            panel.set_yticks(range(len(shown)), [row["label"] for row in shown])
            panel.set_ylim(-0.6, len(shown) - 0.4)
            panel.set_title(f"{budget:.0%} of the MACs, {title}", pad=16)
            panel.grid(axis="x", alpha=0.3)
    for panel in panels[-1]:
        panel.set_xlabel("test accuracy, %")
    handles = [pyplot.Line2D([], [], marker="o", linestyle="", color=c, label=f) for f, c in COLOURS.items()]
    figure.legend(handles=handles, loc="lower center", ncols=3, frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    write_figure(path, figure)


def report(bench: SlimmingBench, choice: Choice, results: Path, name: str) -> None:
    """Write table, JSON and plot of what is finished."""
    rows = summary(bench, choice)
    if not rows:
        print("nothing to report yet")
        return
    tuning = [r for r in bench.records if r["seed"] == TUNING_SEED]
    reported = [r for r in bench.records if r["seed"] in bench.protocol.seeds]
    minutes = {kind: sum(r["cpu_seconds"] for r in part) / 60 for kind, part in (("tuning", tuning), ("run", reported))}
    text = (
        f"{len(reported)} records of {len({r['seed'] for r in reported})} seeds; {minutes['run']:.0f} minutes of one CPU "
        f"core for these and {minutes['tuning']:.0f} for choosing the strengths. Accuracy in % on the 10,000 test images, "
        f"mean ± standard deviation over seeds.\n\n{table(rows)}\n"
    )
    print(text)
    whole = {
        "protocol": asdict(bench.protocol),
        "model": "ResNetForImageClassification, embedding 16, hidden_sizes 16 32 64, depths 3 3 3, basic, 1x28x28 input",
        "grid": {key: method.grid for key, method in METHODS.items() if method.grid},
        "chosen_by": "mean of the validation accuracies before and after fine-tuning, for each budget, seed 100",
        "chosen": {name: {f"{b:g}": s for b, s in strengths.items()} for name, strengths in choice.items()},
        "cpu_minutes": minutes,
        "rows": rows,
        "tuning": tuning,
        "records": reported,
    }
    write(results / f"{name}.json", json.dumps(whole, indent=1) + "\n")
    write(results / f"{name}.md", text)
    plot(rows, bench.protocol.budgets, results / f"{name}.png")


def main() -> None:
    parser = command_line(__doc__, DEFAULT_DATA, METHODS)
    arguments = parser.parse_args()
    logging.getLogger("hf_compress").setLevel(logging.ERROR)  # it would warn of every folded shift
    name = "slimming_pareto_quick" if arguments.quick else "slimming_pareto"
    protocol = QUICK if arguments.quick else Protocol()
    only = arguments.only
    data = data_of(arguments, protocol.train_images)
    bench = SlimmingBench(protocol, data, arguments.results / f"{name}.jsonl")
    if arguments.quick:
        choice = {
            key: dict.fromkeys(protocol.budgets, method.grid[-1]) for key, method in METHODS.items() if method.grid
        }
    elif arguments.tune:
        tune(bench, [name for name in only if METHODS[name].grid])
        print(json.dumps(chosen_settings(bench.records, protocol.budgets), indent=1))
        return
    else:
        choice = chosen_settings(bench.records, protocol.budgets)
        missing = [key for key in only if METHODS[key].grid and key not in choice]
        if missing and not arguments.plot_only:
            parser.error(f"no setting is chosen yet for {', '.join(missing)}: run with --tune first")
    if not arguments.plot_only:
        run(bench, choice, arguments.seeds or protocol.seeds, only)
    report(bench, choice, arguments.results, name)


if __name__ == "__main__":
    main()
