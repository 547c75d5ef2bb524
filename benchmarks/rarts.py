"""Architecture search: RARTS against DARTS of both orders and random search, on cells and on widths, on Fashion-MNIST.

Three parts. **table**: a space of cells so small (96 cells) that every network of it is trained once; the table is kept
in ``results/rarts_table.jsonl``, so that the rank of whatever a search finds there is exact. **cells**: every method
searches that space and the one of DARTS, with equal steps and with the wall time that first-order DARTS needs for them;
networks found in the larger space are trained from new weights. **widths**: channels of a ResNet searched, cut to equal
MACs and fine-tuned, against network slimming and SiDT. These are small tasks for the order of methods, and no
reproduction of the papers' tables. Whatever is finished stays in JSON lines, so a run that was killed goes on.

    python benchmarks/rarts.py --part table       # 96 networks
    python benchmarks/rarts.py                    # all parts, three seeds, then report
    python benchmarks/rarts.py --plot-only        # table, JSON and plot again from what is finished
    python benchmarks/rarts.py --quick            # everything once at a toy size: does it run?
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import fashion_mnist
import torch
import torch.nn.functional as F
from fashion_mnist import DEFAULT_DATA, Data, accuracy, load_data
from records import Record, read_records, write, write_figure
from slimming_pareto import Protocol as SlimmingProtocol
from slimming_pareto import build, cut, example, spread
from torch import nn

from hf_compress import find_axes
from hf_compress.measurement.latency import describe_machine
from hf_compress.methods import (
    ArchitectureSearchCallback,
    DimensionSearchCallback,
    NetworkSlimmingCallback,
    WidthSearchCallback,
)
from hf_compress.models.darts import (
    DartsConfig,
    DartsForImageClassification,
    DartsSupernetConfig,
    DartsSupernetForImageClassification,
    all_cells,
    parameter_free_share,
    random_genotype,
)

HERE = Path(__file__).resolve().parent
PARTS = ("table", "cells", "widths")


@dataclass(frozen=True)
class Space:
    """Cells that are searched, and the networks that they are searched and trained in.

    Attributes:
        supernet: of :class:`DartsSupernetConfig`.
        derived: what differs in the network that is trained from new weights.
        is_small: whether images are halved to 14x14 pixels and all cells are in the table.
    """

    supernet: dict[str, Any]
    derived: dict[str, Any]
    is_small: bool = False


SPACES = {
    # 2 x 4 choices for the first node, 3 x 4 for the second
    "tiny": Space(
        {
            "nodes": 2, "edges_per_node": 1, "num_cells": 3, "width": 8, "stem_multiplier": 1, "reduction_cells": [],
            "operators": ["none", "max_pool_3x3", "skip_connect", "sep_conv_3x3", "dil_conv_3x3"], "image_size": 14,
        },
        {},
        is_small=True,
    ),
    "darts": Space({"nodes": 3, "num_cells": 3, "width": 8, "image_size": 28}, {"num_cells": 5, "width": 12}),
}  # fmt: skip


@dataclass(frozen=True)
class Protocol:
    """What all methods share."""

    seeds: tuple[int, ...] = (0, 1, 2)
    train_images: int = 20_000
    batch_size: int = 64
    search_steps: int = 300
    network_steps: int = 400
    candidate_steps: int = 75  # of every network that random search tries
    learning_rate: float = 0.05
    architecture_lr: float = 3e-3  # ten times that of DARTS, for a fraction of its steps
    training_weight: float = 1.0
    coupling: float = 1.0
    weight_decay: float = 3e-4
    table_cells: int | None = None  # so many of the table; None for all
    width_steps: int = 860  # as in slimming_pareto.py
    width_finetune_steps: int = 290
    width_budgets: tuple[float, ...] = (0.5, 0.25)
    width_strength: float = 1.0
    slimming_strength: float = 3.2e-3  # chosen in slimming_pareto.py for 25 %, from scales that start at 0.1


QUICK = Protocol(
    (0,), train_images=600, batch_size=32, search_steps=4, network_steps=4, candidate_steps=2, table_cells=3,
    width_steps=4, width_finetune_steps=2, width_budgets=(0.5,),
)  # fmt: skip

METHODS = {
    "rarts": ("RARTS, shared passes", {"method": "rarts", "passes": "shared"}),
    "rarts_fresh": ("RARTS, fresh passes", {"method": "rarts", "passes": "fresh"}),
    "darts": ("DARTS, first order", {"method": "darts"}),
    "darts_2": ("DARTS, second order", {"method": "darts-second-order"}),
    "random": ("random search", None),
}
REFERENCE = "darts"  # whose wall time the others get, too
WIDTHS = {
    "width_rarts": "width search, RARTS",
    "width_darts": "width search, DARTS first order",
    "sidt": "SiDT",
    "slimming": "network slimming, l1",
}


# -- networks -------------------------------------------------------------------------------------------------------


def halved(data: Data) -> Data:
    """Images of 14x14 pixels."""
    parts = [
        (F.avg_pool2d(p.float(), 2).round().byte(), labels) for p, labels in (data.train, data.validation, data.test)
    ]
    return Data(*parts)


def supernet_of(space: Space, seed: int) -> DartsSupernetForImageClassification:
    torch.manual_seed(seed)
    return DartsSupernetForImageClassification(DartsSupernetConfig(num_channels=1, num_labels=10, **space.supernet))


def network_of(space: Space, genotype: Any, seed: int) -> DartsForImageClassification:
    torch.manual_seed(seed)
    config = DartsSupernetConfig(num_channels=1, num_labels=10, **space.supernet)
    derived: DartsConfig = config.derived(genotype, **space.derived)
    return DartsForImageClassification(derived)


def train(model: Any, data: Data, protocol: Protocol, seed: int, steps: int, callbacks: Iterable[Any] = ()) -> None:
    """SGD with momentum and a cosine to zero, for networks and supernets alike."""
    fashion_mnist.train(
        model, data, seed, callbacks, None, max_steps=steps, per_device_train_batch_size=protocol.batch_size,
        optim="sgd", optim_args="momentum=0.9", learning_rate=protocol.learning_rate, lr_scheduler_type="cosine",
        weight_decay=protocol.weight_decay, max_grad_norm=5.0,
    )  # fmt: skip


# -- units of work --------------------------------------------------------------------------------------------------
# A record is one line of a file: a network of the table, a search, a network trained from new weights, or a cut ResNet.


class Bench:
    """Runs what is not yet in the files and appends to them.

    ``table`` has networks of the tiny space by genotype; ``records`` everything else.
    """

    def __init__(self, protocol: Protocol, data: Data, folder: Path, name: str):
        self.protocol, self.folder, self.name = protocol, folder, name
        self.files = {kind: folder / f"{name}{end}.jsonl" for kind, end in (("records", ""), ("table", "_table"))}
        self.data = {"darts": data}
        if len(data.train[1]):
            self.data["tiny"] = halved(data)

    def found(self, kind: str = "records", **key: Any) -> Record | None:
        for record in read_records(self.files[kind]):  # another process may work on other seeds
            if all(record.get(name) == value for name, value in key.items()):
                return record
        return None

    def add(self, record: Record, kind: str = "records") -> Record:
        with self.files[kind].open(
            "a"
        ) as stream:  # one short write: a kill leaves at most a last line that is not read
            stream.write(json.dumps(record) + "\n")
        shown = " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in record.items())
        print(time.strftime("%H:%M:%S"), shown, flush=True)
        return record

    # -- the table

    def fill_table(self) -> None:
        """Train every network of the tiny space, for one seed."""
        space = SPACES["tiny"]
        named = [operator for operator in space.supernet["operators"] if operator != "none"]
        cells = list(all_cells(space.supernet["nodes"], named, space.supernet["edges_per_node"]))
        for cell in cells[: self.protocol.table_cells]:
            self.network("tiny", {"normal": cell}, 0, "table")

    def network(self, name: str, genotype: Any, seed: int, kind: str = "records") -> Record:
        """A network trained from new weights."""
        key = {"part": "network", "space": name, "genotype": genotype, "seed": seed}
        known = self.found(kind, **key)
        if known is not None:
            return known
        since = time.perf_counter()
        model = network_of(SPACES[name], genotype, seed)
        train(model, self.data[name], self.protocol, seed, self.protocol.network_steps)
        facts = {
            "validation": accuracy(model, self.data[name].validation), "test": accuracy(model, self.data[name].test),
            "params": sum(p.numel() for p in model.parameters()), "seconds": time.perf_counter() - since,
        }  # fmt: skip
        return self.add({**key, **facts}, kind)

    def rank(self, genotype: Any) -> tuple[int, int] | None:
        """Place by validation accuracy among all networks of the table, and their number; None while it is not full."""
        table = [record for record in read_records(self.files["table"]) if record["part"] == "network"]
        own = next((r["validation"] for r in table if _same(r["genotype"], genotype)), None)
        if own is None:
            return None
        return 1 + sum(record["validation"] > own for record in table), len(table)

    # -- cells

    def search(self, name: str, method: str, seed: int, equal: str) -> Record:
        """One search, of as many steps or as much time as the others."""
        key = {"part": "search", "space": name, "method": method, "seed": seed, "equal": equal}
        known = self.found(**key)
        if known is not None:
            return known
        steps, limit = self.protocol.search_steps, float("inf")
        if equal == "time":
            limit = self.search(name, REFERENCE, seed, "steps")["seconds"]
            if method == REFERENCE:
                return self.add({**self.search(name, method, seed, "steps"), **key})
            if method != "random":
                per_step = self.search(name, method, seed, "steps")["seconds"] / steps
                steps = max(1, round(limit / per_step))
        since = time.perf_counter()
        if method == "random":
            genotype, tried = self.random_search(name, seed, steps if equal == "steps" else None, limit)
            facts: Record = {"tried": tried}
        else:
            model = supernet_of(SPACES[name], seed)
            callback = ArchitectureSearchCallback(
                **METHODS[method][1], architecture_lr=self.protocol.architecture_lr,
                training_weight=self.protocol.training_weight, coupling=self.protocol.coupling,
            )  # fmt: skip
            train(model, self.data[name], self.protocol, seed, steps, [callback])
            genotype, facts = model.genotype(), {"steps": steps}
        seconds = time.perf_counter() - since
        return self.add(
            {**key, "genotype": genotype, **facts, "seconds": seconds, "free": parameter_free_share(genotype)}
        )

    def random_search(self, name: str, seed: int, steps: int | None, limit: float) -> tuple[Any, int]:
        """The best by validation accuracy of networks drawn by lot, each trained shortly."""
        config = DartsSupernetConfig(num_channels=1, **SPACES[name].supernet)
        since, best, chosen, tried = time.perf_counter(), -1.0, None, 0
        while chosen is None or (
            (tried + 1) * self.protocol.candidate_steps <= steps
            if steps is not None
            else (time.perf_counter() - since) * (tried + 1) / tried <= limit
        ):
            genotype = random_genotype(
                config.nodes, config.operators, config.edges_per_node, config.cell_types, seed=1000 * seed + tried
            )
            model = network_of(SPACES[name], genotype, seed)
            train(model, self.data[name], self.protocol, seed, self.protocol.candidate_steps)
            found = accuracy(model, self.data[name].validation)
            tried += 1
            if found > best:
                best, chosen = found, genotype
        return chosen, tried

    def cells(self, seed: int, only: Iterable[str]) -> None:
        for name in SPACES:
            for equal in ("steps", "time"):
                for method in only:
                    self.network(name, self.search(name, method, seed, equal)["genotype"], seed)

    # -- widths

    def widths(self, seed: int, only: Iterable[str]) -> None:
        """Train a ResNet with each method, cut it to every budget, fine-tune it."""
        base = SlimmingProtocol()
        for method in only:
            wanted = [
                b
                for b in self.protocol.width_budgets
                if not self.found(part="width", method=method, seed=seed, budget=b)
            ]
            if not wanted:
                continue
            since = time.perf_counter()
            model = build(base, seed, scale_init=0.1 if method == "slimming" else None)
            dense = find_axes(model, example()).macs
            callback = self.width_callback(method)
            self.train_resnet(model, base, seed, self.protocol.width_steps, base.learning_rate, [callback])
            searched = time.perf_counter() - since
            trained = accuracy(model, self.data["darts"].test)
            for budget in wanted:
                small = copy.deepcopy(model)
                cut(small, callback.scores(model), budget)
                before = accuracy(small, self.data["darts"].test)
                self.train_resnet(
                    small, base, seed + 10_000, self.protocol.width_finetune_steps, base.finetune_learning_rate
                )
                axes = find_axes(small, example())
                self.add({
                    "part": "width", "method": method, "seed": seed, "budget": budget, "macs": axes.macs / dense,
                    "params": axes.params, "trained": trained, "before": before,
                    "after": accuracy(small, self.data["darts"].test), "seconds": searched,
                })  # fmt: skip

    def train_resnet(
        self,
        model: nn.Module,
        base: SlimmingProtocol,
        seed: int,
        steps: int,
        rate: float,
        callbacks: Iterable[Any] = (),
    ) -> None:
        """As in slimming_pareto, with an optimizer that Trainer makes, so that it knows what searches add to the model."""
        fashion_mnist.train(
            model, self.data["darts"], seed, callbacks, None, max_steps=steps,  # type: ignore[arg-type]
            per_device_train_batch_size=min(base.batch_size, len(self.data["darts"].train[1]) // 4), optim="sgd",
            optim_args="momentum=0.9,nesterov=True", learning_rate=rate, weight_decay=base.weight_decay,
            lr_scheduler_type="linear", max_grad_norm=0,
        )  # fmt: skip

    def width_callback(self, method: str) -> Any:
        inputs = {"pixel_values": example()}
        strength = self.protocol.width_strength
        if method == "slimming":
            return NetworkSlimmingCallback(
                "l1", self.protocol.slimming_strength, grouping="axis", example_inputs=inputs
            )
        if method == "sidt":
            return DimensionSearchCallback(strength, kinds="channels", target=0.5, lr_factor=0.1, example_inputs=inputs)
        order = "rarts" if method == "width_rarts" else "darts"
        # a score that the loss does not defend vanishes in the first 100 steps behind the warm-up, as SiDT's do
        return WidthSearchCallback(strength, 0.5, order, architecture_lr=0.01, example_inputs=inputs)


def _same(a: Any, b: Any) -> bool:
    """Whether two genotypes are one network: the order of a node's edges does not matter."""
    return {k: [sorted(map(tuple, n)) for n in c] for k, c in a.items()} == {
        k: [sorted(map(tuple, n)) for n in c] for k, c in b.items()
    }


