"""AFIDAF's two filters against their definitions, and everything about their numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masking import assert_cut_equals_masked, random_keep
from torch import Tensor, nn
from torch.nn import functional as F

from hf_compress import find_axes
from hf_compress.axes.fourier import transform_macs
from hf_compress.errors import ModelError
from hf_compress.measurement import count_macs
from hf_compress.models.afidaf import AfidafConfig, filters_afidaf
from hf_compress.models.afidaf.filters_afidaf import AfidafFourierFilter, AfidafImageFilter, shuffle_channels

SIZES = [(8, 8), (7, 5), (9, 12), (16, 11), (5, 6), (1, 7), (16, 1), (1, 1)]


def fourier(channels: int = 16, groups: int = 4, **arguments: object) -> AfidafFourierFilter:
    torch.manual_seed(0)
    module = AfidafFourierFilter(channels, groups, **arguments).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(20)  # masks far from zero, so that nothing hides behind the shrinkage
    return module


def signal(size: tuple[int, int], channels: int = 16, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def published(module: AfidafFourierFilter, x: Tensor, full: bool = False) -> Tensor:
    """AFFNet's code, line by line: eight products of real and imaginary parts."""
    batch, _, height, width = x.shape
    transform = torch.fft.fft2 if full else torch.fft.rfft2
    spectrum = transform(x, dim=(2, 3), norm="ortho")
    groups, size = module.weight_in.shape[:2]
    z = spectrum.reshape(batch, groups, size, *spectrum.shape[2:])
    w1, w2 = (w.permute(3, 0, 2, 1) for w in (module.weight_in, module.weight_out))  # part, group, in, out
    b1, b2 = (b.permute(2, 0, 1)[..., None, None] for b in (module.bias_in, module.bias_out))
    e = "bkihw,kio->bkohw"
    y_re = F.silu(torch.einsum(e, z.real, w1[0]) - torch.einsum(e, z.imag, w1[1]) + b1[0])
    y_im = F.silu(torch.einsum(e, z.imag, w1[0]) + torch.einsum(e, z.real, w1[1]) + b1[1])
    m_re = torch.einsum(e, y_re, w2[0]) - torch.einsum(e, y_im, w2[1]) + b2[0]
    m_im = torch.einsum(e, y_im, w2[0]) + torch.einsum(e, y_re, w2[1]) + b2[1]
    mask = torch.complex(F.softshrink(m_re, 0.01), F.softshrink(m_im, 0.01)).reshape(spectrum.shape)
    if full:
        return torch.fft.ifft2(mask * spectrum, norm="ortho").real + x
    return torch.fft.irfft2(mask * spectrum, s=(height, width), norm="ortho") + x


def circular(x: Tensor, kernel: Tensor) -> Tensor:
    """Sum over places of kernel[i, j] times the image rolled by (i, j)."""
    result = torch.zeros_like(x)
    for i in range(x.shape[2]):
        for j in range(x.shape[3]):
            result += kernel[..., i : i + 1, j : j + 1] * torch.roll(x, (i, j), (2, 3))
    return result


# -- Fourier filter -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", ["fft", "matrix"])
@pytest.mark.parametrize("size", SIZES)
def test_is_the_published_filter(size: tuple[int, int], transform: str) -> None:
    module, x = fourier(transform=transform), signal(size)
    torch.testing.assert_close(module(x), published(module, x), rtol=0, atol=1e-13)  # float64, sums of a few hundred
    assert (module(x) - x).abs().max() > 1e-2


def test_parameters_are_counted_as_published() -> None:
    for channels in (64, 96, 320):
        assert sum(p.numel() for p in AfidafFourierFilter(channels).parameters()) == channels**2 // 2 + 4 * channels


def test_the_half_spectrum_is_part_of_the_definition() -> None:
    """The same network on the full spectrum gives a mask of no real kernel, so a port to fft2 is another filter."""
    module, x = fourier(), signal((8, 6))
    assert (published(module, x, full=True) - module(x)).norm() > 0.1 * (module(x) - x).norm()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6))
