"""Low-bit weights and activations: quantizers, the layers that use them, calibration, packed storage."""

from .calibration import calibrate
from .layers import freeze, prepare, quantizable_layers, quantization_of, resolve, unfreeze
from .packing import pack, packed_size, unpack
from .post_training import dequantize, quantize
from .quantizers import clipped_relu, fake_quantized, in_own_range, in_range
from .scheme import Quantization
from .storage import packed_state_dict, stored_bytes

__all__ = [
    "Quantization",
    "calibrate",
    "clipped_relu",
    "dequantize",
    "fake_quantized",
    "freeze",
    "in_own_range",
    "in_range",
    "pack",
    "packed_size",
    "packed_state_dict",
    "prepare",
    "quantizable_layers",
    "quantization_of",
    "quantize",
    "resolve",
    "stored_bytes",
    "unfreeze",
    "unpack",
]
