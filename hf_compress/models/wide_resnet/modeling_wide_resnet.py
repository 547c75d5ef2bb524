"""Wide residual networks, as the sparse-group papers train them on CIFAR.

Zagoruyko & Komodakis 2016, arXiv 1605.07146; Bui et al. 2019 and 2021 (arXiv 1912.07868; Frontiers Appl. Math. Stat.
6:529564), in whose code the stride is that of a block's second convolution. The defaults (WRN-28-10) have 36,479,194
parameters for 10 classes. Axes: the inner width of every block, and the residual stream of every stage.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from ..slimming import ImageClassification, PreActivationFeatures, classifier
from .configuration_wide_resnet import WideResNetConfig


class WideResNetBlock(nn.Module):
    """Two 3x3 convolutions, each behind BatchNorm and ReLU, with dropout between them, added to the input.

    Where the shape changes, a 1x1 convolution carries the normalised input over.
    """

    def __init__(self, in_channels: int, width: int, stride: int, dropout: float):
        super().__init__()
        self.normalization_in = nn.BatchNorm2d(in_channels)
        self.convolution_in = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.normalization_out = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout(dropout)
        self.convolution_out = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.activation = nn.ReLU()
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != width:
            self.shortcut = nn.Conv2d(in_channels, width, 1, stride=stride, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        normalised = self.activation(self.normalization_in(hidden_states))
        residual = self.convolution_in(normalised)
        residual = self.dropout(self.activation(self.normalization_out(residual)))
        residual = self.convolution_out(residual)
        return residual + (hidden_states if self.shortcut is None else self.shortcut(normalised))


class WideResNetPreTrainedModel(PreTrainedModel):
    """Initialisation as in the papers' code: Kaiming, by the inputs of convolutions and the outputs of linear layers.

    Gradient checkpointing is not offered: it would update the running statistics of BatchNorm twice in a step.
    """

    config: WideResNetConfig
    base_model_prefix = "wide_resnet"
    main_input_name = "pixel_values"
    input_modalities = "image"
    _no_split_modules = ["WideResNetBlock"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_in")
        elif isinstance(module, nn.Linear):
            init.kaiming_normal_(module.weight, mode="fan_out")
            init.normal_(module.bias, std=0.01)


class WideResNetModel(PreActivationFeatures, WideResNetPreTrainedModel):
    """Three stages of blocks, and the mean of the last features over the image."""

    def __init__(self, config: WideResNetConfig):
        super().__init__(config)
        channels = config.base_width
        self.embedder = nn.Conv2d(config.num_channels, channels, 3, padding=1, bias=False)
        self.stages = nn.ModuleList()
        for number, width in enumerate(config.widths):
            blocks = []
            for place in range(config.blocks_per_stage):
                stride = 2 if number and not place else 1
                blocks.append(WideResNetBlock(channels, width, stride, config.dropout))
                channels = width
            self.stages.append(nn.Sequential(*blocks))
        self.preactivation = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
        self.pooler = nn.AdaptiveAvgPool2d(1)
        self.post_init()


class WideResNetForImageClassification(ImageClassification, WideResNetPreTrainedModel):
    """Wide residual network with one linear layer on the pooled features."""

    def __init__(self, config: WideResNetConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.wide_resnet = WideResNetModel(config)
        self.classifier = classifier(config.widths[-1], config)
        self.post_init()


__all__ = ["WideResNetForImageClassification", "WideResNetModel", "WideResNetPreTrainedModel"]
