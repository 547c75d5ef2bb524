"""What the three networks of the slimming papers share.

Networks and initialisation: Liu et al. 2017, arXiv 1708.06519; Bui et al. 2020 and 2023 (arXiv 2010.01242, 2307.00684)
train the same networks.

None of them offers gradient checkpointing: it runs every block twice in a step, and the running statistics of BatchNorm
would be updated twice.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)
from transformers.utils.generic import can_return_tuple


class PreActivation(nn.Module):
    """Choose channels, normalise them, ReLU: what stands before a convolution in a pre-activation network.

    The input is also read by others (a residual stream, a concatenation), so it stays whole, and ``index`` says which of
    its channels go on. All of them do until a plan shortens ``index`` together with everything behind it.

    The papers' code normalises first and selects afterwards, and leaves the BatchNorm whole in the pruned network.
    BatchNorm treats every channel on its own, so selecting first is the same function with a smaller BatchNorm.
    A dense model has the same parameters in both orders.

    Args:
        channels: number of input channels.

    Attributes:
        index: int64 [channels kept], positions in the input. A parameter without gradient, as in the papers' code,
            which counts it among the parameters.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.index = nn.Parameter(torch.arange(channels), requires_grad=False)
        self.normalization = nn.BatchNorm2d(channels)
        self.activation = nn.ReLU()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Float [batch, channels, height, width] -> [batch, channels kept, height, width]."""
        return self.activation(self.normalization(torch.index_select(hidden_states, 1, self.index)))


class SlimmingPreTrainedModel(PreTrainedModel):
    """Initialisation as in the papers' code.

    Convolutions: N(0, 2 / (kernel area x output channels)); BatchNorm scales: ``config.scale_init`` (the papers: 0.5),
    shifts: 0; linear layers: torch's default, unless ``linear_std`` is set.
    """

    main_input_name = "pixel_values"
    input_modalities = "image"
    linear_std: float | None = None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
        elif isinstance(module, nn.BatchNorm2d):
            init.constant_(module.weight, self.config.scale_init)
        elif isinstance(module, nn.Linear):
            if self.linear_std is not None:
                init.normal_(module.weight, std=self.linear_std)
                init.zeros_(module.bias)
            else:
                bound = 1.0 / math.sqrt(module.in_features)
                init.uniform_(module.weight, -bound, bound)
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, PreActivation):
            init.copy_(module.index, torch.arange(module.index.shape[0], device=module.index.device))


class PreActivationFeatures:
    """The forward pass of a pre-activation trunk: ``embedder``, ``stages``, ``preactivation``, ``pooler``."""

    @can_return_tuple
    def forward(
        self: Any, pixel_values: Tensor, output_hidden_states: bool | None = None
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        """Features of images.

        Args:
            pixel_values: float [batch, config.num_channels, height, width].
            output_hidden_states: whether to return the output of the first convolution and of each stage, too.
            return_dict: False gives a tuple.

        Returns:
            ``last_hidden_state``: [batch, width, height / 4, width / 4], after the last BatchNorm and ReLU;
            ``pooler_output``: [batch, width].
        """
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden_states = self.embedder(pixel_values)
        collected = [hidden_states]
        for stage in self.stages:
            hidden_states = stage(hidden_states)
            collected.append(hidden_states)
        hidden_states = self.preactivation(hidden_states)
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=hidden_states,
            pooler_output=self.pooler(hidden_states).flatten(1),
            hidden_states=tuple(collected) if wanted else None,
        )


class ImageClassification:
    """The forward pass of an image classifier: ``base_model``, then ``classifier`` on the pooled features."""

    @can_return_tuple
    def forward(
        self: Any,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
    ) -> ImageClassifierOutputWithNoAttention:
        """Classify images.

        Args:
            pixel_values: float [batch, config.num_channels, height, width].
            labels: int64 [batch]; with them the output has the mean cross entropy as its loss.
            output_hidden_states: whether to return the features of every stage as well.
            return_dict: False gives a tuple.
        """
        outputs = self.base_model(pixel_values, output_hidden_states=output_hidden_states, return_dict=True)
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


def classifier(features: int, config: PreTrainedConfig) -> nn.Module:
    """The linear head of an image classifier; nothing when there are no labels."""
    return nn.Linear(features, config.num_labels) if config.num_labels else nn.Identity()
