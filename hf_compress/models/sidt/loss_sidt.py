"""Which point of a feature pyramid has to find which object, and how far off it is (FCOS).

Tian et al. 2020, "FCOS: A Simple and Strong Anchor-free Object Detector", arXiv 2006.09214: section 3.1 (assignment with
centre sampling), equation 1 (loss) and 3 (centre-ness), with the GIoU loss of its improved version. Focal and GIoU loss are
torchvision's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from accelerate.state import PartialState
from accelerate.utils import reduce
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from hf_compress.errors import DataError


class Points(NamedTuple):
    """The places of a feature pyramid, all levels one after another.

    Attributes:
        centers: float [points, 2], x and y in pixels of the image.
        strides: float [points, 2], width and height of a place in pixels.
        farthest: float [points, 2], bounds on the distance in pixels to an object's farthest side.
    """

    centers: Tensor
    strides: Tensor
    farthest: Tensor


def points_of(features: Sequence[Tensor], image_size: tuple[int, int], object_range: float) -> Points:
    """The places of feature maps ``[batch, channels, height, width]``, from high to low resolution."""
    centers, strides, farthest = [], [], []
    for level, feature in enumerate(features):
        rows, columns = feature.shape[-2:]
        step_y, step_x = image_size[0] / rows, image_size[1] / columns
        y = (torch.arange(rows, device=feature.device, dtype=torch.float32) + 0.5) * step_y
        x = (torch.arange(columns, device=feature.device, dtype=torch.float32) + 0.5) * step_x
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        center = torch.stack([grid_x.flatten(), grid_y.flatten()], dim=1)
        largest = object_range * max(step_x, step_y)
        bounds = (
            0.0 if level == 0 else largest / 2,
            math.inf if level == len(features) - 1 else largest,
        )
        centers.append(center)
        strides.append(torch.ones_like(center) * center.new_tensor([step_x, step_y]))
        farthest.append(torch.ones_like(center) * center.new_tensor(bounds))
    return Points(torch.cat(centers), torch.cat(strides), torch.cat(farthest))


def corners(distances: Tensor, points: Points) -> Tensor:
    """Distances to left, top, right and bottom in strides -> [x1, y1, x2, y2] in pixels, float [..., points, 4]."""
    left_top, right_bottom = (distances * points.strides.repeat(1, 2)).chunk(2, dim=-1)
    return torch.cat([points.centers - left_top, points.centers + right_bottom], dim=-1)


@torch.no_grad()
def assign(points: Points, boxes: Tensor, radius: float) -> Tensor:
    """The object that every point has to find: int64 [points], -1 for none. Of several, the smallest object.

    Args:
        boxes: float [objects, 4], corners in pixels.
        radius: in strides around an object's centre.
    """
    if len(boxes) == 0:
        return torch.full((len(points.centers),), -1, dtype=torch.int64, device=boxes.device)
    from_left_top = points.centers[:, None] - boxes[None, :, :2]
    to_right_bottom = boxes[None, :, 2:] - points.centers[:, None]
    sides = torch.cat([from_left_top, to_right_bottom], dim=2)
    farthest = sides.amax(dim=2)
    off_center = (from_left_top - to_right_bottom).abs() / 2
    fits = (
        (sides.amin(dim=2) > 0)
        & (off_center < radius * points.strides[:, None]).all(dim=2)
        & (farthest >= points.farthest[:, :1])
        & (farthest <= points.farthest[:, 1:])
    )
    area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    smallest, index = torch.where(fits, area[None], math.inf).min(dim=1)
    return torch.where(smallest < math.inf, index, -1)


def detection_loss(
    class_logits: Tensor,
    distances: Tensor,
    centerness: Tensor,
    points: Points,
    labels: Sequence[Mapping[str, Tensor]],
    sizes: Tensor,
    *,
    radius: float,
    alpha: float,
    gamma: float,
) -> dict[str, Tensor]:
    """The three terms of FCOS's loss, in float32.

    Args:
        class_logits: [batch, points, classes].
        distances: [batch, points, 4] to left, top, right, bottom, in strides.
        centerness: [batch, points], logits.
        labels: per image ``class_labels`` int64 [objects] and ``boxes`` [objects, 4], centre and size relative to
            ``sizes``. Objects without an extent and non-finite ones are ignored.
        sizes: float [batch, 2], width and height of the images in pixels.

    Returns:
        ``loss_ce``, ``loss_bbox`` and ``loss_centerness``; sums over the points, divided by the number of points that
        have an object, or by what they weigh (boxes), each averaged over processes.

    Raises:
        DataError: when a class is none of the model's, or there are not as many labels as images.
    """
    class_logits, distances, centerness = class_logits.float(), distances.float(), centerness.float()
    if len(labels) != len(class_logits):
        raise DataError(f"there are labels for {len(labels)} images and {len(class_logits)} images; give one for each.")
    classes = torch.zeros_like(class_logits)
    positive = torch.zeros_like(centerness, dtype=torch.bool)
    targets = torch.zeros_like(distances)
    for image, label in enumerate(labels):
        boxes = label["boxes"].to(distances.device, torch.float32)
        of_class = label["class_labels"].to(distances.device)
        is_object = torch.isfinite(boxes).all(dim=1) & (boxes[:, 2:] > 0).all(dim=1)
        boxes, of_class = boxes[is_object], of_class[is_object]
        if bool(((of_class < 0) | (of_class >= class_logits.shape[-1])).any()):
            raise DataError(
                f"an image has the class labels {of_class.tolist()[:20]}; the model has {class_logits.shape[-1]} classes, "
                "counted from 0. Set num_labels (or id2label) of its configuration, or clean the annotations."
            )
        boxes = (boxes.view(-1, 2, 2) * sizes[image]).view(-1, 4)
        boxes = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], dim=1)
        found = assign(points, boxes, radius)
        positive[image] = found >= 0
        if len(boxes):
            classes[image, positive[image], of_class[found[positive[image]]]] = 1.0
            targets[image] = boxes[found.clamp(min=0)]

    _, place = positive.nonzero(as_tuple=True)
    of_positive = Points(*(part[place] for part in points))
    wanted = targets[positive]
    left_top, right_bottom = of_positive.centers - wanted[:, :2], wanted[:, 2:] - of_positive.centers
    pairs = torch.stack([left_top, right_bottom])  # [2, positives, 2]: both sides of x and of y
    central = (pairs.amin(dim=0) / pairs.amax(dim=0)).prod(dim=1).sqrt()
    count = mean_over_processes(positive.sum())
    weight = mean_over_processes(central.sum())
    boxes = corners(distances[positive], of_positive)
    overlap = generalized_box_iou_loss(boxes, wanted)
    return {
        "loss_ce": sigmoid_focal_loss(class_logits, classes, alpha=alpha, gamma=gamma, reduction="sum") / count,
        "loss_bbox": (overlap * central).sum() / weight,
        "loss_centerness": F.binary_cross_entropy_with_logits(centerness[positive], central, reduction="sum") / count,
    }


def mean_over_processes(value: Tensor) -> Tensor:
    """What N processes share, so that they train as one with their batches together would. At least 1."""
    value = value.detach().float()
    if PartialState._shared_state:  # what accelerate sets up when a Trainer starts
        value = reduce(value, reduction="mean")
    return value.clamp(min=1.0)
