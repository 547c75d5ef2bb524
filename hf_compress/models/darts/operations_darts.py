"""The operators of DARTS and what stands around the cells: preprocessing, stems, the auxiliary classifier.

Liu et al. 2019, arXiv 1806.09055, and the shapes of the code that they published. Convolutions come as ReLU, convolution,
BatchNorm. Every module maps float [batch, channels, height, width] to float [batch, channels out, height / stride, width /
stride], sizes rounded up.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DartsConvolution(nn.Sequential):
    """ReLU, 1x1 convolution, BatchNorm: what brings an input of a cell to the cell's width."""

    def __init__(self, in_channels: int, out_channels: int, affine: bool = True):
        super().__init__()
        self.activation = nn.ReLU()
        self.convolution = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.normalization = nn.BatchNorm2d(out_channels, affine=affine)


class DartsFactorizedReduction(nn.Module):
    """Half of the resolution: ReLU, two 1x1 convolutions with stride 2 on pixels (0, 0) and (1, 1) of every four, BatchNorm.

    Of an odd size, the second convolution reads zeros beyond the border.
    """

    def __init__(self, in_channels: int, out_channels: int, affine: bool = True):
        super().__init__()
        self.activation = nn.ReLU()
        self.convolution_even = nn.Conv2d(in_channels, out_channels - out_channels // 2, 1, stride=2, bias=False)
        self.convolution_odd = nn.Conv2d(in_channels, out_channels // 2, 1, stride=2, bias=False)
        self.normalization = nn.BatchNorm2d(out_channels, affine=affine)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.normalization(self.halved(self.activation(hidden_states)))

    def halved(self, activated: Tensor) -> Tensor:
        """Both convolutions of the input behind its ReLU."""
        return torch.cat([self.convolution_even(activated), self.convolution_odd(shift(activated))], dim=1)


def shift(hidden_states: Tensor) -> Tensor:
    """The image one pixel up and to the left, for a convolution with stride 2: one size smaller, unless that is even."""
    height, width = hidden_states.shape[-2:]
    if height % 2 or width % 2:
        hidden_states = F.pad(hidden_states, (0, width % 2, 0, height % 2))
    return hidden_states[:, :, 1:, 1:]


class DartsSeparableConvolution(nn.Sequential):
    """ReLU, depthwise and 1x1 convolution, BatchNorm; ``repeats`` times, the first with the stride.

    Args:
        channels: in and out.
        kernel: height and width of the depthwise kernel.
        stride: of the first depthwise convolution.
        dilation: of the depthwise convolutions.
        repeats: 2 is DARTS's sep_conv, 1 its dil_conv.
        affine: whether the BatchNorms have scales and shifts.
    """

    def __init__(
        self, channels: int, kernel: int, stride: int, dilation: int = 1, repeats: int = 2, affine: bool = True
    ):
        super().__init__()
        padding = dilation * (kernel // 2)
        for number in range(repeats):
            step = stride if number == 0 else 1
            self.append(nn.ReLU())
            self.append(nn.Conv2d(channels, channels, kernel, step, padding, dilation, groups=channels, bias=False))
            self.append(nn.Conv2d(channels, channels, 1, bias=False))
            self.append(nn.BatchNorm2d(channels, affine=affine))


def max_pool(stride: int) -> nn.Module:
    """3x3 maxima."""
    return nn.MaxPool2d(3, stride, padding=1)


def mean_pool(stride: int) -> nn.Module:
    """3x3 means, of the pixels inside the image."""
    return nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)


POOLINGS = {"max_pool_3x3": max_pool, "avg_pool_3x3": mean_pool}
CONVOLUTIONS: dict[str, dict[str, int]] = {
    "sep_conv_3x3": {"kernel": 3},
    "sep_conv_5x5": {"kernel": 5},
    "dil_conv_3x3": {"kernel": 3, "dilation": 2, "repeats": 1},
    "dil_conv_5x5": {"kernel": 5, "dilation": 2, "repeats": 1},
}


def operation(operator: str, channels: int, stride: int, affine: bool = True) -> nn.Module:
    """One operator of DARTS, other than "none".

    Args:
        operator: its name.
        channels: in and out.
        stride: 1, or 2 on the edges from the inputs of a reduction cell.
        affine: whether BatchNorms have scales and shifts; not in a search.
    """
    if operator in CONVOLUTIONS:
        return DartsSeparableConvolution(channels, stride=stride, affine=affine, **CONVOLUTIONS[operator])
    if operator == "skip_connect":
        return nn.Identity() if stride == 1 else DartsFactorizedReduction(channels, channels, affine)
    return POOLINGS[operator](stride)


class DartsDropPath(nn.Module):
    """While training, a share ``drop_prob`` of the examples gets nothing from this edge, and the others more."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return hidden_states
        kept = torch.empty_like(hidden_states[:, :1, :1, :1]).bernoulli_(1 - self.drop_prob)
        return hidden_states * (kept / (1 - self.drop_prob))


class DartsCifarStem(nn.Sequential):
    """3x3 convolution, BatchNorm. Both inputs of the first cell are its output."""

    def __init__(self, num_channels: int, channels: int):
        super().__init__(nn.Conv2d(num_channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        self.channels = (channels, channels)
        self.is_halved = False

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        hidden_states = super().forward(pixel_values)
        return hidden_states, hidden_states


class DartsImageNetStem(nn.Module):
    """Three 3x3 convolutions with stride 2, each with BatchNorm. The first cell reads the outputs of the last two."""

    def __init__(self, num_channels: int, channels: int):
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(num_channels, channels // 2, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels // 2),
            nn.ReLU(),
            nn.Conv2d(channels // 2, channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.second = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.channels = (channels, channels)
        self.is_halved = True

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        earlier = self.first(pixel_values)
        return earlier, self.second(earlier)


class DartsAuxiliaryHead(nn.Module):
    """The second classifier that helps training, on the output of an inner cell.

    Shapes of the published code: 5x5 mean pooling to 2 x 2 (stride 3 of 8 x 8 pixels, 2 of 7 x 7), 1x1 convolution to 128
    channels, 2x2 convolution to 768, a linear layer. Its ImageNet variant has no second BatchNorm. Feature maps of other sizes
    than these two are pooled to 2 x 2 adaptively.
    """

    def __init__(self, channels: int, num_labels: int, stem: str):
        super().__init__()
        self.activation = nn.ReLU()
        self.convolution_in = nn.Conv2d(channels, 128, 1, bias=False)
        self.normalization_in = nn.BatchNorm2d(128)
        self.convolution_out = nn.Conv2d(128, 768, 2, bias=False)
        self.normalization_out = nn.BatchNorm2d(768) if stem == "cifar" else nn.Identity()
        self.classifier = nn.Linear(768, num_labels)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Float [batch, channels, height, width] -> logits [batch, num_labels]."""
        size = tuple(hidden_states.shape[-2:])
        hidden_states = self.activation(hidden_states)
        if size in ((7, 7), (8, 8)):
            hidden_states = F.avg_pool2d(hidden_states, 5, stride=2 if size == (7, 7) else 3)
        else:
            hidden_states = F.adaptive_avg_pool2d(hidden_states, 2)
        hidden_states = self.activation(self.normalization_in(self.convolution_in(hidden_states)))
        hidden_states = self.activation(self.normalization_out(self.convolution_out(hidden_states)))
        return self.classifier(hidden_states.flatten(1))


class StatisticsOnce:
    """A layer's computation for gradient checkpointing: run again, it leaves the running statistics of BatchNorm alone.

    Args:
        layer: whose BatchNorms these are; any module with ``track_running_stats`` counts as one.
        compute: what to run.
    """

    def __init__(self, layer: nn.Module, compute: Callable[..., Any]):
        self.layer, self.compute = layer, compute
        self.has_run = False

    def __call__(self, *inputs: Any) -> Any:
        if not self.has_run:
            self.has_run = True
            return self.compute(*inputs)
        tracking: list[Any] = [m for m in self.layer.modules() if getattr(m, "track_running_stats", False)]
        kept = [dict(module._buffers) for module in tracking]
        for module, buffers in zip(tracking, kept, strict=True):
            # copies, not None: what is saved for the backward pass has to be alike in both runs
            module._buffers.update({name: value.clone() for name, value in buffers.items() if value is not None})
        try:
            return self.compute(*inputs)
        finally:
            for module, buffers in zip(tracking, kept, strict=True):
                module._buffers.update(buffers)
