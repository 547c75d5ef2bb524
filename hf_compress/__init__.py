"""Make Hugging Face vision models smaller while they train, and keep them ordinary Hugging Face models.

Importing this package lets the stock ``from_pretrained`` load compressed checkpoints. It imports neither torch nor
transformers by itself; every name below is loaded when it is first used.
"""

from importlib import import_module
from typing import Any

from . import _registration

__version__ = "0.1.0.dev0"

_HOMES = {
    "ArchitectureSearchCallback": "methods",
    "Axis": "axes",
    "AxisGraph": "axes",
    "Plan": "surgery",
    "DimensionSearchCallback": "methods",
    "DistillationCallback": "methods",
    "FeatureAffinityDistillation": "methods",
    "EyeRenderer": "data.eyes",
    "DropPathScheduleCallback": "methods",
    "GrowingRegularizationCallback": "methods",
    "HfCompressConfig": "hub",
    "HfCompressError": "errors",
    "L1": "methods",
    "LatencyTable": "measurement",
    "Lp": "methods",
    "MCP": "methods",
    "Measurement": "measurement",
    "NetworkSlimmingCallback": "methods",
    "ProximalSlimmingCallback": "methods",
    "RunResult": "recipe",
    "QuantizationAwareTrainingCallback": "methods",
    "SCAD": "methods",
    "Scenes": "data",
    "SparseGroupCallback": "methods",
    "TrainedRankPruningCallback": "methods",
    "TransformedL1": "methods",
    "WidthSearchCallback": "methods",
    "export_onnx": "export",
    "factorize": "surgery",
    "factorize_report": "surgery",
    "find_axes": "axes",
    "find_blocks": "surgery",
    "importance": "surgery",
    "load_recipe": "recipe",
    "magnitude_scores": "surgery",
    "match_blocks": "surgery",
    "measure": "measurement",
    "mix_attention": "surgery",
    "own_names_in_checkpoints": "methods",
    "prune": "surgery",
    "push": "hub",
    "quantize": "quantization",
    "remove_blocks": "surgery",
    "replace_attention": "surgery",
    "report_first": "methods",
    "run_recipe": "recipe",
    "select": "surgery",
    "settle_attention": "surgery",
    "shrink": "surgery",
    "write_card": "hub",
}

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_registration.register()
