"""``factorize``: two factors compute what one layer computed, the budget is one for the whole model, and it all reloads."""

from __future__ import annotations

import copy
import itertools
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import FAMILIES, images, perturb
from masking import assert_close, assert_cut_equals_masked, logits, random_keep
from reloading import LOAD_ALL
from torch import Tensor, nn

import hf_compress
from hf_compress.axes import find_axes
from hf_compress.errors import BudgetError, DataError, MethodError, ModelError, NothingToShrinkError
from hf_compress.measurement.cost import count_macs
from hf_compress.models.pruned_vit import PrunedViTConfig
from hf_compress.models.sidt import SidtConfig, SidtForObjectDetection
from hf_compress.recipe.reload import in_own_memory
from hf_compress.surgery import Record, apply_record, record_of
from hf_compress.surgery.decomposition import SCHEMES, can_decompose, fold, full_rank, rank_for_energy, unfold
from hf_compress.surgery.factorize import FactorizeReport, factorize, factorize_report
from hf_compress.surgery.factorized import Factorized, factorized_in
from hf_compress.surgery.low_rank import (
    energies,
    input_moments,
    low_rank_weight,
    numerical_rank,
    output_error,
    shares_lost,
)
from hf_compress.surgery.rank_selection import Options, choose
from hf_compress.surgery.shrink import attach_record


def budgeted(model: nn.Module, x: Tensor, share: float = 0.7, **arguments: Any) -> FactorizeReport:
    """Factorise to a share of the MACs, or halfway to the lowest reachable."""
    try:
        factorize(model, macs=share, example_inputs=x[:1], **arguments)
    except BudgetError as error:
        lowest = float(re.search(r"macs ([\d.]+) \(", str(error)).group(1))  # type: ignore[union-attr]
        factorize(model, macs=(lowest + 1) / 2, example_inputs=x[:1], **arguments)
    return factorize_report(model)


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def random_layers(count: int, kinds: str = "conv2d conv1d linear") -> Iterator[tuple[nn.Module, Tensor]]:
    """Random layers in float64 with an input of batch size 2."""
    draw = random.Random(0)
    for seed in range(count):
        torch.manual_seed(seed)
        kind = draw.choice(kinds.split())
        groups = draw.choice([1, 1, 2, 3])
        bias = draw.random() < 0.5
        inside, out = groups * draw.randint(2, 5), groups * draw.randint(2, 6)
        if kind == "linear":
            shape = (2, 5, inside) if draw.random() < 0.5 else (2, inside)
            yield nn.Linear(inside, out, bias).double(), torch.randn(shape, dtype=torch.float64)
            continue
        dims = int(kind[4])
        kernel = tuple(draw.choice([1, 2, 3, 5]) for _ in range(dims))
        stride = tuple(draw.choice([1, 1, 2]) for _ in range(dims))
        dilation = tuple(draw.choice([1, 1, 2]) for _ in range(dims))
        padding: Any = tuple(draw.choice([0, 1, 2]) for _ in range(dims))
        if draw.random() < 0.2:
            stride, padding = (1,) * dims, draw.choice(["same", "valid"])
        mode = draw.choice(["zeros", "zeros", "reflect", "circular", "replicate"])
        layer = getattr(nn, f"Conv{dims}d")(
            inside, out, kernel, stride, padding, dilation, groups, bias, padding_mode=mode
        ).double()
        yield layer, torch.randn(2, inside, *(draw.randint(11, 14) for _ in range(dims)), dtype=torch.float64)


GEOMETRY = (
    "in_features out_features in_channels out_channels kernel_size stride padding dilation groups padding_mode".split()
)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_full_rank_is_exact_and_looks_like_the_layer(scheme: str) -> None:
    tried = 0
    for layer, x in random_layers(60):
        if can_decompose(layer, scheme):  # type: ignore[arg-type]
            continue
        tried += 1
        with torch.no_grad():
            expected = layer(x)
        model = One(copy.deepcopy(layer))
        rank = full_rank(layer.weight.shape, scheme, getattr(layer, "groups", 1))  # type: ignore[arg-type]
        if not isinstance(layer, nn.Linear) and len(layer.kernel_size) == 1 and scheme == "spatial":
            scheme_here = "channel"  # the same decomposition of one-dimensional kernels
        else:
            scheme_here = scheme
        factorize(model, ranks={"layer": rank}, scheme=scheme_here, example_inputs=x[:1])
        found = model.layer
        assert isinstance(found, Factorized) and found.rank == rank
        with torch.no_grad():
            assert_close(model(x), expected, 1e-9)
            assert_close(found.dense_weight(), layer.weight, 1e-9)
        for name in GEOMETRY:
            if hasattr(layer, name):
                assert getattr(found, name) == getattr(layer, name) or layer.padding_mode != "zeros", (name, layer)
        assert found.bias is None if layer.bias is None else torch.equal(found.bias, layer.bias)
        assert found.weight.shape == layer.weight.shape and found.weight.dtype == layer.weight.dtype
        assert found.weight.isnan().all() and not found.weight.requires_grad
    assert tried > 25


