"""Configuration of LeNet-5."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from hf_compress.errors import ModelError

KERNEL = 5
POOL = 2


@strict
class LeNetConfig(PreTrainedConfig):
    """Configuration of :class:`LeNetModel`. The defaults give LeNet-5 in the sizes of Caffe's example.

    Args:
        widths: output channels of the convolutions.
        hidden_size: units of the hidden linear layer.
        num_channels: channels of an image.
        image_size: height and width of images. No other size fits the linear layer.

    Raises:
        ModelError: when a number is not positive, or the images are too small for the convolutions.
    """

    model_type = "lenet"

    widths: list[int] | tuple[int, ...] = (20, 50)
    hidden_size: int = 500
    num_channels: int = 1
    image_size: int = 28

    def __post_init__(self, **kwargs):
        self.widths = list(self.widths)
        if not self.widths or min(*self.widths, self.hidden_size, self.num_channels) < 1:
            raise ModelError(
                f"widths={self.widths}, hidden_size={self.hidden_size}, num_channels={self.num_channels}: all must be "
                "positive; LeNet-5 has widths [20, 50] and hidden_size 500."
            )
        if self.feature_size < 1:
            raise ModelError(
                f"image_size={self.image_size}: nothing is left after {len(self.widths)} convolutions of {KERNEL}x{KERNEL} "
                "without padding, each with pooling behind it. Use larger images or fewer widths."
            )
        super().__post_init__(**kwargs)

    @property
    def feature_size(self) -> int:
        """Height and width of the features behind the last pooling."""
        size = self.image_size
        for _ in self.widths:
            size = (size - KERNEL + 1) // POOL
        return size


__all__ = ["LeNetConfig"]
