"""Zero weights and removed filters at equal accuracy: l0 + l2,1 against its neighbours, on Fashion-MNIST.

LeNet-5 and a small wide residual network are trained with each method at several strengths; groups that are zero are
removed, what is zero inside the others is held at zero, and the model is fine-tuned. Every method gets the same initial
weights, batches, steps, optimizer and schedule for one seed. A method's curve is accuracy against the share of weights
that are gone (zero or removed) and against MACs; the table reads both curves at the accuracy of the dense model minus one
point. The coupling and its growth are chosen on a validation split and a seed that is not reported (``--tune``). Finished
runs stay in a JSON-lines file, so a run that was killed goes on where it stopped.

    python benchmarks/sparse_group.py --tune       # try couplings at the middle strength
    python benchmarks/sparse_group.py              # three seeds, all strengths, then table, JSON and plot
    python benchmarks/sparse_group.py --plot-only  # report again from what is finished
    python benchmarks/sparse_group.py --quick      # everything once at a toy size: does it run?
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fashion_mnist
import torch
from fashion_mnist import DEFAULT_DATA, TUNING_SEED, Bench, Data, accuracy, data_of
from records import command_line, write, write_figure
from slimming_pareto import spread
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from hf_compress import NetworkSlimmingCallback, find_axes, magnitude_scores, select, shrink
from hf_compress.hub.sparse_storage import compact
from hf_compress.methods.sparse_group import KeepZerosCallback, SparseGroupCallback, weight_zeros
from hf_compress.models.lenet import LeNetConfig, LeNetForImageClassification
from hf_compress.models.wide_resnet import WideResNetConfig, WideResNetForImageClassification

HERE = Path(__file__).resolve().parent
LOSS = 1.0  # points of accuracy below dense at which the curves are read


@dataclass(frozen=True)
class Protocol:
    """What all methods share."""

    seeds: tuple[int, ...] = (0, 1, 2)
    train_images: int = 55_000  # the other 5,000 images of the training set are the validation split
    batch_size: int = 128
    scale: float = 1.0  # of the number of steps
    momentum: float = 0.9
    weight_decay: float = 1e-4
    stages: int = 10  # after each of which the coupling grows by 1.25, as in 200 epochs with growth every 20


QUICK = Protocol(seeds=(0,), train_images=2_000, scale=0.02)


@dataclass(frozen=True)
class Network:
    """One of the two.

    Attributes:
        steps: of training; fine-tuning takes a third of them.
        splits: candidates for the coupling, the first of which is taken without tuning.
    """

    label: str
    build: Callable[[], PreTrainedModel]
    learning_rate: float
    steps: int
    splits: tuple[float, ...] = (0.3, 1.0)


NETWORKS = {
    "lenet": Network("LeNet-5", lambda: LeNetForImageClassification(LeNetConfig(num_labels=10)), 0.05, 1290),
    "wrn": Network(
        "WRN-10-1",
        lambda: WideResNetForImageClassification(
            WideResNetConfig(depth=10, widen_factor=1, dropout=0.0, num_labels=10, num_channels=1, image_size=28)
        ),
        0.1,
        430,
    ),
}


@dataclass(frozen=True)
class Method:
    """A curve.

    Attributes:
        strengths: for each network that it works on, one point each: lambda for sparse groups; the share of MACs that is cut
            for network slimming and whole filters; the share of weights for single ones.
    """

    label: str
    strengths: dict[str, tuple[float, ...]]
    element: str | None = None


def on_both(*strengths: float) -> dict[str, tuple[float, ...]]:
    return dict.fromkeys(NETWORKS, strengths)


# Chosen on the validation split, so that the curves reach from little to much.
METHODS = {
    "dense": Method("dense", on_both(0.0)),
    "l0_group": Method(
        "l0 + l2,1",
        {"lenet": (5e-5, 1e-4, 1.25e-4, 1.5e-4, 2e-4), "wrn": (2e-4, 4e-4, 6e-4, 8e-4, 1e-3)},
        element="l0",
    ),
    "l1_group": Method(
        "l1 + l2,1",
        {"lenet": (5e-5, 1e-4, 1.5e-4, 2e-4, 3e-4), "wrn": (2e-4, 3e-4, 4e-4, 5e-4, 6e-4)},
        element="l1",
    ),
    "group": Method("l2,1 alone", {"lenet": (1e-4, 2e-4, 3e-4, 5e-4, 8e-4), "wrn": (4e-4, 5.5e-4, 7e-4, 8.5e-4, 1e-3)}),
    "slimming": Method("network slimming", {"wrn": (0.25, 0.5, 0.65, 0.8)}),
    "magnitude_filters": Method("dense, smallest filters", on_both(0.25, 0.5, 0.65, 0.8)),
    "magnitude_weights": Method("dense, smallest weights", on_both(0.5, 0.7, 0.85, 0.93, 0.97)),
}
SLIMMING_STRENGTH = 2e-3


def example() -> Tensor:
    return torch.zeros(1, 1, 28, 28)


def train(
    network: Network,
    model: PreTrainedModel,
    data: Data,
    protocol: Protocol,
    seed: int,
    callbacks: Iterable[TrainerCallback] = (),
    is_finetuning: bool = False,
) -> None:
    """SGD with momentum and a linear decay to zero, by the ordinary Trainer."""
    torch.nn.Module.to(model, memory_format=torch.channels_last)
    rate = network.learning_rate / (5 if is_finetuning else 1)
    steps = max(2, round(network.steps * protocol.scale / (3 if is_finetuning else 1)))
    optimizer = torch.optim.SGD(
        model.parameters(), rate, protocol.momentum, nesterov=True, weight_decay=protocol.weight_decay
    )
    fashion_mnist.train(
        model,
        data,
        seed + (10_000 if is_finetuning else 0),
        callbacks,
        optimizer,
        max_steps=steps,
        per_device_train_batch_size=protocol.batch_size,
        learning_rate=rate,
        lr_scheduler_type="linear",
        max_grad_norm=1.0,  # LeNet's initial weights are large
    )


def drop_smallest_weights(model: PreTrainedModel, share: float) -> None:
    """Set the smallest weights of all layers together to zero."""
    names = [name for name in weight_zeros(model) if name != "all"]
    weights = [model.get_parameter(name).detach() for name in names]
    sizes = torch.cat([weight.abs().flatten() for weight in weights])
    threshold = sizes.kthvalue(max(1, round(share * len(sizes)))).values
    for weight in weights:
        weight[weight.abs() <= threshold] = 0


def stored_bytes(model: PreTrainedModel) -> int:
    """Of the weights' file, with sparse tensors stored compactly."""
    with tempfile.TemporaryDirectory() as folder:
        compact(copy.deepcopy(model)).save_pretrained(folder)
        return (Path(folder) / "model.safetensors").stat().st_size


