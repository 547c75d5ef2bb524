"""Depthwise convolutions whose backward pass is fast on a CPU, too.

Nothing here is from a paper. torch's CPU kernels (oneDNN) are fast for a depthwise convolution and for the gradient of a 3x3
kernel, and slow for other gradients: measured on one core of an AMD EPYC with 32 x 16 x 32 x 32 numbers, channels last, the
gradient of a 5x5 kernel takes 4.1 ms where the forward pass takes 0.3, and the input's gradient with dilation 2 takes 3 to 4.6
ms. The same numbers come from fast kernels:

- With stride 1, the input's gradient is the convolution of the output's gradient with the kernel turned by 180 degrees.
- The gradient of a 5x5 kernel is put together from gradients of 3x3 kernels for the input moved by one pixel along both
  diagonals.
- A convolution with dilation 2 is one without, on each of the four images of every second pixel (:func:`split_phases`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def depthwise(hidden_states: Tensor, weight: Tensor, stride: int = 1, dilation: int = 1) -> Tensor:
    """Depthwise convolution with zero padding that keeps the size. The fast backward pass is for dilation 1.

    Args:
        hidden_states: float [batch, channels, height, width].
        weight: float [channels, 1, kernel, kernel], kernel 3 or 5.
        stride: 1 or 2.
        dilation: 1 or 2.
    """
    is_slow = hidden_states.device.type == "cpu" and hidden_states.dtype == weight.dtype == torch.float32
    if is_slow and dilation == 1 and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return DepthwiseFunction.apply(hidden_states, weight, stride)
    return F.conv2d(hidden_states, weight, None, stride, dilation * (weight.shape[-1] // 2), dilation, weight.shape[0])


class DepthwiseFunction(torch.autograd.Function):
    """:func:`depthwise` with the backward pass that the module describes, in any floating point type."""

    @staticmethod
    def forward(hidden_states: Tensor, weight: Tensor, stride: int) -> Tensor:
        return F.conv2d(hidden_states, weight, None, stride, weight.shape[-1] // 2, 1, weight.shape[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        hidden_states, weight, ctx.stride = inputs
        ctx.save_for_backward(hidden_states, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden_states, weight = ctx.saved_tensors
        kernel, groups = weight.shape[-1], weight.shape[0]
        # of float32 in channels last all kernels are fast
        grad = grad.contiguous(memory_format=torch.channels_last)
        of_input = of_weight = None
        if ctx.needs_input_grad[0]:
            if ctx.stride == 1:
                of_input = F.conv2d(grad, weight.flip(2, 3), None, 1, kernel // 2, 1, groups)
            else:
                of_input = _gradients(grad, hidden_states, weight, ctx.stride, [True, False, False])[0]
        if ctx.needs_input_grad[1]:
            if kernel == 5 and ctx.stride == 1:
                of_weight = _gradient_of_5x5(grad, hidden_states, weight)
            else:
                of_weight = _gradients(grad, hidden_states, weight, ctx.stride, [False, True, False])[1]
        return of_input, of_weight, None


def _gradients(
    grad: Tensor, hidden_states: Tensor, weight: Tensor, stride: int, wanted: list[bool], padding: int | None = None
) -> Any:
    around = [weight.shape[-1] // 2 if padding is None else padding] * 2
    return torch.ops.aten.convolution_backward(
        grad, hidden_states, weight, None, [stride] * 2, around, [1, 1], False, [0, 0], weight.shape[0], wanted
    )


def _gradient_of_5x5(grad: Tensor, hidden_states: Tensor, weight: Tensor) -> Tensor:
    """Rows and columns 0 to 2 of the kernel are a 3x3 kernel that reads the padded input, 2 to 4 one that reads it moved."""
    height, width = hidden_states.shape[-2] + 2, hidden_states.shape[-1] + 2
    padded = F.pad(hidden_states, (2, 2, 2, 2))
    inner = weight[:, :, 1:4, 1:4]  # only its shape is used
    corners = [
        [
            _gradients(grad, padded[:, :, i : i + height, j : j + width], inner, 1, [False, True, False], padding=0)[1]
            for j in (0, 2)
        ]
        for i in (0, 2)
    ]
    # both 3x3 gradients of a pair have the middle row or column of the kernel
    rows = [torch.cat([left, right[..., 1:]], dim=3) for left, right in corners]
    return torch.cat([rows[0], rows[1][:, :, 1:]], dim=2)


def split_phases(hidden_states: Tensor) -> Tensor:
    """Float [batch, channels, height, width] -> [4 batch, channels, height / 2, width / 2]: every second row and column.

    Height and width have to be even.
    """
    batch, channels, height, width = hidden_states.shape
    pixels = hidden_states.permute(0, 2, 3, 1).reshape(batch, height // 2, 2, width // 2, 2, channels)
    return pixels.permute(2, 4, 0, 1, 3, 5).reshape(4 * batch, height // 2, width // 2, channels).permute(0, 3, 1, 2)


def join_phases(phases: Tensor) -> Tensor:
    """The reverse of :func:`split_phases`."""
    quadruple, channels, rows, columns = phases.shape
    batch = quadruple // 4
    pixels = phases.permute(0, 2, 3, 1).reshape(2, 2, batch, rows, columns, channels).permute(2, 3, 0, 4, 1, 5)
    return pixels.reshape(batch, 2 * rows, 2 * columns, channels).permute(0, 3, 1, 2)
