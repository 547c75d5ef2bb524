"""Pre-activation bottleneck ResNet, as the slimming papers train it on CIFAR.

Liu et al. 2017, arXiv 1708.06519; architecture: He et al. 2016, arXiv 1603.05027. The defaults (ResNet-164) have 163
BatchNorm layers with 12112 channels in all, and 1,711,338 parameters for 10 classes, of which 8080 are selection
indices. Axes: the two inner widths of every block, and which channels of the residual stream each block and the
classifier read. The scale of each is a BatchNorm weight. The stream itself is never cut.
"""

from torch import Tensor, nn

from ..slimming import ImageClassification, PreActivation, PreActivationFeatures, SlimmingPreTrainedModel, classifier
from .configuration_slimming_preact_resnet import PreActResNetConfig

EXPANSION = 4  # a block's output is so many times wider than its inside; He et al. 2016


class PreActResNetBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolution, each behind BatchNorm and ReLU, added to the input.

    Where the shape changes, a 1x1 convolution carries the input over, before any normalisation.
    """

    def __init__(self, in_channels: int, width: int, stride: int):
        super().__init__()
        out_channels = EXPANSION * width
        self.preactivation = PreActivation(in_channels)
        self.convolution_in = nn.Conv2d(in_channels, width, 1, bias=False)
        self.normalization_in = nn.BatchNorm2d(width)
        self.convolution_mid = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.normalization_mid = nn.BatchNorm2d(width)
        self.convolution_out = nn.Conv2d(width, out_channels, 1, bias=False)
        self.activation = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        residual = self.convolution_in(self.preactivation(hidden_states))
        residual = self.convolution_mid(self.activation(self.normalization_in(residual)))
        residual = self.convolution_out(self.activation(self.normalization_mid(residual)))
        return self.shortcut(hidden_states) + residual


class PreActResNetPreTrainedModel(SlimmingPreTrainedModel):
    """Initialisation and loading; see :class:`SlimmingPreTrainedModel`."""

    config: PreActResNetConfig
    base_model_prefix = "resnet"
    _no_split_modules = ["PreActResNetBlock"]  # noqa: RUF012


class PreActResNetModel(PreActivationFeatures, PreActResNetPreTrainedModel):
    """Three stages of blocks, and the mean of the last features over the image."""

    def __init__(self, config: PreActResNetConfig):
        super().__init__(config)
        channels = config.widths[0]
        self.embedder = nn.Conv2d(config.num_channels, channels, 3, padding=1, bias=False)
        self.stages = nn.ModuleList()
        for number, width in enumerate(config.widths):
            blocks = []
            for place in range(config.blocks_per_stage):
                blocks.append(PreActResNetBlock(channels, width, stride=2 if number and not place else 1))
                channels = EXPANSION * width
            self.stages.append(nn.Sequential(*blocks))
        self.preactivation = PreActivation(channels)
        self.pooler = nn.AdaptiveAvgPool2d(1)
        self.post_init()


class PreActResNetForImageClassification(ImageClassification, PreActResNetPreTrainedModel):
    """Pre-activation ResNet with one linear layer on the pooled features."""

    def __init__(self, config: PreActResNetConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.resnet = PreActResNetModel(config)
        self.classifier = classifier(EXPANSION * config.widths[-1], config)
        self.post_init()


__all__ = ["PreActResNetForImageClassification", "PreActResNetModel", "PreActResNetPreTrainedModel"]