class SparseGroupBench(Bench):
    """Trains, shrinks, fine-tunes."""

    def __init__(self, protocol: Protocol, data: Data, file: Path):
        super().__init__(protocol, data, file)
        self.dense: dict[tuple[str, int], PreTrainedModel] = {}

    def run(self, name: str, method: str, strength: float, split: float, seed: int) -> None:
        """One point of one curve."""
        key = {"network": name, "method": method, "strength": strength, "split": split, "seed": seed}
        if self.has(**key):
            return
        since = time.process_time()
        network = NETWORKS[name]
        torch.manual_seed(seed)
        model = network.build()
        axes = find_axes(model, example())
        weights = {key: model.get_parameter(key).numel() for key in weight_zeros(model) if key != "all"}
        record: dict[str, Any] = {**key}
        callback = self.callback(network, method, strength, split)
        if callback is None and method != "dense":
            model = copy.deepcopy(self.trained_dense(name, seed))
        else:
            train(network, model, self.data, self.protocol, seed, [] if callback is None else [callback])
        record["train_seconds"] = time.process_time() - since
        record["trained"] = self.accuracy(model, seed)
        if method == "dense":
            self.dense[name, seed] = copy.deepcopy(model)
        elif isinstance(callback, SparseGroupCallback):
            shrink(model, callback.plan(model), axes=axes)
        elif method == "magnitude_weights":
            drop_smallest_weights(model, strength)
        else:
            scores = magnitude_scores(model, axes) if callback is None else callback.scores(model)
            plan = select(axes, scores, macs=1 - strength)
            shrink(model, plan, axes=axes, fold_shift=callback is not None, example_inputs=example())
        small = find_axes(model, example())
        left = sum(int(torch.count_nonzero(model.get_parameter(key))) for key in weights)
        record |= {
            "zero_weights": 1 - left / sum(weights.values()),
            "zeros_inside": weight_zeros(model)["all"],
            "removed_filters": 1 - sum(axis.size for axis in small) / sum(axis.size for axis in axes),
            "macs": small.macs / axes.macs,
            "params": small.params,
            "before": self.accuracy(model, seed),
        }
        if method != "dense":
            train(network, model, self.data, self.protocol, seed, [KeepZerosCallback()], is_finetuning=True)
        record |= {"after": self.accuracy(model, seed), "bytes": stored_bytes(model)}
        record["seconds"] = time.process_time() - since
        self.add(record)

    def callback(self, network: Network, method: str, strength: float, split: float) -> Any:
        if method == "slimming":
            return NetworkSlimmingCallback("l1", SLIMMING_STRENGTH, grouping="axis")
        if method not in ("l0_group", "l1_group", "group"):
            return None
        epochs = network.steps * self.protocol.scale * self.protocol.batch_size / self.protocol.train_images
        return SparseGroupCallback(
            METHODS[method].element, strength=strength, split=split, growth_every=epochs / self.protocol.stages
        )

    def trained_dense(self, name: str, seed: int) -> PreTrainedModel:
        if (name, seed) not in self.dense:
            torch.manual_seed(seed)
            model = NETWORKS[name].build()
            train(NETWORKS[name], model, self.data, self.protocol, seed)
            self.dense[name, seed] = model
        return self.dense[name, seed]

    def accuracy(self, model: PreTrainedModel, seed: int) -> float:
        return accuracy(model, self.data.validation if seed == TUNING_SEED else self.data.test)


