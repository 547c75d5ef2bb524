"""Configuration of wide residual networks."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from hf_compress.errors import ModelError


@strict
class WideResNetConfig(PreTrainedConfig):
    """Configuration of :class:`WideResNetModel`. The defaults give WRN-28-10 of Zagoruyko & Komodakis 2016.

    Args:
        depth: number of layers with weights, 6 n + 4: three stages of n blocks of two convolutions.
        widen_factor: how many times wider than ``base_width``, twice and four times that the three stages are.
        base_width: width of the first convolution.
        dropout: between the two convolutions of a block; the sparse-group papers' code has 0.3.
        num_channels: channels of an image.
        image_size: height and width that a model is inspected and measured at; other sizes work too.

    Raises:
        ModelError: when a number is not as said here.
    """

    model_type = "wide_resnet"

    depth: int = 28
    widen_factor: int = 10
    base_width: int = 16
    dropout: float = 0.3
    num_channels: int = 3
    image_size: int = 32

    def __post_init__(self, **kwargs):
        if self.depth < 10 or (self.depth - 4) % 6:
            raise ModelError(f"depth={self.depth}: must be 6 n + 4 for n >= 1, for example 10, 16, 28 or 40.")
        if min(self.widen_factor, self.base_width) < 1:
            raise ModelError(
                f"widen_factor={self.widen_factor}, base_width={self.base_width}: both must be positive; the paper has "
                "factors from 1 to 12 and a width of 16."
            )
        if not 0 <= self.dropout < 1:
            raise ModelError(f"dropout={self.dropout}: must be at least 0 and below 1.")
        super().__post_init__(**kwargs)

    @property
    def widths(self) -> list[int]:
        """Width of each of the three stages."""
        return [self.base_width * self.widen_factor * factor for factor in (1, 2, 4)]

    @property
    def blocks_per_stage(self) -> int:
        """Blocks in each of the three stages."""
        return (self.depth - 4) // 6


__all__ = ["WideResNetConfig"]
