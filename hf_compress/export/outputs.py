"""Which of a model's outputs people need: what an exported file returns, and what checks of a model compare."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import ExportError

OUTPUTS = (
    "logits",
    "pred_boxes",  # detectors: centre and size of a box for every row of logits
    "pred_masks",  # of the DETR kind, for segmentation
    "class_queries_logits",  # of the MaskFormer kind
    "masks_queries_logits",
    "predicted_depth",
    "openness",  # of eyes, 0 to 1, and aperture over width
    "aperture_ratio",
)


def named_outputs(output: Any) -> dict[str, Tensor]:
    """The tensors of a model's output that a result is made from, by their names in transformers.

    Args:
        output: what a model returned; a tensor alone counts as ``logits``.

    Returns:
        Those of ``OUTPUTS`` that there are, in this order.

    Raises:
        ExportError: when there is none.
    """
    if isinstance(output, Tensor):
        return {"logits": output}
    found = {name: getattr(output, name, None) for name in OUTPUTS}
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ExportError(
            f"the model returns {type(output).__name__} without logits (or any of {', '.join(OUTPUTS[1:])}). Wrap it in a "
            "module that returns one tensor."
        )
    return tensors


__all__ = ["OUTPUTS", "named_outputs"]
