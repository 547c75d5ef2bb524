"""AFIDAF: filters that alternate between the Fourier and the image domain; see ``modeling_afidaf``."""

from typing import TYPE_CHECKING

from .. import lazy_names

if TYPE_CHECKING:
    from .configuration_afidaf import AfidafConfig
    from .image_processing_afidaf import AfidafImageProcessor
    from .modeling_afidaf import (
        AfidafBackbone,
        AfidafForImageClassification,
        AfidafForObjectDetection,
        AfidafForSemanticSegmentation,
        AfidafModel,
        AfidafObjectDetectionOutput,
        AfidafPreTrainedModel,
    )

__all__ = [
    "AfidafBackbone",
    "AfidafConfig",
    "AfidafForImageClassification",
    "AfidafForObjectDetection",
    "AfidafForSemanticSegmentation",
    "AfidafImageProcessor",
    "AfidafModel",
    "AfidafObjectDetectionOutput",
    "AfidafPreTrainedModel",
]

_model_names = lazy_names(__name__, __all__)


def __getattr__(name: str) -> object:
    if name == "AfidafImageProcessor":
        from .image_processing_afidaf import AfidafImageProcessor

        return AfidafImageProcessor
    return _model_names(name)
