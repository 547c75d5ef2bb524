"""LeNet-5 as the sparse-group papers train it on MNIST: that of Caffe's example, with ReLU behind every hidden layer.

Bui et al. 2019 and 2021 (arXiv 1912.07868; Frontiers Appl. Math. Stat. 6:529564); architecture: LeCun et al. 1998. The
defaults have 431,080 parameters. Every convolution's output and the hidden layer are axes without a norm.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndNoAttention
from transformers.utils.generic import can_return_tuple

from ..slimming import ImageClassification, classifier
from .configuration_lenet import KERNEL, POOL, LeNetConfig


class LeNetPreTrainedModel(PreTrainedModel):
    """Initialisation as in the papers' code: Kaiming, by the inputs of convolutions and the outputs of linear layers."""

    config: LeNetConfig
    base_model_prefix = "lenet"
    main_input_name = "pixel_values"
    input_modalities = "image"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            mode = "fan_in" if isinstance(module, nn.Conv2d) else "fan_out"
            init.kaiming_normal_(module.weight, mode=mode)
            if module.bias is not None:
                init.normal_(module.bias, std=0.01)


class LeNetModel(LeNetPreTrainedModel):
    """Convolutions with ReLU and maximum pooling, and one hidden linear layer."""

    def __init__(self, config: LeNetConfig):
        super().__init__(config)
        channels = [config.num_channels, *config.widths]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, KERNEL) for before, after in zip(channels, channels[1:], strict=False)
        )
        self.hidden = nn.Linear(channels[-1] * config.feature_size**2, config.hidden_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        """Features of images.

        Args:
            pixel_values: float [batch, config.num_channels, config.image_size, config.image_size].
            output_hidden_states: whether to return what every convolution gives after pooling, too.
            return_dict: False gives a tuple.

        Returns:
            ``last_hidden_state``: [batch, width, height, width] after the last pooling; ``pooler_output``: [batch,
            config.hidden_size].
        """
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden_states = pixel_values
        collected = []
        for convolution in self.convolutions:
            hidden_states = F.max_pool2d(F.relu(convolution(hidden_states)), POOL)
            collected.append(hidden_states)
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=hidden_states,
            pooler_output=F.relu(self.hidden(hidden_states.flatten(1))),
            hidden_states=tuple(collected) if wanted else None,
        )


class LeNetForImageClassification(ImageClassification, LeNetPreTrainedModel):
    """LeNet-5 with the linear layer that tells the classes apart."""

    def __init__(self, config: LeNetConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.lenet = LeNetModel(config)
        self.classifier = classifier(config.hidden_size, config)
        self.post_init()


__all__ = ["LeNetForImageClassification", "LeNetModel", "LeNetPreTrainedModel"]
