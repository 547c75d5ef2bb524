"""AFIDAF: a light network whose blocks filter in the Fourier domain and in the image domain, alternately.

Zheng et al. 2024, "AFIDAF: Alternating Fourier and Image Domain Adaptive Filters as an Efficient Alternative to Attention in
ViTs", arXiv 2407.12217. Frame and Fourier filter are those of AFFNet (Huang et al. 2023, arXiv 2307.14008); every block has
one image-domain filter more. Parameters for 1000 classes: 6,498,296 ("base"; the paper: 6.5 M), 6,188,280 without the
Fourier filter (6.2 M) and 3,054,744 ("tiny"; 3.0 M). See ``AfidafConfig`` for what of this is a reconstruction.

Gradient checkpointing runs the filters again in the backward pass and nothing else: most of a block's memory is theirs, and
the running statistics of the BatchNorms around them are still updated once.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.segmentation.deeplabv3 import ASPP
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPoolingAndNoAttention,
    SemanticSegmenterOutput,
)
from transformers.utils.generic import ModelOutput, can_return_tuple

from hf_compress.errors import DataError

from ..slimming import ImageClassification, classifier
from .configuration_afidaf import SMALLEST_IMAGE, AfidafConfig
from .detection_afidaf import AfidafDetectionHead, detection_loss
from .filters_afidaf import AfidafFourierFilter, AfidafImageFilter, activation, shuffle_channels


class AfidafConvolution(nn.Sequential):
    """Convolution without a bias, BatchNorm and, unless ``act`` is None, an activation."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        act: str | None = "silu",
    ):
        super().__init__()
        self.convolution = nn.Conv2d(
            in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False
        )
        self.normalization = nn.BatchNorm2d(out_channels)
        if act is not None:
            self.activation = activation("hidden_act", act)


class AfidafInvertedResidual(nn.Module):
    """1x1, depthwise 3x3 and 1x1 convolution, added to the input where the shape allows it (MobileNetV2)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expand_ratio: float, act: str):
        super().__init__()
        inner = _divisible(in_channels * expand_ratio)
        self.expansion = nn.Identity() if expand_ratio == 1 else AfidafConvolution(in_channels, inner, 1, act=act)
        self.depthwise = AfidafConvolution(inner, inner, 3, stride, groups=inner, act=act)
        self.reduction = AfidafConvolution(inner, out_channels, 1, act=None)
        self.is_residual = stride == 1 and in_channels == out_channels

    def forward(self, hidden_states: Tensor) -> Tensor:
        inner = self.reduction(self.depthwise(self.expansion(hidden_states)))
        return hidden_states + inner if self.is_residual else inner


def _divisible(width: float, divisor: int = 8) -> int:
    """The nearest multiple, but no less than 90 % of the width (MobileNet)."""
    if width <= divisor:
        return max(1, round(width))
    nearest = int(round(width) + divisor / 2) // divisor * divisor
    return nearest if nearest >= 0.9 * width else nearest + divisor


class AfidafChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [batch, channels, height, width], at every place alone."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class AfidafFilters(GradientCheckpointingLayer):
    """A normalisation, and the two filters of a block one after the other, each with a shortcut of its own."""

    def __init__(self, config: AfidafConfig, norm: nn.Module, channels: int, has_image_filter: bool):
        super().__init__()
        self.norm = norm
        if config.use_fourier_filter:
            self.fourier = AfidafFourierFilter(
                channels, config.fourier_groups, config.fourier_act, config.shrinkage, config.fourier_transform
            )
        if has_image_filter:
            self.image = AfidafImageFilter(channels, config)
        names = ["image", "fourier"] if config.image_filter_first else ["fourier", "image"]
        self.order = [name for name in names if hasattr(self, name)]

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = self.norm(hidden_states)
        for name in self.order:
            hidden_states = getattr(self, name)(hidden_states)
        return hidden_states


class AfidafBlock(nn.Module):
    """AFFNet's block: normalisation, inverted residual, normalisation and the filters, added to the input."""

    def __init__(self, config: AfidafConfig, channels: int):
        super().__init__()
        ratio = float(config.mlp_ratio or 2)
        self.norm = nn.GroupNorm(1, channels, config.layer_norm_eps)
        self.convolutions = AfidafInvertedResidual(channels, channels, 1, ratio, config.hidden_act)
        norm = nn.GroupNorm(1, channels, config.layer_norm_eps)
        self.filters = AfidafFilters(config, norm, channels, config.use_image_filter)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.filters(self.convolutions(self.norm(hidden_states)))


