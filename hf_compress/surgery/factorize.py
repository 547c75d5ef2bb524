"""Put layers in two factors of low rank, in place, where that saves multiply-accumulates.

One forward pass tells what every layer costs and which layers must stay whole; one decomposition of every weight tells
what every rank keeps; :mod:`.rank_selection` gives schemes and ranks for a budget of the whole model.
"""

from __future__ import annotations

import fnmatch
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_compress.axes import Cost, example_inputs_for, find_axes
from hf_compress.axes.finding import (
    Inputs,
    _one_example,
    _uncompiled,
    is_standard,
    run_examples,
    run_model,
    undisturbed,
)
from hf_compress.axes.tracing import PASSIVE, operator_name, tensors_in
from hf_compress.errors import BudgetError, MethodError, ModelError, NothingToShrinkError

from .decomposition import DECOMPOSABLE, SCHEMES, Scheme, can_decompose, check_scheme, factors, full_rank
from .factorized import Factorized, dims_of_first, factorized_in, factorized_shell
from .importance import Batches
from .low_rank import energies, input_moments, low_rank_weight, numerical_rank, output_error, shares_lost
from .rank_selection import Options, cheapest, choose
from .select import Budget, budget_limits
from .shrink import attach_record
from .skeleton import Record, record_of

Ranks = Mapping[str, "int | tuple[Scheme, int]"]


@dataclass(frozen=True)
class LayerRank:
    """One layer of a :class:`FactorizeReport`.

    Attributes:
        name: path of the module.
        scheme: None where it is left alone.
        rank: of every matrix into which the scheme unfolds the weight; None where it is left alone.
        full_rank: the most that could be, for the scheme, or for "channel" where it is left alone.
        macs, dense_macs: of one example, now and as one layer; None where they are not known.
        lost: share of the energy that went: of the weights, or of the outputs where batches were given.
        reason: why it is left alone; empty otherwise.
        energies: float64 [full_rank], of all components before, largest first; sums over the matrices of the layer.
    """

    name: str
    scheme: Scheme | None
    rank: int | None
    full_rank: int
    macs: int | None = None
    dense_macs: int | None = None
    lost: float | None = None
    reason: str = ""
    energies: Tensor | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class FactorizeReport:
    """What :func:`factorize` did; prints as a table. ``before`` and ``after`` are None for a model that was reloaded."""

    layers: tuple[LayerRank, ...]
    before: Cost | None = None
    after: Cost | None = None

    @property
    def ranks(self) -> dict[str, int]:
        """Layer in two factors -> rank."""
        return {layer.name: layer.rank for layer in self.layers if layer.rank is not None}

    def __str__(self) -> str:
        rows = [("layer", "scheme", "rank", "energy lost", "MACs")]
        for layer in self.layers:
            if layer.rank is not None:
                lost = "" if layer.lost is None else f"{layer.lost:.2%}"
                macs = "" if layer.macs is None else f"{layer.dense_macs:,} -> {layer.macs:,}"
                rows.append((layer.name, str(layer.scheme), f"{layer.rank} of {layer.full_rank}", lost, macs))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        lines.insert(1, "-" * max(map(len, lines)))
        reasons = Counter(layer.reason for layer in self.layers if layer.reason)
        lines += [f"{count} left alone: {reason}" for reason, count in reasons.most_common()]
        if self.before is not None and self.after is not None:
            for name, old, new in zip(("MACs", "parameters"), self.before, self.after, strict=True):
                lines.append(f"{name} {old:,} -> {new:,} ({new / old:.1%})")
        return "\n".join(lines)


