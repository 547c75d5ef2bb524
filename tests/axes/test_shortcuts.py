"""Large products are not computed while a model is watched, and that changes nothing of what is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_compress import find_axes
from hf_compress.axes import AxisGraph, finding, shortcuts, tracing
from hf_compress.errors import ModelError


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand-ins for products of any size; the names of those that were made."""
    found: list[str] = []
    monkeypatch.setitem(shortcuts.limits, "macs", 0)
    monkeypatch.setitem(shortcuts.limits, "weight", 0)

    def watched(name: str, arguments: Any) -> Tensor | None:
        result = shortcuts.stand_in(name, arguments)
        found.extend([name] if result is not None else [])
        return result

    monkeypatch.setattr(tracing, "stand_in", watched)
    return found


def described(graph: AxisGraph) -> dict[str, Any]:
    axes = {
        axis.name: (
            axis.size, axis.is_exact, axis.reasons, axis.macs, axis.params,
            [(m.parameter, m.dim, m.positions.tolist()) for m in axis.members],
            [(m.parameter, m.dim) for m in axis.producers], [(m.parameter, m.dim) for m in axis.scales],
        )
        for axis in graph
    }  # fmt: skip
    return {
        "axes": axes, "contractions": graph.contractions, "tied": graph.sizes_tied, "rules": graph.without_rule,
        "macs": graph.macs, "params": graph.params, "attributes": [(a.module, a.name, a.index) for a in graph.attributes],
        "rescales": [(r.parameter, r.dim) for r in graph.rescales],
    }  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_axes_are_found(family: str, seen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = FAMILIES[family]()
    quick = described(find_axes(model, x))
    assert seen  # else nothing is compared
    watch = finding._watched_pass
    monkeypatch.setattr(
        finding,
        "_watched_pass",
        lambda model, inputs, constants, in_full: watch(model, inputs, constants, in_full=True),
    )
    count = len(seen)
    assert described(find_axes(model, x)) == quick
    assert len(seen) == count


@settings(max_examples=60, deadline=None)
@given(
    rank=st.integers(1, 3),
    groups=st.integers(1, 3),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    as_tuple=st.booleans(),
    double=st.booleans(),
)
def test_stand_ins_look_like_results_of_convolutions(
    rank: int, groups: int, kernel: int, stride: int, padding: int, dilation: int, as_tuple: bool, double: bool
) -> None:
    dtype = torch.float64 if double else torch.float32
    x = torch.randn(2, 2 * groups, *range(9, 9 + rank), dtype=dtype)
    weight = torch.randn(4 * groups, 2, *[kernel] * rank, dtype=dtype)
    numbers: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
    if as_tuple:
        numbers = {name: (value,) * rank for name, value in numbers.items()}
    expected = (F.conv1d, F.conv2d, F.conv3d)[rank - 1](x, weight, None, groups=groups, **numbers)
    arguments = {"input": x, "weight": weight, "groups": groups, **numbers}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shortcuts.limits, "macs", 0)
        patch.setitem(shortcuts.limits, "weight", 0)
        found = shortcuts.stand_in(f"conv{rank}d", arguments)
    assert found is not None and found.shape == expected.shape and found.dtype == expected.dtype


def test_other_stand_ins_look_like_results(seen: list[str]) -> None:
    x, weight = torch.randn(2, 5, 6, dtype=torch.bfloat16), torch.randn(7, 6, dtype=torch.bfloat16)
    found = shortcuts.stand_in("linear", {"input": x, "weight": weight})
    assert found is not None and found.shape == (2, 5, 7) and found.dtype == torch.bfloat16
    query, key, value = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 9, 4), torch.randn(2, 3, 9, 8)
    found = shortcuts.stand_in("scaled_dot_product_attention", {"query": query, "key": key, "value": value})
    assert found is not None and found.shape == F.scaled_dot_product_attention(query, key, value).shape
    large = shortcuts.stand_in("linear", {"input": torch.randn(300, 6), "weight": torch.randn(700, 6)})
    assert large is not None and large.shape == (300, 700) and large.isfinite().all() and large.std() > 0.9


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("relu", {"input": torch.zeros(2, 3)}),
        ("linear", {"input": torch.zeros(2, 3), "weight": torch.zeros(4, 5)}),  # torch says what is wrong
        ("linear", {"input": torch.zeros(2, 3), "weight": torch.randn(4, 3).double()}),
        ("linear", {"input": torch.randn(2, 3, device="meta"), "weight": torch.randn(4, 3, device="meta")}),
        ("conv2d", {"input": torch.randn(1, 3, 8, 8), "weight": torch.randn(4, 3, 3, 3), "padding": "same"}),
        ("conv2d", {"input": torch.randn(1, 3, 2, 2), "weight": torch.randn(4, 3, 3, 3)}),  # too small an image
        ("conv2d", {"input": torch.randn(3, 8, 8), "weight": torch.randn(4, 3, 3, 3)}),
    ],
    ids=["no product", "sizes that disagree", "two types", "meta", "padding by name", "small image", "no batch"],
)
def test_what_is_not_plain_is_computed(name: str, arguments: dict[str, Any], seen: list[str]) -> None:
    assert shortcuts.stand_in(name, arguments) is None


def test_small_products_and_autocast_are_computed() -> None:
    small = {"input": torch.randn(4, 32), "weight": torch.randn(8, 32)}
    large = {"input": torch.randn(64, 256), "weight": torch.randn(256, 256)}
    assert shortcuts.stand_in("linear", small) is None
    assert shortcuts.stand_in("linear", large) is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert shortcuts.stand_in("linear", large) is None


class Particular(nn.Module):
    """Fails unless its layer was computed; or always."""

    def __init__(self, always: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.always = nn.Linear(4, 8), nn.Linear(8, 3), always

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        with torch._C.DisableTorchFunction():
            if self.always or not torch.equal(hidden, F.linear(x, self.first.weight, self.first.bias)):
                raise ValueError("not what was expected")
        return self.second(hidden.relu())


def test_a_model_that_looks_at_its_values_is_run_as_it_is(seen: list[str]) -> None:
    graph = find_axes(Particular(), torch.randn(1, 4))
    assert seen == ["linear"] and [axis.size for axis in graph] == [8]
    with pytest.raises(ModelError, match="not what was expected"):
        find_axes(Particular(always=True), torch.randn(1, 4))
