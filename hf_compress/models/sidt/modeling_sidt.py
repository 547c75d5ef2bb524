"""SiDT's object detector: a searched backbone under a feature pyramid and the head of FCOS.

Xue et al. 2022, "Searching Intrinsic Dimensions of Vision Transformers", arXiv 2204.07722, searches the dimensions of
detection backbones. Which detector it used is not known; the choice here is ours. For plain vision transformers the
pyramid is the simple one of Li et al. 2022 (ViTDet, arXiv 2203.16527, section 3; with its deconvolutions as wide as the
pyramid), for hierarchical ones torchvision's FeaturePyramidNetwork. The head is torchvision's FCOS head: anchor-free, so that
nothing has to be tuned to object sizes, and convolutional, so that it learns in few steps and whole groups of its channels
can be pruned. On scenes, with the same backbone, pyramid and 400 steps, it was ahead of torchvision's RetinaNet head; a
small DETR had not begun to find anything by then.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSRegressionHead
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork
from transformers import AutoBackbone, PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import ModelOutput, can_return_tuple

from hf_compress.errors import ModelError

from .configuration_sidt import SidtConfig
from .loss_sidt import corners, detection_loss, points_of

_INITIAL_DISTANCE = 2.0  # strides; the head ends in a ReLU, which passes no gradient where it starts below zero


@dataclass
class SidtObjectDetectionOutput(ModelOutput):
    """What :class:`SidtForObjectDetection` returns.

    Attributes:
        loss: the sum of ``loss_dict``, when labels were given.
        loss_dict: ``loss_ce`` (focal), ``loss_bbox`` (GIoU) and ``loss_centerness``.
        logits: float [batch, points, classes]; their sigmoid is the score of a detection, the geometric mean of class
            probability and centre-ness. There is no background class.
        pred_boxes: float [batch, points, 4], centre and size relative to the image's width and height.
        hidden_states, attentions: those of the backbone, when asked for.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class SimpleFeaturePyramid(nn.Module):
    """Several resolutions out of one feature map (ViTDet), each [batch, out_channels, ...].

    Args:
        in_channels: width of the one feature map.
        out_channels: width of every level.
        scales: resolution of every level relative to it.
        norm: number of channels -> normalisation.
    """

    def __init__(self, in_channels: int, out_channels: int, scales: Sequence[float], norm: Callable[[int], nn.Module]):
        super().__init__()
        self.levels = nn.ModuleList(self._level(in_channels, out_channels, scale, norm) for scale in scales)

    @staticmethod
    def _level(channels: int, out_channels: int, scale: float, norm: Callable[[int], nn.Module]) -> nn.Sequential:
        steps: list[nn.Module] = [nn.MaxPool2d(2)] if scale == 0.5 else []
        for number in range(int(math.log2(max(scale, 1.0)))):
            if number:
                steps += [norm(out_channels), nn.GELU()]
            steps.append(nn.ConvTranspose2d(channels, out_channels, 2, stride=2))
            channels = out_channels
        for kernel in (1, 3):
            steps.append(
                Conv2dNormActivation(channels, out_channels, kernel, norm_layer=norm, activation_layer=None, bias=False)
            )
            channels = out_channels
        return nn.Sequential(*steps)

    def forward(self, features: Tensor) -> list[Tensor]:
        return [level(features) for level in self.levels]


class SidtFeaturePyramid(nn.Module):
    """The backbone's feature maps, as levels of one width, from high to low resolution."""

    def __init__(self, channels: list[int], config: SidtConfig, norm: Callable[[int], nn.Module]):
        super().__init__()
        width = config.pyramid_channels
        if len(channels) == 1:
            self.pyramid: nn.Module = SimpleFeaturePyramid(channels[0], width, config.pyramid_scales, norm)
        else:
            self.pyramid = FeaturePyramidNetwork(channels, width, norm_layer=norm)

    def forward(self, feature_maps: tuple[Tensor, ...]) -> list[Tensor]:
        if isinstance(self.pyramid, SimpleFeaturePyramid):
            return self.pyramid(feature_maps[0])
        if not torch.compiler.is_compiling():
            heights = [feature.shape[-2] for feature in feature_maps]
            if heights != sorted(set(heights), reverse=True):
                raise ModelError(
                    f"the backbone's {len(heights)} feature maps have the heights {heights}; a feature pyramid needs "
                    "falling ones. For a plain vision transformer, choose one of out_features in its configuration."
                )
        return list(self.pyramid(OrderedDict((str(i), feature) for i, feature in enumerate(feature_maps))).values())