def factorize(
    model: nn.Module,
    *,
    energy: float | None = None,
    scheme: str = "best",
    macs: Budget = None,
    params: Budget = None,
    ranks: Ranks | None = None,
    batches: Batches = None,
    targets: str | Sequence[str] | None = None,
    example_inputs: Inputs = None,
) -> nn.Module:
    """Put linear layers and convolutions in two factors, in place, where that saves multiply-accumulates.

    With a budget, schemes, ranks and which layers are left alone are one solution for the whole model
    (:mod:`.rank_selection`). A weight that is of low rank already, as after trained rank pruning, gets no higher one than it
    has, and is put in factors also where the budget could be met without: the result can be smaller than the budget
    asks for. With ``energy`` alone every layer takes the scheme and rank with the fewest MACs that lose no
    more. Schemes, and what is exact when: :mod:`.decomposition`.

    The rank is an axis like any other afterwards: ``find_axes`` finds it, ``prune`` and ``select`` weigh it against
    channels. A model of transformers carries the ranks in the record of its configuration, so that ``save_pretrained``
    and ``from_pretrained`` work. Factors are new parameters: make optimizers afterwards.

    Args:
        model: a model of transformers, or any module together with ``example_inputs``.
        energy: the largest share of a layer's energy (of its squared singular values) that may go, in (0, 1). Paper of
            trained rank pruning: e. Together with a budget it bounds every layer.
        scheme: "channel", "spatial", "decoupled", or "best": any of them, layer by layer. All three are one for linear
            layers.
        macs: budget of multiply-accumulates: a float in (0, 1] is a share of what the model has now, a number above 1 is
            absolute.
        params: budget of parameters, in the same way. With both, both are met.
        ranks: instead of energy and budget: pattern of layer names -> rank, or (scheme, rank). These are followed even
            where they save nothing; the first pattern that matches counts.
        batches: calibration batches, as a ``DataLoader`` gives them; a few hundred examples do, labels are not needed.
            Energy is then that of the outputs on these, and the factors are those that change the outputs least.
        targets: patterns of layer names ("*.mlp.*") or names of classes ("Conv2d"); all layers when not given.
        example_inputs: as for :func:`hf_compress.find_axes`.

    Returns:
        ``model``. What was done: :func:`factorize_report`.

    Raises:
        MethodError: when an argument is out of range, or a pattern matches no layer.
        NothingToShrinkError: when no layer can be put in two factors, or none saves anything.
        BudgetError: when the budget is out of reach; names the lowest reachable.
        DataError: when there is no batch.
        ModelError: when a weight is not finite, the model cannot be run, or was quantized by another method. In all of
            these cases the model is unchanged.
    """
    schemes = _check(energy, scheme, macs, params, ranks)
    earlier = record_of(model) or Record()
    layers = {path: module for path, module in model.named_modules() if isinstance(module, DECOMPOSABLE)}
    wanted = _matching(layers, targets)
    inputs = example_inputs_for(model) if example_inputs is None else example_inputs
    reasons = _obstacles(model, wanted)
    calls, read_elsewhere = _watch(model, {path: wanted[path] for path in wanted if path not in reasons}, inputs)
    for path in wanted:
        if path in read_elsewhere:
            reasons[path] = read_elsewhere[path]
        elif path not in reasons and path not in calls:
            reasons[path] = "the forward pass does not run it"
    able = {path: layer for path, layer in wanted.items() if path not in reasons}
    moments = input_moments(model, able, batches) if batches is not None and able else {}
    work = [_Candidate(path, layer, calls[path], moments.get(path)) for path, layer in able.items()]
    if ranks is not None:
        asked = _asked_ranks(ranks, wanted, work, reasons)
        work = [item for item in work if item.path in asked]
        tables = [item.only(schemes, *asked[item.path]) for item in work]
    else:
        tables = [item.options(schemes, energy) for item in work]
    for item, table in zip(work, tables, strict=True):
        if len(table.ranks) == 1:
            reasons[item.path] = "no scheme saves MACs" if energy is None else f"no scheme saves MACs at {energy=}"
    if all(len(table.ranks) == 1 for table in tables):
        raise NothingToShrinkError(_nothing(reasons))
    before = find_axes(model, inputs).cost()
    chosen = _solution(tables, before, macs, params, energy) if ranks is None else [1] * len(tables)
    rows = []
    for item, table, entry in zip(work, tables, chosen, strict=True):
        if not entry and item.path not in reasons:
            reasons[item.path] = "the budget is met without it"
        rows.append(item.row(table, entry, reasons.get(item.path, "")))
    new = {}
    for number, (item, row) in enumerate(zip(work, rows, strict=True)):
        if row.scheme is not None and row.rank is not None:
            new[item.path], lost = item.factors(row.scheme, row.rank)
            rows[number] = row if lost is None else replace(row, lost=lost)
    for path, module in new.items():
        holder, _, name = path.rpartition(".")
        model.get_submodule(holder)._modules[name] = module
    made = {row.name: (row.scheme, row.rank) for row in rows if row.rank and row.scheme}
    attach_record(model, earlier.merge(Record(factorized=made)))
    saved = sum(table.costs[0] - table.costs[entry] for table, entry in zip(tables, chosen, strict=True))
    after = Cost(*(int(was - less) for was, less in zip(before, saved, strict=True)))
    done = {row.name for row in rows}
    rows += [LayerRank(path, None, None, 0, reason=why) for path, why in reasons.items() if path not in done]
    model.hf_compress_factorize_report = FactorizeReport(tuple(rows), before, after)  # type: ignore[assignment]
    return model


