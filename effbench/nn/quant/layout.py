"""How packed weights lie in memory, for the kernels that multiply them as they are."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Layout(NamedTuple):
    """How a packed weight lies in memory, for kernels that multiply its codes as they are.

    The codes of a row of d_in weights, a multiple of 32, follow those of the row before it; so do
    the bits in each of the bit planes, where there are any.
    """

    bits: int
    """Of a code; `NF4_CODES` for those of `nf4`, and `SIGNS`, `TRITS` or `NESTED` for planes."""
    group: int
    """Neighbouring weights of a row that share one scale, a multiple of 32."""
    scales: torch.Tensor
    """[d_out, G] float16; for NF4 [blocks] uint8; for planes [planes or half of them, d_out, G]
    float16, and for nested codes their levels, [d_out, 2^planes] float16."""
    zeros: torch.Tensor | None = None
    """Packed zero points, None when symmetric, or float16 shifts; for NF4 the second-level scales;
    for signs what is added to each group, [d_out, G] float32."""
    levels: torch.Tensor | None = None
    """Of the scales of NF4, [256] float32."""
    offset: torch.Tensor | None = None
    """Of the scales of NF4, [] float32."""
    planes: int = 0
    """Bit planes that are read; of integer codes `SHIFTS` where they have shifts."""
    stride: int = 0
    """Bytes from one plane to the next."""


NF4_CODES = 104
"""Stands for the 4-bit codes of NF4."""
SIGNS, TRITS, NESTED = 105, 106, 107
"""Stand for the planes of `binary`, `trits` and `nested`."""
SHIFTS = 1
"""Stands, as `planes` of integer codes, for float16 shifts in the place of zero points."""
ALIGNED = 32
"""Weights that kernels multiply at a time: no group and no row ends between them."""
