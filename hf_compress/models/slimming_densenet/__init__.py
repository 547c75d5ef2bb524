"""DenseNet of the slimming papers; see ``modeling_slimming_densenet``."""

from typing import TYPE_CHECKING

from .. import lazy_names

if TYPE_CHECKING:
    from .configuration_slimming_densenet import DenseNetConfig
    from .modeling_slimming_densenet import DenseNetForImageClassification, DenseNetModel, DenseNetPreTrainedModel

__all__ = ["DenseNetConfig", "DenseNetForImageClassification", "DenseNetModel", "DenseNetPreTrainedModel"]

__getattr__ = lazy_names(__name__, __all__)
