"""Meeting the Hugging Face ecosystem: the configuration in a checkpoint, loading it, the model card, uploading."""

from importlib import import_module
from typing import Any

_HOMES = {
    "HfCompressConfig": "config",
    "HfCompressQuantizer": "quantizer",
    "CardContent": "card",
    "write_card": "card",
    "push": "upload",
}

__all__ = ["CardContent", "HfCompressConfig", "HfCompressQuantizer", "push", "write_card"]


def __getattr__(name: str) -> Any:  # transformers and torch are imported when first used
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
