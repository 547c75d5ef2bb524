"""Training methods as Trainer callbacks: one file per method."""

from .architecture_search import ArchitectureSearchCallback
from .axis_callback import AxisCallback
from .checkpoint_names import own_names_in_checkpoints
from .dimension_search import DimensionSearchCallback
from .drop_path_schedule import DropPathScheduleCallback
from .feature_affinity import DistillationCallback, FeatureAffinityDistillation
from .growing_regularization import GrowingRegularizationCallback
from .network_slimming import NetworkSlimmingCallback
from .penalties import L1, MCP, SCAD, Lp, Penalty, TransformedL1, penalty_from
from .proximal_slimming import ProximalSlimmingCallback
from .quantization_aware_training import QuantizationAwareTrainingCallback
from .relaxed_search import BilevelSearch, RelaxedSearch
from .reporting import report_first
from .sparse_group import SparseGroupCallback
from .trained_rank_pruning import TrainedRankPruningCallback
from .width_search import WidthSearchCallback

__all__ = [
    "L1",
    "MCP",
    "SCAD",
    "ArchitectureSearchCallback",
    "AxisCallback",
    "BilevelSearch",
    "DimensionSearchCallback",
    "DistillationCallback",
    "DropPathScheduleCallback",
    "FeatureAffinityDistillation",
    "GrowingRegularizationCallback",
    "Lp",
    "NetworkSlimmingCallback",
    "Penalty",
    "ProximalSlimmingCallback",
    "QuantizationAwareTrainingCallback",
    "RelaxedSearch",
    "SparseGroupCallback",
    "TrainedRankPruningCallback",
    "TransformedL1",
    "WidthSearchCallback",
    "own_names_in_checkpoints",
    "penalty_from",
    "report_first",
]