# -- report -----------------------------------------------------------------------------------------------------------


def summary(bench: Bench) -> dict[str, list[Record]]:
    """Means and standard deviations over the finished seeds."""
    records = read_records(bench.files["records"])
    cells, widths = [], []
    for name in SPACES:
        for equal in ("steps", "time"):
            for method, (label, _) in METHODS.items():
                searches = [
                    r for r in records
                    if (r["part"], r.get("space"), r.get("method"), r.get("equal")) == ("search", name, method, equal)
                ]  # fmt: skip
                if not searches:
                    continue
                row: Record = {"space": name, "equal": equal, "method": method, "label": label}
                row["seeds"] = [r["seed"] for r in searches]
                networks = [
                    bench.found(part="network", space=name, genotype=r["genotype"], seed=r["seed"]) for r in searches
                ]
                ranks = [rank[0] for r in searches if name == "tiny" and (rank := bench.rank(r["genotype"]))]
                columns = {
                    "test": [n["test"] for n in networks if n], "seconds": [r["seconds"] for r in searches],
                    "free": [r["free"] for r in searches], "rank": [float(rank) for rank in ranks],
                }  # fmt: skip
                for key, values in columns.items():
                    if values:
                        row[key], row[f"{key}_std"] = spread(values)
                cells.append(row)
    for budget in bench.protocol.width_budgets:
        for method, label in WIDTHS.items():
            found = [r for r in records if (r["part"], r.get("method"), r.get("budget")) == ("width", method, budget)]
            if found:
                row = {"budget": budget, "method": method, "label": label, "seeds": [r["seed"] for r in found]}
                for key in ("macs", "trained", "before", "after", "seconds"):
                    row[key], row[f"{key}_std"] = spread([r[key] for r in found])
                widths.append(row)
    return {"cells": cells, "widths": widths}


