"""Any plan over exact axes of any architecture: the shrunk model computes what the masked dense model computes.

Architectures are drawn as lists of blocks with random widths; plans keep random indices of every exact axis. The
examples are the same in every run (``derandomize``).
"""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, perturb
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from masking import assert_close, logits, zero_at_producers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hf_compress.axes import AxisGraph, find_axes
from hf_compress.surgery import Plan, shrink

ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU, "hardswish": nn.Hardswish, "sigmoid": nn.Sigmoid}

# -- blocks: each maps a feature map of a given width to one of the width that it names ----------------------------


class Conv(nn.Module):
    """Convolution, maybe a norm, an activation; dense, grouped or depthwise."""

    def __init__(self, width: int, out: int, kernel: int, groups: int, norm: str, bias: bool, activation: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, out, kernel, padding=kernel // 2, groups=groups, bias=bias)
        self.norm = {"none": nn.Identity, "batch": nn.BatchNorm2d}.get(norm, lambda n: nn.GroupNorm(2, n))(out)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.conv(x)))


class Residual(nn.Module):
    def __init__(self, width: int, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Dense(nn.Module):
    """The input beside what is made of it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.inner(x)], dim=1)


class SqueezeExcite(nn.Module):
    def __init__(self, width: int, reduced: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(width, reduced, 1), nn.Conv2d(reduced, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.expand(torch.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


class Shuffle(nn.Module):
    """Channel shuffle, ShuffleNet's way."""

    def forward(self, x: Tensor) -> Tensor:
        batch, width, height, length = x.shape
        return x.view(batch, 2, width // 2, height, length).transpose(1, 2).reshape(batch, -1, height, length)


class Attention(nn.Module):
    """A pre-norm transformer block over the pixels: attention with separate or packed projections, an MLP or a GLU."""

    def __init__(self, width: int, heads: int, head_dim: int, hidden: int, packed: bool, gated: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.gated = heads, head_dim, gated
        self.scale = head_dim**-0.5
        self.norm, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        sizes = [3 * heads * head_dim] if packed else [heads * head_dim] * 3
        self.projections = nn.ModuleList(nn.Linear(width, size) for size in sizes)
        self.out = nn.Linear(heads * head_dim, width)
        self.fc1, self.fc2 = nn.Linear(width, hidden * (1 + gated)), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, width, height, length = x.shape
        x = x.flatten(2).transpose(1, 2)
        y = self.norm(x)
        if len(self.projections) == 1:
            shape = (batch, -1, 3, self.num_heads, self.head_dim)
            q, k, v = self.projections[0](y).reshape(shape).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = (
                layer(y).view(batch, -1, self.num_heads, self.head_dim).transpose(1, 2) for layer in self.projections
            )
        y = (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1) @ v
        x = x + self.out(y.transpose(1, 2).reshape(batch, -1, self.num_heads * self.head_dim))
        y = self.fc1(self.norm_mlp(x))
        x = x + self.fc2(F.glu(y) if self.gated else F.gelu(y))
        return x.transpose(1, 2).view(batch, width, height, length)


class Net(nn.Module):
    def __init__(self, blocks: list[nn.Module], head: nn.Module, pooled: bool) -> None:
        super().__init__()
        self.blocks, self.head, self.pooled = nn.Sequential(*blocks), head, pooled

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.blocks(x), 2)
        return self.head(x.mean((2, 3)) if self.pooled else x.flatten(1))


# -- architectures ------------------------------------------------------------------------------------------------

SIZE = 6  # pixels
EVEN = st.sampled_from([4, 6, 8, 10, 12])


@dataclass
class Architecture:
    """How to build a network; shown by hypothesis when a law fails."""

    spec: list[tuple[str, dict[str, Any]]]
    pooled: bool
    hidden: int
    seed: int

    def build(self) -> nn.Module:
        torch.manual_seed(self.seed)
        blocks: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1)]
        width = 8
        for kind, a in self.spec:
            block: nn.Module
            if kind == "conv":
                block = Conv(width, a["out"], a["kernel"], 1, a["norm"], a["bias"], a["activation"])
                width = a["out"]
            elif kind == "grouped":
                block = Conv(width, width, a["kernel"], 2, a["norm"], a["bias"], a["activation"])
            elif kind == "depthwise":
                block = Conv(width, width, a["kernel"], width, a["norm"], a["bias"], a["activation"])
            elif kind == "residual":
                inner = [Conv(width, a["out"], a["kernel"], 1, a["norm"], a["bias"], a["activation"])]
                block = Residual(width, nn.Sequential(*inner, nn.Conv2d(a["out"], width, 1)))
            elif kind == "dense":
                block = Dense(Conv(width, a["out"], a["kernel"], 1, a["norm"], a["bias"], a["activation"]))
                width += a["out"]
            elif kind == "squeeze":
                block = SqueezeExcite(width, a["out"])
            elif kind == "shuffle":
                block = Shuffle()
            else:
                heads = a["out"] // 2
                block = Attention(width, heads, 4, a["out"] + 3, packed=a["bias"], gated=a["kernel"] == 3)
            blocks.append(block)
        features = width if self.pooled else width * (SIZE // 2) ** 2
        head = nn.Sequential(nn.Linear(features, self.hidden), nn.Tanh(), nn.Linear(self.hidden, 5))
        return perturb(Net(blocks, head, self.pooled), self.seed).double()


KINDS = ("conv", "grouped", "depthwise", "residual", "dense", "squeeze", "shuffle", "attention")
BLOCKS = st.tuples(
    st.sampled_from(KINDS),
    st.fixed_dictionaries(
        {
            "out": EVEN,
            "kernel": st.sampled_from([1, 3]),
            "norm": st.sampled_from(["none", "batch", "group"]),
            "bias": st.booleans(),
            "activation": st.sampled_from(sorted(ACTIVATIONS)),
        }
    ),
)
ARCHITECTURES = st.builds(
    Architecture,
    spec=st.lists(BLOCKS, min_size=1, max_size=5),
    pooled=st.booleans(),
    hidden=st.integers(4, 9),
    seed=st.integers(0, 99),
)
DETERMINISTIC = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck), max_examples=80
)


