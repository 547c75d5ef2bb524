"""Configuration of the slimming papers' DenseNet."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from hf_compress.errors import ModelError


@strict
class DenseNetConfig(PreTrainedConfig):
    """Configuration of :class:`DenseNetModel`. The defaults give DenseNet-40 (k=12) of Liu et al. 2017.

    Args:
        depth: number of layers with weights, 3 n + 4: three blocks of n convolutions.
        growth_rate: channels that every convolution adds. Huang et al. 2017, arXiv 1608.06993: k.
        compression: share of the channels that a transition keeps, in (0, 1]. Huang et al.: theta.
        num_channels: channels of an image.
        image_size: height and width that a model is inspected and measured at; other sizes work too.
        scale_init: initial BatchNorm scales. Liu et al. 2017: gamma, 0.5.

    Raises:
        ModelError: when a number is not as said here.
    """

    model_type = "slimming_densenet"

    depth: int = 40
    growth_rate: int = 12
    compression: float = 1.0
    num_channels: int = 3
    image_size: int = 32
    scale_init: float = 0.5

    def __post_init__(self, **kwargs):
        if self.depth < 7 or (self.depth - 4) % 3:
            raise ModelError(f"depth={self.depth}: must be 3 n + 4 for n >= 1, for example 10, 22 or 40.")
        if self.growth_rate < 1:
            raise ModelError(f"growth_rate={self.growth_rate}: must be at least 1; the papers use 12.")
        if not 0 < self.compression <= 1:
            raise ModelError(f"compression={self.compression}: must be above 0 and at most 1 (keep all channels).")
        super().__post_init__(**kwargs)

    @property
    def layers_per_block(self) -> int:
        """Convolutions in each of the three blocks."""
        return (self.depth - 4) // 3


__all__ = ["DenseNetConfig"]
