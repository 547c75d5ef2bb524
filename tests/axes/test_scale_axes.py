"""Attention divides by the square root of a head's dimension; surgery makes up for the change in the query's layer.

``ATTENTIONS`` are spellings of the same thing, in all of which removing dimensions of heads is exact. ``UNDECIDED`` are those
where no layer can absorb the change alone: there the axis is marked. One line adds a spelling.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, perturb
from masking import assert_close, assert_cut_equals_masked, logits, zero_at_producers
from torch import Tensor, nn

from hf_compress.axes import AxisGraph, find_axes
from hf_compress.surgery import Plan, shrink

WIDTH, HEADS, DIM = 12, 3, 8


class Attention(nn.Module):
    """A patch projection, one attention given as a function of the module and its input, and a head."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **parts: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.run = run
        self.num_heads, self.head_dim = HEADS, DIM
        self.embed = nn.Linear(6, WIDTH)
        made = {"proj": lambda: nn.Linear(HEADS * DIM, WIDTH), **parts}
        for name, make in made.items():
            setattr(self, name, make())
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.embed(x))
        return self.head(h + self.proj(self.run(self, h).transpose(1, 2).flatten(2)))


def heads(m: Any, t: Tensor) -> Tensor:
    return t.unflatten(-1, (-1, m.head_dim)).transpose(1, 2)


