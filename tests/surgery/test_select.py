"""What ``select`` promises: budgets are met, as closely as single indices allow, or refused with the lowest reachable."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache

import numpy as np
import pytest
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_compress.axes import AxisGraph, find_axes
from hf_compress.errors import BudgetError, NothingToShrinkError, PlanError
from hf_compress.surgery import Plan, magnitude_scores, select

PROFILE = settings(max_examples=25, deadline=None, derandomize=True)


@cache
def graph_of(family: str) -> AxisGraph:
    model, x = FAMILIES[family]()
    return find_axes(model, x[:1])


def random_scores(axes: AxisGraph, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {axis.name: torch.rand(axis.size, generator=generator) for axis in axes}


@PROFILE
@given(
    family=st.sampled_from(["resnet_basic", "mobilenet_v2", "vit", "plain_dense"]),
    share=st.floats(0.3, 1.0),
    seed=st.integers(0, 2**16),
    kind=st.sampled_from(["macs", "params"]),
)
def test_budget_is_met_and_nothing_more_fits(family: str, share: float, seed: int, kind: str) -> None:
    axes = graph_of(family)
    scores = random_scores(axes, seed)
    try:
        plan = select(axes, scores, **{kind: share})
    except BudgetError:
        assert family == "vit" and share < 0.5  # its residual width is not exact and holds the most
        return
    limit = share * getattr(axes, kind) * (1 + 1e-12)  # a share that means a whole number must not lose one to rounding
    assert getattr(axes.cost(plan), kind) <= limit
    tied = {name for group in axes.sizes_tied for name in group}
    for name, size in plan.sizes.items():
        if name not in tied:
            assert getattr(axes.cost({**plan.sizes, name: size + 1}), kind) > limit
            kept = scores[name][list(plan.keep[name])]
            gone = torch.ones(axes[name].size, dtype=torch.bool)
            gone[list(plan.keep[name])] = False
            assert kept.min() >= scores[name][gone].max()


@PROFILE
@given(round_to=st.integers(1, 8), min_keep=st.integers(1, 6), share=st.floats(0.1, 1.0), seed=st.integers(0, 99))
def test_widths_obey_round_to_and_min_keep(round_to: int, min_keep: int, share: float, seed: int) -> None:
    axes = graph_of("resnet_bottleneck")
    try:
        plan = select(axes, random_scores(axes, seed), macs=share, round_to=round_to, min_keep=min_keep)
    except BudgetError:
        return  # what is then reachable is tested below
    for name, size in plan.sizes.items():
        assert size % round_to == 0 or size == axes[name].size
        assert size >= min(min_keep, axes[name].size)


@pytest.mark.parametrize("family", ["resnet_basic", "vit", "swin"])
def test_unreachable_budget_names_the_lowest_reachable_which_is_reachable(family: str) -> None:
    axes = graph_of(family)
    scores = random_scores(axes, 0)
    with pytest.raises(BudgetError, match="cannot be reached") as caught:
        select(axes, scores, macs=1e-4, min_keep=2)
    found = re.search(r"Ask for macs >= ([0-9.]+)", str(caught.value))
    assert found is not None
    assert axes.cost(select(axes, scores, macs=float(found[1]), min_keep=2)).macs <= float(found[1]) * axes.macs


def test_latency_budget_is_met_by_its_own_measure() -> None:
    axes = graph_of("resnet_basic")
    calls = []

    def measure(plan: Plan) -> float:
        calls.append(plan)
        return axes.cost(plan).macs / 1000

    limit = 0.6 * axes.macs / 1000
    plan = select(axes, random_scores(axes, 0), latency=(measure, limit))
    assert measure(plan) <= limit
    assert len(calls) <= 2 * math.log2(sum(axis.size for axis in axes)) + 4


class BlockTable:
    """A machine that computes four channels at a time: an axis costs the MACs of the next multiple of 4; and 1 ms."""

    def __init__(self, axes: AxisGraph) -> None:
        self.axes, self.names = axes, tuple(axes.axes)
        self.sizes = np.array([axis.size for axis in axes], dtype=float)
        self.dense_ms = self.predict()

    def predict(self, keep: Mapping[str, int] | None = None) -> float:
        blocks = {name: min(-(-size // 4) * 4, self.axes[name].size) for name, size in (keep or {}).items()}
        return 1.0 + self.axes.cost(blocks).macs / 1000

    def curve(self, names: Sequence[str], counts: Iterable[int]) -> np.ndarray:
        return np.array([self.predict(dict.fromkeys(names, int(count))) for count in counts])


@PROFILE
@given(
    family=st.sampled_from(["resnet_bottleneck", "mobilenet_v2"]),
    share=st.floats(0.4, 1.0),
    seed=st.integers(0, 2**16),
    per_cost=st.booleans(),
)
def test_latency_share_is_met_with_fast_widths_and_nothing_more_fits(
    family: str, share: float, seed: int, per_cost: bool
) -> None:
    axes = graph_of(family)
    table, scores = BlockTable(axes), random_scores(axes, seed)
    try:
        plan = select(axes, scores, latency=share, latency_table=table, per_cost=per_cost)
    except BudgetError as error:
        lowest = re.search(r"([0-9.]+) of the dense time", str(error))
        assert lowest is not None and float(lowest[1]) > share
        return
    limit = share * table.dense_ms
    assert table.predict(plan.sizes) <= limit
    tied = {name for group in axes.sizes_tied for name in group}
    for name, size in plan.sizes.items():
        assert size % 4 == 0  # any other width takes as long as the next multiple
        kept = torch.zeros(axes[name].size, dtype=torch.bool)
        kept[list(plan.keep[name])] = True
        assert scores[name][kept].min() >= scores[name][~kept].max() or name in tied
        if name not in tied:
            step = 8 if axes[name].size > 128 else 4  # of long axes only every other block is looked at
            assert table.predict({**plan.sizes, name: min(size + step, axes[name].size)}) > limit


def test_a_table_gives_fast_widths_under_any_budget() -> None:
    axes = graph_of("mobilenet_v2")
    table, scores = BlockTable(axes), random_scores(axes, 0)
    for budget in ({"macs": 0.5}, {"params": 0.5}, {"macs": 0.6, "latency": 0.6}):
        plan = select(axes, scores, latency_table=table, **budget)
        cost = axes.cost(plan)
        assert plan.sizes and all(size % 4 == 0 for size in plan.sizes.values())
        assert cost.macs <= budget.get("macs", 1) * axes.macs and cost.params <= budget.get("params", 1) * axes.params
        assert table.predict(plan.sizes) <= budget.get("latency", 1) * table.dense_ms
    rounded = select(axes, scores, macs=0.5, round_to=8, latency_table=table)
    assert all(size % 8 == 0 for size in rounded.sizes.values())


def test_latency_in_milliseconds_is_that_share() -> None:
    axes = graph_of("mobilenet_v2")
    table, scores = BlockTable(axes), random_scores(axes, 0)
    assert select(axes, scores, latency=1.0, latency_table=table).keep == {}
    half = select(axes, scores, latency=0.5, latency_table=table)
    assert half.keep and select(axes, scores, latency=0.5 * table.dense_ms, latency_table=table) == half


def test_an_axis_that_saves_no_time_stays_whole() -> None:
    axes = graph_of("mobilenet_v2")
    table, scores = BlockTable(axes), random_scores(axes, 0)
    first = next(iter(axes)).name

    class Deaf(BlockTable):
        def predict(self, keep: Mapping[str, int] | None = None) -> float:
            return super().predict({name: size for name, size in (keep or {}).items() if name != first})

    assert first in select(axes, scores, latency=0.5, latency_table=table).keep
    assert first not in select(axes, scores, latency=0.5, latency_table=Deaf(axes)).keep


def test_latency_that_cannot_be_is_named() -> None:
    axes = graph_of("mobilenet_v2")
    scores = random_scores(axes, 0)
    with pytest.raises(BudgetError, match=r"LatencyTable\.for_model"):
        select(axes, scores, latency=0.5)
    for wrong in (0, -1.0, float("nan"), float("inf"), True, "fast", (0.5,), (lambda plan: 1.0, 0)):
        with pytest.raises(BudgetError, match="latency"):
            select(axes, scores, latency=wrong, latency_table=BlockTable(axes))  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="of the dense time"):
        select(axes, scores, latency=1e-3, latency_table=BlockTable(axes))
    with pytest.raises(PlanError, match="other axes"):
        select(axes, scores, latency=0.5, latency_table=BlockTable(graph_of("vit")))


def test_ratio_is_a_share_of_every_axis_or_of_the_axes_named() -> None:
    axes = graph_of("resnet_basic")
    scores = random_scores(axes, 0)
    for name, size in select(axes, scores, ratio=0.25).sizes.items():
        assert size == axes[name].size - math.floor(0.25 * axes[name].size)
    first = next(iter(axes)).name
    assert set(select(axes, scores, ratio={first: 0.5}).keep) == {first}
    with pytest.raises(PlanError, match="matches no axis"):
        select(axes, scores, ratio={"nothing.*": 0.5})


def test_same_size_ties_axes_and_keeps_the_best_of_each() -> None:
    axes = graph_of("mobilenet_v2")
    sizes = {axis.size for axis in axes}
    size = max(sizes, key=lambda s: sum(axis.size == s for axis in axes))
    group = [axis.name for axis in axes if axis.size == size]
    assert len(group) > 1
    plan = select(axes, random_scores(axes, 0), macs=0.5, same_size=[group])
    assert len({plan.sizes.get(name, size) for name in group}) == 1


def test_inexact_axes_shrink_only_when_asked() -> None:
    axes = graph_of("vit")
    scores = random_scores(axes, 0)
    inexact = {axis.name for axis in axes if not axis.is_exact}
    assert inexact
    assert not inexact & set(select(axes, scores, macs=0.7).keep)
    assert inexact & set(select(axes, scores, macs=0.3, inexact=True).keep)


def test_equal_scores_take_from_every_axis_its_last_indices() -> None:
    axes = graph_of("resnet_basic")
    plan = select(axes, {axis.name: torch.ones(axis.size) for axis in axes}, macs=0.5)
    assert set(plan.keep) == set(axes.axes)
    assert all(kept == tuple(range(len(kept))) for kept in plan.keep.values())


def test_same_arguments_give_the_same_plan_through_json() -> None:
    axes = graph_of("swin")
    plans = [select(axes, random_scores(axes, 3), macs=0.6) for _ in range(2)]
    assert plans[0] == plans[1]
    assert Plan.from_json(plans[0].to_json(), axes) == plans[0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, BudgetError, "no budget"),
        ({"macs": 0}, BudgetError, "not a budget"),
        ({"macs": float("nan")}, BudgetError, "not a budget"),
        ({"macs": 0.5, "ratio": 0.5}, BudgetError, "cannot be combined"),
        ({"ratio": 1.5}, BudgetError, "not a share"),
        ({"macs": 0.5, "round_to": 0}, PlanError, "round_to"),
        ({"macs": 0.5, "min_keep": -1}, PlanError, "min_keep"),
        ({"macs": 0.5, "same_size": ["nope*"]}, PlanError, "matches no axis"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, error: type[Exception], message: str) -> None:
    axes = graph_of("resnet_basic")
    with pytest.raises(error, match=message):
        select(axes, random_scores(axes, 0), **arguments)


def test_bad_scores_are_named() -> None:
    axes = graph_of("resnet_basic")
    scores = random_scores(axes, 0)
    first = next(iter(axes)).name
    with pytest.raises(PlanError, match="NaN"):
        select(axes, {**scores, first: torch.full((axes[first].size,), float("nan"))}, macs=0.5)
    with pytest.raises(PlanError, match="shape"):
        select(axes, {**scores, first: torch.ones(3)}, macs=0.5)
    with pytest.raises(PlanError, match="no axis is called"):
        select(axes, {"nope": torch.ones(3)}, macs=0.5)


def test_nothing_to_shrink_is_said() -> None:
    linear = find_axes(nn.Sequential(nn.Linear(4, 2)), torch.zeros(1, 4))
    with pytest.raises(NothingToShrinkError):
        select(linear, {}, macs=0.5)
    vit = graph_of("vit")
    inexact = {axis.name: torch.rand(axis.size) for axis in vit if not axis.is_exact}
    with pytest.raises(NothingToShrinkError, match="inexact=True"):
        select(vit, inexact, macs=0.9)


def test_magnitude_scores_rank_by_what_hangs_on_an_index() -> None:
    model, x = FAMILIES["resnet_basic"]()
    axes = find_axes(model, x[:1])
    for axis in axes:  # the first index of every axis loses its weights
        for member in axis.members:
            tensor = dict(model.named_parameters()).get(member.parameter)
            if tensor is not None and tensor.dim() > 1:
                tensor.data.index_fill_(member.dim, member.positions[0], 0.0)
    scores = magnitude_scores(model, axes)
    assert set(scores) == set(axes.axes)
    for score in scores.values():
        assert int(score.argmin()) == 0 and score[0] == 0


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"version": 1}', '{"version": 99, "keep": {}}', "{", '{"version": 1, "keep": []}']
)
def test_plans_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(PlanError):
        Plan.from_json(text)


@pytest.mark.parametrize("kept", [(), (1, 1), (2, 1), (-1, 0), (0, 10**6), (0.5,), "01", 3, (True,)])
def test_indices_that_are_none_are_refused(kept: object) -> None:
    axes = graph_of("resnet_basic")
    with pytest.raises(PlanError):
        Plan({next(iter(axes)).name: kept}, axes)  # type: ignore[dict-item]
