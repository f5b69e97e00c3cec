"""What tests say in words, over the rows of a table: Holm's correction, findings, letters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from effbench.stats.base import ALPHA
from effbench.stats.paired import Difference


def holm(pvalues: Sequence[float]) -> list[float]:
    """Return the p-values adjusted for being one of several (Holm, 1979), in the order given."""
    adjusted = [0.0] * len(pvalues)
    running = 0.0
    for rank, index in enumerate(sorted(range(len(pvalues)), key=pvalues.__getitem__)):
        running = max(running, min(1.0, (len(pvalues) - rank) * pvalues[index]))
        adjusted[index] = running
    return adjusted


def letters(values: Sequence[float], differ: Mapping[tuple[int, int], bool]) -> list[str]:
    """Return letters for rows so that two rows share one exactly when they do not differ.

    Insert and absorb (Piepho, 2004). The smallest value gets the first letter.

    Args:
        values: One per row; they order the letters.
        differ: Whether the rows of a pair (i, j), i < j, differ; pairs left out do not.
    """
    columns = [set(range(len(values)))]
    for (i, j), different in differ.items():
        if not different:
            continue
        split = [part for c in columns if {i, j} <= c for part in (c - {i}, c - {j})]
        columns = _absorbed([c for c in columns if not {i, j} <= c] + split)
    columns.sort(key=lambda c: sorted(values[i] for i in c))
    names = [_letter(number) for number in range(len(columns))]
    return [
        "".join(name for name, column in zip(names, columns, strict=True) if i in column)
        for i in range(len(values))
    ]


def _absorbed(columns: Sequence[set[int]]) -> list[set[int]]:
    """Return the columns that are part of no other one, each once."""
    kept: list[set[int]] = []
    for column in sorted(columns, key=len, reverse=True):
        if not any(column <= other for other in kept):
            kept.append(column)
    return kept


def _letter(number: int) -> str:
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    return alphabet[number] if number < 26 else f"({number + 1})"


TOO_LITTLE = "too little to compare"
"""Finding of a difference that has no interval: of one item, or of items that are one group."""


def finding(difference: Difference, p: float | None = None) -> str:
    """Return `lower`, `higher` or `cannot be told apart` for a difference a - b.

    A direction is named only when the p-value is at most `ALPHA` and the interval lacks zero; an
    interval without bounds is `TOO_LITTLE`.

    Args:
        difference: Of a and b.
        p: p-value adjusted for the other rows of the table; the difference's own when None.
    """
    p = difference.p if p is None else p
    if not math.isfinite(difference.value):
        return "cannot be compared"
    if math.isinf(difference.high - difference.low):
        return TOO_LITTLE
    if p > ALPHA or difference.low <= 0 <= difference.high:
        return "cannot be told apart"
    return "lower" if difference.value < 0 else "higher"


def verdict(a: str, b: str, difference: Difference, unit: str = "", p: float | None = None) -> str:
    """Return in one sentence what a difference a - b shows.

    Args:
        a: Name of the first run.
        b: Name of the second run.
        difference: Of a and b.
        unit: Of the difference.
        p: As for `finding`.
    """
    found = finding(difference, p)
    low, high, tail = difference.low, difference.high, f" {unit}" if unit else ""
    if found == "cannot be compared":
        return f"{a} and {b} {found}: an outcome is not a finite number"
    if found == TOO_LITTLE:
        few = "one item" if difference.n == 1 else f"{difference.n} items in one group"
        return f"{a} and {b}: {few}, {found}"
    if found == "cannot be told apart":
        return f"{a} and {b} {found}: the difference is in {span(low, high)}{tail}"
    if found == "lower":
        low, high = -high, -low
    return f"{a} is {found} than {b} by {abs(difference.value):.3g} {span(low, high)}{tail}"


def equivalent(difference: Difference, p: float | None = None, p_worse: float | None = None) -> str:
    """Return `equivalent`, `not worse` or `not shown` for a difference at its margin.

    Args:
        difference: With its `equivalence`.
        p: p-value of the equivalence, adjusted; its own when None.
        p_worse: p-value of being worse by the margin, adjusted; its own when None.
    """
    same = difference.equivalence
    if same is None:
        return ""
    p, p_worse = same.p if p is None else p, same.p_worse if p_worse is None else p_worse
    if p <= ALPHA:
        return "equivalent"
    return "not worse" if p_worse is not None and p_worse <= ALPHA else "not shown"


def span(low: float, high: float) -> str:
    """Return two bounds as people read them."""
    return f"[{low:.3g}, {high:.3g}]"
