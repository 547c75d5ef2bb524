"""Images and annotations in, detections out, for SiDT's detector."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import batched_nms
from transformers import DetrImageProcessor
from transformers.image_transforms import center_to_corners_format

from hf_compress.errors import DataError


class SidtImageProcessor(DetrImageProcessor):
    """DETR's preprocessing, with boxes relative to the image and not to its padding; and non-maximum suppression.

    Every argument of ``DetrImageProcessor`` is possible, ``size={"height": 128, "width": 128}`` for one. Images of one
    batch that are left with different sizes are padded on the right and at the bottom, and have a ``pixel_mask``.
    """

    model_input_names = ["pixel_values", "pixel_mask"]  # noqa: RUF012

    def _update_annotation_for_padded_image(
        self, annotation: dict, input_image_size: Any, output_image_size: Any, padding: Any, update_bboxes: bool
    ) -> dict:
        return super()._update_annotation_for_padded_image(
            annotation, input_image_size, output_image_size, padding, False
        )

    def post_process_object_detection(  # type: ignore[override]  # an array of sizes is no list of tuples
        self,
        outputs: Any,
        threshold: float = 0.5,
        target_sizes: Tensor | Sequence[Sequence[int]] | None = None,
        nms_threshold: float = 0.6,
        max_detections: int = 100,
        candidates: int = 1000,
    ) -> list[dict[str, Tensor]]:
        """Detections of each image, best first.

        Args:
            outputs: of :class:`SidtForObjectDetection`, with ``logits`` and ``pred_boxes``.
            threshold: detections with a lower score are dropped.
            target_sizes: height and width of each image in pixels, [batch, 2]; boxes are relative when not given.
            nms_threshold: of boxes of one class whose overlap (intersection over union) is larger, the best one stays.
            max_detections: as many at most for an image.
            candidates: as many of the best scores are looked at.

        Returns:
            per image ``scores`` [n], ``labels`` [n] and ``boxes`` [n, 4] as x1, y1, x2, y2.

        Raises:
            DataError: when there are not as many target sizes as images.
        """
        logits: Tensor = outputs.logits.float()
        boxes: Any = center_to_corners_format(outputs.pred_boxes.float())
        if target_sizes is not None:
            sizes = torch.as_tensor(target_sizes, device=boxes.device, dtype=boxes.dtype)
            if sizes.shape != (len(boxes), 2):
                raise DataError(
                    f"target_sizes has the shape {tuple(sizes.shape)} for {len(boxes)} images; give a height and a width "
                    "for each."
                )
            boxes = boxes * sizes.flip(1).repeat(1, 2)[:, None]
        classes = logits.shape[-1]
        results = []
        for image_logits, image_boxes in zip(logits, boxes, strict=True):
            scores, found = image_logits.sigmoid().flatten().topk(min(candidates, image_logits.numel()))
            found = found[scores > threshold]
            labels, candidate_boxes = found % classes, image_boxes[found // classes]
            scores = scores[: len(found)]
            has_extent = (candidate_boxes[:, 2:] > candidate_boxes[:, :2]).all(dim=1)
            scores, labels, candidate_boxes = scores[has_extent], labels[has_extent], candidate_boxes[has_extent]
            kept = batched_nms(candidate_boxes, scores, labels, nms_threshold)[:max_detections]
            results.append({"scores": scores[kept], "labels": labels[kept], "boxes": candidate_boxes[kept]})
        return results


__all__ = ["SidtImageProcessor"]
