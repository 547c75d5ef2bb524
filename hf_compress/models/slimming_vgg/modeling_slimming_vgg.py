"""VGG with BatchNorm and one linear layer, as the slimming papers train it on CIFAR.

Liu et al. 2017, arXiv 1708.06519. The defaults have 16 BatchNorm layers with 5504 channels in all, and 20,035,018
parameters for 10 classes. Every convolution's output is an axis whose scale is the BatchNorm weight behind it.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndNoAttention
from transformers.utils.generic import can_return_tuple

from ..slimming import ImageClassification, SlimmingPreTrainedModel, classifier
from .configuration_slimming_vgg import VggConfig


class VggLayer(nn.Module):
    """3x3 convolution, BatchNorm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.convolution = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.normalization = nn.BatchNorm2d(out_channels)
        self.activation = nn.ReLU()

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.activation(self.normalization(self.convolution(hidden_states)))


class VggPreTrainedModel(SlimmingPreTrainedModel):
    """Initialisation and loading; see :class:`SlimmingPreTrainedModel`."""

    config: VggConfig
    base_model_prefix = "vgg"
    linear_std = 0.01
    _no_split_modules = ["VggLayer"]  # noqa: RUF012


class VggModel(VggPreTrainedModel):
    """The convolutions, and the mean of the last features over the image.

    The papers pool the last 2x2 pixels of a 32x32 image; a mean over all pixels is the same there and takes any size.
    """

    def __init__(self, config: VggConfig):
        super().__init__(config)
        self.layers = nn.ModuleList()
        channels = config.num_channels
        for item in config.layers:
            if isinstance(item, int):
                self.layers.append(VggLayer(channels, item))
                channels = item
            else:
                self.layers.append(nn.MaxPool2d(2))
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        """Features of images.

        Args:
            pixel_values: float [batch, config.num_channels, height, width].
            output_hidden_states: whether to return what every entry of ``config.layers`` gives, too.
            return_dict: False gives a tuple.

        Returns:
            ``last_hidden_state``: [batch, width, height / 2^poolings, ...]; ``pooler_output``: [batch, width].
        """
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden_states = pixel_values
        collected = []
        for layer in self.layers:
            hidden_states = layer(hidden_states)
            collected.append(hidden_states)
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=hidden_states,
            pooler_output=F.adaptive_avg_pool2d(hidden_states, 1).flatten(1),
            hidden_states=tuple(collected) if wanted else None,
        )


class VggForImageClassification(ImageClassification, VggPreTrainedModel):
    """VGG with one linear layer on the pooled features."""

    def __init__(self, config: VggConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vgg = VggModel(config)
        self.classifier = classifier(config.hidden_size, config)
        self.post_init()


__all__ = ["VggForImageClassification", "VggModel", "VggPreTrainedModel"]
