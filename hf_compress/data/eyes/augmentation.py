"""Random changes of eye crops that leave the openness as it is, for whole batches at once.

Moving, turning, scaling and mirroring a crop, and what cameras do to it: exposure, colours, blur, resolution, noise, light,
something in front. None of it moves the lids against each other. A design of this package; strengths are those of its
benchmark.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_compress.errors import DataError


@dataclass(frozen=True)
class EyeAugmentation:
    """How much crops are changed; 0 leaves a change out.

    Attributes:
        translate: up to this share of the width and of the height.
        scale: up to this factor larger or smaller, 0.15 for 0.85 to 1.15.
        rotate: up to so many degrees either way.
        flip: share that is mirrored.
        exposure: standard deviation of the logarithm of the gamma.
        colour: standard deviation of each channel's gain, for half of the crops.
        grey: share without colours.
        blur: up to this share of the way to the mean of 3x3, or 0.8 of it away from it (sharper), for half of the crops.
        coarse: share with half of the resolution.
        noise: largest standard deviation, for white 1.
        light: largest change of brightness from the middle to the left or right border.
        cover: share with a rectangle in front.
    """

    translate: float = 0.1
    scale: float = 0.15
    rotate: float = 15.0
    flip: float = 0.5
    exposure: float = 0.35
    colour: float = 0.25
    grey: float = 0.25
    blur: float = 1.0
    coarse: float = 0.15
    noise: float = 0.06
    light: float = 0.3
    cover: float = 0.1

    def times(self, strength: float) -> EyeAugmentation:
        """Everything by this factor, but for the share that is mirrored.

        The full strength is for long trainings; one of a few thousand steps is better with less (``benchmarks/``).

        Args:
            strength: 0 to 1.

        Raises:
            DataError: for another number.
        """
        if not 0 <= strength <= 1:
            raise DataError(f"the strength of the augmentation is {strength}; give 0 to 1.")
        return replace(self, **{name: value * strength for name, value in asdict(self).items() if name != "flip"})

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Changed crops.

        Args:
            pixels: float [crops, channels, height, width], 0 to 1.
            generator: what it draws with, on the CPU; the same state gives the same crops.
        """
        return self.camera(self.move(pixels, generator), generator)

    def move(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Translated, turned, scaled and mirrored, with the border's pixels beyond it."""
        if not (self.translate or self.scale or self.rotate or self.flip):
            return pixels
        count, _, height, width = pixels.shape
        sign = 1 - 2 * (torch.rand(count, generator=generator) < self.flip).float()
        angle = math.radians(self.rotate) * (2 * torch.rand(count, generator=generator) - 1)
        size = 1 / (1 + self.scale * (2 * torch.rand(count, generator=generator) - 1))
        shift = 2 * self.translate * (2 * torch.rand(count, 2, generator=generator) - 1)
        cos, sin, aspect = size * angle.cos(), size * angle.sin(), height / width
        rows = (
            torch.stack([sign * cos, -aspect * sin, shift[:, 0]], dim=1),
            torch.stack([sign * sin / aspect, cos, shift[:, 1]], dim=1),
        )
        grid = F.affine_grid(torch.stack(rows, dim=1), list(pixels.shape), align_corners=False)
        return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)

    def camera(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """What cameras and light do, clipped to 0..1."""
        count, channels, height, width = pixels.shape

        def draw(*shape: int) -> Tensor:
            return torch.rand(count, *(shape or (1, 1, 1)), generator=generator)

        def chosen(share: float) -> Tensor:
            return (draw() < share).float()

        def normal(*shape: int) -> Tensor:
            return torch.randn(count, *shape, generator=generator)

        pixels = pixels.clamp(0, 1) ** torch.exp(self.exposure * normal(1, 1, 1))
        pixels = pixels * (1 + self.colour * normal(channels, 1, 1) * chosen(0.5))
        pixels = torch.lerp(pixels, pixels.mean(1, keepdim=True), chosen(self.grey))
        near = F.avg_pool2d(F.pad(pixels, [1] * 4, mode="replicate"), 3, 1)
        pixels = torch.lerp(pixels, near, self.blur * (1.8 * draw() - 0.8) * chosen(0.6))
        if self.coarse and height % 2 == 0 and width % 2 == 0:
            small = F.interpolate(F.avg_pool2d(pixels, 2), scale_factor=2, mode="bilinear")
            pixels = torch.lerp(pixels, small, chosen(self.coarse))
        pixels = pixels + self.noise * draw() * normal(channels, height, width)
        pixels = pixels * (1 + self.light * (2 * draw() - 1) * torch.linspace(-1, 1, width))
        return self._covered(pixels, generator).clamp(0, 1)

    def _covered(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """A rectangle of one colour, up to a third of the height and of the width, over some crops."""
        count, channels, height, width = pixels.shape
        extent = (1 / 8 + torch.rand(count, 2, generator=generator) * (1 / 3 - 1 / 8)) * torch.tensor([height, width])
        corner = torch.rand(count, 2, generator=generator) * (torch.tensor([height, width]) - extent)
        inside = []
        for axis, side in ((0, height), (1, width)):
            place = torch.arange(side)[None]
            start = corner[:, axis, None]
            inside.append((place >= start) & (place < start + extent[:, axis, None]))
        is_covered = torch.rand(count, generator=generator) < self.cover
        mask = (inside[0][:, :, None] & inside[1][:, None, :] & is_covered[:, None, None])[:, None]
        return torch.where(mask, torch.rand(count, channels, 1, 1, generator=generator), pixels)


__all__ = ["EyeAugmentation"]
