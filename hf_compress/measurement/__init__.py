"""What a model costs, measured: parameters, MACs, bytes and time; and the pictures that show it."""

from .cost import Measurement, checkpoint_bytes, count_macs, measure, state_bytes
from .latency import compare_latency, describe_machine
from .latency_table import LatencyTable
from .plots import TradeoffPoint, plot_sparsity, plot_tradeoff, plot_widths

__all__ = [
    "LatencyTable",
    "Measurement",
    "TradeoffPoint",
    "checkpoint_bytes",
    "compare_latency",
    "count_macs",
    "describe_machine",
    "measure",
    "plot_sparsity",
    "plot_tradeoff",
    "plot_widths",
    "state_bytes",
]