def table(rows: dict[str, list[Record]], size: int) -> str:
    def cell(row: Record, key: str, digits: int = 2) -> str:
        return f"{row[key]:.{digits}f} ± {row[f'{key}_std']:.{digits}f}" if key in row else "-"

    lines = [
        f"| space | equal | method | seeds | test accuracy of the found network, % | rank of {size} | parameter-free | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows["cells"]:
        lines.append(
            f"| {row['space']} | {row['equal']} | {row['label']} | {len(row['seeds'])} | {cell(row, 'test')} | "
            f"{cell(row, 'rank', 1)} | {cell(row, 'free')} | {cell(row, 'seconds', 0)} |"
        )
    lines += [
        "",
        "| MACs | method | seeds | trained, uncut | cut | fine-tuned | seconds of training |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows["widths"]:
        lines.append(
            f"| {row['macs']:.1%} | {row['label']} | {len(row['seeds'])} | {cell(row, 'trained')} | "
            f"{cell(row, 'before')} | {cell(row, 'after')} | {cell(row, 'seconds', 0)} |"
        )
    return "\n".join(lines)


def plot(rows: dict[str, list[Record]], path: Path) -> None:
    """Accuracy of found networks against the seconds of the search; a panel for each space."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(SPACES), figsize=(11, 4.2), squeeze=False)
    for panel, name in zip(panels[0], SPACES, strict=True):
        for place, (method, (label, _)) in enumerate(METHODS.items()):
            for equal, marker in (("steps", "o"), ("time", "s")):
                for row in rows["cells"]:
                    if (row["space"], row["method"], row["equal"]) == (name, method, equal) and "test" in row:
                        panel.errorbar(
                            row["seconds"], row["test"], yerr=row["test_std"], fmt=marker, capsize=3, color=f"C{place}",
                            label=label if equal == "steps" else None,
                        )  # fmt: skip
        panel.set_title(f"{name} space (circle: equal steps, square: equal time)", fontsize=10)
        panel.set_xlabel("seconds of search")
        panel.set_ylabel("test accuracy, %")
        panel.grid(alpha=0.3)
    panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    write_figure(path, figure)


def report(bench: Bench) -> None:
    rows = summary(bench)
    if not any(rows.values()):
        print("nothing to report yet")
        return
    size = len(read_records(bench.files["table"]))
    text = f"Mean ± standard deviation over seeds. {describe_machine()}\n\n{table(rows, size)}\n"
    print(text)
    whole = {"protocol": asdict(bench.protocol), "spaces": {n: asdict(s) for n, s in SPACES.items()}, **rows}
    write(bench.folder / f"{bench.name}.json", json.dumps(whole, indent=1) + "\n")
    write(bench.folder / f"{bench.name}.md", text)
    if rows["cells"]:
        plot(rows, bench.folder / f"{bench.name}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", default=DEFAULT_DATA)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--only", nargs="+", choices=[*METHODS, *WIDTHS], help="these methods alone")
    parser.add_argument("--seeds", nargs="+", type=int, help="these of the seeds alone")
    parser.add_argument("--training-weight", type=float, help="lambda of RARTS")
    parser.add_argument("--coupling", type=float, help="beta of RARTS")
    parser.add_argument(
        "--quick", action="store_true", help="one seed and few steps: a smoke test, results mean nothing"
    )
    parser.add_argument("--plot-only", action="store_true", help="report what is finished")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    logging.getLogger("hf_compress").setLevel(logging.ERROR)  # it would warn of every folded shift
    protocol = QUICK if arguments.quick else Protocol()
    given = {name: getattr(arguments, name) for name in ("training_weight", "coupling")}
    given = {name: value for name, value in given.items() if value is not None}
    protocol = replace(protocol, **given)
    name = "rarts_quick" if arguments.quick else "rarts"
    name += "".join(f"_{key}_{value:g}" for key, value in given.items())  # other numbers, other records
    arguments.results.mkdir(parents=True, exist_ok=True)
    data = Data(*[(torch.empty(0), torch.empty(0))] * 3)
    if not arguments.plot_only:
        data = load_data(arguments.data, protocol.train_images)
        if arguments.quick:
            data = Data(data.train, *((p[:500], labels[:500]) for p, labels in (data.validation, data.test)))
    bench = Bench(protocol, data, arguments.results, name)
    only = arguments.only or [*METHODS, *WIDTHS]
    if not arguments.plot_only:
        if "table" in arguments.part:
            bench.fill_table()
        for seed in arguments.seeds or protocol.seeds:  # seed by seed: what is there at any time compares all methods
            if "cells" in arguments.part:
                bench.cells(seed, [m for m in only if m in METHODS])
            if "widths" in arguments.part:
                bench.widths(seed, [m for m in only if m in WIDTHS])
    report(bench)


if __name__ == "__main__":
    main()
