"""Make a model smaller: scores and a budget give a plan, the plan is cut, a record remembers it."""

from .blocks import Block, block_scores, find_blocks, remove_blocks, select_blocks
from .factorize import FactorizeReport, factorize, factorize_report
from .importance import importance, magnitude_scores
from .mixed import mix_attention, settle_attention
from .plan import Plan
from .replace import find_attention, match_blocks, replace_attention, replacement_report
from .select import select
from .shift import ShiftReport
from .shrink import prune, shrink
from .skeleton import Record, apply_record, record_of

__all__ = [
    "Block",
    "FactorizeReport",
    "Plan",
    "Record",
    "ShiftReport",
    "apply_record",
    "block_scores",
    "factorize",
    "factorize_report",
    "find_attention",
    "find_blocks",
    "importance",
    "magnitude_scores",
    "match_blocks",
    "mix_attention",
    "prune",
    "record_of",
    "remove_blocks",
    "replace_attention",
    "replacement_report",
    "select",
    "select_blocks",
    "settle_attention",
    "shrink",
]