class AfidafBlocks(nn.Module):
    """The blocks of a stage, and a 1x1 convolution that fuses what they give with what they read."""

    def __init__(self, config: AfidafConfig, channels: int, depth: int):
        super().__init__()
        act = config.hidden_act
        self.blocks = nn.ModuleList(AfidafBlock(config, channels) for _ in range(depth))
        self.norm = nn.GroupNorm(1, channels, config.layer_norm_eps)
        self.projection = AfidafConvolution(channels, channels, 1, act=None)
        self.fusion = AfidafConvolution(2 * channels, channels, 1, act=act)

    def forward(self, hidden_states: Tensor) -> Tensor:
        filtered = hidden_states
        for block in self.blocks:
            filtered = block(filtered)
        filtered = self.projection(self.norm(filtered))
        return self.fusion(torch.cat([hidden_states, filtered], dim=1))


class AfidafMobileEncoder(nn.Module):
    """AFFNet's frame. Gives feature maps at the strides 2, 4, 8, 16 and 32, or 16 again with ``output_stride=16``."""

    def __init__(self, config: AfidafConfig, output_stride: int):
        super().__init__()
        act, ratio = config.hidden_act, float(config.expand_ratio)
        self.stem = AfidafConvolution(config.num_channels, config.stem_channels, 3, 2, act=act)
        self.stages = nn.ModuleList()
        channels = config.stem_channels
        for number, width in enumerate(config.hidden_sizes):
            stride = 1 if number == 0 or (number == 4 and output_stride == 16) else 2
            layers: list[nn.Module] = [AfidafInvertedResidual(channels, width, stride, ratio, act)]
            if number == 1:
                layers += [AfidafInvertedResidual(width, width, 1, ratio, act) for _ in range(2)]
            elif number > 1:
                layers.append(AfidafBlocks(config, width, config.depths[number - 2]))
            self.stages.append(nn.Sequential(*layers))
            channels = width

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        hidden_states = self.stem(pixel_values)
        maps = []
        for stage in self.stages:
            hidden_states = stage(hidden_states)
            maps.append(hidden_states)
        return maps


class AfidafMLP(nn.Module):
    """Two 1x1 convolutions in groups of channels, which are shuffled between them."""

    def __init__(self, channels: int, ratio: float, groups: int):
        super().__init__()
        inner = int(channels * ratio)
        self.fc1 = nn.Conv2d(channels, inner, 1, groups=groups)
        self.activation = nn.GELU()
        self.fc2 = nn.Conv2d(inner, channels, 1, groups=groups)

    def forward(self, hidden_states: Tensor) -> Tensor:
        inner = self.activation(self.fc1(hidden_states))
        return self.fc2(shuffle_channels(inner, self.fc1.groups))


class AfidafHierarchicalBlock(nn.Module):
    """Swin's block with filters in place of attention: filters and an MLP, each normalised and added to the input."""

    def __init__(self, config: AfidafConfig, stage: int):
        super().__init__()
        channels, eps = config.hidden_sizes[stage], config.layer_norm_eps
        has_image_filter = config.use_image_filter and stage < config.image_filter_stages
        self.filters = AfidafFilters(config, AfidafChannelNorm(channels, eps), channels, has_image_filter)
        self.norm = AfidafChannelNorm(channels, eps)
        self.mlp = AfidafMLP(channels, float(config.mlp_ratio or 4), config.mlp_groups[stage])

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + self.filters(hidden_states)
        return hidden_states + self.mlp(self.norm(hidden_states))


class AfidafHierarchicalEncoder(nn.Module):
    """Swin's frame. Gives feature maps at the strides 4, 8, 16 and 32.

    In the style of the paper's HAFIDAF: filters of both domains in the first stages, Fourier filters in the later ones. The
    paper's depths are not known, and no result of it is claimed for this network.
    """

    def __init__(self, config: AfidafConfig):
        super().__init__()
        self.stages = nn.ModuleList()
        channels = config.num_channels
        for stage, width in enumerate(config.hidden_sizes):
            size = 2 if stage else 4
            merging = nn.Conv2d(channels, width, size, stride=size)
            around = [nn.Identity(), AfidafChannelNorm(width)] if not stage else [AfidafChannelNorm(channels)]
            layers = [around[0], merging, *around[1:]]
            layers += [AfidafHierarchicalBlock(config, stage) for _ in range(config.depths[stage])]
            self.stages.append(nn.Sequential(*layers))
            channels = width

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        hidden_states, maps = pixel_values, []
        for stage in self.stages:
            hidden_states = stage(hidden_states)
            maps.append(hidden_states)
        return maps


