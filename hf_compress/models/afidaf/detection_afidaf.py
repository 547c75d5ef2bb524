"""SSDLite for AFIDAF: levels, predictions and loss; anchors, box coding and matching are torchvision's.

Liu et al. 2016, "SSD: Single Shot MultiBox Detector", arXiv 1512.02325, with the separable convolutions of Sandler et al. 2018
(MobileNetV2, arXiv 1801.04381), arranged as in the detection code that AFFNet is built on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder, SSDMatcher
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import Conv2dNormActivation, box_iou

from hf_compress.errors import DataError

from ..sidt.loss_sidt import mean_over_processes
from .configuration_afidaf import AfidafConfig
from .filters_afidaf import activation

_CODER = BoxCoder(weights=(10.0, 10.0, 5.0, 5.0))  # SSD's variances, 0.1 and 0.2


class AfidafDetectionHead(nn.Module):
    """Levels from stride 16 on, each half the resolution of the one before and the last a single place; and predictions.

    Each level has one separable 3x3 convolution for the classes, "no object" last, and box offsets of all its anchors.
    """

    def __init__(self, config: AfidafConfig):
        super().__init__()
        widths, backbone = config.detection_channels, config.hidden_sizes[-2:]
        self.classes = (config.num_labels or 0) + 1
        self.anchors = _anchors(config)
        count = 2 + 2 * len(config.anchor_ratios)
        inputs = [backbone[-1], *widths[2:-1]]
        self.extra = nn.ModuleList(
            _separable(before, after, config.hidden_act, stride=2) for before, after in pairwise(inputs)
        )
        self.pooled = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(inputs[-1], widths[-1], 1), activation("hidden_act", config.hidden_act)
        )
        self.projections = nn.ModuleList(
            _convolution(before, after, 1, config.hidden_act) for before, after in zip(backbone, widths, strict=False)
        )
        outputs = count * (4 + self.classes)
        self.predictors = nn.ModuleList(
            _separable(width, outputs, config.hidden_act, kernel=1 if width_is_last else 3, is_last=True)
            for width, width_is_last in zip(widths, [False] * (len(widths) - 1) + [True], strict=True)
        )

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [batch, anchors, classes + 1], offsets [batch, anchors, 4], anchors [anchors, 4] as x1, y1, x2, y2 in 0..1.

        Args:
            features: the feature maps of strides 16 and 32.
        """
        levels = [projection(feature) for projection, feature in zip(self.projections, features, strict=True)]
        hidden_states = features[-1]
        for extra in self.extra:
            hidden_states = extra(hidden_states)
            levels.append(hidden_states)
        levels.append(self.pooled(hidden_states))
        found = [
            predictor(level).permute(0, 2, 3, 1).reshape(level.shape[0], -1, 4 + self.classes)
            for predictor, level in zip(self.predictors, levels, strict=True)
        ]
        offsets, logits = torch.cat(found, dim=1).split([4, self.classes], dim=-1)
        image = ImageList(levels[0].new_empty(0, 0, 1, 1), [(1, 1)])  # of one pixel, which makes the anchors relative
        (anchors,) = self.anchors(image, [level.float() for level in levels])
        return logits, offsets, anchors

    @staticmethod
    def boxes(offsets: Tensor, anchors: Tensor) -> Tensor:
        """Boxes [batch, anchors, 4] as x1, y1, x2, y2, relative to the image."""
        whole = anchors.expand(offsets.shape[0], -1, -1).flatten(0, 1)  # len would fix the batch size of an export
        return _CODER.decode_single(offsets.flatten(0, 1), whole).view(offsets.shape)


def _anchors(config: AfidafConfig) -> DefaultBoxGenerator:
    levels = len(config.detection_channels)
    low, high = config.anchor_scales
    scales = [low + (high - low) * level / levels for level in range(levels + 1)]
    ratios: list = [list(config.anchor_ratios)] * levels
    return DefaultBoxGenerator(ratios, scales=scales)


def _convolution(before: int, after: int, kernel: int, act: str, stride: int = 1, groups: int = 1) -> nn.Module:
    return Conv2dNormActivation(
        before,
        after,
        kernel,
        stride,
        groups=groups,
        activation_layer=lambda inplace=None: activation("hidden_act", act),
    )


def _separable(
    before: int, after: int, act: str, stride: int = 1, kernel: int = 3, is_last: bool = False
) -> nn.Sequential:
    last = nn.Conv2d(before, after, 1) if is_last else _convolution(before, after, 1, act)
    if kernel == 1:
        return nn.Sequential(last)
    return nn.Sequential(_convolution(before, before, kernel, act, stride, groups=before), last)


def detection_loss(
    config: AfidafConfig,
    logits: Tensor,
    offsets: Tensor,
    anchors: Tensor,
    labels: Sequence[Mapping[str, Tensor]],
    sizes: Tensor,
) -> dict[str, Tensor]:
    """SSD's loss, equations 1 to 3: cross entropy of matched anchors and hard negatives, smooth l1 of offsets.

    Args:
        config: gives the matching threshold and the share of negatives.
        logits: float [batch, anchors, classes + 1].
        offsets: float [batch, anchors, 4].
        anchors: [anchors, 4] as x1, y1, x2, y2 in 0..1.
        labels: per image ``class_labels`` [objects] and ``boxes`` [objects, 4], centre and size in 0..1 of the image.
            Boxes without an extent are passed over.
        sizes: width and height of each image relative to its padded ones, [batch, 2].

    Raises:
        DataError: when there are not as many labels as images, or a class does not exist.
    """
    if len(labels) != len(logits):
        raise DataError(f"labels of {len(labels)} images and {len(logits)} images were given; give one for each.")
    background = logits.shape[-1] - 1
    matcher = SSDMatcher(config.matching_threshold)
    wanted = torch.full(logits.shape[:2], background, dtype=torch.int64, device=logits.device)
    losses = []
    for image, label in enumerate(labels):
        boxes = label["boxes"].to(logits.device, torch.float32)
        classes = label["class_labels"].to(logits.device)
        is_object = torch.isfinite(boxes).all(dim=1) & (boxes[:, 2:] > 0).all(dim=1)
        boxes, classes = boxes[is_object], classes[is_object]
        if not len(boxes):
            continue
        if bool(((classes < 0) | (classes >= background)).any()):
            raise DataError(
                f"an image has the class labels {classes.tolist()[:20]}; the model has {background} classes, counted from "
                "0. Set num_labels (or id2label) of its configuration, or clean the annotations."
            )
        boxes = (boxes.view(-1, 2, 2) * sizes[image]).view(-1, 4)
        boxes = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], dim=1)
        found = matcher(box_iou(boxes, anchors))
        positive = found >= 0
        wanted[image, positive] = classes[found[positive]]
        target = _CODER.encode_single(boxes[found[positive]], anchors[positive])
        losses.append(F.smooth_l1_loss(offsets[image, positive], target, reduction="sum"))
    each = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none").view(wanted.shape)
    positive = wanted != background
    # the negatives that the model is most wrong about, a fixed number for every positive
    hardness = each.detach().masked_fill(positive, -1.0)
    rank = hardness.argsort(dim=1, descending=True).argsort(dim=1)
    hard = ~positive & (rank < config.negatives * positive.sum(dim=1, keepdim=True))
    count = mean_over_processes(positive.sum())
    return {
        "loss_ce": (each * (positive | hard)).sum() / count,
        "loss_bbox": (torch.stack(losses).sum() if losses else offsets.sum() * 0) / count,
    }


__all__ = ["AfidafDetectionHead", "detection_loss"]
