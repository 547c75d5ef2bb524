"""Data for detectors: scenes of real images without a download, COCO's format, and batches."""

from .coco import AnnotationCounts, CocoImages, clean_annotations, clean_objects
from .collating import DetectionCollator, detection_collator
from .scenes import Scenes

__all__ = [
    "AnnotationCounts",
    "CocoImages",
    "DetectionCollator",
    "Scenes",
    "clean_annotations",
    "clean_objects",
    "detection_collator",
]
