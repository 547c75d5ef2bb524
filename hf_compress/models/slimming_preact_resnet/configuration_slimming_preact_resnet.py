"""Configuration of the slimming papers' pre-activation ResNet."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from hf_compress.errors import ModelError


@strict
class PreActResNetConfig(PreTrainedConfig):
    """Configuration of :class:`PreActResNetModel`. The defaults give ResNet-164 of Liu et al. 2017, arXiv 1708.06519.

    Args:
        depth: number of layers with weights, 9 n + 2: one stage of n bottleneck blocks for each of three widths.
        widths: inner width of the blocks of each stage; a block's output is four times as wide. The first is also the
            width of the first convolution.
        num_channels: channels of an image.
        image_size: height and width that a model is inspected and measured at; other sizes work too.
        scale_init: initial BatchNorm scales. Paper: gamma, 0.5.

    Raises:
        ModelError: when a number is not as said here.
    """

    model_type = "slimming_preact_resnet"

    depth: int = 164
    widths: list[int] | tuple[int, ...] = (16, 32, 64)
    num_channels: int = 3
    image_size: int = 32
    scale_init: float = 0.5

    def __post_init__(self, **kwargs):
        self.widths = list(self.widths)
        if self.depth < 11 or (self.depth - 2) % 9:
            raise ModelError(f"depth={self.depth}: must be 9 n + 2 for n >= 1, for example 11, 20, 56 or 164.")
        if len(self.widths) != 3 or min(self.widths) < 1:
            raise ModelError(f"widths={self.widths}: three positive widths are needed; the papers use [16, 32, 64].")
        super().__post_init__(**kwargs)

    @property
    def blocks_per_stage(self) -> int:
        """Bottleneck blocks in each of the three stages."""
        return (self.depth - 2) // 9


__all__ = ["PreActResNetConfig"]
