"""LeNet-5 of the sparse-group papers; see ``modeling_lenet``."""

from typing import TYPE_CHECKING

from .. import lazy_names

if TYPE_CHECKING:
    from .configuration_lenet import LeNetConfig
    from .modeling_lenet import LeNetForImageClassification, LeNetModel, LeNetPreTrainedModel

__all__ = ["LeNetConfig", "LeNetForImageClassification", "LeNetModel", "LeNetPreTrainedModel"]

__getattr__ = lazy_names(__name__, __all__)
