"""PreActResNet of the slimming papers; see ``modeling_slimming_preact_resnet``."""

from typing import TYPE_CHECKING

from .. import lazy_names

if TYPE_CHECKING:
    from .configuration_slimming_preact_resnet import PreActResNetConfig
    from .modeling_slimming_preact_resnet import (
        PreActResNetForImageClassification,
        PreActResNetModel,
        PreActResNetPreTrainedModel,
    )

__all__ = [
    "PreActResNetConfig",
    "PreActResNetForImageClassification",
    "PreActResNetModel",
    "PreActResNetPreTrainedModel",
]

__getattr__ = lazy_names(__name__, __all__)
