"""What can shrink in a model: axes, found by watching one forward pass."""

from .finding import example_inputs_for, find_axes
from .graph import AttributeLaw, Axis, AxisGraph, Contraction, Cost, Member, SizeLaw

__all__ = [
    "AttributeLaw",
    "Axis",
    "AxisGraph",
    "Contraction",
    "Cost",
    "Member",
    "SizeLaw",
    "example_inputs_for",
    "find_axes",
]
