"""Codes of weights as bytes: every code takes its real width.

One bit: eight codes a byte. Two bits (ternary): five codes a byte, in base 3, which is 1.6 bits each. Others: their bits
one after another, the lowest first, so four-bit codes are two a byte.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_compress.errors import RecordError

from .quantizers import largest_code

_TRITS = 5


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` codes take."""
    return -(-count // _TRITS) if bits == 2 else -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes as bytes.

    Args:
        codes: integers of any dtype and shape, from -K to K (:func:`~.quantizers.largest_code`).
        bits: 1 to 8.

    Returns:
        uint8 [:func:`packed_size`] on the CPU.
    """
    flat = codes.detach().cpu().flatten().to(torch.int16)
    digits = ((flat + 1) // 2 if bits == 1 else flat + largest_code(bits)).to(torch.uint8)
    if bits == 2:
        return _joined(digits, _TRITS, 3)
    if bits != 1:
        digits = (digits[:, None] >> torch.arange(bits, dtype=torch.uint8)).bitwise_and_(1).flatten()
    return _joined(digits, 8, 2)


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The inverse of :func:`pack`.

    Args:
        packed: uint8 [n].
        bits: 1 to 8.
        shape: of the codes.

    Returns:
        int8 codes.

    Raises:
        RecordError: when the bytes hold something else.
    """
    count = torch.Size(shape).numel()
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (packed_size(count, bits),):
        raise RecordError(
            f"packed weights must be {packed_size(count, bits)} bytes, and are {packed.dtype} "
            f"{list(packed.shape)}. The checkpoint was changed since it was written; save it again."
        )
    base, many = (3, _TRITS) if bits == 2 else (2, 8)
    if bits == 2 and bool((packed >= base**many).any()):
        raise RecordError("packed ternary weights hold a byte above 242. The checkpoint is damaged; save it again.")
    powers = torch.tensor([base**i for i in range(many)], dtype=torch.uint8, device=packed.device)
    digits = packed[:, None].div(powers, rounding_mode="floor").remainder_(base).flatten()
    if bits > 2:
        powers = torch.tensor([2**i for i in range(bits)], dtype=torch.uint8, device=packed.device)
        digits = (digits[: count * bits].view(-1, bits) * powers).sum(1, dtype=torch.uint8)
    codes = digits[:count].to(torch.int16)
    codes = codes * 2 - 1 if bits == 1 else codes - largest_code(bits)
    if bool((codes > largest_code(bits)).any()):
        raise RecordError(f"packed {bits}-bit weights hold a code that is not used. The checkpoint is damaged.")
    return codes.to(torch.int8).view(shape)


def _joined(digits: Tensor, many: int, base: int) -> Tensor:
    """``many`` digits of a base as one byte, the lowest first."""
    padded = torch.nn.functional.pad(digits, (0, -len(digits) % many)).view(-1, many)
    powers = torch.tensor([base**i for i in range(many)], dtype=torch.uint8)
    return (padded * powers).sum(1, dtype=torch.uint8)
