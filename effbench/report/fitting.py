"""The cells of a table in lines, so that its rows fit a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

GUTTER = "  "
"""Between columns."""
LEAST = 10
"""Characters from which on a column of texts is not made narrower."""
INTERVAL = " ["
"""Between a number and its interval."""

Grid = Sequence[Sequence[str]]


def lines_within(grid: Grid, texts: Sequence[bool], width: int) -> list[list[list[str]]]:
    """Return the lines of each cell.

    Texts go on below themselves where a row is too long, the longest first. Where that is not
    enough, intervals stand below their numbers, those of the widest column first.

    Args:
        grid: Rows of cells, the heads first.
        texts: Which columns hold texts.
        width: Characters of a row; 0 for any number.
    """
    if not width:
        return [[[cell] for cell in row] for row in grid]
    below: set[int] = set()
    while True:
        cells = [[_lines(cell, i in below) for i, cell in enumerate(row)] for row in grid]
        columns = [
            [line for cell in column for line in cell] for column in zip(*cells, strict=True)
        ]
        sizes, fits = _narrowed(columns, texts, width)
        numbers = [i for i, text in enumerate(texts) if not text and i not in below]
        wide = [i for i in numbers if any(INTERVAL in line for line in columns[i])]
        if fits or not wide:
            return [
                [_filled(*cell) for cell in zip(row, sizes, texts, strict=True)] for row in cells
            ]
        below.add(max(wide, key=lambda i: sizes[i]))


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


def _lines(cell: str, below: bool) -> list[str]:
    number, mark, interval = cell.partition(INTERVAL)
    return [number, f"[{interval}"] if below and mark else [cell]


def _filled(lines: list[str], size: int, text: bool) -> list[str]:
    """Return the lines of a cell, those of a text as long as its column is wide."""
    if not text or len(lines[0]) <= size:
        return lines
    [line] = lines
    return textwrap.wrap(line, size, break_long_words=False, break_on_hyphens=False)
