"""One tiny network per operator: what becomes of the axis in front of it, and does cutting equal masking there.

A line of the table is a network ``a -> operator -> b`` and the fate of the axes that the first dimension of a parameter
takes part in: ``exact``, the reason why not (``statistics``, ``scale``, ``offset``), or ``whole`` where there is none.
Several axes in one dimension are listed with spaces; ``p@1`` is dimension 1 of parameter ``p``. One line adds an operator,
or a form of calling it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import perturb
from masking import assert_cut_equals_masked, random_keep
from torch import Tensor, nn

from hf_compress.axes import AxisGraph, find_axes

Operator = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    """Layers and parameters by name, and a forward pass given as a function of the module and the input."""

    def __init__(self, forward: Operator, parts: dict[str, Any]) -> None:
        super().__init__()
        self.run = forward
        self.num_heads = 2
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Sizes(nn.Module):
    """A module that holds nothing but sizes."""

    def __init__(self, **sizes: Any) -> None:
        super().__init__()
        self.__dict__.update(sizes)


class Case(NamedTuple):
    run: Operator
    parts: Callable[[], dict[str, Any]]
    shape: tuple[int, ...]
    expected: dict[str, str]


def P(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def fates(expected: str | dict[str, str]) -> dict[str, str]:
    return {"a": expected} if isinstance(expected, str) else expected


def tokens(operator: Operator, expected: str | dict[str, str] = "exact", out: int = 8, **parts: Any) -> Case:
    """Linear(6, 8) on 4 tokens, the operator, Linear(out, 3). Extra parts are functions that make them."""

    def build() -> dict[str, Any]:
        return {"a": nn.Linear(6, 8), "b": nn.Linear(out, 3), **{name: make() for name, make in parts.items()}}

    return Case(lambda m, x: m.b(operator(m, m.a(x))), build, (2, 4, 6), fates(expected))


def maps(operator: Operator, expected: str | dict[str, str] = "exact", out: int = 8, **parts: Any) -> Case:
    """Conv2d(3, 8) on 6 x 6 pixels, the operator, Conv2d(out, 5) and a mean over the pixels."""

    def build() -> dict[str, Any]:
        made = {name: make() for name, make in parts.items()}
        return {"a": nn.Conv2d(3, 8, 3, padding=1), "b": nn.Conv2d(out, 5, 1), **made}

    return Case(lambda m, x: m.b(operator(m, m.a(x))).mean((2, 3)), build, (2, 3, 6, 6), fates(expected))


def attend(m: Any, h: Tensor, **settings: Any) -> Tensor:
    q, k, v = (t.unflatten(-1, (m.num_heads, -1)).transpose(1, 2) for t in (m.q(h), m.k(h), m.v(h)))
    return F.scaled_dot_product_attention(q, k, v, **settings).transpose(1, 2).flatten(2)


def eager_attention(m: Any, h: Tensor, scale: Callable[[Tensor], float]) -> Tensor:
    batch, count, _ = h.shape
    qkv = m.qkv(h).reshape(batch, count, 3, m.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv
    weights = (q @ k.transpose(-2, -1) * scale(q)).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).reshape(batch, count, -1)


def einsum_attention(m: Any, h: Tensor) -> Tensor:
    head_dim = m.sizes.embed_dim // m.num_heads
    q, k, v = (p(h).view(*h.shape[:2], m.num_heads, head_dim).transpose(1, 2) for p in (m.q, m.k, m.v))
    weights = torch.einsum("bhlk,bhtk->bhlt", q, k).softmax(dim=-1)
    mixed = torch.einsum("bhlt,bhtv->bhlv", weights, v).transpose(1, 2)
    return mixed.reshape(*h.shape[:2], m.num_heads * head_dim)


def qkv(width: int = 8) -> dict[str, Callable[[], nn.Module]]:
    return {name: (lambda: nn.Linear(8, width)) for name in "qkv"}


def se_softmax(m: Any, h: Tensor) -> Tensor:
    return h * m.e(torch.tanh(m.s(h.mean((2, 3), keepdim=True)))).softmax(dim=1)


def grn(m: Any, h: Tensor) -> Tensor:
    norm = h.norm(p=2, dim=(2, 3), keepdim=True)
    return m.g * (h * (norm / (norm.mean(dim=1, keepdim=True) + 1e-6))) + m.c + h


def in_place(h: Tensor, change: Callable[[Tensor], object]) -> Tensor:
    change(h)
    return h


def standardised(m: Any, h: Tensor) -> Tensor:
    weight = m.w.weight
    mean, var = weight.mean((1, 2, 3), keepdim=True), weight.var((1, 2, 3), keepdim=True)
    return F.conv2d(h, (weight - mean) / (var + 1e-5).sqrt(), m.w.bias, padding=1)


def standardised_by_norm(m: Any, h: Tensor) -> Tensor:
    weight = m.w.weight
    flat = weight.reshape(1, m.w.out_channels, -1)
    return F.conv2d(h, F.batch_norm(flat, None, None, training=True).reshape_as(weight), m.w.bias)


W = {"w": lambda: nn.Conv2d(8, 8, 3, padding=1)}
CHANNEL = (2, 3)

OPERATORS: dict[str, Case] = {
    # elementwise
    **{
        f"keeps_zero_{op.__name__}": tokens(lambda m, h, op=op: op(h))
        for op in (F.relu, F.gelu, F.silu, F.hardswish, F.mish, F.elu, F.leaky_relu, F.relu6, F.softsign, torch.tanh,
                   torch.abs, torch.square, torch.neg, torch.erf)
    },
    **{
        f"loses_zero_{op.__name__}": tokens(lambda m, h, op=op: op(h), "offset")
        for op in (torch.sigmoid, torch.exp, torch.cos, F.softplus, F.hardsigmoid, torch.logical_not)
        if op is not torch.logical_not
    },
    "bool": tokens(lambda m, h: (h * h).bool().double()),
    "invert": tokens(lambda m, h: (~(h > 0)).double(), "offset"),
    "clamp_around_zero": tokens(lambda m, h: h.clamp(-1, 1)),
    "clamp_above_zero": tokens(lambda m, h: h.clamp(min=0.1), "offset"),
    "clamp_max_below_zero": tokens(lambda m, h: torch.clamp_max(h, -0.1), "offset"),
    "hardtanh_above_zero": tokens(lambda m, h: F.hardtanh(h, 0.1, 2.0), "offset"),
    "threshold_to_zero": tokens(lambda m, h: F.threshold(h, 0.1, 0.0)),
    "threshold_to_one": tokens(lambda m, h: F.threshold(h, 0.0, 1.0), "offset"),
    "prelu": tokens(lambda m, h: F.prelu(h.flatten(0, 1), m.p), p=lambda: P(8)),
    "glu": tokens(lambda m, h: F.glu(h, dim=-1), "exact", out=4),
    "glu_default_dim": tokens(lambda m, h: F.glu(h), "exact", out=4),
    "add_number": tokens(lambda m, h: h + 1, "offset"),
    "add_zero": tokens(lambda m, h: h + 0),
    "number_minus": tokens(lambda m, h: 1 - h, "offset"),
    "multiply_number": tokens(lambda m, h: 3 * h),
    "number_divided_by": tokens(lambda m, h: 1 / (h * h + 1), "offset"),
    "number_floor_divided_by": tokens(lambda m, h: 9 // (h * h + 1), "offset"),
    "power": tokens(lambda m, h: h**2),
    "number_to_the_power": tokens(lambda m, h: 2**h, "offset"),
    "add_parameter": tokens(lambda m, h: h + m.p, p=lambda: P(8)),
    "add_buffer": tokens(lambda m, h: h + m.p, p=lambda: nn.Buffer(torch.randn(8))),
    "add_unsaved_buffer": tokens(lambda m, h: h + m.p, "whole", p=lambda: nn.Buffer(torch.randn(8), persistent=False)),
    "add_constant": tokens(lambda m, h: h + torch.ones(8), "whole"),
    "add_per_token": tokens(lambda m, h: h + m.p, "offset", p=lambda: P(4, 1)),
    "scale_by_parameter": tokens(lambda m, h: h * m.p, p=lambda: P(8)),
    "scale_by_one": tokens(lambda m, h: h * m.p, p=lambda: P(1)),
    "gate": tokens(lambda m, h: h * torch.sigmoid(m.g(h)), "exact", g=lambda: nn.Linear(8, 8)),
    "gate_of_a_bias": tokens(lambda m, h: h * torch.sigmoid(m.p), p=lambda: P(8)),
    "add_sigmoid_of_parameter": tokens(lambda m, h: h + torch.sigmoid(m.p), "offset", p=lambda: P(8)),
    "divide_by_parameter": tokens(lambda m, h: h / (m.p**2 + 1), p=lambda: P(8)),
    "maximum": tokens(lambda m, h: torch.maximum(h, m.c(h)), "exact", c=lambda: nn.Linear(8, 8)),
    "max_of_two": tokens(lambda m, h: torch.max(h, -h)),
    "where_zero": tokens(lambda m, h: torch.where(h > 0, h, 0.0)),
    "where_one": tokens(lambda m, h: torch.where(h > 0, h, 1.0), "offset"),
    "where_two": tokens(lambda m, h: torch.where(h > 0, h, 2 * h)),
    "masked_fill_zero": tokens(lambda m, h: h.masked_fill(h < 0, 0.0)),
    "masked_fill_one": tokens(lambda m, h: h.masked_fill(h < 0, 1.0), "offset"),
    "lerp_keyword": tokens(lambda m, h: torch.lerp(h, h, weight=m.p), "whole", p=lambda: P(8)),
    "addcmul": tokens(lambda m, h: torch.addcmul(h, h, h), "offset"),
    "out_argument": tokens(lambda m, h: torch.add(h, h, out=torch.empty_like(h)), "whole"),
    "in_place_relu": tokens(lambda m, h: F.relu_(h)),
    "in_place_add": tokens(lambda m, h: h.add_(1), "offset"),
    "in_place_through_a_view": tokens(lambda m, h: in_place(h, lambda t: t.flatten(1).sigmoid_()), "offset"),
    "in_place_below_a_view": tokens(lambda m, h: (lambda v: (h.add_(1), v)[1])(h.unsqueeze(0)).squeeze(0), "offset"),
    "assign_a_part": tokens(lambda m, h: in_place(h, lambda t: t.__setitem__((0, 0), 1.0)), "offset"),
    "assign_zero": tokens(lambda m, h: in_place(h, lambda t: t.__setitem__((slice(None), 0), 0))),
    "assign_a_tensor": tokens(lambda m, h: in_place(h, lambda t: t.__setitem__((..., slice(1, 3), slice(None)), m.c(t[:, :1]))),
                              {"a": "exact", "c": "exact"}, c=lambda: nn.Linear(8, 8)),
    "assign_a_broadcast_tensor": tokens(lambda m, h: in_place(h, lambda t: t.__setitem__(slice(None), t[..., :1])), "offset"),
    "assign_a_slice_of_the_axis": tokens(lambda m, h: in_place(h, lambda t: t.__setitem__((..., slice(2)), m.c(t))),
                                         {"a": "exact", "c": "whole"}, c=lambda: nn.Linear(8, 2)),
    "add_to_a_part": tokens(lambda m, h: in_place(h, lambda t: t.__setitem__((0, 0), t[0, 0].add_(t[0, 1])))),
    "assign_through_a_view": tokens(lambda m, h: (h, h[0].__setitem__(0, 1.0))[0], "offset"),
    "assign_by_positions": tokens(lambda m, h: in_place(h, lambda t: t.__setitem__(torch.where(t[..., 0] * 0 == 0), 1.0)), "whole"),
    "assign_rows_by_a_mask": tokens(lambda m, h: in_place(h, lambda t: t.__setitem__((torch.arange(4) == 0).expand(len(h), 4), 0.0)), "exact"),
    "assign_by_a_mask": tokens(lambda m, h: in_place(h, lambda t: t.__setitem__(t > 0, 1.0)), "whole"),
    "assign_data": tokens(lambda m, h: in_place(h, lambda t: setattr(t, "data", torch.sigmoid(t))), "whole"),
    "fill_by_tensor": tokens(lambda m, h: h * 0 + torch.empty_like(h).fill_(h.sum()), "whole"),
    # contractions
    "functional_linear": tokens(lambda m, h: F.linear(h, m.p, bias=m.c), {"a": "exact", "p": "exact"},
                                p=lambda: P(8, 8), c=lambda: P(8)),
    "weight_through_sigmoid": tokens(lambda m, h: F.linear(h, torch.sigmoid(m.p)), {"p": "offset"}, p=lambda: P(8, 8)),
    "bias_through_sigmoid": tokens(lambda m, h: F.linear(h, m.p, m.c.sigmoid()), {"p": "offset"}, p=lambda: P(8, 8),
                                   c=lambda: P(8)),
    "buffer_as_weight": tokens(lambda m, h: F.linear(h, m.p), "exact", p=lambda: nn.Buffer(torch.randn(8, 8))),
    "matmul_parameter": tokens(lambda m, h: h @ m.p, {"a": "exact", "p@1": "exact"}, p=lambda: P(8, 8)),
    "matmul_transposed": tokens(lambda m, h: torch.sigmoid(h) @ m.p.t(), {"a": "offset", "p": "exact"}, p=lambda: P(8, 8)),
    "factorised_weight": tokens(lambda m, h: F.linear(h, m.u @ m.v), {"a": "exact", "v": "exact"}, u=lambda: P(8, 4),
                                v=lambda: P(4, 8)),
    "tied_decoder": tokens(lambda m, h: F.linear(torch.relu(F.linear(h, m.p)), m.p.t()), {"p": "exact"}, p=lambda: P(5, 8)),
    "packed_weight": tokens(lambda m, h: sum(F.linear(h, w) for w in m.p.chunk(3)), "exact",
                            p=lambda: P(24, 8)),
    "einsum": tokens(lambda m, h: torch.einsum("bnc,cd->bnd", h, m.p), {"a": "exact", "p@1": "exact"}, p=lambda: P(8, 8)),
    "einsum_of_parameters": tokens(lambda m, h: h @ torch.einsum("ir,rj->ij", m.u, m.v), "exact", u=lambda: P(8, 4),
                                   v=lambda: P(4, 8)),
    "einsum_ellipsis": tokens(lambda m, h: torch.einsum("...c,cd->...d", h, m.p), {"a": "exact", "p@1": "exact"},
                              p=lambda: P(8, 8)),
    "einsum_implicit": tokens(lambda m, h: torch.einsum("anc,cz", h, m.p), {"a": "exact", "p@1": "exact"}, p=lambda: P(8, 8)),
    "bilinear_form": tokens(lambda m, h: h @ h.transpose(1, 2) @ h),
    "add_matmul": tokens(lambda m, h: torch.addmm(m.p, h.flatten(0, 1), m.w), {"a": "exact", "w@1": "exact"}, p=lambda: P(8),
                         w=lambda: P(8, 8)),
    "vector_product": tokens(lambda m, h: h * (h @ m.p).unsqueeze(-1), "exact", p=lambda: P(8)),
    # convolutions
    "conv": maps(lambda m, h: m.w(h), {"a": "exact", "w": "exact"}, **W),
    "conv_circular": maps(lambda m, h: m.w(h), {"a": "exact", "w": "exact"},
                          w=lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")),
    "conv_reflect": maps(lambda m, h: m.w(h), {"a": "exact", "w": "exact"},
                         w=lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")),
    "conv_same": maps(lambda m, h: m.w(h), w=lambda: nn.Conv2d(8, 8, 3, padding="same")),
    "conv_depthwise": maps(lambda m, h: m.w(h), w=lambda: nn.Conv2d(8, 8, 3, groups=8)),
    "conv_depthwise_multiplier": maps(lambda m, h: m.w(h), {"a": "exact", "w": "exact exact"}, out=16,
                                      w=lambda: nn.Conv2d(8, 16, 3, groups=8)),
    "conv_depthwise_after_sigmoid": maps(lambda m, h: m.w(h.sigmoid()), w=lambda: nn.Conv2d(8, 8, 3, groups=8)),
    "conv_grouped": maps(lambda m, h: m.w(h), {"a": "exact exact", "w": "exact exact"},
                         w=lambda: nn.Conv2d(8, 12, 3, groups=2), out=12),
    "conv_grouped_after_sigmoid": maps(lambda m, h: m.w(h.sigmoid()), {"a": "exact offset", "w": "exact exact"},
                                       w=lambda: nn.Conv2d(8, 12, 3, groups=2), out=12),
    "conv_literal_groups": maps(lambda m, h: F.conv2d(h, m.p, groups=8), "whole", p=lambda: P(8, 1, 3, 3)),
    "conv_groups_from_shape": maps(lambda m, h: F.conv2d(h, m.p, groups=h.shape[1]), p=lambda: P(8, 1, 3, 3)),
    "conv_transposed": maps(lambda m, h: m.w(h), {"a": "exact", "w@1": "exact"}, w=lambda: nn.ConvTranspose2d(8, 8, 3, 2)),
    "conv_transposed_grouped": maps(lambda m, h: m.w(h), {"a": "exact exact", "w@1": "exact"},
                                    w=lambda: nn.ConvTranspose2d(8, 12, 3, groups=2), out=12),
    "conv_transposed_depthwise": maps(lambda m, h: m.w(h), "exact", w=lambda: nn.ConvTranspose2d(8, 8, 3, groups=8)),
    "conv_standardised": maps(standardised, {"a": "statistics", "w": "exact"}, **W),
    "conv_standardised_by_norm": maps(standardised_by_norm, {"a": "statistics", "w": "exact"}, **W),
    "conv_weight_norm": maps(lambda m, h: m.w(h), {"a": "statistics", "w.bias": "exact"},
                             w=lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1))),
    # attention
    "attention": tokens(lambda m, h: attend(m, h, scale=0.5), **qkv(),
                        expected={"q": "exact exact", "v": "exact exact"}),
    "attention_runtime_scale": tokens(lambda m, h: attend(m, h), **qkv(),
                                      expected={"q": "exact exact", "v": "exact exact"}),
    "attention_bias_table": tokens(lambda m, h: attend(m, h, attn_mask=m.t, scale=0.5), t=lambda: P(2, 4, 4), **qkv(),
                                   expected={"q": "exact exact", "v": "exact exact", "t": "exact"}),
    "attention_iterated": tokens(lambda m, h: eager_attention(m, h, lambda q: 0.5), {"qkv": "exact exact"}, qkv=lambda: nn.Linear(8, 24)),
    **{
        f"attention_scale_{name}": tokens(lambda m, h, f=f: eager_attention(m, h, f), {"qkv": "exact exact"},
                                          qkv=lambda: nn.Linear(8, 24))
        for name, f in {
            "power": lambda q: q.shape[-1] ** -0.5,
            "math_sqrt": lambda q: 1 / math.sqrt(q.size(-1)),
        }.items()
    },
    **{
        f"attention_scale_{name}": tokens(lambda m, h, f=f: eager_attention(m, h, f), {"qkv": "exact scale"},
                                          qkv=lambda: nn.Linear(8, 24))
        for name, f in {
            "math_log": lambda q: math.log(q.shape[-1]),
            "numpy": lambda q: float(1 / np.sqrt(q.shape[-1])),
            "tensor": lambda q: 1 / torch.tensor(float(q.size(dim=3))).sqrt(),
        }.items()
    },
    "attention_scale_numel": tokens(lambda m, h: eager_attention(m, h, lambda q: q[0, 0, 0].numel() ** -0.5),
                                    {"qkv": "exact"}, qkv=lambda: nn.Linear(8, 24)),
    "multi_head_attention_module": tokens(lambda m, h: m.m(h, h, h)[0], "exact scale",
                                          m=lambda: nn.MultiheadAttention(8, 2, batch_first=True)),
    "multi_head_attention_across": tokens(lambda m, h: m.m(m.q(h), h, h, need_weights=False)[0],
                                          {"a": "exact", "q": "exact scale", "m.out_proj": "exact"}, out=4,
                                          m=lambda: nn.MultiheadAttention(4, 2, kdim=8, vdim=8), q=lambda: nn.Linear(8, 4)),
    "einsum_attention": tokens(lambda m, h: einsum_attention(m, h), {"q": "exact exact", "v": "exact exact"},
                               sizes=lambda: Sizes(embed_dim=8), **qkv()),
    "lstm": tokens(lambda m, h: m.m(h)[0], "whole", m=lambda: nn.LSTM(8, 8, batch_first=True)),
    # normalisation
    "batch_norm": maps(lambda m, h: m.n(h), n=lambda: nn.BatchNorm2d(8)),
    "batch_norm_without_weight": maps(lambda m, h: m.n(h), "offset", n=lambda: nn.BatchNorm2d(8, affine=False)),
    "batch_norm_cleans": maps(lambda m, h: m.n(h.sigmoid()), n=lambda: nn.BatchNorm2d(8)),
    "frozen_batch_norm": maps(
        lambda m, h: h * (m.s * (m.v.abs() + 1e-5).rsqrt())[None, :, None, None] + m.t.view(1, -1, 1, 1),
        **{name: (lambda: nn.Buffer(torch.randn(8))) for name in "svt"},
    ),
    "layer_norm": tokens(lambda m, h: m.n(h), "statistics", n=lambda: nn.LayerNorm(8)),
    "rms_norm": tokens(lambda m, h: m.n(h), "statistics", n=lambda: nn.RMSNorm(8)),
    "rms_norm_by_hand": tokens(lambda m, h: m.p * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)), "statistics",
                               p=lambda: P(8)),
    "group_norm": maps(lambda m, h: m.n(h), "exact statistics", n=lambda: nn.GroupNorm(2, 8)),
    "group_norm_of_one": maps(lambda m, h: m.n(h), "statistics", n=lambda: nn.GroupNorm(1, 8)),
    "group_norm_of_each": maps(lambda m, h: m.n(h), n=lambda: nn.GroupNorm(8, 8)),
    "instance_norm": maps(lambda m, h: m.n(h), n=lambda: nn.InstanceNorm2d(8, affine=True)),
    "softmax": tokens(lambda m, h: h.softmax(-1), "offset+statistics"),
    "normalize": tokens(lambda m, h: F.normalize(h, dim=-1), "statistics"),
    "normalize_over_tokens": tokens(lambda m, h: F.normalize(h, dim=1)),
    "response_norm": maps(grn, "statistics", g=lambda: P(1, 8, 1, 1), c=lambda: P(1, 8, 1, 1)),
    # reductions
    "mean_over_tokens": tokens(lambda m, h: h.mean(dim=1, keepdim=True) + h),
    "mean_over_axis": tokens(lambda m, h: h * h.mean(-1, keepdim=True), "statistics"),
    "mean_of_all": tokens(lambda m, h: h * h.mean(), "statistics"),
    "mean_axis_keyword": tokens(lambda m, h: h * h.mean(axis=2, keepdims=True), "statistics"),
    "sum_over_axis": tokens(lambda m, h: h * h.sum((-1,), keepdim=True)),
    "sum_over_dirty_axis": tokens(lambda m, h: h * h.sigmoid().sum(-1, True), "offset"),
    "sum_divided_by_size": tokens(lambda m, h: h * h.sum(-1, True) / h.shape[-1], "scale"),
    "sum_divided_by_attribute": tokens(lambda m, h: h * h.sum(-1, True) / m.b.in_features, "scale"),
    "amax": tokens(lambda m, h: h * h.amax(2, keepdim=True), "statistics"),
    "max_over_tokens": tokens(lambda m, h: h * torch.max(h, dim=1, keepdim=True)[0]),
    "norm_positional": tokens(lambda m, h: h * h.norm(2, 1, True)),
    "norm_keyword": tokens(lambda m, h: h * h.norm(2, dim=-1, keepdim=True), "statistics"),
    "vector_norm": tokens(lambda m, h: h * torch.linalg.vector_norm(h, 2, (1,), True)),
    "variance": tokens(lambda m, h: h * h.var(1, False, True)),
    "variance_and_mean": tokens(lambda m, h: h - torch.var_mean(h, dim=-1, keepdim=True)[1], "offset+statistics"),
    # squeeze and excite
    "squeeze_excite": maps(lambda m, h: h * m.e(F.relu(m.s(F.adaptive_avg_pool2d(h, 1)))).sigmoid(),
                           {"a": "exact", "s": "exact"}, s=lambda: nn.Conv2d(8, 4, 1), e=lambda: nn.Conv2d(4, 8, 1)),
    "squeeze_excite_softmax": maps(se_softmax, {"a": "statistics", "s": "exact"}, s=lambda: nn.Conv2d(8, 4, 1),
                                   e=lambda: nn.Conv2d(4, 8, 1)),
    # spatial
    "max_pool": maps(lambda m, h: F.max_pool2d(h, 2, padding=1)),
    "average_pool": maps(lambda m, h: F.avg_pool2d(h, kernel_size=3, stride=1, padding=1)),
    "pool_over_channels": tokens(lambda m, h: F.avg_pool1d(h, 2, 1, 0), "whole", out=7),
    "interpolate": maps(lambda m, h: F.interpolate(h, scale_factor=2, mode="bilinear")),
    "pad_pixels": maps(lambda m, h: F.pad(h, (1, 1, 1, 1))),
    "pad_pixels_by_one": maps(lambda m, h: F.pad(h, (1, 1, 1, 1), value=1.0), "offset"),
    "pad_channels": maps(lambda m, h: F.pad(h, (0, 0, 0, 0, 2, 2)), out=12),
    "pad_channels_to_a_layer": maps(lambda m, h: F.pad(h, (0, 0, 0, 0, 0, m.b.in_channels - h.shape[1])), out=12),
    "pad_channels_to_a_width": maps(lambda m, h: F.pad(h, (0, 0, 0, 0, 0, 12 - h.shape[1])), "whole", out=12),
    "pixel_shuffle": maps(lambda m, h: F.pixel_shuffle(h, 2), out=2),
    "pixel_unshuffle": maps(lambda m, h: F.pixel_unshuffle(h, 2), out=32),
    "unfold": maps(lambda m, h: F.unfold(h, 3).unflatten(-1, (4, 4)), out=72),
    "fold": maps(lambda m, h: F.fold(F.unfold(h, 3), (6, 6), 3)),
    "unfold_method": maps(lambda m, h: h.unfold(2, 3, 2).unfold(3, 3, 2).mean((-1, -2))),
    "convolution_along_an_axis": tokens(lambda m, h: h + m.c(h[:, :1]), "whole", c=lambda: nn.Conv1d(1, 1, 1)),
    "grid_sample": maps(lambda m, h: F.grid_sample(h, torch.zeros(h.shape[0], 3, 3, 2, dtype=h.dtype), align_corners=False)),
    "grid_sample_of_heads": maps(
        lambda m, h: F.grid_sample(
            h.view(h.shape[0], m.num_heads, h.shape[1] // m.num_heads, 6, 6).flatten(0, 1),
            m.o(h.mean((2, 3))).view(h.shape[0], m.num_heads, 3, 3, 2).tanh().flatten(0, 1), align_corners=False,
        ).view(h.shape[0], -1, 3, 3),
        {"a": "exact exact", "o": "exact"}, o=lambda: nn.Linear(8, 36)),
    "channel_shuffle": maps(lambda m, h: h.view(h.shape[0], 2, h.shape[1] // 2, 6, 6).transpose(1, 2).flatten(1, 2), "exact"),
    # layout
    "reshape_minus_one": tokens(lambda m, h: h.reshape(-1).reshape(h.shape)),
    "view_literal": tokens(lambda m, h: h.view(h.shape[0], 4, 8), "whole"),
    "view_traced": tokens(lambda m, h: h.view(h.shape[0], -1, h.shape[-1])),
    "view_attribute_of_a_layer": tokens(lambda m, h: h.flatten(1).view(h.shape[0], -1, m.a.out_features)),
    "view_attribute_of_another_layer": tokens(lambda m, h: h.flatten(1).view(h.shape[0], -1, m.o.out_features),
                                              o=lambda: nn.Linear(6, 8)),
    "split_size": tokens(lambda m, h: torch.cat(torch.split(h, 4, dim=-1)[::-1], -1), "whole"),
    "split_half": tokens(lambda m, h: torch.mul(*torch.split(h, h.shape[-1] // 2, dim=-1)), "exact", out=4),
    "split_sections": tokens(lambda m, h: h.split([2, 6], dim=-1)[1], "whole", out=6),
    "split_by_attributes": tokens(lambda m, h: torch.cat(h.split(m.sizes.splits, dim=-1)[::-1], -1), "exact exact",
                                  sizes=lambda: Sizes(splits=[2, 6])),
    "split_by_half_of_an_attribute": tokens(lambda m, h: torch.cat(h.split(m.sizes.expand_chs // 2, dim=-1)[::-1], -1),
                                            sizes=lambda: Sizes(expand_chs=8)),
    "split_by_what_is_left": tokens(
        lambda m, h: torch.cat(h.split([m.sizes.pdim, m.sizes.dim - m.sizes.pdim], dim=-1)[::-1], -1), "exact exact",
        sizes=lambda: Sizes(pdim=2, dim=8)),
    "constant_buffer": tokens(lambda m, h: h * m.t, t=lambda: nn.Buffer(torch.full((8,), 2.0), persistent=False)),
    "buffer_of_many_values": tokens(lambda m, h: h * m.t, "whole", t=lambda: nn.Buffer(torch.arange(8.0), persistent=False)),
    "tensor_split": tokens(lambda m, h: torch.mul(*h.tensor_split(2, dim=-1)), "exact", out=4),
    "chunk": tokens(lambda m, h: (lambda x, y: x * torch.sigmoid(y))(*h.chunk(2, dim=2)), "exact", out=4),
    "slice_half": tokens(lambda m, h: h[..., : h.shape[-1] // 2], "whole", out=4),
    "slice_tail": tokens(lambda m, h: h[:, :, 2:], "exact", out=6),
    "slice_negative": tokens(lambda m, h: h[:, :, :-2], "exact", out=6),
    "slice_strided": tokens(lambda m, h: h[..., ::2], "whole", out=4),
    "narrow": tokens(lambda m, h: h.narrow(-1, 0, 4) + h.narrow(-1, 4, 4), "whole", out=4),
    "select": tokens(lambda m, h: h * h[..., 0].unsqueeze(-1), "whole"),
    "slice_of_one": tokens(lambda m, h: h * h[..., :1]),
    "gather_list": tokens(lambda m, h: h[..., [1, 0, 2]], "whole", out=3),
    "gather_tokens": tokens(lambda m, h: h.gather(1, h[..., :1].argsort(1).repeat(1, 1, h.shape[-1]))),
    "gather_tokens_by_an_expansion": tokens(lambda m, h: h.gather(1, h.new_zeros(len(h), 2, 1).long().expand(-1, -1, h.shape[-1]))),
    "gather_along_the_axis": tokens(lambda m, h: h.gather(2, torch.zeros(len(h), 4, 8, dtype=torch.long)), "whole"),
    "take_along_tokens": tokens(lambda m, h: torch.take_along_dim(h, h.argsort(1), 1), "exact"),
    "topk_of_tokens": tokens(lambda m, h: h.topk(2, dim=1).values),
    "sorted_tokens": tokens(lambda m, h: h.sort(dim=-2, descending=True)[0]),
    "places_of_tokens": tokens(lambda m, h: h.argsort(1).to(h.dtype), "offset"),
    "topk_of_the_axis": tokens(lambda m, h: torch.topk(h, 3)[0], "whole", out=3),
    "scatter": tokens(lambda m, h: h.scatter(1, torch.zeros(1, 1, 8, dtype=torch.long), 1.0), "whole"),
    "index_add": tokens(lambda m, h: h.index_add(1, torch.tensor([0]), h[:, :1]), "whole"),
    "flip": tokens(lambda m, h: h.flip(-1), "whole"),
    "roll_tokens": tokens(lambda m, h: h.roll(1, dims=1)),
    "cumsum": tokens(lambda m, h: h.cumsum(1), "whole"),
    "concatenate": tokens(lambda m, h: torch.cat([h, m.c(h)], dim=-1), {"a": "exact", "c": "exact"}, out=12,
                          c=lambda: nn.Linear(8, 4)),
    "stack": tokens(lambda m, h: torch.stack([h, 2 * h], dim=-2).sum(-2)),
    "repeat": tokens(lambda m, h: h.repeat(1, 1, 2), out=16),
    "repeat_by_a_ratio": tokens(lambda m, h: h + m.c(h).repeat(1, 1, h.shape[-1] // m.c.out_features),
                                c=lambda: nn.Linear(8, 4)),
    "repeat_by_a_literal_ratio": tokens(lambda m, h: h + m.c(h).repeat(1, 1, h.shape[-1] // 4), "whole",
                                        c=lambda: nn.Linear(8, 4)),
    "repeat_to_a_size": tokens(lambda m, h: h * m.p.repeat(1, 1, h.shape[-1]), p=lambda: P(1, 4, 1)),
    "linear_beside_heads": tokens(lambda m, h: m.t(h.unflatten(-1, (m.num_heads, -1))).flatten(2), "exact offset",
                                  t=lambda: nn.Linear(4, 4)),
    "linear_without_bias_beside_heads": tokens(lambda m, h: m.t(h.unflatten(-1, (m.num_heads, -1))).flatten(2),
                                               "exact exact", t=lambda: nn.Linear(4, 4, bias=False)),
    "layer_norm_beside_heads": tokens(lambda m, h: m.n(h.unflatten(-1, (m.num_heads, -1))).flatten(2),
                                      "offset statistics", n=lambda: nn.LayerNorm(4)),
    "vmap_over_positions": tokens(lambda m, h: h * torch.vmap(lambda i: i > 1)(torch.arange(4))[:, None]),
    "vmap_over_activations": tokens(lambda m, h: torch.vmap(lambda t: t * 2)(h), "whole"),
    "tile": tokens(lambda m, h: h.tile(2), out=16),
    "masked_scatter": tokens(lambda m, h: h.masked_scatter(torch.ones(len(h), 4, 1, dtype=torch.bool), m.c(h)),
                             {"a": "exact", "c": "exact"}, c=lambda: nn.Linear(8, 8)),
    "repeat_interleave": tokens(lambda m, h: h.repeat_interleave(2, dim=-1), out=16),
    "expand": tokens(lambda m, h: h + m.p.expand(-1, -1, h.shape[-1]), "offset", p=lambda: P(1, 4, 1)),
    "permute": tokens(lambda m, h: h.permute(2, 0, 1).movedim(0, -1).mT.transpose(-1, -2)),
    "iterate": tokens(lambda m, h: torch.stack([t for t in h.transpose(0, 1)], 1)),
    "zeros": tokens(lambda m, h: h + torch.zeros(h.shape[-1], dtype=h.dtype)),
    "arange": tokens(lambda m, h: h * torch.arange(h.shape[-1]), "whole"),
    "lookup": tokens(lambda m, h: h + m.e(torch.arange(4)), e=lambda: nn.Embedding(4, 8)),
    # modules used twice, and code that cannot be watched
    "called_twice": tokens(lambda m, h: m.t(torch.relu(m.t(h))), t=lambda: nn.Linear(8, 8)),
    "called_in_a_loop": tokens(lambda m, h: [h := h + torch.relu(m.t(h)) for _ in range(3)][-1], t=lambda: nn.Linear(8, 8)),
    "numpy_round_trip": tokens(lambda m, h: torch.from_numpy(1 / (1 + h.numpy() ** 2)), "whole"),
    "parameter_of_a_tensor": tokens(lambda m, h: nn.Parameter(h, requires_grad=False) + 1, "whole"),
    "matrix_exponential": tokens(lambda m, h: torch.linalg.matrix_exp(h.transpose(1, 2) @ h), "whole"),
}  # fmt: skip


def fate(graph: AxisGraph, key: str) -> str:
    """What became of the axes in one dimension of a parameter."""
    name, _, dim = key.partition("@")
    name = name if name in graph.parameter_dims else f"{name}.weight"
    found = [
        "exact" if axis.is_exact else "+".join(axis.reasons)
        for axis in graph
        if any((member.parameter, member.dim) == (name, int(dim or 0)) for member in axis.members)
    ]
    return " ".join(sorted(found)) or "whole"


@pytest.mark.parametrize("operator", OPERATORS)
def test_rule(operator: str) -> None:
    case = OPERATORS[operator]
    torch.manual_seed(0)
    model = perturb(Net(case.run, case.parts())).double()
    x = torch.randn(case.shape, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which operators have no rule is another test
        graph = find_axes(model, x)
    assert {key: fate(graph, key) for key in case.expected} == case.expected
    keep = random_keep(graph, seed=1)
    if keep:
        # 1e-9 of the largest output: float64 rounding through three layers stays below 1e-12
        assert_cut_equals_masked(model, graph, keep, x)