SPARSE = ("l0_group", "l1_group", "group")


def chosen_split(records: list[dict[str, Any]], network: str, method: str) -> float:
    """The coupling with which the middle strength is best: accuracy without fine-tuning plus the share of weights gone."""
    if method not in SPARSE:
        return 0.0
    wanted = (network, method, middle(network, method), TUNING_SEED)
    found = [r for r in records if (r["network"], r["method"], r["strength"], r["seed"]) == wanted]
    best = max(found, key=lambda r: r["before"] + 10 * r["zero_weights"], default=None)
    return NETWORKS[network].splits[0] if best is None else best["split"]


def middle(network: str, method: str) -> float:
    strengths = METHODS[method].strengths[network]
    return strengths[len(strengths) // 2]


# -- report -------------------------------------------------------------------------------------------------------

KEYS = (
    "zero_weights",
    "zeros_inside",
    "removed_filters",
    "macs",
    "trained",
    "before",
    "after",
    "bytes",
    "train_seconds",
)


def points(records: list[dict[str, Any]], network: str, method: str, seeds: Iterable[int]) -> list[dict[str, Any]]:
    """One point for every strength, means over seeds."""
    split, found = chosen_split(records, network, method), []
    for strength in METHODS[method].strengths.get(network, ()):
        wanted = (network, method, strength, split)
        rows = [
            r
            for r in records
            if (r["network"], r["method"], r["strength"], r["split"]) == wanted and r["seed"] in seeds
        ]
        if rows:
            point: dict[str, Any] = {"strength": strength, "split": split, "seeds": sorted(r["seed"] for r in rows)}
            for key in KEYS:
                point[key], point[f"{key}_std"] = spread([r[key] for r in rows])
            found.append(point)
    return found


def finished_seeds(records: list[dict[str, Any]], network: str, seeds: Iterable[int]) -> list[int]:
    """The seeds with which everything ran: curves of different seeds are not to be compared."""
    wanted = {
        (network, name, strength, chosen_split(records, network, name))
        for name, method in METHODS.items()
        for strength in method.strengths.get(network, ())
    }
    found = {(r["network"], r["method"], r["strength"], r["split"], r["seed"]) for r in records}
    return [seed for seed in seeds if all((*point, seed) in found for point in wanted)]


def at_accuracy(curve: list[dict[str, Any]], key: str, level: float, is_more: bool) -> float | None:
    """The best value of a curve where its accuracy after fine-tuning is at least ``level``, interpolated between points."""
    curve = sorted(curve, key=lambda p: p[key], reverse=not is_more)
    best = None
    for a, b in zip(curve, [*curve[1:], None], strict=True):
        if a["after"] >= level:
            best = a[key]
            if b is not None and b["after"] < level:
                best += (b[key] - a[key]) * (a["after"] - level) / (a["after"] - b["after"])
    return best


def summary(records: list[dict[str, Any]], seeds: Iterable[int]) -> dict[str, Any]:
    whole = {}
    for network in NETWORKS:
        used = finished_seeds(records, network, seeds) or seeds
        curves = {m: c for m in METHODS if (c := points(records, network, m, used))}
        if "dense" not in curves:
            continue
        level = curves["dense"][0]["after"] - LOSS
        equal = {
            method: {
                "zero_weights": at_accuracy(curve, "zero_weights", level, True),
                "removed_filters": at_accuracy(curve, "removed_filters", level, True),
                "macs": at_accuracy(curve, "macs", level, False),
                "bytes": at_accuracy(curve, "bytes", level, False),
            }
            for method, curve in curves.items()
        }
        whole[network] = {"level": level, "at_equal_accuracy": equal, "curves": curves}
    return whole


def table(whole: dict[str, Any]) -> str:
    lines = []
    for network, found in whole.items():
        lines += [
            f"**{NETWORKS[network].label}**, at {found['level']:.2f} % (dense minus {LOSS:g}) after fine-tuning:",
            "",
            "| method | weights zero or removed | filters and units removed | MACs | bytes stored |",
            "|---|---|---|---|---|",
        ]
        for method, row in found["at_equal_accuracy"].items():
            cells = [
                "-" if row[key] is None else f"{row[key] / 1000:.0f} k" if key == "bytes" else f"{100 * row[key]:.1f} %"
                for key in ("zero_weights", "removed_filters", "macs", "bytes")
            ]
            lines.append(f"| {METHODS[method].label} | {' | '.join(cells)} |")
        lines += [
            "",
            "| method | strength | zero or removed | zeros in what remains | filters removed | MACs | trained | cut | fine-tuned | CPU s of training | seeds |",
            "|" + "---|" * 11,
        ]
        for method, curve in found["curves"].items():
            for p in curve:
                shares = " | ".join(
                    f"{100 * p[key]:.1f} %" for key in ("zero_weights", "zeros_inside", "removed_filters", "macs")
                )
                accuracies = " | ".join(
                    f"{p[key]:.2f} ± {p[f'{key}_std']:.2f}" for key in ("trained", "before", "after")
                )
                lines.append(
                    f"| {METHODS[method].label} | {p['strength']:g} | {shares} | {accuracies} | {p['train_seconds']:.0f} "
                    f"| {len(p['seeds'])} |"
                )
        lines.append("")
    return "\n".join(lines)


def plot(whole: dict[str, Any], path: Path) -> None:
    """Accuracy after fine-tuning against the share of weights gone, and against MACs; a row for each network."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(whole), 2, figsize=(11, 3.8 * len(whole)), squeeze=False, sharey="row")
    for (network, found), pair in zip(whole.items(), panels, strict=True):
        dense = found["curves"]["dense"][0]["after"]
        for panel, key, label in zip(
            pair, ("zero_weights", "macs"), ("weights zero or removed, %", "MACs, %"), strict=True
        ):
            panel.axhline(dense, color="0.6", linewidth=1)
            panel.axhline(dense - LOSS, color="0.6", linewidth=1, linestyle=":")
            for place, method in enumerate(METHODS):
                curve = sorted(found["curves"].get(method, []), key=lambda p: p[key])
                if method != "dense" and curve:
                    values, means, bars = zip(*((100 * p[key], p["after"], p["after_std"]) for p in curve), strict=True)
                    panel.errorbar(
                        values, means, bars, marker="o", capsize=2, color=f"C{place}", label=METHODS[method].label
                    )
            panel.set_ylim(max(dense - 12, panel.get_ylim()[0]), dense + 1.6)
            panel.set_xlabel(label)
            panel.grid(alpha=0.3)
        pair[0].set_ylabel(f"{NETWORKS[network].label}: test accuracy, %")
        pair[0].legend(fontsize=8, loc="lower left")
    figure.tight_layout()
    write_figure(path, figure)


def report(bench: SparseGroupBench, results: Path, name: str) -> None:
    """Write table, JSON and plot of what is finished."""
    records = bench.records
    whole = summary(records, bench.protocol.seeds)
    if not whole:
        print("nothing to report yet")
        return
    minutes = sum(r["seconds"] for r in records) / 60
    text = (
        f"{len(records)} runs, {minutes:.0f} minutes of one CPU core. Accuracy in % on the 10,000 test images, mean and "
        f"standard deviation over seeds.\n\n{table(whole)}\n"
    )
    print(text)
    data = {"protocol": asdict(bench.protocol), "networks": whole, "cpu_minutes": minutes, "records": records}
    write(results / f"{name}.json", json.dumps(data, indent=1) + "\n")
    write(results / f"{name}.md", text)
    plot(whole, results / f"{name}.png")


def main() -> None:
    parser = command_line(__doc__, DEFAULT_DATA, METHODS)
    parser.add_argument("--networks", nargs="+", choices=sorted(NETWORKS), default=sorted(NETWORKS))
    arguments = parser.parse_args()
    name = "sparse_group_quick" if arguments.quick else "sparse_group"
    protocol = QUICK if arguments.quick else Protocol()
    data = data_of(arguments, protocol.train_images)
    bench = SparseGroupBench(protocol, data, arguments.results / f"{name}.jsonl")
    only = arguments.only
    if arguments.tune:
        for network in arguments.networks:
            for method in [method for method in only if method in SPARSE]:
                for split in NETWORKS[network].splits:
                    bench.run(network, method, middle(network, method), split, TUNING_SEED)
        return
    if not arguments.plot_only:
        records = bench.records
        for seed in arguments.seeds or protocol.seeds:
            for network in arguments.networks:
                for method in [method for method in only if network in METHODS[method].strengths]:
                    strengths = METHODS[method].strengths[network]
                    for strength in strengths[:: max(1, len(strengths) - 1)] if arguments.quick else strengths:
                        bench.run(network, method, strength, chosen_split(records, network, method), seed)
    report(bench, arguments.results, name)


if __name__ == "__main__":
    main()