def test_adds_a_circular_convolution_with_the_inverse_of_its_mask(height: int, width: int, seed: int) -> None:
    """Convolution theorem; the kernel is the inverse without the factor 1 / sqrt(points) of "ortho"."""
    module = fourier()
    x = torch.randn(2, 16, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        mask = module.mask(torch.fft.rfft2(x, norm="ortho"))
        kernel = torch.fft.irfft2(mask, s=(height, width), norm="backward")
        scaled = torch.fft.irfft2(mask, s=(height, width), norm="ortho")
        torch.testing.assert_close(
            module(x) - x, circular(x, kernel), rtol=0, atol=1e-12
        )  # 81 products of numbers below 10
    torch.testing.assert_close(scaled, kernel * math.sqrt(height * width), rtol=0, atol=1e-12)


def test_a_fixed_mask_commutes_with_shifts_and_moves_a_point() -> None:
    module, x = fourier(), signal((9, 12))
    with torch.no_grad():
        mask = module.mask(torch.fft.rfft2(x, norm="ortho"))

    def apply(image: Tensor) -> Tensor:
        return torch.fft.irfft2(mask * torch.fft.rfft2(image, norm="ortho"), s=image.shape[-2:], norm="ortho")

    torch.testing.assert_close(
        apply(torch.roll(x, (2, 5), (2, 3))), torch.roll(apply(x), (2, 5), (2, 3)), rtol=0, atol=1e-12
    )
    point = torch.zeros_like(x)
    point[..., 3, 4] = 1
    kernel = torch.fft.irfft2(mask, s=(9, 12))
    torch.testing.assert_close(apply(point), torch.roll(kernel, (3, 4), (2, 3)), rtol=0, atol=1e-12)


def test_a_small_mask_is_exactly_zero() -> None:
    module, x = fourier(), signal((8, 8))
    with torch.no_grad():
        module.weight_out.zero_()
        module.bias_out.fill_(0.0099)
    assert torch.equal(module(x), x)


def test_groups_do_not_meet() -> None:
    module, x = fourier(), signal((8, 6))
    other = x.clone()
    other[:, 4:8] += 1
    changed = (module(other) - module(x)).abs().amax(dim=(0, 2, 3)) > 1e-9
    assert changed.nonzero().flatten().tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("transform", ["fft", "matrix"])
def test_gradients(transform: str) -> None:
    module = fourier(8, 4, transform=transform)
    x = signal((5, 4), 8, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda image, *_: module(image), (x, *module.parameters()))


@pytest.mark.parametrize("transform", ["fft", "matrix"])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(kind: torch.dtype, transform: str) -> None:
    """Also at sizes that are no powers of two, for which there is no transform of half precision at all."""
    whole = fourier(transform=transform).float()
    half = fourier(transform=transform).to(kind)
    for size in ((8, 8), (7, 5)):
        x = signal(size).to(kind)
        assert half(x).dtype == kind
        with torch.no_grad():
            half_weights = {name: value.float() for name, value in half.state_dict().items()}
            expected = torch.func.functional_call(whole, half_weights, (x.float(),)) - x.float()
            assert torch.equal(half.filtered(x), expected.to(kind)) or torch.allclose(
                half.filtered(x).float(), expected, rtol=2**-7, atol=1e-6
            )
        # under autocast the float32 weights stay float32
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(whole(x.float()), whole.double()(x.double()).float(), rtol=1e-4, atol=1e-4)
            whole.float()


def test_layouts_agree() -> None:
    module, x = fourier(), signal((8, 6))
    expected = module(x)
    torch.testing.assert_close(module(x.contiguous(memory_format=torch.channels_last)), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(module(x.transpose(2, 3).contiguous().transpose(2, 3)), expected, rtol=0, atol=1e-13)


def test_channels_must_fall_into_groups() -> None:
    with pytest.raises(ModelError, match=r"20 channels .* 8 groups"):
        AfidafFourierFilter(20)


# -- image filter ---------------------------------------------------------------------------------------------------


def image_filter(channels: int = 16, **changes: object) -> AfidafImageFilter:
    torch.manual_seed(0)
    return AfidafImageFilter(channels, AfidafConfig(**{"image_projection_groups": 4, **changes})).double()


def test_shuffle_is_a_permutation_with_an_inverse() -> None:
    x = signal((2, 3), 24)
    for groups in (1, 2, 3, 4, 8, 24):
        shuffled = shuffle_channels(x, groups)
        assert sorted(shuffled[0, :, 0, 0].tolist()) == sorted(x[0, :, 0, 0].tolist())
        assert torch.equal(shuffle_channels(shuffled, 24 // groups), x)
    assert shuffle_channels(torch.arange(6.0).view(1, 6, 1, 1), 2).flatten().tolist() == [0, 3, 1, 4, 2, 5]


def test_image_filter_is_what_it_says() -> None:
    """Against a dense reference: every convolution written out as one matrix on the pixels of a small map."""
    module, x = image_filter(), signal((6, 5))

    def dense(layer: nn.Conv2d, images: Tensor) -> Tensor:
        kernel, dilation = layer.kernel_size[0], layer.dilation[0]
        reach = kernel // 2 * dilation
        padded = F.pad(images, (reach,) * 4)
        result = torch.zeros_like(images) + layer.bias[:, None, None]
        per_group = 16 // layer.groups
        for channel in range(16):
            first = channel // per_group * per_group
            for place in range(layer.weight.shape[1]):
                for i in range(kernel):
                    for j in range(kernel):
                        part = padded[:, first + place, i * dilation :, j * dilation :][:, :6, :5]
                        result[:, channel] = result[:, channel] + layer.weight[channel, place, i, j] * part
        return result

    with torch.no_grad():
        a = F.gelu(shuffle_channels(dense(module.projection_in, x), 4))
        m = dense(module.pointwise, dense(module.dilated, dense(module.depthwise, a)))
        torch.testing.assert_close(module(x), x + dense(module.projection_out, m * a), rtol=0, atol=1e-12)
        module.pointwise.weight.zero_()
        module.pointwise.bias.zero_()
        expected = x + module.projection_out.bias[:, None, None]
        torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-13)  # a gate of zero


def test_image_filter_counts_as_reconstructed() -> None:
    for channels in (64, 96, 320):
        module = AfidafImageFilter(channels, AfidafConfig())
        assert sum(p.numel() for p in module.parameters()) == 5 * channels**2 // 4 + 79 * channels


@pytest.mark.parametrize(("side", "unused"), [(8, 24), (10, 0)])
def test_taps_that_reach_no_pixel_have_no_gradient(side: int, unused: int) -> None:
    """On small maps a dilated kernel reaches over the edge from everywhere: 24 of 49 taps at 8 x 8, none at 10 x 10."""
    module = image_filter()
    module(signal((side, side))).pow(2).sum().backward()
    never = (module.dilated.weight.grad == 0).all(dim=0).sum()
    assert int(never) == unused


# -- cost -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (16, 11)])
def test_multiply_accumulates_are_counted_in_full(size: tuple[int, int]) -> None:
    """Two complex layers at every frequency, four real products each, and two real transforms; by two counters."""
    module, x = fourier(), signal(size, batch=1)
    places = size[0] * (size[1] // 2 + 1)
    expected = 2 * 4 * 16 * 4 * places + 2 * 16 * transform_macs(size[0] * size[1], is_real=True)
    assert count_macs(module, x) == expected == find_axes(module, x).macs
    assert transform_macs(64, is_real=True) == 480 and transform_macs(64, is_real=False) == 960


# -- dilated convolutions in phases ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (16, 11), (32, 31), (8, 40)])
@pytest.mark.parametrize(("kernel", "dilation"), [(7, 3), (5, 2), (3, 4)])
def test_phases_give_the_same_sums(size: tuple[int, int], kernel: int, dilation: int) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 6, kernel, padding=kernel // 2 * dilation, dilation=dilation, groups=6).double()
    x = torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)
    found, expected = filters_afidaf._in_phases(layer, x), layer(x)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(expected)
    for inputs in ((x,), tuple(layer.parameters())):
        ours = torch.autograd.grad((found * weights).sum(), inputs, retain_graph=True)
        theirs = torch.autograd.grad((expected * weights).sum(), inputs, retain_graph=True)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)  # sums over up to 1,000 places


def test_phases_are_for_nobody_to_see(monkeypatch: pytest.MonkeyPatch) -> None:
    """In eager mode on a CPU alone; whoever counts or traces operators, or hooks the layer, sees the layer itself."""
    made: list[str] = []
    in_phases = filters_afidaf._in_phases
    monkeypatch.setattr(filters_afidaf, "_in_phases", lambda *args: made.append("phases") or in_phases(*args))
    module = AfidafImageFilter(8, AfidafConfig()).eval()
    x = torch.randn(1, 8, 16, 16)
    with torch.no_grad():
        module(x)
        assert len(made) == 1
        module(x[..., :7, :])  # a small map
        find_axes(module, x)
        # projections in 8 groups, two depthwise convolutions, one dense layer
        assert count_macs(module, (x,)) == 256 * (8 + 8 + 8 * 25 + 8 * 49 + 64)
        torch.export.export(module, (x,))
        seen: list[Any] = []
        handle = module.dilated.register_forward_hook(lambda *args: seen.append(args))
        module(x)
        handle.remove()
        assert len(made) == 1 and len(seen) == 1
    module(torch.randn(1, 8, 8, 8))  # training, and too small for it
    assert len(made) == 1


@pytest.mark.parametrize(
    ("channels", "groups", "expected"), [(32, 4, [2]), (48, 4, [3]), (16, 4, []), (24, 8, []), (24, 1, [24])]
)
def test_inner_channels_can_go_where_the_groupings_nest(channels: int, groups: int, expected: list[int]) -> None:
    """The shuffle leaves ``channels / groups`` runs of one channel of each group; the last layer's groups are whole runs.

    Where there are several runs for each of its groups, one run of each can go: an axis of ``channels / groups**2``.
    """
    torch.manual_seed(0)
    module = AfidafImageFilter(channels, AfidafConfig(image_projection_groups=groups)).double().eval()
    x = torch.randn(2, channels, 6, 7, dtype=torch.float64)
    graph = find_axes(module, x)
    assert [axis.size for axis in graph if axis.is_exact] == expected
    if expected:
        small = assert_cut_equals_masked(module, graph, random_keep(graph, 0), x)
        assert small.depthwise.weight.shape[0] < channels
