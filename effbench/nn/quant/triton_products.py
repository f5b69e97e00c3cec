"""Products of packed weights and a few vectors on a CUDA device, in Triton.

    codes    scale (code - zero point), or scale code + shift: `groupwise`, `shifted`; 2 to 8 bits
    planes   scaled signs, scaled trits, levels by nested codes: `binary`, `trits`, `nested`

No weight is expanded. At batch 1 a product is as fast as its bytes come in, if it takes few
instructions for each weight. So codes are read as units of 4 or 8, whose bits become the mantissa
of a float32 number, and planes as words of 32 bits, of which four columns at a time become the
bytes of one word. Sums are in float32. Each vector is multiplied by programs of its own.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from effbench.nn.quant.layout import NESTED, NF4_CODES, SHIFTS, SIGNS, TRITS, Layout

ROWS = 4
"""Rows that a program multiplies."""
UNITS, WORDS = 128, 32
"""Units of codes, and words of a plane, that it looks at at once."""
WARPS = 4
"""Of a program."""
SYMMETRIC, ZEROS, SHIFTED = 0, 1, 2
"""What a group takes from its codes: half of the levels, or a zero point; or it adds a shift."""


@triton.jit
def _units(codes, at, mask, BITS: tl.constexpr, UNIT: tl.constexpr):
    """Return the bits of some units as integers; `codes` has a unit an element, or bytes."""
    WIDE: tl.constexpr = BITS * UNIT // 8
    kind: tl.constexpr = tl.int64 if WIDE > 4 else tl.int32
    if WIDE == 2 or WIDE == 4:
        found = tl.load(codes + at, mask=mask, other=0, eviction_policy="evict_first").to(kind)
    else:
        found = tl.zeros(mask.shape, dtype=kind)
        for i in tl.static_range(WIDE):
            byte = tl.load(codes + at * WIDE + i, mask=mask, other=0)
            found |= byte.to(kind) << (8 * i)
    return found


@triton.jit
def _packed(stream, at, mask, BITS: tl.constexpr):
    """Return some codes of a stream of bytes as float32."""
    bit = at * BITS
    low = tl.load(stream + bit // 8, mask=mask, other=0).to(tl.int32)
    if 8 % BITS != 0:
        more = mask & (bit % 8 + BITS > 8)
        high = tl.load(stream + bit // 8 + 1, mask=more, other=0).to(tl.int32)
        low = high << 8 | low
    return ((low >> (bit % 8).to(tl.int32)) & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def _codes(
    codes,
    scales,
    zeros,
    x,
    out,
    N,
    K: tl.constexpr,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Write the products of some rows of codes with one vector of x [B, K].

    The codes of a unit come first in every shape, so that one thread has them all.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    x += tl.program_id(1) * K
    out += tl.program_id(1) * N
    there, inner = rows < N, tl.arange(0, UNIT)
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    many = K // UNIT
    for start in range(0, many, BLOCK_M):
        units = start + tl.arange(0, BLOCK_M)
        inside = units < many
        mask = there[:, None] & inside[None, :]
        held = _units(codes, rows.to(tl.int64)[:, None] * many + units[None, :], mask, BITS, UNIT)
        # A number from 1 to 2, 1 + code / 2^BITS: the code is moved to where a mantissa begins.
        down = (inner * BITS - (23 - BITS)).to(held.dtype)[:, None, None]
        moved = tl.where(
            down > 0,
            held[None, :, :] >> tl.maximum(down, 0),
            held[None, :, :] << tl.maximum(-down, 0),
        )
        mantissa = moved.to(tl.int32) & (((1 << BITS) - 1) << (23 - BITS))
        value = (mantissa | 0x3F800000).to(tl.float32, bitcast=True)
        columns = units[None, :] * UNIT + inner[:, None]
        vector = tl.load(x + columns, mask=inside[None, :], other=0.0).to(tl.float32)
        dot = tl.sum(value * vector[:, None, :], axis=0) * (1 << BITS)
        whole = tl.sum(vector, axis=0)[None, :]
        place = rows.to(tl.int64)[:, None] * G + (units * UNIT // GROUP)[None, :]
        scale = tl.load(scales + place, mask=mask, other=0.0).to(tl.float32)
        if KIND == 2:
            shift = tl.load(zeros + place, mask=mask, other=0.0).to(tl.float32)
            total += scale * (dot - (1 << BITS) * whole) + shift * whole
        elif KIND == 1:
            total += scale * (dot - ((1 << BITS) + _packed(zeros, place, mask, BITS)) * whole)
        else:
            total += scale * (dot - ((1 << BITS) + (1 << (BITS - 1)) - 1) * whole)
    tl.store(out + rows, tl.sum(total, axis=1).to(out.dtype.element_ty), mask=there)


@triton.jit
def _planes(
    planes,
    stride,
    scales,
    offsets,
    x,
    out,
    N,
    K: tl.constexpr,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    COUNT: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Write the products of some rows of bit planes with one vector of x [B, K].

    Bit k of byte i of a word is column k S + i of those that begin with the word's, S being an
    eighth of the columns of its block: 32, and fewer in the last one of a row. Shapes are
    [i, k, rows, words], so that one thread has all columns of a word.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    x += tl.program_id(1) * K
    out += tl.program_id(1) * N
    there, bits, bytes_ = rows < N, tl.arange(0, 8), tl.arange(0, 4)
    total = tl.zeros((4, 8, BLOCK_N, BLOCK_W), dtype=tl.float32)
    many = K // 32
    for start in range(0, many, BLOCK_W):
        words = start + tl.arange(0, BLOCK_W)
        inside = words < many
        mask = there[:, None] & inside[None, :]
        first = rows.to(tl.int64)[:, None] * many + words[None, :]
        block = words // 8
        step = tl.minimum(K - block * 256, 256) // 8
        strands = (block * 256 + words % 8 * 4)[None, :] + bits[:, None] * step[None, :]
        columns = strands[None, :, :] + bytes_[:, None, None]
        vector = tl.load(x + columns, mask=inside[None, None, :], other=0.0).to(tl.float32)
        if KIND == 107:
            codes = tl.zeros((8, BLOCK_N, BLOCK_W), dtype=tl.int32)
            for p in tl.static_range(COUNT):
                word = tl.load(planes + p * stride + first, mask=mask, other=0)
                bit = (word[None, :, :] >> bits[:, None, None]) & 0x01010101
                codes |= bit << (COUNT - 1 - p)
            code = (codes[None, :, :, :] >> (8 * bytes_)[:, None, None, None]) & 255
            place = (rows * (1 << COUNT))[None, None, :, None] + code
            level = tl.load(scales + place, mask=there[None, None, :, None], other=0.0)
            total += level.to(tl.float32) * vector[:, :, None, :]
        else:
            shifts = (bits[None, :] + (8 * bytes_)[:, None])[:, :, None, None]
            groups = rows.to(tl.int64)[None, :, None] * G + (strands // GROUP)[:, None, :]
            plus, minus = vector[:, :, None, :], -vector[:, :, None, :]
            for p in tl.static_range(COUNT if KIND == 105 else COUNT // 2):
                if KIND == 105:
                    word = tl.load(planes + p * stride + first, mask=mask, other=0)
                    bit = (word[None, None, :, :] >> shifts) & 1
                    signed = tl.where(bit != 0, plus, minus)
                else:
                    word = tl.load(planes + 2 * p * stride + first, mask=mask, other=0)
                    some = tl.load(planes + (2 * p + 1) * stride + first, mask=mask, other=0)
                    bit = (word[None, None, :, :] >> shifts) & 1
                    there_is = (some[None, None, :, :] >> shifts) & 1
                    signed = tl.where(there_is != 0, tl.where(bit != 0, minus, plus), 0.0)
                scale = tl.load(scales + p * N * G + groups, mask=mask[None, :, :], other=0.0)
                total += scale.to(tl.float32)[None, :, :, :] * signed
            if HAS_OFFSETS:
                offset = tl.load(offsets + groups, mask=mask[None, :, :], other=0.0)
                total += offset[None, :, :, :] * plus
    found = tl.sum(tl.sum(tl.sum(total, axis=0), axis=0), axis=1)
    tl.store(out + rows, found.to(out.dtype.element_ty), mask=there)


def multiplies(layout: Layout | None, weight: torch.Tensor) -> bool:
    """Whether the kernels here multiply weights that lie so; NF4 has bitsandbytes' kernel.

    Args:
        layout: Of the weights; None for those that lie otherwise.
        weight: Their codes or planes, which are read by words.
    """
    known = layout is not None and layout.bits != NF4_CODES
    return known and weight.is_contiguous() and weight.data_ptr() % 4 == 0


def product(layout: Layout, weight: torch.Tensor, x: torch.Tensor, n: int) -> torch.Tensor:
    """Return x W^T, [..., N] in the dtype of x.

    Args:
        layout: How the weights lie; see `multiplies`.
        weight: Their codes or planes, uint8.
        x: [..., K]; each vector reads the weights anew.
        n: N.
    """
    k = x.shape[-1]
    vectors = x.reshape(-1, k).contiguous()
    out = vectors.new_empty(len(vectors), n)
    grid = triton.cdiv(n, ROWS), len(vectors)
    if layout.bits in (SIGNS, TRITS, NESTED):
        groups = 1 if layout.bits == NESTED else layout.scales.shape[-1]
        _planes[grid](
            weight.view(torch.int32),
            layout.stride // 4,
            layout.scales,
            layout.zeros,
            vectors,
            out,
            n,
            K=k,
            G=groups,
            GROUP=layout.group,
            KIND=layout.bits,
            COUNT=layout.planes,
            HAS_OFFSETS=layout.zeros is not None,
            BLOCK_N=ROWS,
            BLOCK_W=min(WORDS, triton.next_power_of_2(k // 32)),
            num_warps=WARPS,
        )
        return out.view(*x.shape[:-1], n)
    unit, kind = UNIT[layout.bits]
    _codes[grid](
        weight.view(kind),
        layout.scales,
        layout.zeros,
        vectors,
        out,
        n,
        K=k,
        G=layout.scales.shape[-1],
        GROUP=layout.group,
        BITS=layout.bits,
        UNIT=unit,
        KIND=_taken(layout),
        BLOCK_N=ROWS,
        BLOCK_M=min(UNITS, triton.next_power_of_2(k // unit)),
        num_warps=WARPS,
    )
    return out.view(*x.shape[:-1], n)


UNIT: dict[int, tuple[int, Any]] = {
    2: (8, torch.int16),
    3: (8, torch.uint8),
    4: (8, torch.int32),
    5: (8, torch.uint8),
    6: (4, torch.uint8),
    7: (8, torch.uint8),
    8: (4, torch.int32),
}
"""By bits: the codes of a unit, and what units are read as; bytes where no integer is as wide."""


def _taken(layout: Layout) -> int:
    if layout.zeros is None:
        return SYMMETRIC
    return SHIFTED if layout.planes == SHIFTS else ZEROS