def random_plan(axes: AxisGraph, seed: int) -> Plan:
    """Every exact axis keeps a random number, at least one, of random indices; tied axes keep equally many."""
    draw = random.Random(seed)
    counts = {axis.name: draw.randint(1, axis.size) for axis in axes}
    for tied in axes.sizes_tied:
        fewest = min(counts[name] for name in tied)
        is_exact = all(axes[name].is_exact for name in tied)
        counts |= {name: fewest if is_exact else axes[name].size for name in tied}
    keep = {axis.name: sorted(draw.sample(range(axis.size), counts[axis.name])) for axis in axes if axis.is_exact}
    return Plan({name: tuple(kept) for name, kept in keep.items()}, axes)


def macs_of(model: nn.Module, x: Tensor) -> int:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(x[:1])
    return counter.get_total_flops() // 2


def assert_attributes_are_true(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
            assert tuple(module.weight.shape) == shape, path
        elif isinstance(module, nn.Linear):
            assert tuple(module.weight.shape) == (module.out_features, module.in_features), path
        elif isinstance(module, nn.BatchNorm2d):
            assert module.num_features == module.weight.numel() == module.running_mean.numel(), path
        elif isinstance(module, nn.GroupNorm):
            assert module.num_channels == module.weight.numel() and module.num_channels % module.num_groups == 0, path
        elif isinstance(module, nn.LayerNorm):
            assert module.normalized_shape == tuple(module.weight.shape), path
        elif isinstance(module, Attention):
            assert module.out.in_features == module.num_heads * module.head_dim, path


def assert_shrunk_equals_masked(model: nn.Module, plan: Plan, x: Tensor) -> None:
    """Shrinks ``model`` in place."""
    axes = plan.axes
    assert axes is not None
    masked = zero_at_producers(copy.deepcopy(model), axes, plan.masks(axes))
    assert shrink(model, plan) is model
    with torch.no_grad():
        # 1e-9 of the largest logit: float64 rounding through a dozen layers stays below 1e-12
        assert_close(logits(model(x)), logits(masked(x)))


@DETERMINISTIC
@given(architecture=ARCHITECTURES, seed=st.integers(0, 999))
def test_shrunk_equals_masked_and_costs_what_the_law_says(architecture: Architecture, seed: int) -> None:
    model = architecture.build()
    kind = type(model)
    x = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
    axes = find_axes(model, x)
    assert axes.macs == macs_of(model, x)
    plan = random_plan(axes, seed)
    assert_shrunk_equals_masked(model, plan, x)
    cost = axes.cost(plan)
    assert cost.params == sum(p.numel() for p in model.parameters())
    assert cost.macs == macs_of(model, x)
    assert type(model) is kind
    assert_attributes_are_true(model)


@settings(DETERMINISTIC, max_examples=25)
@given(architecture=ARCHITECTURES, seed=st.integers(0, 999))
def test_a_shrunk_model_can_be_shrunk_again_and_trained(architecture: Architecture, seed: int) -> None:
    model = architecture.build()
    x = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
    names = [name for name, _ in model.named_parameters()]
    for step in range(3):
        axes = find_axes(model, x)
        draw = random.Random(seed + step)
        plan = random_plan(axes, draw.randrange(1000))
        assert_shrunk_equals_masked(model, plan, x)
        model.train()
        model(x).square().sum().backward()
        assert [name for name, _ in model.named_parameters()] == names
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        model.zero_grad()
        model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_families_shrunk_equal_masked(family: str) -> None:
    model, x = FAMILIES[family]()
    model, x = model.double(), x.double()
    axes = find_axes(model, x)
    assert_shrunk_equals_masked(model, random_plan(axes, seed=3), x)
    assert_attributes_are_true(model)


@pytest.mark.parametrize("family", ["resnet_bottleneck", "vit", "mobilenet_v2"])
def test_dtype_and_requires_grad_are_kept(family: str) -> None:
    model, x = FAMILIES[family]()
    model.bfloat16()
    frozen = [name for i, (name, _) in enumerate(model.named_parameters()) if i % 2]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    axes = find_axes(model, x.bfloat16())
    shrink(model, random_plan(axes, seed=5))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == frozen
    assert all(isinstance(p, nn.Parameter) and p.is_contiguous() for p in model.parameters())


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode, self.head = nn.Linear(6, 10), nn.Linear(10, 6, bias=False), nn.Linear(6, 3)
            self.again = nn.Linear(6, 10)
            self.again.weight = self.encode.weight

        def forward(self, x: Tensor) -> Tensor:
            x = F.linear(torch.relu(self.encode(x)), self.encode.weight.t())
            return self.head(self.decode(torch.relu(self.again(x))))

    model = perturb(Tied()).double()
    x = torch.randn(2, 6, dtype=torch.float64)
    axes = find_axes(model, x)
    plan = random_plan(axes, seed=1)
    assert plan.sizes["encode"] < 10
    assert_shrunk_equals_masked(model, plan, x)
    assert model.again.weight is model.encode.weight


class Shelf:
    """A cache that is a plain object, as OmDet-Turbo keeps for its words; an entry may hold several tensors."""

    def __init__(self) -> None:
        self.kept: OrderedDict[str, tuple[Tensor, ...]] = OrderedDict()


@pytest.mark.parametrize("is_on_a_shelf", [False, True])
def test_tensors_cached_by_an_earlier_forward_pass_do_not_survive(is_on_a_shelf: bool) -> None:
    class Caching(nn.Module):
        """As LeViT: in evaluation mode a gathered bias is kept in a dict on the module."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)
            self.table = nn.Parameter(torch.randn(8, 5))
            self.cache: dict[str, Tensor] = {}
            self.shelf = Shelf()

        def forward(self, x: Tensor) -> Tensor:
            cache = self.shelf.kept if is_on_a_shelf else self.cache
            if "bias" not in cache:
                bias = self.table[:, torch.tensor([1, 3])].sum(1)
                cache["bias"] = (bias, bias + 1) if is_on_a_shelf else bias
            bias = cache["bias"][0] if is_on_a_shelf else cache["bias"]
            return self.second(self.first(x) * bias)

    model = perturb(Caching()).double()
    x = torch.randn(2, 4, dtype=torch.float64)
    with torch.no_grad():
        model(x)
    held = model.shelf.kept.get("bias")
    axes = find_axes(model, x)
    assert model.shelf.kept.get("bias") is held  # watching disturbed nothing
    assert {member.parameter for member in axes["table"].members} >= {"table", "first.weight", "second.weight"}
    plan = random_plan(axes, seed=2)
    masked = zero_at_producers(copy.deepcopy(model), axes, plan.masks(axes))
    masked.cache.clear()
    masked.shelf.kept.clear()
    shrink(model, plan)
    with torch.no_grad():
        assert_close(model(x), masked(x))
