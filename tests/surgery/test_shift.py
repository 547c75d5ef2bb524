"""Constants of removed channels: carried over exactly where that is possible, measured and reported where not."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from families import FAMILIES, perturb
from torch import Tensor, nn

from hf_compress.axes import AxisGraph, find_axes
from hf_compress.surgery import Plan, shrink
from hf_compress.surgery.shift import zero_producers


def logits(output: object) -> Tensor:
    return output.logits if hasattr(output, "logits") else output


def third_of_every_exact_axis(axes: AxisGraph) -> Plan:
    keep = {}
    for axis in axes:
        if axis.is_exact and axis.size > 2 and not any(axis.name in tied for tied in axes.sizes_tied):
            keep[axis.name] = tuple(i for i in range(axis.size) if i % 3 != 1)
    return Plan(keep, axes)


@pytest.mark.parametrize(
    "family", ["mobilenet_v2", "plain_cnn", "resnet_basic", "regnet_x", "timm_densenet", "plain_preactivation"]
)
def test_reported_difference_is_the_real_one(family: str) -> None:
    model, x = FAMILIES[family]()
    model, x = model.double(), x.double()
    axes = find_axes(model, x[:1])
    plan = third_of_every_exact_axis(axes)
    masked = copy.deepcopy(model)
    zero_producers(masked, axes, plan.masks(axes), keep_shifts=True)
    plain = shrink(copy.deepcopy(model), plan)
    folded = shrink(copy.deepcopy(model), plan, fold_shift=True, example_inputs=x[:1])
    with torch.no_grad():
        expected, without, found = logits(masked(x)), logits(plain(x)), logits(folded(x))
    error, error_without = (found - expected).abs().max(), (without - expected).abs().max()
    reports = folded.hf_compress_shift_report
    assert reports and all(report.is_folded for report in reports)
    if all(report.is_exact for report in reports):
        assert error <= 1e-9 * expected.abs().max()  # float64 rounding
    else:
        assert all(report.reason == "zero padding at the borders" for report in reports if not report.is_exact)
        # both are measured on noise of the same kind, not on the same images
        assert 0.1 * error <= reports[0].max_abs_difference <= 10 * error
    assert error < error_without


def test_padding_inside_a_layer_of_its_own_is_not_called_exact() -> None:
    class Padded(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), Padded(6, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    perturb(model)
    model[1].bias.data.abs_()  # the activation lets it through
    axes = find_axes(model, torch.zeros(1, 3, 8, 8))
    shrink(model, third_of_every_exact_axis(axes), fold_shift=True, example_inputs=torch.zeros(1, 3, 8, 8))
    (report,) = model.hf_compress_shift_report
    assert report.is_folded and not report.is_exact and report.reason == "zero padding at the borders"


def test_readers_that_cannot_take_a_constant_are_reported_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3), nn.AdaptiveAvgPool2d(1)
    )
    perturb(model)
    model[1].bias.data.abs_()  # the activation lets it through
    axes = find_axes(model, torch.zeros(1, 3, 8, 8))
    with caplog.at_level(logging.WARNING, logger="hf_compress"):
        shrink(model, third_of_every_exact_axis(axes), fold_shift=True, example_inputs=torch.zeros(1, 3, 8, 8))
    (report,) = model.hf_compress_shift_report
    assert not report.is_folded and report.reason == "neither a linear layer nor a convolution"
    assert "could not take over their constants exactly" in caplog.text


def test_a_constant_that_float32_rounds_away_is_no_cause_for_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3), nn.AdaptiveAvgPool2d(1)
    )
    nn.init.constant_(model[1].bias, 1e-12)
    axes = find_axes(model, torch.zeros(1, 3, 8, 8))
    gone = third_of_every_exact_axis(axes)
    for name, mask in gone.masks(axes).items():  # as training leaves what is about to go
        for member in axes[name].producers:
            if member.parameter == "1.weight":
                model[1].weight.data[~mask] = 1e-12
    with caplog.at_level(logging.WARNING, logger="hf_compress"):
        shrink(model, gone, fold_shift=True, example_inputs=torch.zeros(1, 3, 8, 8))
    (report,) = model.hf_compress_shift_report
    assert not report.is_exact and report.max_abs_difference < 1e-6 and not caplog.text


def test_without_shifts_there_is_nothing_to_carry() -> None:
    model, x = FAMILIES["resnet_basic"]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.bias)
    axes = find_axes(model, x[:1])
    shrink(model, third_of_every_exact_axis(axes), fold_shift=True, example_inputs=x[:1])
    assert model.hf_compress_shift_report == []


def test_without_inputs_nothing_is_folded_in_silence() -> None:
    model, x = FAMILIES["plain_cnn"]()
    axes = find_axes(model, x[:1])
    shrink(model, third_of_every_exact_axis(axes), fold_shift=True)
    assert all(not r.is_folded and "no example inputs" in r.reason for r in model.hf_compress_shift_report)
    assert model.hf_compress_shift_report


def test_folding_leaves_mode_gradients_and_random_state_alone() -> None:
    model, x = FAMILIES["mobilenet_v2"]()
    model.train()
    state = torch.get_rng_state()
    axes = find_axes(model, x[:1])
    shrink(model, third_of_every_exact_axis(axes), fold_shift=True, example_inputs=x[:1])
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
