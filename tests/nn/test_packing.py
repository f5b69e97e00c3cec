"""Packed codes: round trips and exact sizes for every bit width."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effbench.nn.quant.packing import pack, packed_bytes, unpack


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 8), st.integers(0, 200), st.integers(0, 2**31))
def test_codes_come_back_from_exactly_their_bits(bits: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (count,), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == packed_bytes(count, bits) == (count * bits + 7) // 8
    assert packed.untyped_storage().nbytes() == packed.numel()
    assert torch.equal(unpack(packed, bits, count), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_stream_has_no_gaps_and_starts_with_the_lowest_bit(bits: int) -> None:
    codes = (torch.arange(37) * 7 % 2**bits).to(torch.uint8)
    stream = sum(int(code) << (i * bits) for i, code in enumerate(codes))
    expected = stream.to_bytes(packed_bytes(codes.numel(), bits), "little")
    assert bytes(pack(codes, bits).tolist()) == expected


def test_any_shape_is_packed_row_after_row() -> None:
    codes = torch.arange(24, dtype=torch.uint8) % 8
    assert torch.equal(pack(codes.view(4, 6), 3), pack(codes, 3))


def test_packing_leaves_the_codes_alone() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    pack(codes, 8).zero_()
    assert torch.equal(codes, torch.arange(16, dtype=torch.uint8))