def factorize_report(model: nn.Module) -> FactorizeReport:
    """Schemes and ranks of a model as it is now, with what :func:`factorize` knew of costs and energies, where it ran here.

    Args:
        model: one that was factorised, in this process or before it was saved.
    """
    held = vars(model).get("hf_compress_factorize_report")
    known = {layer.name: layer for layer in held.layers} if held else {}
    rows = []
    for path, module in factorized_in(model):
        groups = getattr(module.first, "groups", 1)
        row = LayerRank(path, module.scheme, module.rank, full_rank(module.weight.shape, module.scheme, groups))
        rows.append(known[path] if path in known and known[path].rank == module.rank else row)
    if held and [row for row in held.layers if row.rank] == rows:
        return held
    return FactorizeReport(tuple(rows))


# -- arguments ------------------------------------------------------------------------------------------------------


def _check(energy: Any, scheme: str, macs: Budget, params: Budget, ranks: Ranks | None) -> tuple[Scheme, ...]:
    is_number = isinstance(energy, (int, float)) and not isinstance(energy, bool)
    if energy is not None and not (is_number and 0 < energy < 1):
        raise MethodError(
            f"energy={energy!r} is the share of a layer's energy that may go: a number between 0 and 1, both excluded; "
            "0.02 is mild, 0.3 is strong."
        )
    if scheme != "best":
        check_scheme(scheme)
    given = [name for name, value in (("energy", energy), ("macs", macs), ("params", params)) if value is not None]
    if ranks is None and not given:
        raise MethodError(
            "say how far to go: macs= or params= (a budget), energy= (the most that a layer may lose), or ranks=."
        )
    if ranks is not None and given:
        raise MethodError(f"ranks= says what every layer gets; it cannot be combined with {' and '.join(given)}.")
    if ranks is not None and not (isinstance(ranks, Mapping) and ranks):
        raise MethodError(f"ranks must map patterns of layer names to ranks, got {ranks!r}.")
    return SCHEMES if scheme == "best" else (scheme,)  # type: ignore[return-value]


def _matching(layers: Mapping[str, nn.Module], targets: str | Sequence[str] | None) -> dict[str, nn.Module]:
    if targets is None:
        return dict(layers)
    found: set[str] = set()
    for pattern in [targets] if isinstance(targets, str) else list(targets):
        matches = {path for path, layer in layers.items() if _matches(pattern, path, layer)}
        if not matches:
            known = ", ".join(list(layers)[:6])
            raise MethodError(
                f"targets: {pattern!r} matches no linear layer or convolution of this model; the first are {known}. "
                "Patterns are of layer names, with * for any text, or names of classes (Conv2d, Linear)."
            )
        found |= matches
    if not found:
        raise MethodError("targets is empty: give patterns of layer names, or None for all layers.")
    return {path: layer for path, layer in layers.items() if path in found}


def _matches(pattern: str, path: str, layer: nn.Module) -> bool:
    return fnmatch.fnmatchcase(path, pattern) or type(layer).__name__ == pattern


def _asked_ranks(
    ranks: Ranks, wanted: Mapping[str, nn.Module], work: Sequence[_Candidate], reasons: dict[str, str]
) -> dict[str, tuple[Scheme | None, int]]:
    """Path -> scheme (None where there is no choice, or it was not said) and rank."""
    asked: dict[str, tuple[Scheme | None, int]] = {}
    able = {item.path for item in work}
    for pattern, value in ranks.items():
        matches = set(_matching(wanted, pattern))
        if not matches & able:
            path = min(matches)
            raise NothingToShrinkError(f"ranks: {pattern!r} names {path!r}, which is left alone: {reasons[path]}.")
        scheme, rank = value if isinstance(value, tuple) and len(value) == 2 else (None, value)
        if scheme is not None:
            check_scheme(scheme)
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise MethodError(f"ranks[{pattern!r}]={value!r}: a rank is a positive integer, or (scheme, rank).")
        for path in sorted(matches & able):
            asked.setdefault(path, (scheme, rank))
    for path in able - set(asked):
        reasons[path] = "no rank was given"
    return asked


