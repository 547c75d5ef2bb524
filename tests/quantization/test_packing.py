"""Codes take their real width and come back as they were."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_compress.errors import RecordError
from hf_compress.quantization import pack, packed_size, unpack
from hf_compress.quantization.quantizers import largest_code


def random_codes(count: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if bits == 1:
        return torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    return torch.randint(-largest_code(bits), largest_code(bits) + 1, (count,), generator=generator)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 300), st.integers(1, 8), st.integers(0, 10**6))
def test_round_trip_at_the_real_width(count, bits, seed):
    codes = random_codes(count, bits, seed)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (packed_size(count, bits),)
    assert torch.equal(unpack(packed, bits, (count,)), codes.to(torch.int8))
    assert torch.equal(pack(unpack(packed, bits, (count,)), bits), packed)


@pytest.mark.parametrize("bits", range(1, 9))
def test_size_is_within_five_percent_of_the_ideal(bits):
    count = 100_003
    ideal = count * (math.log2(3) if bits == 2 else bits) / 8
    assert ideal <= packed_size(count, bits) <= 1.05 * ideal


def test_layout_in_bytes():
    assert pack(torch.tensor([1, -1, -1, 1, 1, 1, -1, -1, 1]), 1).tolist() == [0b00111001, 1]
    assert pack(torch.tensor([-1, 0, 1, 1, -1, 1]), 2).tolist() == [0 + 1 * 3 + 2 * 9 + 2 * 27, 2]
    assert pack(torch.tensor([-7, 7, 0]), 4).tolist() == [14 << 4, 7]
    assert pack(torch.tensor([-127, 0, 127]), 8).tolist() == [0, 127, 254]


@pytest.mark.parametrize("bits", range(1, 9))
def test_impossible_bytes_are_refused(bits):
    packed = pack(random_codes(100, bits), bits)
    for wrong in (packed[:-1], torch.cat([packed, packed]), packed.float(), packed[:, None], packed.to(torch.int8)):
        with pytest.raises(RecordError, match="must be"):
            unpack(wrong, bits, (100,))
    packed[0] = 255
    if bits == 1:
        assert unpack(packed, bits, (100,))[:8].eq(1).all()
    else:
        with pytest.raises(RecordError, match=r"242|not used"):
            unpack(packed, bits, (100,))
