"""Models for other runtimes, compared with the PyTorch model before anyone gets them."""

from .int8 import Agreement, export_int8_onnx, int8_agreement
from .onnx import OnnxModel, export_onnx, largest_difference, onnx_difference, onnx_outputs, onnx_runner
from .outputs import OUTPUTS, named_outputs

__all__ = [
    "OUTPUTS",
    "Agreement",
    "OnnxModel",
    "export_int8_onnx",
    "export_onnx",
    "int8_agreement",
    "largest_difference",
    "named_outputs",
    "onnx_difference",
    "onnx_outputs",
    "onnx_runner",
]
