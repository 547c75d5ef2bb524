"""Loading a checkpoint whose task is not known beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_compress.errors import HfCompressError, ModelError

_HEADS = (
    "ForImageClassification",
    "ForObjectDetection",
    "ForSemanticSegmentation",
    "ForInstanceSegmentation",
    "ForUniversalSegmentation",
    "ForDepthEstimation",
)


def load_as_saved(name: str | Path) -> Any:
    """A model with the head that its checkpoint names; the bare model where that is no head of the Auto classes.

    Args:
        name: a folder that ``save_pretrained`` wrote, or a Hub id.

    Raises:
        ModelError: when it cannot be loaded.
    """
    import transformers

    text = str(name)
    if text.startswith((".", "/", "~")) and not Path(text).expanduser().is_dir():
        raise ModelError(f"there is no folder {text}. Give a folder that save_pretrained wrote, or a Hub id.")
    try:
        saved = transformers.AutoConfig.from_pretrained(text).architectures or []
        head = next((head for head in _HEADS if any(kind.endswith(head) for kind in saved)), "")
        return getattr(transformers, f"AutoModel{head}").from_pretrained(text)
    except HfCompressError:
        raise
    except Exception as error:  # a missing folder, the network, a damaged file: no common class
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{text} cannot be loaded: {reason}") from error
