"""Paired differences with their intervals, a line for each row: what a table of values hides."""

from __future__ import annotations

from pathlib import Path

from effbench.report.comparison.metric_table import MetricTable, Row
from effbench.report.comparison.result import Comparison
from effbench.report.labels import better
from effbench.report.plots.canvas import COLOURS, GREY, Size, footnote, headline, save
from effbench.report.plots.curves import drawn_table, titled, words
from effbench.report.plots.rows import Mark, rows_of
from effbench.report.table import Value

GOOD, BAD = COLOURS[2], COLOURS[1]


def forest_plot(found: Comparison, metric: str, path: Path, size: Size = "screen") -> Path:
    """Plot the differences of a metric from the row that others are held against.

    A mark is filled where the paired test found a difference after Holm, and coloured where it is
    known which direction is the good one. The numbers stand at the right.

    Args:
        found: The comparison.
        metric: Name of the metric, as in `comparison_plot`.
        path: File to write: PNG, PDF or SVG.
        size: Of the picture.

    Raises:
        UserError: When no run has the metric, or none has a paired test of it.
    """
    table = drawn_table(found, metric, tested=True)
    marks = [_mark(row, metric) for row in table.rows if row.difference]
    figure, axes = rows_of(marks, size)
    axes.axvline(0, color=GREY, linewidth=1, zorder=1)
    unit = table.rows[0].value.unit
    axes.set_xlabel(f"difference of {words(metric)}{f' ({unit})' if unit else ''}")
    headline(axes, _title(table), size)
    footnote(figure, ["95 % intervals", "filled: differs after Holm"], size)
    return save(figure, path, size)


def _title(table: MetricTable) -> str:
    return titled(table.kind, f" against {table.against}")


def _mark(row: Row, metric: str) -> Mark:
    """Return the interval of one row, and its difference."""
    d = row.difference
    assert d is not None
    differs = row.finding in ("lower", "higher")
    direction = better(metric)
    colour = GREY if not differs else COLOURS[0] if not direction else BAD
    colour = GOOD if differs and row.finding == direction else colour
    number = str(Value(d.value, "", d.low, d.high))
    return Mark(row.label, row.point, d.value, d.low, d.high, number, colour, differs)
