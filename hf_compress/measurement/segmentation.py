"""Mean intersection over union of semantic segmentation, from counts of pixels alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import DataError

IGNORED = 255  # a pixel of this class is not counted; transformers' usual semantic_loss_ignore_index


def confusion_matrices(logits: Tensor, labels: Tensor, ignored: int = IGNORED) -> Tensor:
    """Count, for each image, the pixels of every class that were taken for every class.

    Args:
        logits: [batch, classes, height, width]; brought to the size of the labels bilinearly.
        labels: int64 [batch, height, width].
        ignored: label of pixels that do not count.

    Returns:
        int64 [batch, classes, classes]: row by true class, column by predicted class.
    """
    classes = logits.shape[1]
    resized = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
    found = resized.argmax(dim=1)
    counted = (labels != ignored) & (labels >= 0) & (labels < classes)
    image = torch.arange(len(labels), device=labels.device).view(-1, 1, 1).expand_as(labels)
    places = ((image * classes + labels) * classes + found)[counted]
    counts = torch.bincount(places, minlength=len(labels) * classes * classes)
    return counts.view(len(labels), classes, classes)


def segmentation_figures(confusion: Any) -> dict[str, float]:
    """Mean intersection over union, and the share of pixels that are right.

    Args:
        confusion: counts [classes, classes] of the whole data set; true classes in rows.

    Returns:
        ``mean_iou`` over the classes that are in the labels or in the predictions, and ``pixel_accuracy``; 0 to 1.

    Raises:
        DataError: when no pixel was counted.
    """
    counts = np.asarray(confusion, dtype=np.float64)
    if not counts.sum():
        raise DataError("no pixel has a label, so there is nothing to measure on.")
    right = np.diag(counts)
    union = counts.sum(0) + counts.sum(1) - right
    return {
        "mean_iou": float(np.mean(right[union > 0] / union[union > 0])),
        "pixel_accuracy": float(right.sum() / counts.sum()),
    }


class SegmentationEvaluation:
    """Mean intersection over union for Trainer, with memory that does not grow with the number of images.

    ::

        evaluation = SegmentationEvaluation()
        Trainer(..., compute_metrics=evaluation, preprocess_logits_for_metrics=evaluation.confusion,
                args=TrainingArguments(..., batch_eval_metrics=True))

    Args:
        ignored: label of pixels that do not count.
    """

    def __init__(self, ignored: int = IGNORED):
        self.ignored = ignored
        self._counts: np.ndarray | None = None

    def confusion(self, outputs: Tensor | Sequence[Any], labels: Tensor) -> Tensor:
        """What Trainer keeps of a batch: int64 [batch, classes, classes]."""
        logits = outputs if isinstance(outputs, Tensor) else outputs[0]
        return confusion_matrices(logits, labels, self.ignored)

    def __call__(self, prediction: Any, compute_result: bool = True) -> dict[str, float]:
        """Figures of all batches since the last result; see the class.

        Args:
            prediction: an ``EvalPrediction`` of one batch.
            compute_result: whether this was the last one.
        """
        counts = np.asarray(torch.as_tensor(prediction.predictions).cpu()).sum(0)
        self._counts = counts if self._counts is None else self._counts + counts
        if not compute_result:
            return {}
        total, self._counts = self._counts, None
        return segmentation_figures(total)


__all__ = ["IGNORED", "SegmentationEvaluation", "confusion_matrices", "segmentation_figures"]
