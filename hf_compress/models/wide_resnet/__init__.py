"""Wide residual networks; see ``modeling_wide_resnet``."""

from typing import TYPE_CHECKING

from .. import lazy_names

if TYPE_CHECKING:
    from .configuration_wide_resnet import WideResNetConfig
    from .modeling_wide_resnet import WideResNetForImageClassification, WideResNetModel, WideResNetPreTrainedModel

__all__ = [
    "WideResNetConfig",
    "WideResNetForImageClassification",
    "WideResNetModel",
    "WideResNetPreTrainedModel",
]

__getattr__ = lazy_names(__name__, __all__)
