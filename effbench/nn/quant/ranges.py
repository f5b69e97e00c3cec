"""Numbers as codes between the least and the largest of their group.

Over the numbers x of one group, with L = 2^b - 1:

    l = min(x),   s = (max(x) - l) / L,   q = clamp(round((x - l) / s), 0, L),   x̂ = l + s q

Zero need not lie in the range, as it has to for weights (`nn.quant.groupwise`): channels of keys
lie far on one side of it. l and s are rounded to float16 before they are used, so that q fits what
is stored. Storage: q in b bits, s and l in 16 each.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

from effbench.nn.quant.groupwise import LARGEST_SCALE, SMALLEST_SCALE
from effbench.nn.quant.packing import pack, unpack
from effbench.util.lazy import torch

RANGE_BYTES = 4
"""Bytes of s and l."""


class Ranges(NamedTuple):
    """Groups of numbers [*lead, *groups, size] in few bits."""

    codes: torch.Tensor
    """[*lead, bytes] uint8; what belongs to one place of `lead` fills whole bytes."""
    scales: torch.Tensor
    """[*lead, *groups] float16, s."""
    lows: torch.Tensor
    """[*lead, *groups] float16, l."""

    @property
    def bytes(self) -> int:
        """Bytes of all three."""
        return sum(t.numel() * t.element_size() for t in self)


def channels_of(group: int, width: int) -> int:
    """Return how many of `width` channels share a range, so that all groups are whole."""
    return gcd(group, width)


def encode(x: torch.Tensor, bits: int, lead: int) -> Ranges:
    """Return groups of numbers in `bits` bits each.

    Args:
        x: [*lead, *groups, size], any floating dtype; computed in float32 at the least.
        bits: 1 to 8.
        lead: Dimensions of `lead`; the numbers at one of its places have to fill whole bytes.
    """
    x, top = x.to(torch.promote_types(x.dtype, torch.float32)), 2**bits - 1
    lows = x.amin(-1).clamp(-LARGEST_SCALE, LARGEST_SCALE).to(torch.float16)
    span = x.amax(-1) - lows
    scales = (span / top).clamp(SMALLEST_SCALE, LARGEST_SCALE).to(torch.float16)
    codes = ((x - lows[..., None]) / scales[..., None]).round().clamp(0, top).to(torch.uint8)
    return Ranges(pack(codes, bits).view(*x.shape[:lead], -1), scales, lows)


def decode(stored: Ranges, bits: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the numbers that the codes stand for, [*lead, *groups, size], rounded once."""
    shape = (*stored.scales.shape, size)
    codes = unpack(stored.codes.flatten(), bits, stored.scales.numel() * size).view(shape)
    wide = torch.promote_types(dtype, torch.float32)
    return (codes.to(wide) * stored.scales[..., None] + stored.lows[..., None]).to(dtype)
