"""Codes of 1 to 8 bits in exactly that many bits each.

The codes follow one another without gaps, the lowest bit first: code i lies in bits i·b to
i·b + b - 1 of the stream, and bit k of the stream is bit k mod 8 of byte ⌊k / 8⌋. Only the last
byte can have unused bits; they are zero.
"""

from __future__ import annotations

from math import gcd

from effbench.util.lazy import F, torch


def fill_up(tensor: torch.Tensor, multiple: int) -> torch.Tensor:
    """Return the tensor with zeros after its last dimension, up to a multiple; itself if even."""
    missing = -tensor.shape[-1] % multiple
    return F.pad(tensor, (0, missing)) if missing else tensor


def packed_bytes(count: int, bits: int) -> int:
    """Return the bytes of `count` codes of `bits` bits."""
    return -(count * bits // -8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return `codes` in `bits` bits each.

    Args:
        codes: uint8 of any shape, every value below 2^bits.
        bits: 1 to 8.

    Returns:
        [⌈count · bits / 8⌉] uint8.
    """
    many, wide = _period(bits)
    flat = codes.reshape(-1)
    columns = fill_up(flat, many).view(-1, many)
    out = torch.zeros(columns.shape[0], wide, dtype=torch.uint8, device=codes.device)
    for i in range(many):
        byte, shift = divmod(i * bits, 8)
        out[:, byte] |= columns[:, i] << shift
        if shift + bits > 8:
            out[:, byte + 1] |= columns[:, i] >> (8 - shift)
    return out.view(-1)[: packed_bytes(flat.numel(), bits)].clone()


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Return the first `count` codes of a packed stream, [count] uint8."""
    many, wide = _period(bits)
    if many == wide:
        return packed[:count]
    columns = fill_up(packed, wide).view(-1, wide)
    out = torch.empty(columns.shape[0], many, dtype=torch.uint8, device=packed.device)
    for i in range(many):
        byte, shift = divmod(i * bits, 8)
        part = columns[:, byte] >> shift
        if shift + bits > 8:
            part = part | columns[:, byte + 1] << (8 - shift)
        out[:, i] = part & (2**bits - 1)
    return out.view(-1)[:count]


def codes_at(packed: torch.Tensor, bits: int, places: torch.Tensor) -> torch.Tensor:
    """Return the codes at some places of a packed stream, int32 in the shape of `places`.

    Args:
        packed: [bytes] uint8.
        bits: Of a code.
        places: Numbers of codes, int64 of any shape.
    """
    first = places * bits
    byte = first >> 3
    found = packed[byte].int()
    if 8 % bits:
        found |= packed[(byte + 1).clamp_(max=len(packed) - 1)].int() << 8
    return (found >> (first & 7).int()) & (2**bits - 1)


def _period(bits: int) -> tuple[int, int]:
    """Return how many codes fill how many whole bytes."""
    common = gcd(bits, 8)
    return 8 // common, bits // common
