"""Canonical Huffman codes of bytes, in a stream that many can decode at once.

The layout is that of DFloat11 (Zhang et al., NeurIPS 2025, arXiv 2504.11651; code
LeanModels/DFloat11): codes stand one after the other, the highest bit first. The stream is cut into
chunks of 8 bytes and blocks of 512 chunks. A chunk's gap says at which of its bits the first code
begins that starts in it, a block's position which symbol that is. Tables of 256 entries, one for
each prefix of whole bytes, give for the next byte the symbol whose code ends in it, or, from
`POINTER` on, 256 minus the number of the table that goes on; symbols are below `POINTER` for that.

Our choices: codes are canonical, so that they follow from their lengths; no symbol stands for the
end, as the positions say how many there are; zeros fill the last chunk.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from effbench.nn.quant import packing
from effbench.util.errors import UserError

CHUNK = 64
"""Bits of a chunk."""
BLOCK = 512
"""Chunks of a block."""
GAP = 5
"""Bits of a gap: a code is shorter than half a chunk, or just as long."""
LONGEST = 32
"""Bits of the longest code."""
POINTER = 240
"""Table entries from here on point to another table."""
PADDING = 12
"""Bytes after the last chunk, so that nobody reads beyond the end."""
PIECE = 2**18
"""Symbols that are encoded at a time."""

DAMAGED = (
    "The Huffman codes of some weights are damaged.",
    "Compress the model again: the same command with --fresh.",
)
"""Message and hint of what no encoder wrote."""


class Stream(NamedTuple):
    """Encoded symbols."""

    codes: torch.Tensor
    """[8 C + 12] uint8, C chunks."""
    gaps: torch.Tensor
    """[⌈5 C / 8⌉] uint8, 5 bits each (`packing`)."""
    positions: torch.Tensor
    """[⌈C / 512⌉ + 1] int32: the first symbol of each block, and the number of symbols."""
    tables: torch.Tensor
    """[tables + 1, 256] uint8; the last row has the length of each symbol's code."""

    @property
    def chunks(self) -> int:
        """C."""
        return (len(self.codes) - PADDING) * 8 // CHUNK

    @property
    def fits(self) -> bool:
        """Whether the arrays have sizes that belong together, as what an encoder wrote does."""
        return (
            self.chunks >= 0
            and len(self.gaps) == packing.packed_bytes(self.chunks, GAP)
            and len(self.positions) - 1 == -(self.chunks // -BLOCK)
            and len(self.tables) > 1
        )


def code_lengths(counts: Sequence[int]) -> list[int]:
    """Return the bits of each symbol's code, 0 for symbols that do not occur.

    Where codes are longer than `LONGEST`, or need more tables than pointers can name, counts below
    a share 2^-k of the sum are raised to it, with the largest k that helps. A symbol that is alone
    has a code of one bit.
    """
    lengths = _huffman(counts)
    for k in range(LONGEST, -1, -1):
        if max(lengths) <= LONGEST and len(_prefixes(lengths)) <= 256 - POINTER:
            break
        floor = max(1, sum(counts) >> k)
        lengths = _huffman([max(count, floor) if count else 0 for count in counts])
    return lengths


def _huffman(counts: Sequence[int]) -> list[int]:
    """Return code lengths of least sum; of equal counts the lower symbols are joined first."""
    lengths = [0] * len(counts)
    heap = [(count, symbol, [symbol]) for symbol, count in enumerate(counts) if count]
    if len(heap) == 1:
        lengths[heap[0][1]] = 1
    heapq.heapify(heap)
    while len(heap) > 1:
        (one, order, under), (other, _, rest) = heapq.heappop(heap), heapq.heappop(heap)
        under = under + rest
        for symbol in under:
            lengths[symbol] += 1
        heapq.heappush(heap, (one + other, order, under))
    return lengths


def canonical_codes(lengths: Sequence[int]) -> list[int]:
    """Return the codes: counted upwards, from short to long and from low symbols to high ones."""
    codes, code, before = [0] * len(lengths), 0, 0
    for length, symbol in sorted((n, s) for s, n in enumerate(lengths) if n):
        code <<= length - before
        codes[symbol], before = code, length
        code += 1
    return codes


def _prefixes(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return the prefixes of whole bytes that codes go beyond, (bits, prefix), shortest first."""
    codes = canonical_codes(lengths)
    pairs = list(zip(codes, lengths, strict=True))
    found = {(n, code >> (size - n)) for n in (8, 16, 24) for code, size in pairs if size > n}
    return sorted(found)


def decode_tables(lengths: Sequence[int]) -> torch.Tensor:
    """Return the tables and, as the last row, the lengths; [tables + 1, 256] uint8."""
    numbers = {prefix: i for i, prefix in enumerate([(0, 0), *_prefixes(lengths)])}
    tables = torch.zeros(len(numbers) + 1, 256, dtype=torch.uint8)
    for (bits, prefix), number in numbers.items():
        if bits:
            above = numbers[bits - 8, prefix >> 8]
            tables[above, prefix & 255] = 256 - number
    for symbol, (code, size) in enumerate(zip(canonical_codes(lengths), lengths, strict=True)):
        if size:
            bits = (size - 1) // 8 * 8
            free = bits + 8 - size  # bits of the last byte that do not belong to the code
            first = (code << free) & 255
            tables[numbers[bits, code >> (size - bits)], first : first + (1 << free)] = symbol
    tables[-1] = torch.tensor(lengths)
    return tables


def encode(symbols: torch.Tensor) -> Stream:
    """Return symbols [N] uint8, all below `POINTER`, as a stream."""
    device = symbols.device
    counts = torch.bincount(symbols, minlength=256).tolist()
    lengths = code_lengths(counts)
    bits = sum(count * length for count, length in zip(counts, lengths, strict=True))
    chunks = -(bits // -CHUNK)
    words = torch.zeros(2 * chunks + PADDING // 4, dtype=torch.int64, device=device)
    firsts = torch.full((chunks,), len(symbols), dtype=torch.int32, device=device)
    # A last chunk in which no code starts has the end of the one before as its gap.
    gaps = torch.full((chunks,), bits - CHUNK * (chunks - 1), dtype=torch.uint8, device=device)
    codes = torch.tensor(canonical_codes(lengths), device=device)
    last = -1
    for piece, first, sizes, starts in _pieces(symbols, torch.tensor(lengths, device=device)):
        _write(words, codes[piece], sizes, starts)
        chunk = starts // CHUNK
        fresh = (chunk != torch.cat([chunk.new_tensor([last]), chunk[:-1]])).nonzero()[:, 0]
        firsts[chunk[fresh]] = (first + fresh).int()
        gaps[chunk[fresh]] = (starts[fresh] % CHUNK).to(torch.uint8)
        last = int(chunk[-1])
    stream = torch.stack([(words >> n & 255).to(torch.uint8) for n in (24, 16, 8, 0)], 1).flatten()
    positions = torch.cat([firsts[::BLOCK], firsts.new_tensor([len(symbols)])])
    return Stream(stream, packing.pack(gaps, GAP), positions, decode_tables(lengths).to(device))


def _pieces(
    symbols: torch.Tensor, lengths: torch.Tensor
) -> Iterator[tuple[torch.Tensor, int, torch.Tensor, torch.Tensor]]:
    """Yield symbols, the number of the first, the bits of their codes and where these start."""
    base = 0
    for first in range(0, len(symbols), PIECE):
        piece = symbols[first : first + PIECE].long()
        sizes = lengths[piece]
        ends = base + sizes.cumsum(0)
        yield piece, first, sizes, ends - sizes
        base = int(ends[-1])


def _write(
    words: torch.Tensor, codes: torch.Tensor, sizes: torch.Tensor, starts: torch.Tensor
) -> None:
    """Put codes of some bits into words of 32; a code lies in one word, or in two."""
    word, place = starts // 32, starts % 32
    both = codes << (64 - place - sizes)
    words.index_add_(0, word, both >> 32 & 0xFFFFFFFF)
    words.index_add_(0, word + 1, both & 0xFFFFFFFF)


def decode(stream: Stream, first: int = 0, last: int | None = None) -> torch.Tensor:
    """Return the symbols of blocks from `first` to before `last`, [n] uint8, all chunks in step.

    Raises:
        UserError: When no encoder wrote the stream. Nothing beyond its end is read.
    """
    if not stream.fits:
        raise UserError(*DAMAGED)
    chunks, blocks = stream.chunks, len(stream.positions) - 1
    last = blocks if last is None else last
    numbers = torch.arange(first * BLOCK, min(last * BLOCK, chunks), device=stream.codes.device)
    found, valid = _in_step(stream, numbers, chunks)
    stated = stream.positions[first : last + 1].long().diff()
    counts = torch.zeros_like(stated).index_add_(0, numbers // BLOCK - first, valid.sum(1))
    if last == blocks:  # what fills the last chunk may read as symbols too
        counts[-1:] = torch.minimum(counts[-1:], stated[-1:])
    if not counts.equal(stated):
        raise UserError(*DAMAGED)
    return found[valid][: int(stated.sum())]


def _in_step(
    stream: Stream, numbers: torch.Tensor, chunks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the symbols that start in some of the chunks, [C, S], and which of them there are."""
    tables, lengths = stream.tables[:-1].flatten(), stream.tables[-1].long()
    end = (numbers + 1) * CHUNK
    place = numbers * CHUNK + packing.unpack(stream.gaps, GAP, chunks)[numbers]
    found, valid = [], []
    while bool((inside := place < end).any()):
        symbol = _look_up(tables, _peek(stream.codes, torch.minimum(place, end)))
        size = lengths[symbol]
        if bool((inside & (size == 0)).any()):
            raise UserError(*DAMAGED)
        place = place + size * inside
        found.append(symbol.to(torch.uint8))
        valid.append(inside)
    if not found:
        return numbers.new_zeros(len(numbers), 0), numbers.new_zeros(len(numbers), 0).bool()
    return torch.stack(found, 1), torch.stack(valid, 1)


def _peek(codes: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Return the 32 bits from each place on, int64."""
    byte, bits = place // 8, codes.new_zeros(len(place), dtype=torch.int64)
    for i in range(5):
        bits = bits << 8 | codes[byte + i].long()
    return bits >> (8 - place % 8) & 0xFFFFFFFF


def _look_up(tables: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Return the symbol that 32 bits begin with, int64; a pointer where they begin with none."""
    entry = tables[bits >> 24].long()
    for shift in (16, 8, 0):
        goes_on = entry >= POINTER
        if not bool(goes_on.any()):
            break
        table = (256 - entry).clamp(max=len(tables) // 256 - 1)
        entry = torch.where(goes_on, tables[table * 256 + (bits >> shift & 255)].long(), entry)
    return entry