def test_truncation_loses_the_energy_that_is_reported() -> None:
    for layer, x in random_layers(40):
        for scheme in SCHEMES:
            if can_decompose(layer, scheme) or (scheme == "spatial" and layer.weight.ndim == 3):
                continue
            highest = full_rank(layer.weight.shape, scheme, getattr(layer, "groups", 1))
            model = One(copy.deepcopy(layer))
            factorize(
                model,
                ranks={"layer": (scheme if layer.weight.ndim > 2 else "channel", (highest + 1) // 2)},
                example_inputs=x,
            )
            row = factorize_report(model).layers[0]
            with torch.no_grad():
                dropped = (layer.weight - model.layer.dense_weight()).square().sum() / layer.weight.square().sum()
                assert abs(float(dropped) - row.lost) < 1e-12  # Eckart and Young, matrix by matrix
                # the output changes by no more than the Frobenius norm of the change allows (Cauchy and Schwarz)
                moment = input_moments(One(layer), {"layer": layer}, [(x,)])["layer"]
                change = (model.layer(x) - layer(x)).square().sum() / (layer(x).numel() / layer.weight.shape[0])
                reads = moment.diagonal(dim1=-2, dim2=-1).sum()
                assert change <= (1 + 1e-9) * dropped * layer.weight.square().sum() * reads


def test_rank_does_not_rise_while_steps_are_small() -> None:
    """Theorem 2 of trained rank pruning (arXiv 2004.14566): m steps shorter than sqrt(e) / m of the weight's norm."""
    generator = torch.Generator().manual_seed(0)
    energy, period = 0.05, 10
    for _ in range(20):
        weight = torch.randn(16, 8, 3, 3, generator=generator, dtype=torch.float64)
        for _ in range(6):
            spectrum = energies(weight, "channel", 1)
            rank = int(rank_for_energy(spectrum.sqrt(), energy))
            assert float(shares_lost(spectrum)[rank - 1]) <= energy
            weight = low_rank_weight(weight, "channel", 1, rank)
            longest = 0.0
            for _ in range(period):
                step = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
                step = step * (0.8 * energy**0.5 / period * weight.norm() / step.norm())
                longest, weight = max(longest, float(step.norm())), weight + step
            assert longest < energy**0.5 / period * float(weight.norm())  # the premise
            after = int(rank_for_energy(energies(weight, "channel", 1).sqrt(), energy))
            assert after <= rank


# -- one solution for the whole model -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_budget_is_met_and_costs_are_those_that_are_measured(family: str) -> None:
    model, x = FAMILIES[family]()
    dense = find_axes(model, x[:1])
    report = budgeted(model, x)
    axes = find_axes(model, x[:1])
    assert axes.cost() == report.after and count_macs(model, x[:1]) == axes.macs
    assert dense.cost() == report.before and report.after.macs < 0.95 * dense.macs
    assert sum(p.numel() for p in model.parameters()) == report.after.params
    assert all(row.macs < row.dense_macs and row.rank < row.full_rank for row in report.layers if row.rank)
    with torch.no_grad():
        assert logits(model(x)).isfinite().all()
    assert {path: module.rank for path, module in factorized_in(model)} == report.ranks


def test_small_problems_are_solved_almost_optimally() -> None:
    draw = np.random.default_rng(0)
    worst = 0.0
    for _ in range(60):
        tables = []
        for _ in range(4):
            whole = draw.integers(20, 200)
            spectrum = np.sort(draw.random(6) ** 3)[::-1]
            lost = 1 - np.cumsum(spectrum) / spectrum.sum()
            cost = np.arange(1, 7) * draw.integers(2, 30)
            kept = cost < whole
            costs = np.stack([np.r_[whole, cost[kept]]] * 2, axis=1)
            tables.append(
                Options(
                    [None] + ["channel"] * int(kept.sum()),
                    np.r_[0, np.arange(1, 7)[kept]],
                    costs,
                    np.r_[0.0, lost[kept].clip(0)],
                )
            )
        whole = sum(int(table.costs[0, 0]) for table in tables)
        limit = 0.6 * whole
        every = [
            sum(float(t.losses[i]) for t, i in zip(tables, picks, strict=True))
            for picks in itertools.product(*(range(len(t.ranks)) for t in tables))
            if sum(int(t.costs[i, 0]) for t, i in zip(tables, picks, strict=True)) <= limit
        ]
        chosen = choose(tables, [limit, np.inf])
        assert (chosen is None) == (not every)
        if chosen is None:
            continue
        assert sum(int(t.costs[i, 0]) for t, i in zip(tables, chosen, strict=True)) <= limit
        loss = sum(float(t.losses[i]) for t, i in zip(tables, chosen, strict=True))
        assert loss >= min(every) - 1e-12
        worst = max(worst, loss - min(every))
    assert worst < 1.0  # four layers are few, so one step is coarse; the sum of the losses is about 3


def test_ranks_that_hold_nothing_are_not_paid_for() -> None:
    """A weight of rank 3 gets rank 3, whatever the budget has left; the others keep what the budget gives them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 40, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(40, 3) @ torch.randn(3, 40))
        model[2].weight.zero_()  # which says nothing of the rank it needs
    x = torch.randn(5, 40)
    before = model[:2](x)
    factorize(model, macs=1.0, example_inputs=x)
    assert factorize_report(model).ranks == {"0": 3}
    layers = {layer.name: layer for layer in factorize_report(model).layers}
    assert layers["0"].lost == 0 and "is zero" in layers["2"].reason
    torch.testing.assert_close(model[:2](x), before, rtol=1e-5, atol=1e-5)  # rounding of float32, logits of size 10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_numerical_rank(scheme: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shape = (16, 12, 3, 3)
    matrices = unfold(torch.randn(shape, dtype=torch.float64), scheme)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    low = fold((left[..., :4] * values[..., None, :4]) @ right[..., :4, :], shape, scheme).to(dtype)
    # halves round by more than float32's resolution, so that all components are there
    assert numerical_rank(low, scheme, 1) == (4 if dtype in (torch.float64, torch.float32) else values.shape[-1])
    assert numerical_rank(torch.zeros(shape, dtype=dtype), scheme, 1) == 1


def test_global_choice_keeps_more_than_equal_shares() -> None:
    """More of the product of energies than the same share of the full rank in every layer, at the same MACs."""
    model, x = FAMILIES["vit"]()
    for number, layer in enumerate(m for m in model.modules() if isinstance(m, nn.Linear)):
        with torch.no_grad():  # spectra that differ from layer to layer, as trained ones do
            u, s, v = torch.linalg.svd(layer.weight, full_matrices=False)
            layer.weight.copy_(u * (s * torch.exp(-torch.arange(len(s)) * 0.05 * (number % 5))) @ v)
    uniform = copy.deepcopy(model)
    ranks = {name: 9 for name, m in model.named_modules() if isinstance(m, nn.Linear) and "classifier" not in name}
    factorize(uniform, ranks=ranks, scheme="channel", example_inputs=x[:1])
    report = budgeted(model, x, factorize_report(uniform).after.macs, scheme="channel")
    assert report.after.macs <= factorize_report(uniform).after.macs

    def kept(found: FactorizeReport) -> float:
        return sum(float(np.log1p(-row.lost)) for row in found.layers if row.rank)

    assert kept(report) > kept(factorize_report(uniform)) + 0.5


@pytest.mark.parametrize("scheme", SCHEMES)
def test_energy_bounds_every_layer(scheme: str) -> None:
    model, x = FAMILIES["plain_preactivation"]()
    low_rank = {path: m for path, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    for layer in low_rank.values():
        with torch.no_grad():
            layer.weight.copy_(low_rank_weight(layer.weight, scheme, 1, 2) + 0.01 * layer.weight)  # type: ignore[arg-type]
    factorize(model, energy=0.1, scheme=scheme, example_inputs=x[:1])
    rows = [row for row in factorize_report(model).layers if row.rank]
    assert rows and all(row.lost <= 0.1 and row.scheme in (scheme, "channel") for row in rows)
    for row in rows:
        assert row.rank == int(rank_for_energy(row.energies.sqrt(), 0.1))


def test_two_budgets_are_both_met() -> None:
    model, x = FAMILIES["timm_vit"]()
    factorize(model, macs=0.8, params=0.75, example_inputs=x[:1])
    report = factorize_report(model)
    assert report.after.macs <= 0.8 * report.before.macs and report.after.params <= 0.75 * report.before.params


def test_a_budget_that_is_met_already_changes_nothing() -> None:
    model, x = FAMILIES["vit"]()
    before = copy.deepcopy(model.state_dict())
    factorize(model, macs=1.0, example_inputs=x[:1])
    assert record_of(model) is None and not factorize_report(model).ranks
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_parameters_keep_what_they_are() -> None:
    model, x = FAMILIES["vit"]()
    model.half()
    model.vit.layers[0].requires_grad_(False)
    state = torch.get_rng_state()
    factorize(model.train(), macs=0.6, targets="vit.layers.*", example_inputs=x[:1].half())
    assert torch.equal(state, torch.get_rng_state())
    for path, module in factorized_in(model):
        assert module.training and module.first.training
        for parameter in module.parameters():
            assert parameter.dtype == torch.float16 and parameter.requires_grad == (".0." not in path)


# -- with data ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_data_never_makes_the_output_worse(scheme: str) -> None:
    """At any rank, on any layer, also where the batches are too few to tell all inputs apart."""
    better = tried = 0
    for layer, x in random_layers(40):
        if can_decompose(layer, scheme):  # type: ignore[arg-type]
            continue
        groups = getattr(layer, "groups", 1)
        channels = x.shape[1] if layer.weight.ndim > 2 else x.shape[-1]
        skew = torch.logspace(0, -6, channels, dtype=torch.float64)
        x = x * (skew.view(1, -1, *(1,) * (x.dim() - 2)) if layer.weight.ndim > 2 else skew)
        moment = input_moments(One(layer), {"layer": layer}, [(x,), (2 * x,)])["layer"]
        for rank in range(1, full_rank(layer.weight.shape, scheme, groups)):  # type: ignore[arg-type]
            errors = []
            for used in (moment, None):
                change = layer.weight.detach() - low_rank_weight(layer.weight, scheme, groups, rank, used)  # type: ignore[arg-type]
                assert full_rank_found(layer.weight.detach() - change, scheme, groups) <= rank
                predicted = output_error(change, groups, moment)
                with torch.no_grad():
                    other = copy.deepcopy(layer)
                    other.weight.copy_(layer.weight - change)
                    errors.append(float((other(x) - layer(x)).square().sum()))
                # batches x and 2 x: the mean over positions of both is 2.5 times that of the first
                positions = layer(x).numel() / layer.weight.shape[0]
                assert predicted == pytest.approx(2.5 * errors[-1] / positions, rel=1e-6, abs=1e-15)
            assert errors[0] <= errors[1] * (1 + 1e-9)
            better += errors[0] < 0.9 * errors[1]
            tried += 1
    assert better > tried / 3  # such inputs are what data is for


def full_rank_found(weight: Tensor, scheme: str, groups: int) -> int:
    spectrum = energies(weight, scheme, groups).sqrt()  # type: ignore[arg-type]
    return int((spectrum > 1e-7 * spectrum[0]).sum())


def test_channel_scheme_with_data_is_the_best_there_is() -> None:
    """The reported loss is the error on the batches, and no weight of that rank found by gradients comes below."""
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, padding=1).double()
    x = torch.randn(8, 4, 6, 6, dtype=torch.float64) * torch.tensor([3.0, 1.0, 0.3, 0.1]).view(1, 4, 1, 1)
    model = One(copy.deepcopy(layer))
    factorize(model, ranks={"layer": ("channel", 2)}, batches=[(x,)], example_inputs=x[:1])
    with torch.no_grad():
        clean = layer(x) - layer.bias.view(1, -1, 1, 1)
        share = (model(x) - layer(x)).square().sum() / clean.square().sum()
    assert factorize_report(model).layers[0].lost == pytest.approx(float(share), rel=1e-6)
    first, second = (p.detach().clone().requires_grad_() for p in (model.layer.first.weight, model.layer.second.weight))
    expected, optimizer = float(share), torch.optim.Adam([first, second], lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        output = nn.functional.conv2d(nn.functional.conv2d(x, first, padding=1), second)
        loss = (output - clean).square().sum() / clean.square().sum()
        assert float(loss.detach()) > expected * (1 - 1e-9)
        loss.backward()
        optimizer.step()


def test_data_help_a_whole_model() -> None:
    """Images with little variety, a transformer at half of the MACs: the logits change less than with weights alone."""
    errors = {}
    for seed in range(3):
        model, x = FAMILIES["vit"]()
        base = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        weights = torch.randn(64, 4, generator=torch.Generator().manual_seed(9))
        batch = {"pixel_values": torch.einsum("bk,kchw->bchw", weights, base)}
        with torch.no_grad():
            expected = model(**batch).logits
        for name, batches in (("weights", None), ("data", [batch])):
            small = copy.deepcopy(model)
            factorize(small, macs=0.5, batches=batches, example_inputs=x[:1])
            with torch.no_grad():
                errors.setdefault(name, []).append(float((small(**batch).logits - expected).square().mean()))
    assert sum(errors["data"]) < 0.7 * sum(errors["weights"]), errors


# -- what is left alone ---------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Layers that each have a reason to stay."""

    def __init__(self) -> None:
        super().__init__()
        self.good = nn.Linear(16, 64)
        self.back = nn.Linear(64, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.tied, self.twin = nn.Linear(16, 16), nn.Linear(16, 16)
        self.twin.weight = self.tied.weight
        self.hooked = nn.Linear(16, 16)
        self.hooked.register_forward_hook(lambda *_: None)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        self.idle = nn.Linear(16, 16)
        self.read, self.read_in_training = nn.Linear(16, 16), nn.Linear(16, 16)
        self.training_head = nn.Linear(16, 16)
        self.thin = nn.Linear(16, 1)
        self.deep = nn.Conv1d(16, 16, 3, groups=16)
        self.same, self.alias = nn.Linear(16, 16), nn.Identity()
        self.alias = self.same

    def forward(self, x: Tensor) -> Tensor:
        x = self.back(self.good(x.to(self.good.weight.dtype)))
        x = self.block(x + self.attention(x, x, x)[0])
        x = self.hooked(self.normed(self.twin(self.tied(x))))
        x = self.alias(self.same(x)) + nn.functional.linear(x, self.read.weight)
        if self.training:
            x = x @ self.read_in_training.weight + self.training_head(x)
        else:
            x = self.read_in_training(x)
        return self.thin(x + 0 * self.deep(x.transpose(1, 2)).sum())


def test_what_must_stay_stays_and_says_why() -> None:
    torch.manual_seed(0)
    model, x = Odd(), torch.randn(1, 5, 16)
    budgeted(model, x, 0.9)
    report = factorize_report(model)
    assert report.ranks and set(report.ranks) <= {"good", "back"}
    reasons = {row.name: row.reason for row in report.layers}
    for name, reason in {
        "attention.out_proj": "may do more",
        "block.linear1": "TransformerEncoderLayer",
        "tied": "shared",
        "twin": "shared",
        "hooked": "hooks",
        "normed": "may do more|no ordinary parameter",
        "idle": "does not run it",
        "training_head": "does not run it",
        "read": r"without running it \(linear\)",
        "read_in_training": r"without running it \(matmul\)",
        "thin": "rank 1",
        "deep": "rank 1",
        "same": "shared",
    }.items():
        assert re.search(reason, reasons[name]), (name, reasons[name])
    text = str(report)
    assert "left alone: hooks hang on it" in text and "good" in text and "MACs" in text
    with torch.no_grad():
        assert model.eval()(x).isfinite().all()


# -- the rank is an axis --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_pruning_afterwards_obeys_the_law(family: str) -> None:
    """Cut equals masked, for ranks and channels together, and ranks are axes of their own."""
    model, x = FAMILIES[family]()
    report = budgeted(model, x)
    model, x = model.double(), x.double()
    axes = find_axes(model, x[:1])
    for name, rank in report.ranks.items():
        if rank > 1:
            axis = axes[f"{name}:rank"]
            assert axis.size == rank and axis.is_exact
            assert {(m.parameter, m.dim) for m in axis.members} == {
                (f"{name}.first.weight", 0),
                (f"{name}.second.weight", 1),
            }
    keep = random_keep(axes, seed=0)
    assert any(name.endswith(":rank") for name in keep) or max(report.ranks.values()) == 1
    assert_cut_equals_masked(model, axes, keep, x)


def test_select_weighs_ranks_against_channels() -> None:
    model, x = FAMILIES["vit"]()
    report = budgeted(model, x, 0.8)
    before = find_axes(model, x[:1]).macs
    hf_compress.prune(model, macs=0.6, example_inputs=x[:1])
    axes = find_axes(model, x[:1])
    assert axes.macs <= 0.6 * before
    now = factorize_report(model).ranks
    assert set(now) == set(report.ranks) and sum(now.values()) < sum(report.ranks.values())
    assert any(axis.size < 40 for axis in axes if axis.name.endswith(("mlp.fc1", "mlp.fc1.second")))


# -- the record -----------------------------------------------------------------------------------------------------

ORDERS = ("F", "FP", "FPP", "PF", "PFP", "BPF", "FB")


def compressed(family: str, order: str) -> tuple[nn.Module, Tensor]:
    """Factorised (F), pruned (P) and with a block removed (B), in the given order."""
    model, x = FAMILIES[family]()
    for step in order:
        if step == "F":
            budgeted(model, x)
        elif step == "P":
            hf_compress.prune(model, ratio=0.3, fold_shift=True, example_inputs=x[:1])
        else:
            hf_compress.remove_blocks(model, hf_compress.find_blocks(model)[0])
    return model, x


def rebuilt(model: nn.Module) -> nn.Module:
    """From the configuration, the record and the state, as loading does it, without files."""
    config = copy.deepcopy(model.config)
    record = Record.from_json(json.loads(json.dumps(record_of(model).to_json())))
    del config.quantization_config
    with torch.device("meta"):
        skeleton = type(model)(config)
    apply_record(skeleton, record)
    assert all(tensor.is_meta for tensor in skeleton.parameters())
    fresh = type(model)(config).eval()  # buffers that checkpoints leave out
    apply_record(fresh, record)
    shapes = {name: tensor.shape for name, tensor in skeleton.named_parameters()}
    assert shapes == {name: tensor.shape for name, tensor in model.named_parameters()}
    fresh.load_state_dict(model.state_dict())
    attach_record(fresh, record)
    return fresh


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("family", ["vit", "regnet_x", "timm_densenet"])
def test_record_rebuilds_whatever_the_order(family: str, order: str) -> None:
    if "B" in order and family != "vit":
        order = order.replace("B", "P")  # its small models have no block to spare
    model, x = compressed(family, order)
    record = record_of(model)
    assert record.version == 3 and record.factorized
    other = rebuilt(model)
    assert {path: m.rank for path, m in factorized_in(other)} == {path: m.rank for path, m in factorized_in(model)}
    with torch.no_grad():
        assert torch.equal(other(x).logits, model(x).logits)
    for (path, a), (_, b) in zip(model.named_modules(), other.named_modules(), strict=True):
        for name in ("in_features", "out_features", "in_channels", "out_channels", "groups", "num_features"):
            assert vars(a).get(name) == vars(b).get(name), (path, name)
    hf_compress.prune(other, ratio=0.2, example_inputs=x[:1])
    assert record_of(other).factorized == record.factorized
    rebuilt(other)


def test_records_without_factors_are_written_as_before() -> None:
    model, x = FAMILIES["vit"]()
    hf_compress.prune(model, ratio=0.3, example_inputs=x[:1])
    assert record_of(model).to_json()["version"] == 1 and "factorized" not in record_of(model).to_json()


# -- checkpoints ----------------------------------------------------------------------------------------------------

RELOADED = [f"{family}-F" for family in FAMILIES if not family.startswith("plain")]
RELOADED += [f"{family}-PFP" for family in ("vit", "swin", "regnet_x", "mobilenet_v2")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints with what their models computed, reloaded and saved again elsewhere."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name in RELOADED:
        model, x = compressed(*name.split("-"))
        model.save_pretrained(root / name / "model")
        with torch.no_grad():
            torch.save((x, model(x).logits), root / name / "expected.pt")
    arguments = [sys.executable, "-c", LOAD_ALL, *(str(root / name) for name in RELOADED)]
    result = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert f"all {len(RELOADED)}" in result.stdout, result.stderr[-2000:]
    return {name: root / name for name in RELOADED}


@pytest.mark.parametrize("name", RELOADED)
def test_new_process_gives_the_same_logits_and_the_same_bytes(name: str, folders: dict[str, Path]) -> None:
    for file in ("config.json", "model.safetensors"):  # the logits were compared there, in the other process
        assert (folders[name] / "again" / file).read_bytes() == (folders[name] / "model" / file).read_bytes(), file


@pytest.mark.parametrize("name", ["vit-PFP", "regnet_x-F"])
def test_loading_options_work(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    load = transformers.AutoModelForImageClassification.from_pretrained
    x, expected = torch.load(folders[name] / "expected.pt")
    for arguments in ({"device_map": "auto"}, {"dtype": "auto"}, {"low_cpu_mem_usage": True}):
        with torch.no_grad():
            assert torch.equal(load(folders[name] / "model", **arguments)(x).logits, expected)
    half = load(folders[name] / "model", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with torch.no_grad():  # bfloat16 has 8 bits of mantissa
        assert (half(x.bfloat16()).logits.float() - expected).abs().max() < 0.1 * expected.abs().max()
    half.float().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    with torch.no_grad():
        sharded, half = in_own_memory(load(tmp_path / "sharded")), in_own_memory(half.float())
        assert torch.equal(sharded(x).logits, half(x).logits)


def test_reloaded_models_can_be_trained_and_report_their_ranks(folders: dict[str, Path]) -> None:
    model = transformers.AutoModelForImageClassification.from_pretrained(folders["vit-F"] / "model")
    report = factorize_report(model)
    assert report.ranks and report.before is None and "of 24" in str(report)
    x, _ = torch.load(folders["vit-F"] / "expected.pt")
    model.train()(x, labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad is not None for _, module in factorized_in(model) for p in module.parameters())


@pytest.mark.parametrize("family", ["vit", "plain_preactivation"])
def test_onnx_exports(family: str, tmp_path: Path) -> None:
    model, x = FAMILIES[family]()
    budgeted(model, x)
    path = hf_compress.export_onnx(model, tmp_path / "model.onnx", x[:1])
    assert Path(path).stat().st_size > 1000  # the export compares both models' outputs itself


# -- detectors ------------------------------------------------------------------------------------------------------


def detr() -> nn.Module:
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic", out_features=["stage4"]
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone_config=backbone, d_model=32, encoder_layers=1,
        decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
        num_queries=6, num_labels=3,
    )  # fmt: skip
    return transformers.DetrForObjectDetection(config)


def sidt() -> nn.Module:
    backbone = PrunedViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=64,
        patch_size=8,
        intermediate_sizes=[40, 32],
    )
    return SidtForObjectDetection(
        SidtConfig(backbone_config=backbone, pyramid_channels=24, group_size=4, head_layers=1, num_labels=5)
    )


@pytest.mark.parametrize(("build", "targets"), [(detr, "*layers*"), (sidt, None)])
def test_detectors(build: Any, targets: str | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = perturb(build()), images(64)
    report = budgeted(model, x, 0.6, targets=targets)
    assert len(report.ranks) > 2 and report.after == find_axes(model, x[:1]).cost()
    hf_compress.prune(model, ratio=0.2, example_inputs=x[:1])
    with torch.no_grad():
        expected = model(pixel_values=x)
    model.save_pretrained(tmp_path / "model")
    other = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        found = other(pixel_values=x)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.pred_boxes, expected.pred_boxes)
    other.save_pretrained(tmp_path / "again")
    weights = "model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (tmp_path / "model" / weights).read_bytes()
    assert record_of(other) == record_of(model)


# -- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"energy": 0.0}, MethodError, "between 0 and 1"),
        ({"energy": 1}, MethodError, "between 0 and 1"),
        ({"energy": -0.1}, MethodError, "between 0 and 1"),
        ({"energy": float("nan")}, MethodError, "between 0 and 1"),
        ({"energy": True}, MethodError, "between 0 and 1"),
        ({"energy": "0.1"}, MethodError, "between 0 and 1"),
        ({"macs": 0.01}, BudgetError, r"the lowest is macs 0\.\d+ \([\d,]+\) of the model"),
        ({"macs": 0.3, "energy": 0.3}, BudgetError, r"the lowest at energy=0.3 is macs 0\.\d+ .*raise energy"),
        ({"macs": 0}, BudgetError, "is not a budget"),
        ({"macs": 0.9, "params": 0.01}, BudgetError, "params 0"),
        ({"macs": 0.7, "scheme": "tucker"}, MethodError, "choose one of channel, spatial, decoupled"),
        ({"macs": 0.7, "targets": "*.mlp.fc9"}, MethodError, "'\\*.mlp.fc9' matches no linear layer"),
        ({"macs": 0.7, "targets": ["*.fc1", "Conv3d"]}, MethodError, "'Conv3d' matches no"),
        ({"macs": 0.7, "targets": []}, MethodError, "targets is empty"),
        ({"macs": 0.7, "batches": []}, DataError, "batches is empty"),
        ({"energy": 1e-9}, NothingToShrinkError, "none of 14 layers .*no scheme saves MACs at energy=1e-09"),
        ({}, MethodError, "say how far to go"),
        ({"ranks": {"*": 2}, "macs": 0.5}, MethodError, "cannot be combined with macs"),
        ({"ranks": {}}, MethodError, "must map patterns"),
        ({"ranks": {"*.fc9": 2}}, MethodError, "matches no"),
        ({"ranks": {"*.fc1": 0}}, MethodError, "a rank from 1 to 24"),
        ({"ranks": {"*.fc1": 25}}, MethodError, "a rank from 1 to 24"),
        ({"ranks": {"*.fc1": 2.5}}, MethodError, "positive integer"),
        ({"ranks": {"*.fc1": ("tucker", 3)}}, MethodError, "choose one of"),
        ({"ranks": {"*.projection": 3}}, MethodError, r"give \(scheme, rank\)"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_arguments_are_refused_and_change_nothing(arguments: Any, error: Any, message: str) -> None:
    model, x = FAMILIES["vit"]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        factorize(model, example_inputs=x[:1], **arguments)
    assert record_of(model) is None and list(before) == list(model.state_dict())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_models_with_nothing_to_factorise_and_broken_ones_are_refused() -> None:
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(NothingToShrinkError, match="no linear layer and no convolution"):
        factorize(One(nn.BatchNorm2d(3)), macs=0.5, example_inputs=x)
    with pytest.raises(NothingToShrinkError, match="1: no scheme saves MACs"):
        factorize(One(nn.Conv2d(3, 3, 3, groups=3)), macs=0.5, scheme="channel", example_inputs=x)
    with pytest.raises(NothingToShrinkError, match="the whole model"):
        factorize(nn.Conv2d(3, 3, 3), macs=0.5, example_inputs=x)
    broken = One(nn.Conv2d(3, 8, 3))
    broken.layer.weight.data[0, 0, 0, 0] = float("nan")
    for batches in (None, [(x,)]):
        with pytest.raises(ModelError, match="'layer' holds NaN"):
            factorize(broken, macs=0.5, batches=batches, example_inputs=x)
    with pytest.raises(ModelError, match="what 'layer' reads is not finite"):
        factorize(One(nn.Conv2d(3, 8, 3)), macs=0.5, batches=[(x / 0,)], example_inputs=x)
    with pytest.raises(ModelError, match="failed on the example inputs"):
        factorize(One(nn.Conv2d(3, 8, 3)), macs=0.5, example_inputs=torch.randn(1, 5, 8, 8))


def test_factorising_twice_leaves_factors_alone() -> None:
    model, x = FAMILIES["vit"]()
    factorize(model, macs=0.8, targets="*.mlp.*", example_inputs=x[:1])
    first = factorize_report(model).ranks
    factorize(model, macs=0.8, example_inputs=x[:1])
    report = factorize_report(model)
    assert first and first.items() <= report.ranks.items() and len(report.ranks) > len(first)
    assert any("two factors already" in row.reason for row in vars(model)["hf_compress_factorize_report"].layers)
    with torch.no_grad():
        assert torch.equal(rebuilt(model)(x).logits, model(x).logits)
