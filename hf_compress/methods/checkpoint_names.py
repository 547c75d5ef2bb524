"""The names that a model's parameters have in the checkpoints of its training.

save_pretrained writes many models (ViT, Swin, BEiT, ...) under older parameter names, which Trainer does not translate
when it resumes or loads the best model: it then goes on with weights that it did not save (transformers 5.24, its issue
48805). An empty list of conversions makes checkpoints keep the names that the model itself has; from_pretrained reads both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

_CONVERSIONS = "_weight_conversions"


def use_own_names(model: nn.Module) -> Any:
    """Save a model under its own parameter names from now on.

    Returns:
        What :func:`restore_names` needs to undo it.
    """
    before = vars(model).get(_CONVERSIONS)
    if isinstance(model, PreTrainedModel):
        vars(model)[_CONVERSIONS] = []
    return before


def restore_names(model: nn.Module, before: Any) -> None:
    """Save a model under the names again that it had before :func:`use_own_names`."""
    vars(model).pop(_CONVERSIONS, None)
    if before is not None:
        vars(model)[_CONVERSIONS] = before


@contextmanager
def own_names_in_checkpoints(model: nn.Module) -> Iterator[None]:
    """Have Trainer resume, and load its best model, from the weights that it saved. Enter it before Trainer is made.

    Needed for ViT, DeiT, Swin, DINOv2 and BEiT, among others, with and without a method of this package; models whose
    names never changed are saved as always. Recipes do it by themselves. What is saved afterwards has the names that
    everybody else expects::

        with own_names_in_checkpoints(model):
            trainer = Trainer(model, arguments, ...)
            trainer.train(resume_from_checkpoint=True)
        model.save_pretrained("result")
    """
    before = use_own_names(model)
    try:
        yield
    finally:
        restore_names(model, before)


__all__ = ["own_names_in_checkpoints", "restore_names", "use_own_names"]
