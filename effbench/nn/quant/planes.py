"""Bit planes: plane i of a matrix of codes holds the bit of weight 2^(b - 1 - i) of each code.

The first b planes of wider codes are the codes shifted right, so a format can be read at fewer
bits than it has. A row's columns stand in blocks of 256, 32 bytes a plane: bit k of byte j of a
block is column 32 k + j of it. A kernel thus has 32 neighbouring columns from one register by one
shift and one mask. A last block of c < 256 columns has c / 8 bytes, and bit k of byte j is column
k c / 8 + j; c is filled up with zeros to a multiple of 8.
"""

from __future__ import annotations

from effbench.nn.quant.packing import fill_up
from effbench.util.lazy import torch

BLOCK = 256
"""Columns whose bits stand together."""
LOWEST = 0x0101010101010101
"""The lowest bit of each of eight bytes."""


def plane_bytes(columns: int) -> int:
    """Return the bytes of one row of one plane."""
    return -(columns // -8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the planes of codes, the most significant first.

    Args:
        codes: [N, K] uint8, every value below 2^bits.
        bits: 1 to 8.

    Returns:
        [bits, N, ⌈K / 8⌉] uint8.
    """
    whole = codes.shape[-1] // BLOCK * BLOCK
    blocks = [codes[:, :whole].unflatten(1, (-1, BLOCK))] if whole else []
    if whole < codes.shape[-1]:
        blocks.append(fill_up(codes[:, whole:], 8).unsqueeze(1))
    planes = [[_gather(block >> (bits - 1 - i) & 1) for block in blocks] for i in range(bits)]
    return torch.stack([torch.cat(parts, 1) for parts in planes])


def unpack(planes: torch.Tensor, columns: int) -> torch.Tensor:
    """Return the codes of planes [b, N, ⌈K / 8⌉] of K columns, [N, K] uint8."""
    whole = columns // BLOCK * BLOCK // 8
    parts = [_blocks(planes[:, :, :whole], BLOCK // 8)] if whole else []
    if whole < planes.shape[2]:
        parts.append(_blocks(planes[:, :, whole:], planes.shape[2] - whole))
    return torch.cat(parts, 1)[:, :columns] if len(parts) > 1 else parts[0][:, :columns]


def _blocks(planes: torch.Tensor, size: int) -> torch.Tensor:
    """Return the codes of planes [b, N, M size] in blocks of `size` bytes, [N, 8 M size] uint8.

    Eight bytes are taken at a time, as one number.
    """
    bits, rows, _ = planes.shape
    filled = fill_up(planes.unflatten(2, (-1, size)), 8).contiguous().view(torch.int64)
    codes = filled.new_zeros(rows, filled.shape[2], 8, filled.shape[3])
    for k in range(8):
        for i, plane in enumerate(filled):
            codes[:, :, k] |= (plane >> k).bitwise_and_(LOWEST) << (bits - 1 - i)
    return codes.view(torch.uint8)[..., :size].flatten(1)


def _gather(bits: torch.Tensor) -> torch.Tensor:
    """Return the bytes of blocks [N, M, c] of single bits, [N, M c / 8]."""
    rows, blocks, size = bits.shape
    strands = bits.view(rows, blocks, 8, size // 8)
    out = strands[:, :, 0].clone()
    for k in range(1, 8):
        out |= strands[:, :, k] << k
    return out.flatten(1)
