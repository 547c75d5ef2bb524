"""Every error that this package raises on purpose.

One root class, so that ``except HfCompressError`` catches them all; every child also derives from the built-in
exception that a caller unaware of this package would expect. Messages say what was received, what is possible and what
to try next.
"""


class HfCompressError(Exception):
    """Root of all errors raised by hf_compress."""


class ModelError(HfCompressError, ValueError):
    """The model itself cannot be worked with: no way to run it, NaN weights, an unsuitable class."""


class NothingToShrinkError(ModelError):
    """The model has no axis that the request could act on."""


class MethodError(HfCompressError, ValueError):
    """A method's argument is out of range, or two methods cannot act on the same parameter."""


class PlanError(HfCompressError, ValueError):
    """A plan does not fit the model: an unknown axis, an index out of range, sizes that must agree and do not."""


class BudgetError(PlanError):
    """No plan meets the budget under the given limits."""


class RecordError(HfCompressError, ValueError):
    """The record in a checkpoint's configuration is malformed or does not fit the architecture."""


class RecipeError(HfCompressError, ValueError):
    """A recipe cannot be read or does not fit its schema."""


class DataError(HfCompressError, ValueError):
    """A data set does not fit the model or cannot be read."""


class CheckpointError(HfCompressError, ValueError):
    """A folder does not hold what it should, or holds what must not be overwritten."""


class ExportError(HfCompressError, RuntimeError):
    """An exported file could not be written or does not agree with the PyTorch model."""


class HubError(HfCompressError, RuntimeError):
    """An upload to the Hub could not be done."""
