"""Mean average precision of detections, by pycocotools; and the same for Trainer."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError

_SUMMARY = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
_MAR = {8: "mar_100"}


def mean_average_precision(
    predictions: Sequence[Mapping[str, Any]],
    targets: Sequence[Mapping[str, Any]],
    class_names: Sequence[str] | Mapping[int, str] | None = None,
) -> dict[str, float]:
    """COCO's mean average precision of boxes.

    Args:
        predictions: per image ``boxes`` [n, 4] as x1, y1, x2, y2 in pixels, ``scores`` [n] and ``labels`` [n]; of each
            image's detections of a class the best 100 count.
        targets: per image ``boxes`` [m, 4] and ``labels`` [m]; ``iscrowd`` [m] and ``area`` [m] where known.
        class_names: names for the classes' own figures; their numbers are used without it.

    Returns:
        ``map`` (mean over overlaps 0.50, 0.55, ..., 0.95), ``map_50``, ``map_75``; ``map_small``, ``map_medium``,
        ``map_large`` (areas below 32^2, below 96^2 and above) where there are such objects; ``mar_100``; and
        ``map/<class>`` for every class with objects. All from 0 to 1.

    Raises:
        DataError: when there are not as many targets as predictions, or no object at all.
        ImportError: without pycocotools.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise ImportError("mean average precision needs pycocotools: pip install 'hf-compress[detection]'.") from error

    if len(predictions) != len(targets):
        raise DataError(f"there are predictions for {len(predictions)} images and targets for {len(targets)}.")
    annotations: list[dict[str, Any]] = []
    for image, target in enumerate(targets):
        boxes = _array(target["boxes"]).reshape(-1, 4)
        sides = boxes[:, 2:] - boxes[:, :2]
        areas = _array(target["area"]) if "area" in target else sides.prod(axis=1)
        crowds = _array(target["iscrowd"]) if "iscrowd" in target else np.zeros(len(boxes))
        for box, side, label, area, crowd in zip(boxes, sides, _array(target["labels"]), areas, crowds, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": int(label),
                    "bbox": [*box[:2].tolist(), *side.tolist()],
                    "area": float(area),
                    "iscrowd": int(crowd),
                }
            )
    if not annotations:
        raise DataError(f"none of the {len(targets)} images has an object, so there is no average precision.")
    detections = []
    for image, found in enumerate(predictions):
        boxes = _array(found["boxes"]).reshape(-1, 4)
        for box, score, label in zip(boxes, _array(found["scores"]), _array(found["labels"]), strict=True):
            if not (np.isfinite(box).all() and np.isfinite(score)):
                raise DataError(f"image {image} has a detection that is not finite: box {box}, score {score}.")
            detections.append(
                {
                    "image_id": image,
                    "category_id": int(label),
                    "bbox": [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()],
                    "score": float(score),
                }
            )
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
        truth = COCO()
        truth.dataset = {
            "images": [{"id": image} for image in range(len(targets))],
            "annotations": annotations,
            "categories": [{"id": label} for label in sorted({a["category_id"] for a in annotations})],
            "info": {},
        }
        truth.createIndex()
        known = {category["id"] for category in truth.dataset["categories"]}
        counted = [detection for detection in detections if detection["category_id"] in known]
        if not counted:
            return {"map": 0.0, "map_50": 0.0, "map_75": 0.0, "mar_100": 0.0} | {
                f"map/{_name(class_names, label)}": 0.0 for label in sorted(known)
            }
        evaluation = COCOeval(truth, truth.loadRes(counted), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    figures = dict(zip(_SUMMARY, evaluation.stats, strict=False)) | {n: evaluation.stats[i] for i, n in _MAR.items()}
    result = {name: float(value) for name, value in figures.items() if value > -1}
    # [overlaps, recalls, classes, areas, detections]; the first area is all of them, the last number of detections 100
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    for number, label in enumerate(evaluation.params.catIds):
        of_class = precision[:, :, number]
        if (of_class > -1).any():
            result[f"map/{_name(class_names, label)}"] = float(of_class[of_class > -1].mean())
    return result


class DetectionEvaluation:
    """Mean average precision for Trainer, of models with ``logits`` and ``pred_boxes``, and labels of the DETR kind.

    ::

        evaluation = DetectionEvaluation(processor, model.config.id2label)
        Trainer(..., compute_metrics=evaluation, preprocess_logits_for_metrics=evaluation.detections,
                args=TrainingArguments(..., eval_do_concat_batches=False, remove_unused_columns=False))

    ``detections`` keeps the best detections of each batch alone, so that the memory needed does not grow with the
    number of places that a detector looks at.

    Args:
        processor: an image processor with ``post_process_object_detection``.
        id2label: class names for the classes' own figures, which are left out without it.
        threshold: detections with a lower score are not counted. COCO's figures are for all; a low one saves time.
        max_detections: so many of an image at most.
    """

    def __init__(
        self,
        processor: Any,
        id2label: Mapping[int, str] | None = None,
        threshold: float = 0.01,
        max_detections: int = 100,
    ):
        self.processor, self.id2label = processor, id2label
        self.threshold, self.max_detections = threshold, max_detections

    @torch.no_grad()
    def detections(self, outputs: Sequence[Any], labels: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """What Trainer keeps of a batch.

        Args:
            outputs: of the model without the loss; logits [batch, places, classes] and boxes [batch, places, 4] among
                them.
            labels: of the batch, with ``orig_size``.

        Returns:
            float32 [batch, max_detections, 6]: x1, y1, x2, y2 in pixels, score, class; a score of -1 where there are
            fewer.
        """
        logits, boxes = [part for part in outputs if isinstance(part, Tensor)][:2]
        sizes = torch.stack([label["orig_size"] for label in labels])
        found = self.processor.post_process_object_detection(
            SimpleNamespace(logits=logits, pred_boxes=boxes), threshold=self.threshold, target_sizes=sizes
        )
        result = logits.new_full((len(found), self.max_detections, 6), -1.0, dtype=torch.float32)
        for row, one in zip(result, found, strict=True):
            best = one["scores"].argsort(descending=True)[: self.max_detections]
            columns = [one["boxes"], one["scores"][:, None], one["labels"][:, None].float()]
            row[: len(best)] = torch.cat(columns, dim=1)[best]
        return result

    def __call__(self, prediction: Any) -> dict[str, float]:
        """Figures of an ``EvalPrediction`` made with ``eval_do_concat_batches=False``; see the class.

        Raises:
            DataError: when the batches were concatenated, which mixes up the labels of images.
        """
        batches, label_batches = prediction.predictions, prediction.label_ids
        if not isinstance(label_batches, (list, tuple)) or not isinstance(label_batches[0], (list, tuple)):
            raise DataError("labels come without their batches; set eval_do_concat_batches=False in TrainingArguments.")
        predictions, targets = [], []
        for rows, labels in zip(batches, label_batches, strict=True):
            if not isinstance(rows, np.ndarray) or rows.shape[-1] != 6:
                raise DataError("give Trainer preprocess_logits_for_metrics=evaluation.detections as well.")
            for row, label in zip(rows, labels, strict=True):
                row = row[row[:, 4] >= 0]
                predictions.append({"boxes": row[:, :4], "scores": row[:, 4], "labels": row[:, 5]})
                height, width = _array(label["orig_size"])
                boxes = _array(label["boxes"]).reshape(-1, 4) * [width, height, width, height]
                middle, half = boxes[:, :2], boxes[:, 2:] / 2
                corners = np.concatenate([middle - half, middle + half], axis=1)
                targets.append({"boxes": corners, "labels": label["class_labels"]})
        figures = mean_average_precision(predictions, targets, self.id2label)
        return {name: value for name, value in figures.items() if self.id2label is not None or "/" not in name}


def _array(values: Any) -> np.ndarray:
    return (
        values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values, dtype=np.float64)
    )


def _name(class_names: Sequence[str] | Mapping[int, str] | None, label: int) -> str:
    if isinstance(class_names, Mapping):
        return str(class_names.get(label, label))
    return str(class_names[label]) if class_names is not None and label < len(class_names) else str(label)


__all__ = ["DetectionEvaluation", "mean_average_precision"]