class SidtHead(nn.Module):
    """Two towers of convolutions, shared by all levels: classes; and distances to the sides with centre-ness."""

    def __init__(self, config: SidtConfig, norm: Callable[[int], nn.Module]):
        super().__init__()
        width, layers = config.pyramid_channels, config.head_layers
        self.prior_probability = config.prior_probability
        self.classification = FCOSClassificationHead(width, 1, config.num_labels, layers, norm_layer=norm)
        self.regression = FCOSRegressionHead(width, 1, layers, norm_layer=norm)

    @property
    def outputs(self) -> dict[nn.Module, float]:
        """The last layers, and what each gives before any training."""
        prior = -math.log((1 - self.prior_probability) / self.prior_probability)
        regression = self.regression
        return {
            self.classification.cls_logits: prior,
            regression.bbox_reg: _INITIAL_DISTANCE,
            regression.bbox_ctrness: 0.0,
        }

    def forward(self, features: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Class logits [batch, points, classes], distances in strides [batch, points, 4], centre-ness [batch, points]."""
        distances, centerness = self.regression(features)
        return self.classification(features), distances, centerness.squeeze(-1)


class SidtPreTrainedModel(PreTrainedModel):
    """Initialisation, loading and what transformers wants to know about the model."""

    config: SidtConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # Trainer must average over micro-batches
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The backbone's modules are initialised by the backbone's own class.

        Only modules with parameters of their own come here: transformers passes over the others for models that it does
        not ship.
        """
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            outputs: Any = self.head.outputs  # type: ignore[union-attr]
            # a deconvolution whose kernel is its stride reads one place of the input for each of the output
            area = 1 if isinstance(module, nn.ConvTranspose2d) else math.prod(module.kernel_size)
            std = self.config.initializer_range if module in outputs else (module.in_channels * area) ** -0.5
            init.normal_(module.weight, std=std)
            if module.bias is not None:
                init.constant_(module.bias, outputs.get(module, 0.0))
        elif isinstance(module, nn.GroupNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


class SidtForObjectDetection(SidtPreTrainedModel):
    """An object detector on any backbone.

    The forward pass is tensor arithmetic alone, so it can be traced and exported; scores below a threshold and
    overlapping boxes are dropped by the image processor's ``post_process_object_detection``.
    """

    def __init__(self, config: SidtConfig):
        super().__init__(config)
        try:
            self.backbone = AutoBackbone.from_config(config.backbone_config)
        except ValueError as error:
            raise ModelError(
                f"backbone_config ({type(config.backbone_config).__name__}) builds no backbone: {error}"
            ) from error
        norm = partial(_group_norm, config.group_size)
        self.neck = SidtFeaturePyramid(list(self.backbone.channels), config, norm)
        self.head = SidtHead(config, norm)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: list[dict[str, Tensor]] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> SidtObjectDetectionOutput:
        """Detect objects.

        Args:
            pixel_values: float [batch, channels, height, width].
            pixel_mask: [batch, height, width], 1 where the image is and 0 where it was padded, on the right and at the
                bottom. Boxes are relative to the image without its padding.
            labels: per image ``class_labels``, int64 [objects], and ``boxes``, float [objects, 4]: centre and size
                relative to the image's width and height.
            output_hidden_states, output_attentions: whether to return the backbone's.
            return_dict: False gives a tuple.
        """
        asked = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        outputs = self.backbone(pixel_values, **{name: value for name, value in asked.items() if value is not None})
        features = self.neck(outputs.feature_maps)
        class_logits, distances, centerness = self.head(features)
        height, width = pixel_values.shape[-2:]
        points = points_of(features, (height, width), self.config.object_range)
        if pixel_mask is None:
            sizes = points.centers.new_tensor([[width, height]])
        else:
            sizes = torch.stack([pixel_mask[:, 0].sum(1), pixel_mask[:, :, 0].sum(1)], dim=1).to(points.centers.dtype)
        loss, loss_dict = None, None
        if labels is not None:
            with torch.autocast(pixel_values.device.type, enabled=False):
                loss_dict = detection_loss(
                    class_logits,
                    distances,
                    centerness,
                    points,
                    labels,
                    sizes.expand(len(pixel_values), 2),
                    radius=self.config.center_sampling_radius,
                    alpha=self.config.focal_alpha,
                    gamma=self.config.focal_gamma,
                )
            loss = torch.stack(list(loss_dict.values())).sum()
        boxes = corners(distances, points).to(distances.dtype) / sizes[:, None].repeat(1, 1, 2)
        boxes = boxes.clamp(0, 1)
        left_top, right_bottom = boxes.chunk(2, dim=-1)
        return SidtObjectDetectionOutput(
            loss=loss,
            loss_dict=loss_dict,
            logits=_score_logits(class_logits, centerness),
            pred_boxes=torch.cat([(left_top + right_bottom) / 2, right_bottom - left_top], dim=-1),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _group_norm(group_size: int, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(channels // group_size, channels)


def _score_logits(class_logits: Tensor, centerness: Tensor) -> Tensor:
    """Logits of sqrt(sigmoid(class) sigmoid(centre-ness)), FCOS's score; without overflow.

    With p = exp(s) the logit of p is s - log(1 - exp(s)); s stays below 0, where 1 - exp(s) would round to 0.
    """
    # logsigmoid(x) as -softplus(-x): exporters write the former as the logarithm of a sigmoid, and ONNX Runtime's sigmoid is
    # too coarse near zero for that (an error of 1e-3 in the logits of a trained detector)
    score = -(F.softplus(-class_logits) + F.softplus(-centerness).unsqueeze(-1)) / 2
    score = score.float().clamp(max=-1e-6)
    return score - torch.log(-torch.expm1(score))


__all__ = ["SidtForObjectDetection", "SidtObjectDetectionOutput", "SidtPreTrainedModel"]