class AfidafPreTrainedModel(PreTrainedModel):
    """Initialisation, loading and what transformers wants to know about the model.

    Initialisation: Fourier filters and linear layers N(0, ``initializer_range``), as in AFFNet's code; convolutions
    N(0, 1 / fan in), so that the product inside an image filter stays small beside its shortcut; biases 0.
    """

    config: AfidafConfig
    base_model_prefix = "afidaf"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # Trainer must average over micro-batches
    _no_split_modules = ["AfidafBlock", "AfidafHierarchicalBlock"]  # noqa: RUF012
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, nn.Conv2d):
            init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=std)
            init.zeros_(module.bias)
        elif isinstance(module, AfidafFourierFilter):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, std=std)


class AfidafModel(AfidafPreTrainedModel):
    """The network without a task.

    Args:
        config: widths, filters and frame.
        expand_output: whether the last feature map goes through the 1x1 convolution (or, in Swin's frame, normalisation)
            that classification reads.
        output_stride: 16 or 32, where ``config.output_stride`` leaves it open.
    """

    def __init__(self, config: AfidafConfig, expand_output: bool = True, output_stride: int = 32):
        super().__init__(config)
        width = config.hidden_sizes[-1]
        self.expansion: nn.Module = nn.Identity()
        if config.frame == "mobile":
            self.encoder: nn.Module = AfidafMobileEncoder(config, config.output_stride or output_stride)
            if expand_output:
                self.expansion = AfidafConvolution(width, config.expansion_size or width, 1, act=config.hidden_act)
        else:
            self.encoder = AfidafHierarchicalEncoder(config)
            if expand_output:
                self.expansion = AfidafChannelNorm(width, config.layer_norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | None = None
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        """Features of images.

        Args:
            pixel_values: float [batch, config.num_channels, height, width], of any size from 32 pixels on.
            output_hidden_states: whether to return the feature map of every stage, too.
            return_dict: False gives a tuple.

        Returns:
            ``last_hidden_state``: [batch, width, height / 32, width / 32]; ``pooler_output``: [batch, width], its mean;
            ``hidden_states``: of each of ``config.stage_names``, before the last convolution.

        Raises:
            DataError: when images are smaller, or have another number of channels.
        """
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        _check_images(pixel_values, self.config)
        maps = self.encoder(pixel_values)
        hidden_states = self.expansion(maps[-1])
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=hidden_states,
            pooler_output=hidden_states.mean(dim=(2, 3)),
            hidden_states=tuple(maps) if wanted else None,
        )


def _check_images(pixel_values: Tensor, config: AfidafConfig) -> None:
    if pixel_values.dim() != 4 or pixel_values.shape[1] != config.num_channels:
        raise DataError(
            f"pixel_values has the shape {list(pixel_values.shape)}; the model reads [batch, {config.num_channels}, height, "
            "width]."
        )
    if pixel_values.shape[2] < SMALLEST_IMAGE or pixel_values.shape[3] < SMALLEST_IMAGE:
        raise DataError(
            f"images of {pixel_values.shape[2]} x {pixel_values.shape[3]} pixels are too small: the model reduces both sides "
            f"by 32. Give at least {SMALLEST_IMAGE} x {SMALLEST_IMAGE}, for instance by the image processor's size."
        )


class AfidafForImageClassification(ImageClassification, AfidafPreTrainedModel):
    """AFIDAF with one linear layer on the mean of the last features."""

    def __init__(self, config: AfidafConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.afidaf = AfidafModel(config)
        features = config.expansion_size if config.frame == "mobile" else config.hidden_sizes[-1]
        self.classifier = classifier(features or 0, config)
        self.post_init()


class AfidafBackbone(BackboneMixin, AfidafPreTrainedModel):
    """AFIDAF as a backbone: the feature maps of ``config.out_features``."""

    def __init__(self, config: AfidafConfig):
        super().__init__(config)
        self.num_features = config.channels
        self.afidaf = AfidafModel(config, expand_output=False)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: Tensor, output_hidden_states: bool | None = None, **kwargs: Any) -> BackboneOutput:
        """Feature maps of images, [batch, width of the stage, height / stride, width / stride] each.

        Args:
            pixel_values: float [batch, config.num_channels, height, width].
            output_hidden_states: whether to return the feature map of every stage, too.
            return_dict: False gives a tuple.
        """
        maps = self.afidaf(pixel_values, output_hidden_states=True).hidden_states
        chosen = tuple(
            features for name, features in zip(self.stage_names, maps, strict=True) if name in self.out_features
        )
        return BackboneOutput(feature_maps=chosen, hidden_states=maps)


