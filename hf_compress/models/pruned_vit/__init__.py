"""Vision transformers whose layers have widths of their own; see ``modeling_pruned_vit``.

``configuration_pruned_vit`` and ``modeling_pruned_vit`` need transformers alone, so a checkpoint can carry them::

    PrunedViTConfig.register_for_auto_class()
    PrunedViTForImageClassification.register_for_auto_class("AutoModelForImageClassification")
    model.save_pretrained(folder)  # AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
"""

from typing import TYPE_CHECKING

from .. import lazy_names

if TYPE_CHECKING:
    from .configuration_pruned_vit import PrunedViTConfig
    from .conversion_pruned_vit import to_pruned_vit
    from .modeling_pruned_vit import (
        PrunedViTBackbone,
        PrunedViTForImageClassification,
        PrunedViTModel,
        PrunedViTPreTrainedModel,
    )

__all__ = [
    "PrunedViTBackbone",
    "PrunedViTConfig",
    "PrunedViTForImageClassification",
    "PrunedViTModel",
    "PrunedViTPreTrainedModel",
    "to_pruned_vit",
]

_model_names = lazy_names(__name__, __all__)


def __getattr__(name: str) -> object:
    if name == "to_pruned_vit":
        from .conversion_pruned_vit import to_pruned_vit

        return to_pruned_vit
    return _model_names(name)
