"""Models for other runtimes, compared with the PyTorch model before anyone gets them."""

from .onnx import export_onnx, onnx_difference, onnx_runner

__all__ = ["export_onnx", "onnx_difference", "onnx_runner"]
