"""Paired differences with their intervals, a line for each row: what a table of values hides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from effbench.report.comparison.metric_table import MetricTable, Row
from effbench.report.comparison.result import Comparison
from effbench.report.labels import better
from effbench.report.plots.canvas import COLOURS, GREY, Size, canvas, footnote, headline, save
from effbench.report.plots.curves import drawn_table, words
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
    rows = [row for row in table.rows if row.difference]
    figure, axes = canvas(size, rows=len(rows))
    axes.grid(False)
    axes.grid(axis="x", color="#e5e5e5", linewidth=0.8)
    axes.axvline(0, color=GREY, linewidth=1)
    for place, row in enumerate(rows):
        _mark(axes, place, row, metric)
    _names(axes, rows)
    unit = table.rows[0].value.unit
    axes.set_xlabel(f"difference of {words(metric)}{f' ({unit})' if unit else ''}")
    headline(axes, _title(table), size)
    footnote(figure, ["95 % intervals", "filled: differs after Holm"])
    return save(figure, path, size)


def _title(table: MetricTable) -> str:
    where = f" on {table.kind.split}" if table.kind.split else ""
    direction = better(table.kind.metric)
    good = f", {direction} is better" if direction else ""
    return f"{words(table.kind.metric).capitalize()}{where} against {table.against}{good}"


def _mark(axes: Axes, place: int, row: Row, metric: str) -> None:
    """Draw the interval of one row, and its difference."""
    d = row.difference
    assert d is not None
    differs = row.finding in ("lower", "higher")
    direction = better(metric)
    colour = GREY if not differs else COLOURS[0] if not direction else BAD
    colour = GOOD if differs and row.finding == direction else colour
    axes.plot([d.low, d.high], [place, place], color=colour, linewidth=1.6)
    face = colour if differs else "white"
    axes.plot(d.value, place, marker="o", markersize=6, color=colour, markerfacecolor=face)


def _names(axes: Axes, rows: Sequence[Row]) -> None:
    """Write the names at the left and the numbers at the right, the first row on top."""
    places = range(len(rows))
    axes.set_yticks(places, [row.name for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    numbers = axes.secondary_yaxis("right")
    numbers.set_yticks(places, [_number(row) for row in rows])
    numbers.spines["right"].set_visible(False)
    for axis in (axes, numbers):
        axis.tick_params(axis="y", length=0)


def _number(row: Row) -> str:
    d = row.difference
    return str(Value(d.value, "", d.low, d.high)) if d else ""