class AfidafForSemanticSegmentation(AfidafPreTrainedModel):
    """AFIDAF with the head of DeepLabV3: atrous spatial pyramid pooling and one 1x1 convolution.

    The pooling is torchvision's, with SiLU and less dropout, as in AFFNet's code.
    """

    def __init__(self, config: AfidafConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.afidaf = AfidafModel(config, expand_output=False, output_stride=16)
        self.pyramid = ASPP(config.hidden_sizes[-1], config.aspp_rates, config.aspp_channels)
        for part in [*self.pyramid.convs, self.pyramid.project]:
            for place, layer in enumerate(part):
                if isinstance(layer, nn.ReLU):
                    part[place] = activation("hidden_act", config.hidden_act)
                elif isinstance(layer, nn.Dropout):
                    layer.p = config.aspp_dropout
        self.prediction = nn.Conv2d(config.aspp_channels, config.num_labels or 1, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, output_hidden_states: bool | None = None
    ) -> SemanticSegmenterOutput:
        """Classify every pixel.

        Args:
            pixel_values: float [batch, config.num_channels, height, width].
            labels: int64 [batch, height, width], of any resolution; ``config.semantic_loss_ignore_index`` is left out.
            output_hidden_states: whether to return the feature map of every stage, too.
            return_dict: False gives a tuple.

        Returns:
            ``logits``: [batch, labels, height / 16, width / 16]; the image processor's
            ``post_process_semantic_segmentation`` brings them to the size of the image.
        """
        outputs = self.afidaf(pixel_values, output_hidden_states=output_hidden_states)
        logits = self.prediction(self.pyramid(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            resized = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
            each = F.cross_entropy(
                resized, labels, ignore_index=self.config.semantic_loss_ignore_index, reduction="sum"
            )
            count = (labels != self.config.semantic_loss_ignore_index).sum()
            loss = each / count.clamp(min=1)  # a batch without a labelled pixel gives 0, not 0 / 0
        return SemanticSegmenterOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


@dataclass
class AfidafObjectDetectionOutput(ModelOutput):
    """What :class:`AfidafForObjectDetection` returns.

    Attributes:
        loss: the sum of ``loss_dict``, when labels were given.
        loss_dict: ``loss_ce`` (cross entropy with hard negatives) and ``loss_bbox`` (smooth l1).
        logits: float [batch, anchors, classes + 1]; the last is "no object". Their softmax is the score of a detection.
        pred_boxes: float [batch, anchors, 4], centre and size relative to the image's width and height.
        hidden_states: the feature map of every stage, when asked for.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class AfidafForObjectDetection(AfidafPreTrainedModel):
    """AFIDAF with the head of SSDLite.

    The forward pass is tensor arithmetic alone; scores below a threshold and overlapping boxes are dropped by the image
    processor's ``post_process_object_detection``.
    """

    def __init__(self, config: AfidafConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.afidaf = AfidafModel(config, expand_output=False)
        self.head = AfidafDetectionHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: list[dict[str, Tensor]] | None = None,
        output_hidden_states: bool | None = None,
    ) -> AfidafObjectDetectionOutput:
        """Detect objects.

        Args:
            pixel_values: float [batch, config.num_channels, height, width].
            pixel_mask: [batch, height, width], 1 where the image is and 0 where it was padded, on the right and at the
                bottom. Boxes are relative to the image without its padding.
            labels: per image ``class_labels``, int64 [objects], and ``boxes``, float [objects, 4]: centre and size
                relative to the image's width and height.
            output_hidden_states: whether to return the feature map of every stage, too.
            return_dict: False gives a tuple.
        """
        outputs = self.afidaf(pixel_values, output_hidden_states=True)
        maps = outputs.hidden_states
        logits, offsets, anchors = self.head(list(maps[-2:]))
        shares = anchors.new_ones(1, 2)  # width and height of the image, relative to its padded ones
        if pixel_mask is not None:
            height, width = pixel_mask.shape[-2:]
            shares = torch.stack([pixel_mask[:, 0].sum(1) / width, pixel_mask[:, :, 0].sum(1) / height], dim=1)
        loss, loss_dict = None, None
        if labels is not None:
            with torch.autocast(pixel_values.device.type, enabled=False):
                sizes = shares.to(anchors.dtype).expand(len(pixel_values), 2)
                loss_dict = detection_loss(self.config, logits.float(), offsets.float(), anchors, labels, sizes)
            loss = torch.stack(list(loss_dict.values())).sum()
        boxes = self.head.boxes(offsets.float(), anchors) / shares[:, None].repeat(1, 1, 2)
        left_top, right_bottom = boxes.clamp(0, 1).chunk(2, dim=-1)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return AfidafObjectDetectionOutput(
            loss=loss,
            loss_dict=loss_dict,
            logits=logits,
            pred_boxes=torch.cat([(left_top + right_bottom) / 2, right_bottom - left_top], dim=-1),
            hidden_states=maps if wanted else None,
        )


__all__ = [
    "AfidafBackbone",
    "AfidafForImageClassification",
    "AfidafForObjectDetection",
    "AfidafForSemanticSegmentation",
    "AfidafModel",
    "AfidafObjectDetectionOutput",
    "AfidafPreTrainedModel",
]
