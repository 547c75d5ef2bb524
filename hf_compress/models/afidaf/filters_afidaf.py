"""AFIDAF's two filters: a mask that depends on the image in the Fourier domain, and a large kernel in the image domain.

Zheng et al. 2024, arXiv 2407.12217. The Fourier filter is AFFNet's (Huang et al. 2023, arXiv 2307.14008), as published in its
code; the image filter is a reconstruction (large-kernel attention of Guo et al. 2022, arXiv 2202.09741, with grouped
projections and a channel shuffle). Both take and give float [batch, channels, height, width] of any size.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from hf_compress.errors import ModelError

from .configuration_afidaf import AfidafConfig


def activation(field: str, name: str) -> nn.Module:
    """An activation by its name in transformers."""
    if name not in ACT2FN:
        raise ModelError(f"AfidafConfig: {field}={name[:60]!r} is not one of {', '.join(sorted(ACT2FN))}.")
    return ACT2FN[name]


def shuffle_channels(hidden_states: Tensor, groups: int) -> Tensor:
    """Spread each of the groups of channels over all of the next layer's groups."""
    return hidden_states.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class AfidafFourierFilter(nn.Module):
    """``x + irfft2(M(X) X)`` with ``X = rfft2(x)``: the mask M is computed from the spectrum, at each frequency alone.

    For each group of channels M is a small network of two complex linear layers, with an activation on real and imaginary
    parts between, and soft shrinkage of both behind. By the convolution theorem the filter is a circular depthwise
    convolution with a kernel as large as the image, of every image and channel its own.

    The network sees the half spectrum of ``rfft2``, which is part of the model: activation and biases act on real and
    imaginary parts separately, so on the full spectrum its mask would not be that of a real kernel.

    Args:
        channels: number of channels.
        groups: of them. Must divide ``channels``.
        act: activation inside the network.
        shrinkage: threshold of the soft shrinkage.
        transform: "fft", "matrix" or "auto"; see ``AfidafConfig.fourier_transform``.

    Attributes:
        weight_in, weight_out: [groups, channels out, channels in, 2], real and imaginary part last.
        bias_in, bias_out: [groups, channels out, 2].
    """

    def __init__(
        self,
        channels: int,
        groups: int = 8,
        act: str = "silu",
        shrinkage: float = 0.01,
        transform: Literal["auto", "fft", "matrix"] = "auto",
    ):
        super().__init__()
        if channels % groups:
            raise ModelError(f"{channels} channels do not fall into {groups} groups of a Fourier filter.")
        size = channels // groups
        self.weight_in = nn.Parameter(torch.empty(groups, size, size, 2))
        self.bias_in = nn.Parameter(torch.empty(groups, size, 2))
        self.weight_out = nn.Parameter(torch.empty(groups, size, size, 2))
        self.bias_out = nn.Parameter(torch.empty(groups, size, 2))
        self.activation = activation("fourier_act", act)
        self.shrinkage = shrinkage
        self.transform = transform
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=0.02)

    def forward(self, hidden_states: Tensor) -> Tensor:
        device = hidden_states.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return hidden_states + self.filtered(hidden_states)
        return hidden_states + self.filtered(hidden_states)

    def filtered(self, hidden_states: Tensor) -> Tensor:
        """What the filter adds to its input, in the type of the input."""
        # CPUs have no transform of half precision, and GPUs one for powers of two alone
        signal = hidden_states if hidden_states.dtype == torch.float64 else hidden_states.float()
        is_export = torch.compiler.is_exporting() or torch.jit.is_tracing()
        if self.transform == "matrix" or (self.transform == "auto" and is_export):
            result = self._by_matrices(signal)
        else:
            spectrum = torch.fft.rfft2(signal, norm="ortho")
            result = torch.fft.irfft2(self.mask(spectrum) * spectrum, s=signal.shape[-2:], norm="ortho")
        return result.to(hidden_states.dtype)

    def mask(self, spectrum: Tensor) -> Tensor:
        """The mask of a half spectrum, both complex [batch, channels, height, width // 2 + 1]."""
        grouped = spectrum.unflatten(1, (self.weight_in.shape[0], -1)).flatten(3)
        kind = spectrum.real.dtype
        # complex products run at the speed of a matrix product and need no copy of real and imaginary parts
        hidden = _complex(self.weight_in, kind) @ grouped + _complex(self.bias_in, kind).unsqueeze(-1)
        hidden = torch.view_as_complex(self.activation(torch.view_as_real(hidden)))
        mask = _complex(self.weight_out, kind) @ hidden + _complex(self.bias_out, kind).unsqueeze(-1)
        mask = torch.view_as_complex(F.softshrink(torch.view_as_real(mask), self.shrinkage))
        return mask.flatten(1, 2).unflatten(-1, spectrum.shape[-2:])

    def _by_matrices(self, signal: Tensor) -> Tensor:
        """The same in real numbers alone: transforms as products with matrices of cosines and sines.

        Spectra are [batch, channels, 2 height, width // 2 + 1] here, real parts above imaginary ones.
        """
        height, width = signal.shape[-2:]
        frequencies = width // 2 + 1
        cos, sin = _fourier_matrices(height, height, signal)
        rows = torch.cat([torch.cat([cos, sin], 1), torch.cat([-sin, cos], 1)])
        cos, sin = _fourier_matrices(width, frequencies, signal)
        columns = torch.cat([cos, -sin], 1)
        spectrum = rows @ torch.cat(_halves(signal @ columns, 3), 2)
        (real, imaginary), (mask_real, mask_imaginary) = _halves(spectrum, 2), _halves(self._real_mask(spectrum), 2)
        filtered = [real * mask_real - imaginary * mask_imaginary, real * mask_imaginary + imaginary * mask_real]
        # on the way back all columns but the first and the middle one stand for two
        place = torch.arange(frequencies, device=signal.device)
        twice = ((place > 0) & (2 * place != width)).to(signal.dtype) + 1
        back = torch.cat(_halves(rows.T @ torch.cat(filtered, 2), 2), 3)
        return back @ (columns * twice.repeat(2)).T

    def _real_mask(self, spectrum: Tensor) -> Tensor:
        """The mask of a spectrum, with real and imaginary parts of a group as if they were its channels."""
        groups, shape = self.weight_in.shape[0], spectrum.shape[-2:]
        parts = spectrum.unflatten(1, (groups, -1)).unflatten(
            3, (2, -1)
        )  # [batch, groups, size, 2, height, frequencies]
        inputs = parts.transpose(2, 3).flatten(4).flatten(2, 3)
        hidden = self.activation(_real_layer(self.weight_in, self.bias_in, inputs))
        mask = F.softshrink(_real_layer(self.weight_out, self.bias_out, hidden), self.shrinkage)
        parts = mask.unflatten(2, (2, -1)).transpose(2, 3).flatten(3)
        return parts.flatten(1, 2).unflatten(-1, shape)

    def extra_repr(self) -> str:
        groups, size = self.weight_in.shape[:2]
        return f"{groups * size}, groups={groups}, shrinkage={self.shrinkage}, transform={self.transform}"


