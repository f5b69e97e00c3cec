"""Plots of records, written as PNG, PDF or SVG by the name of the file."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from effbench.report.labels import better
from effbench.report.plots.canvas import (
    COLOURS,
    Look,
    Size,
    canvas,
    footnote,
    headline,
    named,
    save,
)
from effbench.report.plots.rows import Mark, rows_of
from effbench.report.table import scale
from effbench.util.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from effbench.report.comparison.metric_table import Kind, MetricTable, Row
    from effbench.report.comparison.result import Comparison
    from effbench.report.table import Value


MODELLED = ("modelled, not measured",)
ALONE = ("95 % intervals of each value alone, not of differences",)
APART = 0.03
"""Between the bars of levels, as a share of the axis."""
CROWD = 4
"""Most lines or levels that have bars; more of them would hide each other."""


def comparison_plot(found: Comparison, metric: str, path: Path, size: Size = "screen") -> Path:
    """Plot a metric over the operating points of what was compared; runs without any are levels.

    Several seeds are one line, through their means. Bars and bands are 95 % intervals. Points whose
    names hold a number (`r1`, `r2`, `r4`) are put at that number, on a logarithmic axis when they
    span a factor of four or more. Where nothing has two points, or their names have no
    order, there is no line to draw: the rows are a list.

    Args:
        found: The comparison.
        metric: Name of the metric; of several tables that have it, that of the test split is drawn,
            else the first.
        path: File to write.
        size: Of the picture.

    Raises:
        UserError: When no run has the metric.
    """
    table = drawn_table(found, metric)
    kind = table.kind
    names = list(dict.fromkeys(row.label for row in table.rows))
    series = [[r for r in table.rows if r.label == name] for name in names]
    factor, unit = _factor([r.value.value for rows in series for r in rows], series[0][0])
    modelled = kind.obtained == "modelled"
    points = [{r.point for r in rows if r.point} for rows in series]
    lines = any(len(own) > 1 for own in points) and bool(_axis(set[str]().union(*points))[0])
    if lines:
        drawn = [[_Place(r.point, *_over(r.value, factor)) for r in rows] for rows in series]
        figure = _drawn(names, drawn, modelled, size)
    else:
        figure = _listed(table.rows, factor, modelled, size)
    axes = figure.axes[0]
    headline(axes, titled(kind), size)
    name = f"{words(metric)} ({unit})" if unit else words(metric)
    (axes.set_ylabel if lines else axes.set_xlabel)(name)
    return save(figure, path, size)


def titled(kind: Kind, held: str = "") -> str:
    """Return the title of a plot of a metric.

    Args:
        kind: Of its table.
        held: Against what it is held, after what it was measured on.
    """
    direction = better(kind.metric)
    task = f" of {kind.task}" if kind.task else ""
    where = f" on {kind.split}" if kind.split else ""
    good = f", {direction} is better" if direction else ""
    title = f"{words(kind.metric)}{task}{where}{held}{good}"
    return title[0].upper() + title[1:]


def drawn_table(found: Comparison, metric: str, tested: bool = False) -> MetricTable:
    """Return the table of a metric that is drawn: that of the test split, else the first.

    Args:
        found: The comparison.
        metric: Name of the metric.
        tested: Whether it has to have paired tests.

    Raises:
        UserError: When no run has the metric, or none a test of it.
    """
    fits = [table for table in found.metrics if table.tested or not tested]
    tables = [table for table in fits if table.kind.metric == metric]
    if not tables:
        hint = did_you_mean(metric, {table.kind.metric for table in fits})
        what = "paired test of a metric" if tested else "metric"
        raise UserError(f"No run has a {what} called {metric!r}.", hint)
    return min(tables, key=lambda t: not t.kind.task and t.kind.split != "test")


class _Place(NamedTuple):
    """A value at an operating point, in the unit of the axis."""

    point: str
    value: float
    low: float | None
    high: float | None


def _listed(rows: Sequence[Row], factor: float, modelled: bool, size: Size) -> Any:
    """Return a figure with a line for each row: its value, its interval and its number."""
    marks = []
    for row in rows:
        value, low, high = _over(row.value, factor)
        bounds = (low, high) if _bounded(_Place("", value, low, high)) else (None, None)
        number = str(row.value._replace(unit="")) if factor == 1 else str(row.value)
        marks.append(Mark(row.label, row.point, value, *bounds, number, COLOURS[0]))
    figure, _ = rows_of(marks, size)
    said = ALONE if any(mark.low is not None for mark in marks) else ()
    footnote(figure, [*MODELLED * modelled, *said], size)
    return figure


def _drawn(names: Sequence[str], series: list[list[_Place]], modelled: bool, size: Size) -> Any:
    """Return a figure with a line or a level for each name."""
    positions, axis_name, log = _axis([m.point for values in series for m in values if m.point])
    bars = len(series) <= CROWD
    places = _places(sum(not any(m.point for m in values) for values in series), bars)
    beside = sum(place is not None for place in places)
    figure, axes = canvas(size, names=names)
    marks = []
    for number, (name, values) in enumerate(zip(names, series, strict=True)):
        look = Look.of(number, name, size)
        shown = values if bars else [m._replace(low=None, high=None) for m in values]
        pointed = sorted((m for m in shown if m.point), key=lambda m: positions[m.point])
        if pointed:
            _line(axes, [positions[m.point] for m in pointed], pointed, look)
        else:
            _level(axes, values[0], places.pop(), look)
        marks.append(((pointed or shown)[-1].value, name, look.colour))
    _finish_x(axes, positions, axis_name, log, beside)
    named(axes, marks, size)
    barred = (values for values in series if bars or not any(m.point for m in values))
    said = ALONE if any(_bounded(m) for values in barred for m in values) else ()
    footnote(figure, [*MODELLED * modelled, *said], size)
    return figure


# -- what is drawn -----------------------------------------------------------------------------


def _factor(values: Sequence[float], first: Row) -> tuple[float, str]:
    """Return what makes values easy to read when they are divided by it, and the unit then."""
    most = max((abs(v) for v in values if math.isfinite(v)), default=0.0)
    unit = first.value.unit
    factor, prefix = scale(most, unit)
    if unit.startswith("bytes"):
        return factor, prefix
    return factor, f"10^{round(math.log10(factor))} {unit}".rstrip() if prefix else unit


def _over(value: Value, factor: float) -> tuple[float, float | None, float | None]:
    """Return a value and its bounds, divided."""
    low, high = (None if bound is None else bound / factor for bound in value[2:])
    return value.value / factor, low, high


def _axis(names: Iterable[str]) -> tuple[dict[str, float], str, bool]:
    """Return where each point lies, what the axis is called, and whether it is logarithmic.

    Nowhere, when their names are more than one number in the same words.
    """
    unique = list(dict.fromkeys(names))
    parts = [re.fullmatch(r"(\D*)(\d+(?:\.\d+)?)(\D*)", name) for name in unique]
    matches = [m for m in parts if m]
    if len(matches) < len(unique) or len({(m[1], m[3]) for m in matches}) != 1:
        return {}, "", False
    positions = {name: float(m[2]) for name, m in zip(unique, matches, strict=True)}
    least, most = min(positions.values()), max(positions.values())
    log = least > 0 and most / least >= 4
    return positions, f"operating point{' (log scale)' if log else ''}", log


def _line(axes: Axes, xs: list[float], metrics: list[_Place], look: Look) -> None:
    axes.plot(
        xs,
        [m.value for m in metrics],
        color=look.colour,
        marker=look.marker,
        markersize=look.dot,
        linewidth=1.8,
        zorder=3,
        label=look.name,
    )
    for x, metric in zip(xs, metrics, strict=True):
        if _bounded(metric):
            _bar(axes, x, metric, look.colour)


def _places(levels: int, bars: bool) -> list[float | None]:
    """Return where across the axes each level has its bar; a single one among few gets a band."""
    if levels == 1 and bars:
        return [None]
    return [0.99 - APART * i for i in range(levels)]


def _level(axes: Axes, metric: _Place, place: float | None, look: Look) -> None:
    """Draw a run without points: a band, or a mark at `place` when bands would cover each other."""
    colour, level = look.colour, metric.value
    if place is None:
        axes.axhline(level, color=colour, linewidth=1.4, linestyle="--", zorder=1, label=look.name)
        if _bounded(metric):
            axes.axhspan(metric.low or 0, metric.high or 0, color=colour, alpha=0.12, linewidth=0)
        return
    axes.axhline(level, color=colour, linewidth=1.4, linestyle="--", zorder=1)
    across = axes.get_yaxis_transform()
    axes.plot(
        place,
        level,
        color=colour,
        marker=look.marker,
        markersize=look.dot,
        linestyle="--",
        transform=across,
        label=look.name,
    )
    if _bounded(metric):
        _bar(axes, place, metric, colour, transform=across)


def _bar(axes: Axes, x: float, metric: _Place, colour: str, **options: Any) -> None:
    low, high = metric.value - (metric.low or 0), (metric.high or 0) - metric.value
    axes.errorbar(
        x,
        metric.value,
        [[max(0, low)], [max(0, high)]],
        color=colour,
        capsize=3,
        linewidth=1.2,
        zorder=2,
        **options,
    )


def _bounded(metric: _Place) -> bool:
    return all(b is not None and math.isfinite(b) for b in (metric.low, metric.high))


SHORT = {"kl": "KL", "kv": "KV", "flops": "FLOPs", "co2": "CO2"}


def words(metric: str) -> str:
    """Return the name of a metric as it stands in a text."""
    return " ".join(SHORT.get(word, word) for word in metric.split("_"))


def _finish_x(axes: Axes, positions: dict[str, float], name: str, log: bool, beside: int) -> None:
    """Write the points below the axes, and make room at the right for the bars of levels."""
    if log:
        axes.set_xscale("log", base=2)
    axes.set_xticks(list(positions.values()), list(positions))
    axes.minorticks_off()
    axes.set_xlabel(name)
    if len(positions) == 1:
        (x,) = positions.values()
        axes.set_xlim(x / 2, x * 2) if log else axes.set_xlim(x - 1, x + 1)
    if beside:
        taken = APART * (beside + 1)
        low, high = axes.transScale.transform([(x, 1) for x in axes.get_xlim()])[:, 0]
        end = axes.transScale.inverted().transform((high + (high - low) * taken / (1 - taken), 0))
        axes.set_xlim(right=float(end[0]))