def separate(m: Any, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return heads(m, m.q(h)), heads(m, m.k(h)), heads(m, m.v(h))


def packed(m: Any, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, count, _ = h.shape
    q, k, v = m.qkv(h).reshape(batch, count, 3, m.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def chunked(m: Any, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (heads(m, part) for part in m.qkv(h).chunk(3, dim=-1))
    return q, k, v


def eager(q: Tensor, k: Tensor, v: Tensor, scale: Any = 1.0) -> Tensor:
    return (q @ k.transpose(-2, -1) * scale).softmax(-1) @ v


def rotate(t: Tensor) -> Tensor:
    angle = torch.arange(t.shape[2], dtype=t.dtype)[:, None]
    first, second = t.chunk(2, dim=-1)
    return t * angle.cos() + torch.cat((-second, first), dim=-1) * angle.sin()


def divided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.size(-1))
    return (scores + torch.arange(scores.shape[-1])).softmax(-1) @ v


def of_map(m: Any, h: Tensor, layers: Callable[[Tensor], Tensor]) -> Tensor:
    return layers(h.transpose(1, 2)[..., None]).flatten(2).transpose(1, 2)


sdpa = F.scaled_dot_product_attention
Q = {name: (lambda: nn.Linear(WIDTH, HEADS * DIM)) for name in "qkv"}
QKV = {"qkv": lambda: nn.Linear(WIDTH, 3 * HEADS * DIM)}
GROUPED = {**Q, "q": lambda: nn.Linear(WIDTH, 2 * HEADS * DIM), "proj": lambda: nn.Linear(2 * HEADS * DIM, WIDTH)}
CONV = {**Q, "q": lambda: nn.Conv2d(WIDTH, HEADS * DIM, 1, bias=False), "n": lambda: nn.BatchNorm2d(HEADS * DIM)}

ATTENTIONS: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, Callable[[], nn.Module]]]] = {
    "fused": (lambda m, h: sdpa(*separate(m, h)), Q),
    "fused_packed": (lambda m, h: sdpa(*packed(m, h)), QKV),
    "fused_chunked": (lambda m, h: sdpa(*chunked(m, h)), QKV),
    "fused_given_scale": (lambda m, h: sdpa(*separate(m, h), scale=m.head_dim**-0.5), Q),
    "fused_masked": (lambda m, h: sdpa(*packed(m, h), is_causal=True), QKV),
    "fused_without_bias": (lambda m, h: sdpa(*separate(m, h)), {n: (lambda: nn.Linear(WIDTH, HEADS * DIM, False)) for n in "qkv"}),
    "fused_grouped": (lambda m, h: sdpa(*separate(m, h), enable_gqa=True), GROUPED),
    "scores_divided": (lambda m, h: divided(*separate(m, h)), Q),
    "scores_divided_packed": (lambda m, h: divided(*packed(m, h)), QKV),
    "query_scaled": (lambda m, h: (lambda q, k, v: ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1) @ v)(*packed(m, h)), QKV),
    "power_of_attribute": (lambda m, h: eager(*chunked(m, h), m.head_dim**-0.5), QKV),
    "power_of_shape": (lambda m, h: (lambda q, k, v: eager(q, k, v, q.shape[-1] ** -0.5))(*packed(m, h)), QKV),
    "two_roots": (lambda m, h: (lambda q, k, v: eager(q * m.head_dim**-0.25, k * m.head_dim**-0.25, v))(*separate(m, h)), Q),
    "inverse_root_times_number": (lambda m, h: eager(*separate(m, h), 2.0 * (1.0 / math.sqrt(m.head_dim))), Q),
    "width_by_heads": (lambda m, h: eager(*separate(m, h), (m.q.out_features // m.num_heads) ** -0.5), Q),
    "key_scaled": (lambda m, h: (lambda q, k, v: eager(q, k / math.sqrt(k.shape[-1]), v))(*separate(m, h)), Q),
    "rotary": (lambda m, h: (lambda q, k, v: sdpa(rotate(q), rotate(k), v))(*packed(m, h)), QKV),
    "pooled_query": (lambda m, h: (lambda q, k, v: sdpa(q.unflatten(2, (-1, 2)).amax(2), k, v).repeat(1, 1, 2, 1))(*packed(m, h)), QKV),
    "convolution_and_norm": (lambda m, h: sdpa(heads(m, of_map(m, h, lambda x: m.n(m.q(x)))), heads(m, m.k(h)), heads(m, m.v(h))), CONV),
    "normalised_key": (lambda m, h: (lambda q, k, v: sdpa(q, k / (1 + k.abs()), v))(*separate(m, h)), Q),
    "mask_added": (lambda m, h: (lambda q, k, v: (q @ k.mT * q.shape[-1] ** -0.5 + torch.ones(4, 4).tril().log()).softmax(-1) @ v)(*packed(m, h)), QKV),
}  # fmt: skip

UNDECIDED: dict[str, tuple[Callable[[Any, Tensor], Tensor], dict[str, Callable[[], nn.Module]]]] = {
    "nonlinear_both": (lambda m, h: (lambda q, k, v: sdpa(q.tanh(), k.tanh(), v))(*separate(m, h)), Q),
    "query_is_key": (lambda m, h: sdpa(heads(m, m.q(h)), heads(m, m.q(h)), heads(m, m.v(h))), Q),
    "query_used_again": (lambda m, h: (lambda q, k, v: sdpa(q, k.tanh(), v) + q)(*separate(m, h)), Q),
    "query_with_position": (lambda m, h: (lambda q, k, v: sdpa(q + torch.ones(4, 1), k.tanh(), v))(*separate(m, h)), Q),
    "query_changed_in_place": (lambda m, h: (lambda q, k, v: sdpa(q.add_(1), k.tanh(), v))(*separate(m, h)), Q),
    "weight_read_elsewhere": (lambda m, h: sdpa(*separate(m, h)) * m.q.weight.mean(), Q),
    "weight_computed": (lambda m, h: (lambda q, k, v: sdpa(q, k.tanh(), v))(
        heads(m, F.linear(h, m.q.weight * 2, m.q.bias)), heads(m, m.k(h)), heads(m, m.v(h))), Q),
    "logarithm": (lambda m, h: eager(*separate(m, h), math.log(m.head_dim)), Q),
    "sum_of_sizes": (lambda m, h: eager(*separate(m, h), 1 / (m.head_dim**0.5 + 1)), Q),
    "tensor_of_a_size": (lambda m, h: eager(*separate(m, h), torch.tensor(m.head_dim**-0.5)), Q),
    "scaled_and_not": (lambda m, h: (lambda q, k, v: sdpa(q, k, v) + sdpa(q, k, v, scale=0.3))(*separate(m, h)), Q),
}  # fmt: skip


def built(spelling: str) -> tuple[nn.Module, Tensor, AxisGraph]:
    run, parts = (ATTENTIONS | UNDECIDED)[spelling]
    torch.manual_seed(0)
    model = perturb(Attention(run, **parts)).double()
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    return model, x, find_axes(model, x)


def keep_of(graph: AxisGraph, kinds: tuple[str, ...], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for axis in graph:
        if axis.is_exact and axis.name.rpartition(":")[2] in kinds:
            mask = torch.ones(axis.size, dtype=torch.bool)
            mask[torch.randperm(axis.size, generator=generator)[: max(1, axis.size // 3)]] = False
            keep[axis.name] = mask
    return keep


def plan_of(graph: AxisGraph, keep: dict[str, Tensor]) -> Plan:
    return Plan({name: tuple(mask.nonzero().flatten().tolist()) for name, mask in keep.items()}, graph)


DIMS = (
    "head_dim",
    "value_dim",
    "part",
)  # one attribute measures the first two, which keep equally many; half of a rotation
KINDS = {"head_dim": DIMS, "heads": ("heads",), "both": ("heads", *DIMS)}


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("spelling", ATTENTIONS)
def test_removing_parts_of_heads_is_exact(spelling: str, kinds: str) -> None:
    model, x, graph = built(spelling)
    assert [axis.reasons for axis in graph if axis.name.endswith(("heads", "head_dim"))].count(()) >= 1
    assert all(axis.is_exact for axis in graph if axis.name.endswith(":head_dim"))
    keep = keep_of(graph, KINDS[kinds], seed=1)
    # 1e-9 of the largest output: float64 rounding through four layers stays below 1e-12
    small = assert_cut_equals_masked(model, graph, keep, x)
    by_surgery = shrink(copy.deepcopy(model), plan_of(graph, keep))
    assert_close(by_surgery(x), small(x))
    changes = any(rescale.factor(plan_of(graph, keep).sizes) != 1 for rescale in graph.rescales)
    assert changes == (kinds != "heads") or spelling == "width_by_heads"  # its quotient changes with the heads as well


@pytest.mark.parametrize("spelling", UNDECIDED)
def test_what_no_layer_can_absorb_is_marked(spelling: str) -> None:
    _, _, graph = built(spelling)
    marked = [axis for axis in graph if axis.name.endswith(":head_dim")]
    assert marked and all("scale" in axis.reasons for axis in marked)


@pytest.mark.parametrize("spelling", ATTENTIONS)
def test_pruning_twice(spelling: str) -> None:
    model, x, _ = built(spelling)
    for seed in (1, 2):
        graph = find_axes(model, x)
        keep = keep_of(graph, DIMS, seed)
        masked = zero_at_producers(copy.deepcopy(model), graph, keep)(x)
        before = model(x)
        model = shrink(model, plan_of(graph, keep))
        assert_close(model(x), masked)
        assert not torch.allclose(masked, before)


def test_whole_heads_leave_the_remaining_weights_as_they_are() -> None:
    model, _, graph = built("fused_packed")
    before = model.qkv.weight.detach().reshape(3, HEADS, DIM, WIDTH)
    small = shrink(copy.deepcopy(model), plan_of(graph, {"qkv:heads": torch.tensor([True, False, True])}))
    assert torch.equal(small.qkv.weight, before[:, [0, 2]].reshape(-1, WIDTH))


def test_only_the_query_is_rescaled() -> None:
    _, _, graph = built("fused_packed")
    assert {(rescale.parameter, rescale.dim) for rescale in graph.rescales} == {("qkv.weight", 0), ("qkv.bias", 0)}
    for rescale in graph.rescales:
        assert rescale.positions.tolist() == list(range(HEADS * DIM))  # the first third of the packed projection
        assert rescale.factor({"qkv:head_dim": 2}) == pytest.approx(math.sqrt(2 / DIM))  # sqrt(new / old)
        assert rescale.factor({"qkv:heads": 1}) == 1


def test_a_folded_shift_is_rescaled_with_the_query() -> None:
    """Folding may give the query a bias that it did not have; the axes do not know it."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv1d(6, WIDTH, 1), nn.BatchNorm1d(WIDTH)
            for name in "qkv":
                setattr(self, name, nn.Linear(WIDTH, HEADS * DIM, bias=False))
            self.proj = nn.Linear(HEADS * DIM, 5)
            self.head_dim = DIM

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.norm(self.conv(x.mT))).mT
            return self.proj(sdpa(*separate(self, h)).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    model = perturb(Net()).double()
    with torch.no_grad():
        model.norm.weight[:4] = 0.0  # these channels emit a constant, which folding carries into q, k and v exactly
        model.norm.bias[:4] = torch.rand(4, dtype=torch.float64) + 0.5
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    graph = find_axes(model, x)
    keep = {"conv": torch.arange(WIDTH) >= 4, "q:head_dim": torch.arange(DIM) < 5}
    (name,) = [axis.name for axis in graph if any(member.parameter == "norm.weight" for member in axis.members)]
    keep[name] = keep.pop("conv")
    keep["v:value_dim"] = keep["q:head_dim"]
    expected = zero_at_producers(copy.deepcopy(model), graph, {n: keep[n] for n in ("q:head_dim", "v:value_dim")})(x)
    small = shrink(copy.deepcopy(model), plan_of(graph, keep), fold_shift=True, example_inputs=x)
    assert small.q.bias is not None
    assert_close(small(x), expected)


def test_a_model_of_timm() -> None:
    model, x = FAMILIES["timm_vit"]()
    model, x = model.double(), x.double()
    graph = find_axes(model, x)
    keep = keep_of(graph, ("heads", *DIMS), seed=0)
    assert len(keep) == 4 and len(graph.rescales) == 4
    small = shrink(copy.deepcopy(model), plan_of(graph, keep))
    assert_close(logits(small(x)), logits(zero_at_producers(copy.deepcopy(model), graph, keep)(x)))