def _complex(parameter: Tensor, kind: torch.dtype) -> Tensor:
    return torch.view_as_complex(parameter.to(kind).contiguous())  # a model in channels_last has its weights so, too


def _halves(tensor: Tensor, dim: int) -> tuple[Tensor, ...]:
    return tensor.unflatten(dim, (2, -1)).unbind(dim)  # chunk would ask exporters whether a free size is even


def _real_layer(weight: Tensor, bias: Tensor, inputs: Tensor) -> Tensor:
    """A complex linear layer on [batch, groups, 2 size, places], real parts above imaginary ones."""
    real, imaginary = weight.to(inputs.dtype).unbind(-1)
    whole = torch.cat([torch.cat([real, -imaginary], -1), torch.cat([imaginary, real], -1)], -2)
    return whole @ inputs + bias.to(inputs.dtype).transpose(-1, -2).flatten(1).unsqueeze(-1)


def _fourier_matrices(size: Any, frequencies: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of 2 pi k l / size, over sqrt(size): [size, frequencies] each."""
    if isinstance(size, int):  # a constant of an exported model
        tables = torch.tensor(_cosines_and_sines(int(size), int(frequencies)), dtype=like.dtype, device=like.device)
        return tables[0], tables[1]
    place = torch.arange(size, dtype=torch.float64, device=like.device)
    turns = place[:, None] * torch.arange(frequencies, dtype=torch.float64, device=like.device) / size
    angle = 2 * math.pi * (turns - turns.floor())  # exporters know no remainder of a size that is not fixed
    scale = size**-0.5
    return (angle.cos() * scale).to(like.dtype), (angle.sin() * scale).to(like.dtype)


@lru_cache(maxsize=16)
def _cosines_and_sines(size: int, frequencies: int) -> list[list[list[float]]]:
    angles = [[2 * math.pi * (row * column % size) / size for column in range(frequencies)] for row in range(size)]
    scale = size**-0.5
    return [[[scale * f(angle) for angle in row] for row in angles] for f in (math.cos, math.sin)]


class AfidafImageFilter(nn.Module):
    """``x + out(large_kernel(a) a)`` with ``a = gelu(shuffle(in(x)))``: group-shuffled large-kernel convolution.

    The large kernel is a depthwise, a dilated depthwise and a 1x1 convolution; what it gives is multiplied with what it
    reads. Zeros are padded around the image.

    Args:
        channels: number of channels.
        config: gives kernels and groups.
    """

    def __init__(self, channels: int, config: AfidafConfig):
        super().__init__()
        near, far, dilation = config.image_kernel_size, config.image_dilated_kernel_size, config.image_dilation
        self.projection_in = nn.Conv2d(channels, channels, 1, groups=config.image_projection_groups)
        self.activation = nn.GELU()
        self.depthwise = nn.Conv2d(channels, channels, near, padding=near // 2, groups=channels)
        self.dilated = nn.Conv2d(
            channels, channels, far, padding=far // 2 * dilation, dilation=dilation, groups=channels
        )
        self.pointwise = nn.Conv2d(channels, channels, 1, groups=config.image_pointwise_groups)
        self.projection_out = nn.Conv2d(channels, channels, 1, groups=config.image_projection_groups)

    def forward(self, hidden_states: Tensor) -> Tensor:
        inner = self.projection_in(hidden_states)
        inner = self.activation(shuffle_channels(inner, self.projection_in.groups))
        near = self.depthwise(inner)
        far = _in_phases(self.dilated, near) if _is_faster_in_phases(self.dilated, near) else self.dilated(near)
        return hidden_states + self.projection_out(self.pointwise(far) * inner)


_SMALLEST_IN_PHASES = (8, 16)  # places a side, in inference and in training; below, filling up the phases costs more


def _is_faster_in_phases(layer: nn.Module, images: Tensor) -> bool:
    """Whether the layer is an ordinary dilated convolution, on a CPU, of whose call nobody takes notice.

    oneDNN's kernels for dilated depthwise convolutions take about three times as long as those for plain ones (torch 2.14).
    Where operators are counted, traced, compiled or exported, the convolution stays what it is on paper.
    """
    if type(layer) is not nn.Conv2d or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    if images.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        return False
    is_training = torch.is_grad_enabled() and (images.requires_grad or layer.weight.requires_grad)
    return layer.dilation[0] > 1 and min(images.shape[-2:]) >= _SMALLEST_IN_PHASES[is_training]


def _in_phases(layer: nn.Conv2d, images: Tensor) -> Tensor:
    """A dilated depthwise convolution as plain ones of every ``dilation``-th row and column: the same sums."""
    (batch, channels, height, width), step = images.shape, layer.dilation[0]
    rows, columns = -(-height // step), -(-width // step)
    images = F.pad(images, (0, columns * step - width, 0, rows * step - height))
    phases = images.view(batch, channels, rows, step, columns, step).permute(0, 3, 5, 1, 2, 4).flatten(0, 2)
    phases = F.conv2d(phases, layer.weight, layer.bias, padding=layer.kernel_size[0] // 2, groups=layer.groups)
    phases = phases.view(batch, step, step, channels, rows, columns).permute(0, 3, 4, 1, 5, 2)
    return phases.reshape(batch, channels, rows * step, columns * step)[..., :height, :width]


__all__ = ["AfidafFourierFilter", "AfidafImageFilter", "activation", "shuffle_channels"]
