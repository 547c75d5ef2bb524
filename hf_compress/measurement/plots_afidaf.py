"""AFIDAF's learned masks in the Fourier plane, and the kernels in the image plane that they are, for a real image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..axes.finding import run_model, undisturbed
from ..errors import ModelError
from ..models.afidaf.filters_afidaf import AfidafFourierFilter
from .plots import _GREY, _figure

_COLUMNS = 4


def fourier_masks(model: nn.Module, pixel_values: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The mask of every Fourier filter for one image, and the same as a convolution kernel.

    Args:
        model: any module with :class:`AfidafFourierFilter` in it.
        pixel_values: float [1, channels, height, width].

    Returns:
        path of the filter -> mask, complex [channels, height, width // 2 + 1] of its feature map; and kernel, float
        [channels, height, width], with its origin at [0, 0]: the filter adds the circular convolution with it.

    Raises:
        ModelError: when there is no such filter in the model.
    """
    filters = {name: module for name, module in model.named_modules() if isinstance(module, AfidafFourierFilter)}
    if not filters:
        raise ModelError(f"{type(model).__name__} has no Fourier filter; give an AFIDAF with use_fourier_filter.")
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(module: AfidafFourierFilter, inputs: tuple[Tensor, ...]) -> None:
            signal = inputs[0][:1].float()
            mask = module.mask(torch.fft.rfft2(signal, norm="ortho"))
            found[name] = mask[0].cpu(), torch.fft.irfft2(mask, s=signal.shape[-2:])[0].cpu()

        return hook

    handles = [module.register_forward_pre_hook(keep(name)) for name, module in filters.items()]
    try:
        with undisturbed(model), torch.no_grad():
            run_model(model, pixel_values[:1])
    finally:
        for handle in handles:
            handle.remove()
    return found


def plot_fourier_masks(
    path: str | Path,
    model: nn.Module,
    pixel_values: Tensor,
    image: Any,
    filter_name: str | None = None,
    channels: Sequence[int] | None = None,
) -> Path:
    """Draw an image, and masks and kernels of some channels of one Fourier filter for it.

    Args:
        path: the PNG to write.
        model: an AFIDAF.
        pixel_values: the image as the model reads it, float [1, channels, height, width].
        image: the image as people see it, a PIL image or an array.
        filter_name: path of the filter in the model; by default the first one, which has the highest resolution.
        channels: four of them; by default those with the strongest masks.

    Raises:
        ModelError: when there is no such filter in the model.
    """
    masks = fourier_masks(model, pixel_values)
    name = next(iter(masks)) if filter_name is None else filter_name
    if name not in masks:
        raise ModelError(f"there is no Fourier filter {name!r} in the model. Possible: {', '.join(masks)}.")
    mask, kernel = masks[name]
    strongest = mask.abs().flatten(1).norm(dim=1).argsort(descending=True)[:_COLUMNS].tolist()
    chosen = list(strongest if channels is None else channels)[:_COLUMNS]
    row_height = 0.35 + 1.4 * kernel.shape[-2] / kernel.shape[-1]  # inches; four panels side by side
    with _figure(path, 2.9 + 2 * row_height) as frame:
        figure = frame.figure
        frame.remove()
        grid = figure.add_gridspec(3, _COLUMNS, height_ratios=[2.9, row_height, row_height])
        top = figure.add_subplot(grid[0, :])
        top.imshow(image)
        top.set_title("image", color=_GREY)
        top.set_axis_off()
        for column, channel in enumerate(chosen):
            height, width = kernel.shape[-2:]
            # what a half spectrum leaves out is the mirror image of what it has: the mask of a real kernel
            whole = torch.fft.fftshift(torch.fft.fft2(kernel[channel]).abs())
            centred = torch.roll(kernel[channel], (height // 2, width // 2), (0, 1))
            limit = float(centred.abs().max()) or 1.0
            panels = (
                (whole, {"cmap": "viridis", "vmin": 0.0}, "mask"),
                (centred, {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}, "kernel"),
            )
            for row, (values, style, kind) in enumerate(panels, start=1):
                axes = figure.add_subplot(grid[row, column])
                axes.imshow(values.numpy(), interpolation="nearest", **style)
                axes.set_xticks([])
                axes.set_yticks([])
                if row == 1:
                    axes.set_title(f"channel {channel}", fontsize=11, color=_GREY)
                if column == 0:
                    axes.set_ylabel(f"{kind}, {height} x {width}", fontsize=11, color=_GREY)
    return Path(path)


__all__ = ["fourier_masks", "plot_fourier_masks"]
