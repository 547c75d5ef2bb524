"""Images in; classes, maps or detections out."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import batched_nms
from transformers import RTDetrImageProcessor
from transformers.image_transforms import center_to_corners_format

from hf_compress.errors import DataError


class AfidafImageProcessor(RTDetrImageProcessor):
    """RT-DETR's preprocessing of images and annotations, to one size and without padding, for all three tasks.

    Every argument of ``RTDetrImageProcessor`` is possible. Colours are normalised with ImageNet's mean and deviation.
    """

    size = {"height": 256, "width": 256}  # noqa: RUF012
    do_normalize = True
    model_input_names = ["pixel_values"]  # noqa: RUF012

    def post_process_semantic_segmentation(
        self, outputs: Any, target_sizes: Tensor | Sequence[Sequence[int]] | None = None
    ) -> list[Tensor]:
        """The class of every pixel of each image, int64 [height, width].

        Args:
            outputs: of :class:`AfidafForSemanticSegmentation`, with ``logits`` [batch, classes, height, width].
            target_sizes: height and width of each image in pixels; the resolution of the logits when not given.

        Raises:
            DataError: when there are not as many target sizes as images.
        """
        logits = outputs.logits.float()
        if target_sizes is None:
            return list(logits.argmax(dim=1))
        sizes = _sizes(target_sizes, len(logits))
        return [
            F.interpolate(one[None], size=size, mode="bilinear", align_corners=False)[0].argmax(dim=0)
            for one, size in zip(logits, sizes, strict=True)
        ]

    def post_process_object_detection(  # type: ignore[override]  # an array of sizes is no list of tuples
        self,
        outputs: Any,
        threshold: float = 0.5,
        target_sizes: Tensor | Sequence[Sequence[int]] | None = None,
        nms_threshold: float = 0.5,
        max_detections: int = 200,
        candidates: int = 400,
    ) -> list[dict[str, Tensor]]:
        """Detections of each image, best first.

        Args:
            outputs: of :class:`AfidafForObjectDetection`, with ``logits`` and ``pred_boxes``.
            threshold: detections with a lower score are dropped.
            target_sizes: height and width of each image in pixels, [batch, 2]; boxes are relative when not given.
            nms_threshold: of boxes of one class whose overlap (intersection over union) is larger, the best one stays.
            max_detections: as many at most for an image.
            candidates: as many of the best scores of each class are looked at.

        Returns:
            per image ``scores`` [n], ``labels`` [n] and ``boxes`` [n, 4] as x1, y1, x2, y2.

        Raises:
            DataError: when there are not as many target sizes as images.
        """
        probabilities = outputs.logits.float().softmax(dim=-1)[..., :-1]
        boxes: Any = center_to_corners_format(outputs.pred_boxes.float())
        if target_sizes is not None:
            sizes = boxes.new_tensor(_sizes(target_sizes, len(boxes)))
            boxes = boxes * sizes.flip(1).repeat(1, 2)[:, None]
        results = []
        for image_scores, image_boxes in zip(probabilities, boxes, strict=True):
            scores, places = image_scores.topk(min(candidates, len(image_scores)), dim=0)  # of each class on its own
            labels = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
            chosen = (scores > threshold) & (image_boxes[places, 2:] > image_boxes[places, :2]).all(dim=-1)
            scores, labels, candidate_boxes = scores[chosen], labels[chosen], image_boxes[places[chosen]]
            kept = batched_nms(candidate_boxes, scores, labels, nms_threshold)[:max_detections]
            results.append({"scores": scores[kept], "labels": labels[kept], "boxes": candidate_boxes[kept]})
        return results


def _sizes(target_sizes: Any, images: int) -> list[list[int]]:
    sizes = [[int(side) for side in size] for size in target_sizes]
    if len(sizes) != images or any(len(size) != 2 for size in sizes):
        raise DataError(f"target_sizes is {sizes} for {images} images; give a height and a width for each.")
    return sizes


__all__ = ["AfidafImageProcessor"]
