"""DARTS: networks of searched cells, and the supernet to search them in; see ``modeling_darts``."""

from typing import TYPE_CHECKING

from .. import lazy_names

if TYPE_CHECKING:
    from .configuration_darts import DartsConfig, DartsSupernetConfig
    from .modeling_darts import (
        DartsForImageClassification,
        DartsModel,
        DartsPreTrainedModel,
        DartsSupernetForImageClassification,
        DartsSupernetModel,
        all_cells,
        parameter_free_share,
        random_genotype,
    )

__all__ = [
    "DartsConfig",
    "DartsForImageClassification",
    "DartsModel",
    "DartsPreTrainedModel",
    "DartsSupernetConfig",
    "DartsSupernetForImageClassification",
    "DartsSupernetModel",
    "all_cells",
    "parameter_free_share",
    "random_genotype",
]

__getattr__ = lazy_names(__name__, __all__)
