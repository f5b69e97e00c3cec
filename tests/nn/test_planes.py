"""Bit planes: where each bit lies, and that fewer planes are the codes shifted right."""

from __future__ import annotations

import pytest
import torch

from effbench.nn.quant import planes


@pytest.mark.parametrize("columns", [1, 8, 33, 256, 576, 1120])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_the_first_planes_are_the_codes_shifted_right(columns: int, bits: int) -> None:
    codes = torch.randint(2**bits, (5, columns), dtype=torch.uint8)
    packed = planes.pack(codes, bits)
    assert packed.shape == (bits, 5, planes.plane_bytes(columns))
    for read in range(1, bits + 1):
        assert torch.equal(planes.unpack(packed[:read], columns), codes >> (bits - read))


@pytest.mark.parametrize(
    ("columns", "column", "byte", "bit"),
    [(512, 256 + 32 * 3 + 7, 32 + 7, 3), (576, 512 + 8 * 5 + 2, 64 + 2, 5), (8, 4, 0, 4)],
)
def test_each_bit_lies_where_kernels_look_for_it(
    columns: int, column: int, byte: int, bit: int
) -> None:
    codes = torch.zeros(2, columns, dtype=torch.uint8)
    codes[1, column] = 0b10
    packed = planes.pack(codes, 2)
    expected = torch.zeros_like(packed)
    expected[0, 1, byte] = 1 << bit
    assert torch.equal(packed, expected)
