"""From annotated images to a detector's batches."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from .coco import AnnotationCounts, clean_objects

logger = logging.getLogger(__name__)


class DetectionCollator:
    """Turns examples with ``image``, ``image_id`` and ``objects`` into ``pixel_values``, ``labels`` and ``pixel_mask``.

    Boxes that no detector can learn from are clipped or dropped (see :func:`~.coco.clean_objects`), which is logged at
    the first batch where it happens; what became of all of them is in ``counts``. An image may be left without objects.

    Args:
        processor: an image processor of the DETR kind, such as ``SidtImageProcessor``.
        num_labels: number of the model's classes.
    """

    def __init__(self, processor: Any, num_labels: int | None = None):
        self.processor, self.num_labels = processor, num_labels
        self.counts = AnnotationCounts()

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        was_clean = self.counts.is_clean
        images, annotations = [], []
        for example in examples:
            image = example["image"].convert("RGB")
            objects = clean_objects(example["objects"], image.size, self.num_labels, self.counts)
            names = ("bbox", "category", "area", "iscrowd")
            rows = zip(*(objects[name] for name in names), strict=True)
            images.append(image)
            annotations.append(
                {
                    "image_id": int(example["image_id"]),
                    "annotations": [
                        {"bbox": box, "category_id": category, "area": area, "iscrowd": crowd}
                        for box, category, area, crowd in rows
                    ],
                }
            )
        if was_clean and not self.counts.is_clean:
            logger.warning(
                "some annotations cannot be learnt from; so far %s. Later ones are dealt with in silence; "
                "clean_annotations counts them all.",
                self.counts,
            )
        batch = dict(self.processor(images=images, annotations=annotations, return_tensors="pt"))
        batch["labels"] = [dict(label) for label in batch["labels"]]
        mask: Any = batch.get("pixel_mask")
        if mask is not None and bool(mask.all()):
            del batch["pixel_mask"]  # nothing was padded
        return batch


def detection_collator(processor: Any, num_labels: int | None = None) -> DetectionCollator:
    """A ``data_collator`` for Trainer; use it with ``remove_unused_columns=False``. See :class:`DetectionCollator`."""
    return DetectionCollator(processor, num_labels)


__all__ = ["DetectionCollator", "detection_collator"]
