"""DenseNet without bottlenecks, as the slimming papers train it on CIFAR.

Liu et al. 2017, arXiv 1708.06519; architecture: Huang et al. 2017, arXiv 1608.06993. The defaults (DenseNet-40, k=12)
have 39 BatchNorm layers with 9360 channels in all, and 1,068,658 parameters for 10 classes, of which 9360 are selection
indices. Which channels each convolution reads is an axis, whose scale is the BatchNorm weight before that convolution.
What convolutions add to the concatenation is never cut.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..slimming import ImageClassification, PreActivation, PreActivationFeatures, SlimmingPreTrainedModel, classifier
from .configuration_slimming_densenet import DenseNetConfig


class DenseNetLayer(nn.Module):
    """Adds ``growth_rate`` channels, computed from all channels so far."""

    def __init__(self, channels: int, growth_rate: int):
        super().__init__()
        self.preactivation = PreActivation(channels)
        self.convolution = nn.Conv2d(channels, growth_rate, 3, padding=1, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.cat([hidden_states, self.convolution(self.preactivation(hidden_states))], dim=1)


class DenseNetTransition(nn.Module):
    """1x1 convolution and 2x2 mean pooling between two blocks."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.preactivation = PreActivation(in_channels)
        self.convolution = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.avg_pool2d(self.convolution(self.preactivation(hidden_states)), 2)


class DenseNetPreTrainedModel(SlimmingPreTrainedModel):
    """Initialisation and loading; see :class:`SlimmingPreTrainedModel`."""

    config: DenseNetConfig
    base_model_prefix = "densenet"
    _no_split_modules = ["DenseNetLayer", "DenseNetTransition"]  # noqa: RUF012


class DenseNetModel(PreActivationFeatures, DenseNetPreTrainedModel):
    """Three dense blocks, and the mean of the last features over the image."""

    def __init__(self, config: DenseNetConfig):
        super().__init__(config)
        channels = 2 * config.growth_rate
        self.embedder = nn.Conv2d(config.num_channels, channels, 3, padding=1, bias=False)
        self.stages = nn.ModuleList()
        for number in range(3):
            layers: list[nn.Module] = []
            if number:
                kept = int(config.compression * channels)
                layers.append(DenseNetTransition(channels, kept))
                channels = kept
            for _ in range(config.layers_per_block):
                layers.append(DenseNetLayer(channels, config.growth_rate))
                channels += config.growth_rate
            self.stages.append(nn.Sequential(*layers))
        self.preactivation = PreActivation(channels)
        self.pooler = nn.AdaptiveAvgPool2d(1)
        self.post_init()


class DenseNetForImageClassification(ImageClassification, DenseNetPreTrainedModel):
    """DenseNet with one linear layer on the pooled features."""

    def __init__(self, config: DenseNetConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.densenet = DenseNetModel(config)
        self.classifier = classifier(self.densenet.preactivation.normalization.num_features, config)
        self.post_init()


__all__ = ["DenseNetForImageClassification", "DenseNetModel", "DenseNetPreTrainedModel"]
