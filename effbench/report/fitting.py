"""The cells of a table in lines, so that its rows fit a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import zip_longest

GUTTER = "  "
"""Between columns."""
LEAST = 10
"""Characters from which on a column of texts is not made narrower."""
INTERVAL = " ["
"""Between a number and its interval."""

Line = tuple[str, ...]
Grid = Sequence[Sequence[str]]


def lines_within(grid: Grid, texts: Sequence[bool], width: int) -> tuple[list[Line], int]:
    """Return the lines of a table, and how many of them are those of its heads.

    Texts go on below themselves where a row is too long, the longest first. Where that is not
    enough, intervals stand below their numbers, those of the widest column first.

    Args:
        grid: Rows of cells, the heads first.
        texts: Which columns hold texts.
        width: Characters of a line.
    """
    below: set[int] = set()
    while True:
        cells = [[_parts(cell, i in below) for i, cell in enumerate(row)] for row in grid]
        columns = [
            [part for cell in column for part in cell] for column in zip(*cells, strict=True)
        ]
        sizes, fits = _narrowed(columns, texts, width)
        numbers = [i for i, text in enumerate(texts) if not text and i not in below]
        wide = [i for i in numbers if any(INTERVAL in part for part in columns[i])]
        if fits or not wide:
            break
        below.add(max(wide, key=lambda i: sizes[i]))
    rows = [[_filled(*cell) for cell in zip(row, sizes, texts, strict=True)] for row in cells]
    return [line for row in rows for line in zip_longest(*row, fillvalue="")], max(
        map(len, rows[0])
    )


def _narrowed(columns: Grid, texts: Sequence[bool], width: int) -> tuple[list[int], bool]:
    """Return the widths of columns, those of texts as narrow as they must be, and if rows fit."""
    sizes = [max(map(len, column)) for column in columns]
    words = [max((len(w) for x in column for w in x.split()), default=0) for column in columns]
    least = [max(LEAST, w) if t else s for s, w, t in zip(sizes, words, texts, strict=True)]
    room = width - len(GUTTER) * (len(sizes) - 1)
    while sum(sizes) > room:
        wide = [i for i, (size, floor) in enumerate(zip(sizes, least, strict=True)) if size > floor]
        if not wide:
            return sizes, False
        sizes[max(wide, key=lambda i: sizes[i])] -= 1
    return sizes, True


def _parts(cell: str, below: bool) -> list[str]:
    number, mark, interval = cell.partition(INTERVAL)
    return [number, f"[{interval}"] if below and mark else [cell]


def _filled(parts: list[str], size: int, text: bool) -> list[str]:
    """Return the lines of a cell, those of a text as long as its column is wide."""
    if not text or len(parts[0]) <= size:
        return parts
    [line] = parts
    return textwrap.wrap(line, size, break_long_words=False, break_on_hyphens=False)
