"""Vgg of the slimming papers; see ``modeling_slimming_vgg``."""

from typing import TYPE_CHECKING

from .. import lazy_names

if TYPE_CHECKING:
    from .configuration_slimming_vgg import VggConfig
    from .modeling_slimming_vgg import VggForImageClassification, VggModel, VggPreTrainedModel

__all__ = ["VggConfig", "VggForImageClassification", "VggModel", "VggPreTrainedModel"]

__getattr__ = lazy_names(__name__, __all__)