# -- which layers ---------------------------------------------------------------------------------------------------


def _obstacles(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Why layers must stay whole, as far as their modules tell."""
    modules = dict(model.named_modules())
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    joined = _joined_in_checkpoints(model)
    found = {}
    for path, layer in layers.items():
        above = [modules[path.rsplit(".", i)[0]] for i in range(1, path.count(".") + 1)] + [model]
        own = [parameter for parameter in layer._parameters.values() if parameter is not None]
        weight = layer._parameters.get("weight")
        hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
        torchs = [
            a for a in above if is_standard(a) and not isinstance(a, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        ]
        if any(isinstance(module, Factorized) for module in above):
            found[path] = "in two factors already; prune the rank, which is an axis"
        elif not path:
            found[path] = "it is the whole model"
        elif type(layer) not in DECOMPOSABLE:
            found[path] = f"a {type(layer).__name__} may do more than its base class"
        elif torchs:
            found[path] = f"torch's {type(torchs[0]).__name__} reads its weight"
        elif weight is None or type(weight) is not nn.Parameter:
            found[path] = "its weight is no ordinary parameter"
        elif any(uses[id(parameter)] > 1 for parameter in own):
            found[path] = "a parameter is shared with another layer"
        elif any(hooks) or "forward" in vars(layer):
            found[path] = "hooks hang on it"
        elif any(pattern.search(f"{path}.weight") for pattern in joined):
            found[path] = "checkpoints hold its weight in one tensor with others"
        elif all(can_decompose(layer, scheme) for scheme in SCHEMES):
            found[path] = "its matrices have rank 1"
        elif not bool(weight.any()):
            found[path] = "its weight is zero, and two factors of zeros do not train"
    return found


def _joined_in_checkpoints(model: nn.Module) -> list[re.Pattern[str]]:
    """Patterns of weights that transformers cuts out of larger tensors at loading and puts together when saving."""
    conversions = sys.modules.get("transformers.conversion_mapping")
    if conversions is None or not hasattr(model, "save_pretrained"):
        return []
    found = []
    for conversion in conversions.get_model_conversion_mapping(model):
        if getattr(conversion, "operations", None):  # the others give names
            found += [re.compile(re.sub(r"\\\d", ".*", pattern)) for pattern in conversion.target_patterns]
    return found


_METADATA = PASSIVE | {"shape.__get__", "size", "numel", "nelement", "data.__get__"}
Shapes = tuple[tuple[int, ...], tuple[int, ...]]


class _Readers(TorchFunctionMode):
    """Notes which parameters are used while their own layer does not run."""

    def __init__(self, layers: Mapping[str, nn.Module]):
        super().__init__()
        self.owners = {id(p): path for path, layer in layers.items() for p in layer._parameters.values()}
        self.running: list[str] = []
        self.found: dict[str, str] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator_name(func)
        if name not in _METADATA:
            for tensor in tensors_in((args, kwargs or {})):
                path = self.owners.get(id(tensor))
                if path is not None and path not in self.running:
                    self.found[path] = f"the forward pass reads its parameters without running it ({name})"
        return func(*args, **(kwargs or {}))


def _watch(
    model: nn.Module, layers: Mapping[str, nn.Module], inputs: Any
) -> tuple[dict[str, list[Shapes]], dict[str, str]]:
    """What every layer is called with for one example, and which layers' parameters are read elsewhere."""
    calls: dict[str, list[Shapes]] = {}
    readers = _Readers(layers)
    handles = []
    for path, layer in layers.items():

        def enter(layer: nn.Module, args: Any, path: str = path) -> None:
            readers.running.append(path)

        def leave(layer: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
            readers.running.pop()
            given = args[0] if args else kwargs.get("input")
            if isinstance(given, Tensor) and isinstance(output, Tensor):
                calls.setdefault(path, []).append((tuple(given.shape), tuple(output.shape)))

        handles += [
            layer.register_forward_pre_hook(enter),
            layer.register_forward_hook(leave, with_kwargs=True, always_call=True),
        ]
    inputs = _one_example(inputs)
    try:
        with torch.no_grad(), _uncompiled():
            with undisturbed(model), readers:
                run_examples(model, inputs)
            measured = {path: list(found) for path, found in calls.items()}
            with undisturbed(model), readers:  # heads that only training uses; statistics of one example are not needed
                for module in model.modules():
                    module.training = not (is_standard(module) or isinstance(module, nn.modules.batchnorm._NormBase))
                try:
                    run_model(model, inputs)
                except Exception:  # it asks for labels
                    readers.running.clear()
    finally:
        for handle in handles:
            handle.remove()
    return measured, readers.found


# -- what can be done with one layer --------------------------------------------------------------------------------


class _Candidate:
    """A layer that may be put in two factors: its options, and how each is carried out."""

    def __init__(self, path: str, layer: nn.Module, calls: Sequence[Shapes], moment: Tensor | None):
        self.path, self.layer, self.calls, self.moment = path, layer, calls, moment
        self.groups: int = getattr(layer, "groups", 1)
        self.weight: Tensor = layer.weight  # type: ignore[assignment]
        self.energies: dict[Scheme, Tensor] = {}
        if not bool(self.weight.isfinite().all()):
            raise ModelError(
                f"the weight of {path!r} holds NaN or infinity. Look for a training run that diverged, and load weights "
                "from before it did."
            )

    def cost(self, scheme: Scheme | None, rank: int) -> tuple[int, int]:
        """MACs of one example and parameters of the weights."""
        if scheme is None:
            size = self.weight.numel()
            return size * sum(self._positions(shapes, None) for shapes in self.calls), size
        shell = factorized_shell(self.layer, scheme, 1)
        first, second = shell.first.weight.numel() * rank, shell.second.weight.numel() * rank
        macs = sum(
            first * self._positions(shapes, scheme) + second * self._positions(shapes, None) for shapes in self.calls
        )
        return macs, first + second

    def _positions(self, shapes: Shapes, first_of: Scheme | None) -> int:
        """Where an output is computed: by the layer (and the second factor), or by the first factor of a scheme."""
        given, output = shapes
        if isinstance(self.layer, nn.Linear):
            return math.prod(output[:-1])
        dims = len(self.layer.kernel_size)  # type: ignore[arg-type]
        taken = set(range(dims)) if first_of is None else dims_of_first(self.layer, first_of)
        sizes = [(output if dim in taken else given)[dim - dims] for dim in range(dims)]
        return math.prod(sizes) * math.prod(output[: -dims - 1])

    def schemes(self, asked: Sequence[Scheme]) -> list[Scheme]:
        """Those that differ for this layer and can be used."""
        is_plain = isinstance(self.layer, nn.Linear)
        has_width = self.weight.ndim == 4 and self.weight.shape[3] > 1
        found: list[Scheme] = []
        for scheme in asked:
            if is_plain or (scheme == "spatial" and not has_width):
                scheme = "channel"
            if scheme not in found and not can_decompose(self.layer, scheme):
                found.append(scheme)
        return found

    def energy_of(self, scheme: Scheme) -> Tensor:
        if scheme not in self.energies:
            self.energies[scheme] = energies(self.weight, scheme, self.groups, self.moment, self.path).cpu()
        return self.energies[scheme]

    def options(self, asked: Sequence[Scheme], energy: float | None) -> Options:
        """Everything that saves MACs and loses no more than ``energy``; the layer as it is comes first."""
        whole = self.cost(None, 0)
        schemes: list[Scheme | None] = [None]
        ranks, costs, lost = [np.zeros(1, np.int64)], [np.array([whole])], [np.zeros(1)]
        for scheme in self.schemes(asked):
            shares = shares_lost(self.energy_of(scheme)).numpy()
            rank = np.arange(1, len(shares) + 1)
            cost = rank[:, None] * np.array(self.cost(scheme, 1))
            own = self.energy_of(scheme) if self.moment is None else None  # else it is the outputs'
            held = numerical_rank(self.weight, scheme, self.groups, own)
            shares[held - 1 :] = 0.0  # what rounding leaves behind would pay for ranks that hold nothing
            kept = (cost[:, 0] < whole[0]) & (shares <= (1.0 if energy is None else energy)) & (rank <= held)
            ranks.append(rank[kept])
            costs.append(cost[kept])
            lost.append(shares[kept])
            schemes += [scheme] * int(kept.sum())
        return Options(schemes, np.concatenate(ranks), np.concatenate(costs), np.concatenate(lost))

    def only(self, asked: Sequence[Scheme], scheme: Scheme | None, rank: int) -> Options:
        """The layer as it is, and what was asked for."""
        possible = self.schemes(asked if scheme is None else (scheme,))
        if len(possible) != 1:
            raise MethodError(
                f"ranks: {self.path!r} can be decomposed by {' or '.join(possible) or 'no scheme'}; give (scheme, rank), or scheme=."
            )
        highest = full_rank(self.weight.shape, possible[0], self.groups)
        if not 1 <= rank <= highest:
            raise MethodError(f"ranks: {self.path!r} can have a rank from 1 to {highest} ({possible[0]}), got {rank}.")
        lost = float(shares_lost(self.energy_of(possible[0]))[rank - 1])
        costs = np.array([self.cost(None, 0), self.cost(possible[0], rank)])
        return Options([None, possible[0]], np.array([0, rank]), costs, np.array([0.0, lost]))

    def row(self, table: Options, entry: int, reason: str) -> LayerRank:
        scheme, rank = table.schemes[entry], int(table.ranks[entry]) or None
        energy = self.energy_of(scheme or "channel")
        return LayerRank(
            self.path, scheme, rank, len(energy), int(table.costs[entry][0]), int(table.costs[0][0]),
            float(table.lost[entry]), reason, energy,
        )  # fmt: skip

    def factors(self, scheme: Scheme, rank: int) -> tuple[Factorized, float | None]:
        """The module, and with batches the share of the output's energy that goes."""
        weight, lost = self.weight, None
        if self.moment is not None:
            weight = low_rank_weight(weight, scheme, self.groups, rank, self.moment)
            whole = output_error(self.weight.detach(), self.groups, self.moment)
            lost = output_error(self.weight.detach() - weight, self.groups, self.moment) / max(whole, 1e-300)
        module = factorized_shell(self.layer, scheme, rank)
        pair = zip((module.first, module.second), factors(weight, scheme, rank, self.groups), strict=True)
        for layer, value in pair:
            layer.weight = nn.Parameter(value.to(self.weight.dtype), self.weight.requires_grad)
        return module, lost


def _solution(tables: Sequence[Options], before: Cost, macs: Budget, params: Budget, energy: float | None) -> list[int]:
    limits = dict(budget_limits(before, macs, params))
    if not limits:
        return [cheapest(table) for table in tables]
    others = np.array(before) - np.sum([table.costs[0] for table in tables], axis=0)
    room = [limits.get(kind, math.inf) - others[kind] for kind in (0, 1)]
    chosen = choose(tables, room)
    if chosen is None:
        lowest = np.sum([table.costs.min(axis=0) for table in tables], axis=0) + others
        share = ", ".join(
            f"{name} {math.ceil(1000 * lowest[kind] / max(before[kind], 1)) / 1000:g} ({lowest[kind]:,})"
            for kind, name in enumerate(("macs", "params"))
            if kind in limits
        )
        asked = ", ".join(
            f"{name}={value}" for name, value in (("macs", macs), ("params", params)) if value is not None
        )
        why = "" if energy is None else f" at energy={energy:g}"
        raise BudgetError(
            f"the budget {asked} cannot be reached by factors alone: the lowest{why} is {share} of "
            "the model. Ask for that or more"
            + (", raise energy," if energy else "")
            + " and prune channels for the rest."
        )
    return chosen


def _nothing(reasons: Mapping[str, str]) -> str:
    if not reasons:
        return "the model has no linear layer and no convolution, so there is nothing to put in two factors."
    met = "; ".join(f"{count}: {reason}" for reason, count in Counter(reasons.values()).most_common(4))
    return f"none of {len(reasons)} layers can be put in two factors with fewer MACs ({met})."
