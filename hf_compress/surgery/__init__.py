"""Make a model smaller: scores and a budget give a plan, the plan is cut, a record remembers it."""

from .plan import Plan
from .scores import magnitude_scores
from .select import select
from .shift import ShiftReport
from .shrink import prune, shrink
from .skeleton import Record, apply_record, record_of

__all__ = [
    "Plan",
    "Record",
    "ShiftReport",
    "apply_record",
    "magnitude_scores",
    "prune",
    "record_of",
    "select",
    "shrink",
]
