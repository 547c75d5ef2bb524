"""Configuration of the slimming papers' VGG."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from hf_compress.errors import ModelError


@strict
class VggConfig(PreTrainedConfig):
    """Configuration of :class:`VggModel`. The defaults give VGG-19 of Liu et al. 2017, arXiv 1708.06519.

    Args:
        layers: from input to output: the width of a 3x3 convolution, or "M" for 2x2 maximum pooling.
        num_channels: channels of an image.
        image_size: height and width that a model is inspected and measured at; other sizes work too.
        scale_init: initial BatchNorm scales. Paper: gamma, 0.5.

    Raises:
        ModelError: when ``layers`` is no such list.
    """

    model_type = "slimming_vgg"

    layers: list[int | str] | tuple[int | str, ...] = (
        64, 64, "M", 128, 128, "M", 256, 256, 256, 256, "M", 512, 512, 512, 512, "M", 512, 512, 512, 512,
    )  # fmt: skip
    num_channels: int = 3
    image_size: int = 32
    scale_init: float = 0.5

    def __post_init__(self, **kwargs):
        self.layers = list(self.layers)
        wrong = [item for item in self.layers if item != "M" and (not isinstance(item, int) or item < 1)]
        if wrong or not any(isinstance(item, int) for item in self.layers):
            problem = f"{wrong[0]!r} is no layer" if wrong else "there is no convolution"
            raise ModelError(
                f"layers={self.layers}: {problem}. Give widths of convolutions and 'M' for pooling, for example "
                "[64, 'M', 128]."
            )
        super().__post_init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Width of the features that the classifier reads."""
        return [item for item in self.layers if isinstance(item, int)][-1]


__all__ = ["VggConfig"]
