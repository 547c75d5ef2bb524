"""How far an eye is open, as a number; see ``modeling_eye_openness``."""

from typing import TYPE_CHECKING

from .. import lazy_names

if TYPE_CHECKING:
    from .configuration_eye_openness import EyeOpennessConfig
    from .image_processing_eye_openness import EyeOpennessImageProcessor
    from .modeling_eye_openness import (
        DropDomainHead,
        EyeOpennessForRegression,
        EyeOpennessOutput,
        EyeOpennessPreTrainedModel,
        ReversalSchedule,
    )

__all__ = [
    "DropDomainHead",
    "EyeOpennessConfig",
    "EyeOpennessForRegression",
    "EyeOpennessImageProcessor",
    "EyeOpennessOutput",
    "EyeOpennessPreTrainedModel",
    "ReversalSchedule",
]

_model_names = lazy_names(__name__, __all__)


def __getattr__(name: str) -> object:
    if name == "EyeOpennessImageProcessor":
        from .image_processing_eye_openness import EyeOpennessImageProcessor

        return EyeOpennessImageProcessor
    return _model_names(name)
