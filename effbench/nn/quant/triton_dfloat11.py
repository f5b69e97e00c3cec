"""Decoding of DFloat11 weights on a CUDA device, in Triton, in the paper's two phases.

A program has a block of chunks, a lane of it one chunk, whose gap says where its first code begins
(`huffman`). First the lanes count the symbols that start in their chunks: the sums of the counts,
from the block's position on, say where each lane writes. Then they decode again, a few symbols at a
time, which are joined with their signs and mantissas and lie so that neighbouring threads write
neighbouring numbers. No program waits for another.

Nothing is read or written beyond what is handed over, whatever codes, gaps, positions and tables
say: each block reports what no encoder wrote, and the output is then undefined.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

from effbench.nn.quant import huffman
from effbench.nn.quant.huffman import Stream

WARPS = 16
"""Of a program: a thread has a lane."""
_BLOCK = tl.constexpr(huffman.BLOCK)
_CHUNK = tl.constexpr(huffman.CHUNK)
_GAP = tl.constexpr(huffman.GAP)
_GAPS = tl.constexpr(2**huffman.GAP)
_LONGEST = tl.constexpr(huffman.LONGEST)
_POINTER = tl.constexpr(huffman.POINTER)
_ROUND = tl.constexpr(8)
"""Symbols of a lane between two looks at whether all lanes have finished: those of 64 bits."""


@triton.jit
def _gaps(gaps, chunks, mask):
    bit = chunks.to(tl.int64) * _GAP
    shift = (bit % 8).to(tl.int32)
    low = tl.load(gaps + bit // 8, mask=mask, other=0).to(tl.int32)
    high = tl.load(gaps + bit // 8 + 1, mask=mask & (shift + _GAP > 8), other=0).to(tl.int32)
    return ((high << 8 | low) >> shift) % _GAPS


@triton.jit
def _word(codes, chunks, number: tl.constexpr, mask):
    """Return 32 bits of some chunks, or of what follows them, the first bit as the highest."""
    word = tl.load(codes + chunks.to(tl.int64) * 2 + number, mask=mask, other=0)
    word = word.to(tl.uint32, bitcast=True)
    turned = word >> 24 | (word >> 8 & 0xFF00) | (word << 8 & 0xFF0000) | word << 24
    return turned.to(tl.uint64)


@triton.jit
def _symbols(tables, count, early, late, place, inside):
    """Return the symbols at some places of chunks, and the bits of their codes; 0 for no code.

    Args:
        tables: The decode tables, the lengths behind them.
        count: Of the tables, the lengths left out.
        early: The 64 bits of each chunk.
        late: Those from its bit 32 on.
        place: From which of its bits on to look, 0 to 63.
        inside: Which lanes look at all.
    """
    from_there = tl.where(place < 32, early, late) << (place & 31).to(tl.uint64)
    bits = (from_there >> 32).to(tl.uint32)
    entry = tl.load(tables + (bits >> 24), mask=inside, other=0).to(tl.int32)
    for level in tl.static_range(3):
        goes_on = inside & (entry >= _POINTER)
        own = tables + tl.minimum(256 - entry, count - 1) * 256
        below = tl.load(own + (bits >> (16 - 8 * level) & 255), mask=goes_on, other=0)
        entry = tl.where(goes_on, below.to(tl.int32), entry)
    known = inside & (entry < _POINTER)
    size = tl.load(tables + count * 256 + entry, mask=known, other=0).to(tl.int32)
    return entry, tl.where(size > _LONGEST, 0, size)


@triton.jit(do_not_specialize=["count", "chunks", "total"])
def _decode(codes, gaps, positions, tables, count, rest, out, damaged, chunks, total):
    """Write the bfloat16 numbers of a block of chunks, and whether something is wrong with it.

    See `huffman.Stream`: the codes are read as words of 32 bits, `chunks` is C, `total` is N and
    `count` the number of tables. `rest` [N] and `out` [N] int16 have signs and mantissas, and bits.
    """
    block, blocks = tl.program_id(0), tl.num_programs(0)
    lanes = block * _BLOCK + tl.arange(0, _BLOCK)
    there = lanes < chunks
    middle = _word(codes, lanes, 1, there)
    early = _word(codes, lanes, 0, there) << 32 | middle
    late = middle << 32 | _word(codes, lanes, 2, there)
    gap = tl.where(there, _gaps(gaps, lanes, there), _CHUNK)

    place, counts = gap, tl.zeros((_BLOCK,), dtype=tl.int32)
    astray = tl.zeros((_BLOCK,), dtype=tl.int32)
    while tl.min(place, axis=0) < _CHUNK:
        for _ in tl.static_range(_ROUND):
            inside = place < _CHUNK
            _entry, size = _symbols(tables, count, early, late, place, inside)
            astray |= (inside & (size == 0)).to(tl.int32)
            counts += inside.to(tl.int32)
            place = tl.where(inside & (size == 0), _CHUNK, place + size)

    start, end = tl.load(positions + block), tl.load(positions + block + 1)
    well = (start >= 0) & (start <= end) & (end <= total) & (tl.max(astray, axis=0) == 0)
    found, last = tl.sum(counts, axis=0), block == blocks - 1
    # What fills the last chunk may read as symbols too.
    well &= (found == end - start) | (last & (found > end - start))
    well &= ((block > 0) | (start == 0)) & (~last | (end == total))
    tl.store(damaged + block, tl.where(well, 0, 1).to(tl.uint8))

    end = tl.where(well, end, start)
    at, place = start + tl.cumsum(counts, axis=0) - counts, gap
    order = tl.arange(0, _ROUND)
    while tl.min(place, axis=0) < _CHUNK:
        several = tl.zeros((_BLOCK,), dtype=tl.int64)
        many = tl.zeros((_BLOCK,), dtype=tl.int32)
        for i in tl.static_range(_ROUND):
            inside = place < _CHUNK
            entry, size = _symbols(tables, count, early, late, place, inside)
            several |= entry.to(tl.int64) << (8 * i)
            many += inside.to(tl.int32)
            place = tl.where(inside & (size == 0), _CHUNK, place + size)
        own = at[:, None] + order[None, :]
        mask = (order[None, :] < many[:, None]) & (own < end)
        exponent = (several[:, None] >> (8 * order)[None, :]).to(tl.int32) & 255
        kept = tl.load(rest + own, mask=mask, other=0).to(tl.int32)
        bits = (kept & 0x80) << 8 | exponent << 7 | kept & 0x7F
        tl.store(out + own, bits.to(tl.int16), mask=mask)
        at += many


def decodes(stream: Stream, rest: torch.Tensor) -> bool:
    """Whether the kernel decodes arrays that lie so; `Stream.fits` says that they belong together.

    Args:
        stream: The exponents of weights.
        rest: [N] uint8, their signs and mantissas.
    """
    whole = all(tensor.is_contiguous() for tensor in (*stream, rest))
    return whole and stream.codes.data_ptr() % 4 == 0


def decode(stream: Stream, rest: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Decode weights into a buffer, and wait for nothing.

    Args:
        stream: Their exponents; see `decodes`.
        rest: Their signs and mantissas.
        out: [N] bfloat16, contiguous.

    Returns:
        [blocks] uint8, not 0 where no encoder wrote a block.
    """
    codes, gaps, positions, tables = stream
    blocks = len(positions) - 1
    damaged = positions.new_empty(blocks, dtype=torch.uint8)
    if blocks:
        _decode[(blocks,)](
            codes.view(torch.int32),
            gaps,
            positions,
            tables,
            len(tables) - 1,
            rest,
            out.view(torch.int16),
            damaged,
            stream.chunks,
            len(rest),
            num_warps=WARPS,
        )
    return damaged
