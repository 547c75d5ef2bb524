"""SiDT's object detector; see ``modeling_sidt``."""

from typing import TYPE_CHECKING

from .. import lazy_names

if TYPE_CHECKING:
    from .configuration_sidt import SidtConfig
    from .image_processing_sidt import SidtImageProcessor
    from .modeling_sidt import SidtForObjectDetection, SidtObjectDetectionOutput, SidtPreTrainedModel

__all__ = [
    "SidtConfig",
    "SidtForObjectDetection",
    "SidtImageProcessor",
    "SidtObjectDetectionOutput",
    "SidtPreTrainedModel",
]

_model_names = lazy_names(__name__, __all__)


def __getattr__(name: str) -> object:
    if name == "SidtImageProcessor":
        from .image_processing_sidt import SidtImageProcessor

        return SidtImageProcessor
    return _model_names(name)
