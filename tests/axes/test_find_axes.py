"""What ``find_axes`` promises: masked dense models equal cut models, counts equal independent counts."""

from __future__ import annotations

import copy
import random
import warnings

import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hf_compress.axes import AxisGraph, find_axes
from hf_compress.errors import ModelError, PlanError


def logits(output: object) -> Tensor:
    return output.logits if hasattr(output, "logits") else output


def zero_at_producers(model: nn.Module, graph: AxisGraph, keep: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for axis in graph:
            for member in axis.producers if axis.name in keep else ():
                gone = member.positions[~keep[axis.name]].flatten()
                parameters[member.parameter].index_fill_(member.dim, gone, 0.0)


def cut(model: nn.Module, graph: AxisGraph, keep: dict[str, Tensor]) -> None:
    """The plainest possible surgery: slice every tensor, set every attribute that the graph names."""
    sizes = {name: int(mask.sum()) for name, mask in keep.items()}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        masks = [graph.keep_mask(name, dim, keep) for dim in range(tensor.dim())]
        if all(bool(mask.all()) for mask in masks):
            continue
        sliced = tensor.detach()
        for dim, mask in enumerate(masks):
            sliced = sliced.index_select(dim, mask.nonzero().flatten())
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(tensor, nn.Parameter):
            setattr(module, last, nn.Parameter(sliced, requires_grad=tensor.requires_grad))
        else:
            setattr(module, last, sliced)
        if isinstance(module, nn.LayerNorm):
            module.normalized_shape = tuple(module.weight.shape)
    for rule in graph.attributes:
        module = model.get_submodule(rule.module)
        value = rule.law(sizes)
        if rule.index is not None:
            whole = list(getattr(module, rule.name))
            whole[rule.index] = value
            value = type(getattr(module, rule.name))(whole)
        setattr(module, rule.name, value)


def random_keep(graph: AxisGraph, seed: int) -> dict[str, Tensor]:
    """Remove about 30 % of every exact axis; axes that share an attribute keep equally many."""
    draw = random.Random(seed)
    keep = {}
    for axis in graph:
        if (
            axis.is_exact
            and axis.size > 1
            and all(graph[n].is_exact for t in graph.sizes_tied if axis.name in t for n in t)
        ):
            gone = draw.sample(range(axis.size), max(1, int(0.3 * axis.size)))
            mask = torch.ones(axis.size, dtype=torch.bool)
            mask[gone] = False
            keep[axis.name] = mask
    return keep


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_cut_equals_masked(family: str, seed: int) -> None:
    model, x = FAMILIES[family]()
    model, x = model.double(), x.double()
    graph = find_axes(model, x[:1])
    keep = random_keep(graph, seed)
    assert keep, "nothing exact was found"
    with torch.no_grad():
        dense = logits(model(x))
        masked, small = copy.deepcopy(model), copy.deepcopy(model)
        zero_at_producers(masked, graph, keep)
        cut(small, graph, keep)
        expected, got = logits(masked(x)), logits(small(x))
    # 1e-9 of the largest logit: float64 rounding through at most a few dozen layers stays below 1e-12
    assert (got - expected).abs().max() <= 1e-9 * max(1.0, float(expected.abs().max()))
    assert not torch.allclose(expected, dense), "pruning changed nothing, so the comparison proves nothing"
    cost = graph.cost({name: int(mask.sum()) for name, mask in keep.items()})
    assert cost.params == sum(p.numel() for p in small.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_equal_independent_counts(family: str) -> None:
    model, x = FAMILIES[family]()
    if hasattr(model, "set_attn_implementation") and family in ("vit", "swin"):
        model.set_attn_implementation("eager")  # the FLOP counter does not know the CPU kernel of fused attention
    graph = find_axes(model, x[:1])
    assert graph.params == sum(p.numel() for p in model.parameters())
    if family == "timm_vit":
        return  # fused attention cannot be switched off by the wrapper; its parameters are checked above
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(x[:1])
    assert graph.macs == counter.get_total_flops() // 2


def test_model_and_random_state_are_untouched() -> None:
    model, x = FAMILIES["swin"]()
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = [{k: v for k, v in vars(m).items() if isinstance(v, int)} for m in model.modules()]
    state = torch.get_rng_state()
    find_axes(model, x[:1])
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    after = [{k: v for k, v in vars(m).items() if isinstance(v, int)} for m in model.modules()]
    assert attributes == after
    assert all(type(value) in (int, bool) for values in after for value in values.values())


def test_operator_without_a_rule_freezes_and_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.linalg.matrix_exp(self.first(x).unsqueeze(-1) @ torch.ones(1, 6))[..., 0])

    with pytest.warns(UserWarning, match="matrix_exp"):
        graph = find_axes(Odd(), torch.randn(1, 4))
    assert len(graph) == 0


def test_sigmoid_between_layers_is_not_called_exact() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (axis,) = find_axes(model, torch.randn(1, 4))
    assert not axis.is_exact and axis.reasons == ("offset",)


def test_unusable_inputs_and_unknown_axes_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    with pytest.raises(ModelError, match="example_inputs"):
        find_axes(model)
    with pytest.raises(ModelError, match="failed on the example inputs"):
        find_axes(model, torch.randn(1, 5))
    with pytest.raises(PlanError, match="no axis is called 'nope'"):
        find_axes(model, torch.randn(1, 4))["nope"]
