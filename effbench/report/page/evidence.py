"""What a report says of runs held against one of them: sentences, and differences to be drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from effbench.report.comparison.compare import compare
from effbench.report.comparison.metric_table import MetricTable, Row
from effbench.report.comparison.sentences import APART
from effbench.report.labels import better
from effbench.results.records import Record
from effbench.util.errors import UserError

FEW = 8
"""Rows of a metric up to which no sentence counts them."""


@dataclass(frozen=True)
class Evidence:
    """The tests of a report."""

    words: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    forest: list[dict[str, Any]] = field(default_factory=list)
    flips: list[tuple[str, str]] = field(default_factory=list)
    """Lines on items that change sides, with what stands below each."""
    """A metric each: its title, and the paired differences with their intervals."""


def evidence(
    records: Sequence[Record],
    against: Record,
    known: Sequence[Record],
    tunings: Sequence[Collection[str]] = (),
    runs: int = 0,
) -> Evidence:
    """Hold runs against one of them, with the tests of `effbench compare`.

    Args:
        records: The runs, with their outcomes; those that share no items with the reference are
            left out, and a note says how many.
        against: The reference.
        known: Of all finished runs those that `compare` must know of.
        tunings: Keys of the runs of each grid that was declared to tune.
        runs: How many there are on the page, where some that share no items are not in `records`.
    """
    others = [r for r in records if r.key != against.key]
    near = [r for r in others if _items(r) & _items(against)]
    notes = []
    if far := max(runs - 1, len(others)) - len(near):
        notes.append(f"Not held against it, as no items are the same: {far} run{'s'[: far - 1]}.")
    try:
        found = compare([against, *near], known, tunings=tunings, all_pairs=False)
    except UserError as error:  # one run at one point
        return Evidence([], [*notes, error.message], [])
    forest = [_forest(table) for table in found.metrics if any(r.difference for r in table.rows)]
    counts = [line for table in found.metrics if (line := _counted(table))]
    return Evidence([*counts, *found.words], [*notes, *found.notes], forest)


def _items(record: Record) -> set[tuple[str, ...]]:
    """Return the items that a run saw, by what they are of."""
    return {(o.evaluator, o.metric, o.task, o.split, o.ids) for o in record.outcomes}


def _counted(table: MetricTable) -> str:
    """Return how many rows differ and how, where they are too many to be read one by one."""
    said = Counter(row.finding for row in table.rows if row.difference)
    if said.total() <= FEW:
        return ""
    good = better(table.kind.metric)
    counts = [f"{said[way]} {way}{' (better)' * (way == good)}" for way in ("lower", "higher")]
    head = f"{table.kind}, {said.total()} rows against {table.against}"
    return f"{head}: {', '.join(counts)}, {said[APART]} {APART}."


def _forest(table: MetricTable) -> dict[str, Any]:
    """Return the differences of a metric for drawing, in the order of the table."""
    return {
        "title": table.title,
        "unit": table.rows[0].value.unit,
        "better": better(table.kind.metric),
        "against": table.against,
        "rows": [_drawn(row) for row in table.rows if row.difference],
    }


def _drawn(row: Row) -> list[Any]:
    """Return name, difference, both ends of its interval, p-value, finding and keys of a row."""
    d = row.difference
    assert d is not None
    numbers = [float(f"{v:.5g}") for v in (d.value, d.low, d.high, row.p_adjusted or 0.0)]
    return [row.name, *numbers, row.finding, row.key]
