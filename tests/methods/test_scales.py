"""The flat vector of scales: what is read is written back, per-index reductions are right."""

from dataclasses import replace

import pytest
import torch
from families import FAMILIES, PlainDense

from hf_compress.axes import find_axes
from hf_compress.errors import ModelError
from hf_compress.methods.scales import Scales


def with_slices():
    """Dense connections: an axis whose scales are slices of the BatchNorms that read a concatenation."""
    torch.manual_seed(0)
    model = PlainDense()
    graph = find_axes(model, torch.zeros(1, 3, 12, 12))
    axes = []
    for axis in graph:
        scales = tuple(
            member for member in axis.members
            if member.parameter.endswith(".0.weight") and member.dim == 0
            and len(graph.parameter_dims[member.parameter]) == 1
        )  # fmt: skip
        if scales:
            axes.append(replace(axis, scales=scales))
    assert any(member.positions.min() > 0 for axis in axes for member in axis.scales)
    return model, axes


def of_family(name):
    model, inputs = FAMILIES[name]()
    return model, [axis for axis in find_axes(model, inputs) if axis.scales]


CASES = {"slices": with_slices, "shared": lambda: of_family("resnet_basic"), "single": lambda: of_family("plain_cnn")}


@pytest.mark.parametrize("case", CASES)
def test_reductions_equal_a_loop_over_axes(case):
    model, axes = CASES[case]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    scales = Scales(model, axes)
    values = scales.read()
    means, roots = scales.by_axis(scales.mean(values.abs())), scales.by_axis(scales.mean(values**2).sqrt())
    tripled = {}
    for axis in axes:
        of_axis = torch.stack([model.get_parameter(m.parameter)[m.positions[:, 0]] for m in axis.scales])
        torch.testing.assert_close(means[axis.name], of_axis.abs().mean(0))
        torch.testing.assert_close(roots[axis.name], of_axis.pow(2).mean(0).sqrt())
        for member in axis.scales:
            target = tripled.setdefault(member.parameter, model.get_parameter(member.parameter).detach().clone())
            target[member.positions[:, 0]] *= 3
    assert scales.counts.tolist() == [len(axis.scales) for axis in axes for _ in range(axis.size)]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    scales.write(scales.scaled_by_index(values, lambda root: 3 * root))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), tripled.get(name, before[name]))


@pytest.mark.parametrize("case", CASES)
def test_writing_what_was_read_changes_nothing(case):
    model, axes = CASES[case]()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    scales = Scales(model, axes)
    scales.write(scales.read())
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_frozen_parameters_and_those_without_gradient_are_left_alone():
    model, axes = of_family("plain_cnn")
    scales = Scales(model, axes)
    frozen, free = model.features[1].weight, model.features[5].weight
    frozen.requires_grad_(False)
    before = frozen.detach().clone()
    free.grad = torch.zeros_like(free)
    scales.write(scales.read() + 1)
    scales.add_to_gradients(torch.arange(scales.length, dtype=torch.float32))
    assert torch.equal(frozen, before) and frozen.grad is None
    assert free.grad.tolist() == list(range(12, 28))


def test_a_zero_index_stays_zero():
    model, axes = of_family("resnet_basic")
    scales = Scales(model, axes)
    zero = torch.zeros(scales.length)
    assert scales.scaled_by_index(zero, lambda root: root).eq(0).all()


def test_missing_parameter_is_named():
    model, axes = of_family("plain_cnn")
    with pytest.raises(ModelError, match=r"no parameter 'features\.1\.weight'"):
        Scales(model.head, axes)
