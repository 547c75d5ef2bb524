"""Rules of Fourier transforms and complex tensors, each on a network of two layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from masking import assert_cut_equals_masked, random_keep
from torch import Tensor, nn

from hf_compress import find_axes
from hf_compress.axes.fourier import transform_macs
from hf_compress.measurement import count_macs

FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {  # of [2, 6, 8, 10]; its MACs of one channel
    "rfft2": (lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * 2, s=x.shape[-2:]), 2 * transform_macs(80, True)),
    "odd_width": (lambda x: torch.fft.irfft2(torch.fft.rfft2(x, s=(8, 9)), s=(8, 9)), 2 * transform_macs(72, True)),
    "fft2": (lambda x: torch.fft.ifft2(torch.fft.fft2(x)).real, 2 * transform_macs(80, False)),
    "rfft": (lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=2), n=8, dim=2), 2 * transform_macs(8, True) * 10),
    "fftn": (lambda x: torch.fft.fftn(x, dim=(2, 3)).abs(), transform_macs(80, False)),
    "shift": (
        lambda x: torch.fft.fftshift(torch.fft.fft2(x), dim=(-2, -1)).imag,
        transform_macs(80, False),
    ),
    "complex": (lambda x: torch.fft.ifft2(torch.complex(x, x.relu())).imag, transform_macs(80, False)),
    "polar": (lambda x: torch.polar(x.abs(), x.cos()).real, 0),
    "views": (lambda x: torch.view_as_complex(torch.view_as_real(torch.fft.fft2(x)).relu()).real, transform_macs(80, False)),
}  # fmt: skip


class Between(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.first, self.last, self.function = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_channels_are_found_cut_exactly_and_counted(name: str) -> None:
    function, macs = FUNCTIONS[name]
    torch.manual_seed(0)
    model, x = Between(function).double().eval(), torch.randn(2, 3, 8, 10, dtype=torch.float64)
    graph = find_axes(model, x)
    assert not graph.without_rule
    assert [(axis.size, axis.is_exact) for axis in graph] == [(6, True)]
    assert_cut_equals_masked(model, graph, random_keep(graph, seed=0), x)
    places = 8 * 9 if name == "odd_width" else 80
    assert graph.macs == count_macs(model, x[:1]) == 3 * 6 * 80 + 6 * 4 * places + 6 * macs


def test_a_transform_of_channels_keeps_them_whole() -> None:
    model, x = Between(lambda x: torch.fft.fft(x, dim=1).real), torch.randn(2, 3, 8, 10)
    assert not list(find_axes(model, x))


def test_complex_matrices_are_four_real_products() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.weight = nn.Linear(5, 6), nn.Parameter(torch.randn(4, 6, 2, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            spectrum = torch.fft.rfft(self.first(x), dim=1)  # [batch, 5, 6]
            return torch.view_as_real(spectrum @ torch.view_as_complex(self.weight).T)

    model, x = Complex().double(), torch.randn(1, 8, 5, dtype=torch.float64)
    graph = find_axes(model, x)
    assert graph.macs == count_macs(model, x) == 8 * 5 * 6 + 6 * transform_macs(8, True) + 4 * 5 * 6 * 4
    assert [axis.size for axis in graph] == [6]
