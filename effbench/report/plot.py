"""Plots of records and events, written as PNG, PDF or SVG by the name of the file."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effbench.errors import UserError, did_you_mean
from effbench.records import Metric, Record
from effbench.report.canvas import COLOURS, canvas, direct_labels, footnote, save
from effbench.report.labels import better, labels
from effbench.report.table import scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = "osD^vPX"
"""So that lines stay distinct without colour too."""


def points_plot(records: Sequence[Record], metric: str, path: Path, split: str = "") -> Path:
    """Plot a metric over the operating points of each run; runs without any are levels.

    Bars and bands are 95 % intervals. Points whose names hold a number (`r1`, `r2`, `r4`) are put
    at that number, on a logarithmic axis when they span a factor of four or more.

    Args:
        records: The runs.
        metric: Name of the metric.
        path: File to write.
        split: Which split; empty takes `test`, or else the first one found.

    Raises:
        UserError: When no run has the metric.
    """
    found = [(record, _values(record, metric, split)) for record in records]
    shown = [(record, values) for record, values in found if values]
    if not shown:
        known = {m.name for record in records for m in record.metrics}
        raise UserError(f"No run has a metric called {metric!r}.", did_you_mean(metric, known))
    names = labels([record for record, _ in shown])
    first = shown[0][1][0]
    series, unit = _scaled([values for _, values in shown], first.unit)
    positions, axis_name, log = _axis([m.point for values in series for m in values if m.point])
    places = _places(sum(not any(m.point for m in values) for values in series), bool(positions))
    figure, axes = canvas()
    axes.margins(x=0.1 if len(places) > 1 else 0.05)
    marks = []
    for number, (name, values) in enumerate(zip(names, series, strict=True)):
        colour = COLOURS[number % len(COLOURS)]
        pointed = sorted((m for m in values if m.point), key=lambda m: positions[m.point])
        if pointed:
            _line(axes, [positions[m.point] for m in pointed], pointed, colour, number)
        else:
            _level(axes, values[0], colour, places.pop())
        marks.append(((pointed or values)[-1].value, name, colour))
    _finish_x(axes, positions, axis_name, log)
    where = f" on {first.split}" if first.split else ""
    direction = f", {better(metric)} is better" if better(metric) else ""
    task = f" of {first.task}" if first.task else ""
    title = f"{_words(metric)}{task}{where}{direction}"
    axes.set_title(title[0].upper() + title[1:], loc="left")
    axes.set_ylabel(f"{_words(metric)} ({unit})" if unit else _words(metric))
    notes = ["modelled, not measured"] if first.obtained == "modelled" else []
    if any(_bounded(m) for values in series for m in values):
        notes.append("bars and bands: 95 % interval of each value alone, not of differences")
    footnote(figure, notes)
    direct_labels(axes, marks)
    return save(figure, path)


def loss_plot(events: Iterable[Mapping[str, Any]], path: Path, title: str = "") -> Path:
    """Plot the loss over the optimiser steps of one run.

    Args:
        events: Events with `step` and `loss`; those of kind `validation` make a line of their own.
        path: File to write.
        title: Of the plot.

    Raises:
        UserError: When no event holds a loss.
    """
    lines: dict[str, list[tuple[int, float]]] = {"training": [], "validation": []}
    for event in events:
        if "step" in event and "loss" in event:
            kind = "validation" if event.get("event") == "validation" else "training"
            lines[kind].append((event["step"], event["loss"]))
    if not any(lines.values()):
        raise UserError("The run has no losses to plot.", "Only training writes them.")
    figure, axes = canvas()
    marks = []
    for (kind, line), colour in zip(lines.items(), COLOURS, strict=False):
        if not line:
            continue
        steps, losses = zip(*line, strict=True)
        if kind == "training":
            reach = len(losses) // 40
            smooth = _running_mean(losses, reach)
            axes.plot(steps, losses, color=colour, linewidth=0.8, alpha=0.35)
            axes.plot(steps, smooth, color=colour, linewidth=2)
            marks.append((smooth[-1], kind, colour))
            footnote(figure, [f"thick line: mean over {2 * reach + 1} steps"] if reach else [])
        else:
            axes.plot(steps, losses, color=colour, linewidth=1.5, marker="s", markersize=5)
            marks.append((losses[-1], kind, colour))
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss (nats/token)")
    axes.set_title(title or "Loss over training", loc="left")
    direct_labels(axes, marks)
    return save(figure, path)


# -- what is drawn -----------------------------------------------------------------------------


def _values(record: Record, metric: str, split: str) -> list[Metric]:
    """Return one metric of a run; when several fit, on the test split and of the first kind."""
    found = [m for m in record.metrics if m.name == metric and split in ("", m.split)]
    found.sort(key=lambda m: not m.task and m.split != "test")
    return [m for m in found if _kind(m) == _kind(found[0])]


def _kind(metric: Metric) -> tuple[str, ...]:
    return metric.task, metric.split, metric.phase, metric.obtained


def _scaled(series: list[list[Metric]], unit: str) -> tuple[list[list[Metric]], str]:
    """Return the metrics divided by a common factor that makes them easy to read, and the unit."""
    most = max((abs(m.value) for v in series for m in v if math.isfinite(m.value)), default=0.0)
    factor, prefix = scale(most, unit)
    if unit.startswith("bytes"):
        unit = prefix
    elif prefix:
        unit = f"10^{round(math.log10(factor))} {unit}".rstrip()

    def divided(bound: float | None) -> float | None:
        return None if bound is None else bound / factor

    return [
        [
            replace(m, value=m.value / factor, low=divided(m.low), high=divided(m.high))
            for m in values
        ]
        for values in series
    ], unit


def _axis(names: Iterable[str]) -> tuple[dict[str, float], str, bool]:
    """Return where each point lies, what the axis is called, and whether it is logarithmic."""
    unique = list(dict.fromkeys(names))
    parts = [re.fullmatch(r"(\D*)(\d+(?:\.\d+)?)(\D*)", name) for name in unique]
    matches = [m for m in parts if m]
    if len(matches) < len(unique) or len({(m[1], m[3]) for m in matches}) != 1:
        return {name: float(i) for i, name in enumerate(unique)}, "operating point", False
    positions = {name: float(m[2]) for name, m in zip(unique, matches, strict=True)}
    least, most = min(positions.values()), max(positions.values())
    log = least > 0 and most / least >= 4
    return positions, f"operating point{' (log scale)' if log else ''}", log


def _line(axes: Axes, xs: list[float], metrics: list[Metric], colour: str, number: int) -> None:
    values = [m.value for m in metrics]
    marker = MARKERS[number % len(MARKERS)]
    axes.plot(xs, values, color=colour, marker=marker, markersize=6, linewidth=1.8, zorder=3)
    for x, metric in zip(xs, metrics, strict=True):
        if _bounded(metric):
            _bar(axes, x, metric, colour)


def _places(levels: int, points: bool) -> list[float | None]:
    """Return where across the axes each level has its bar; a single one gets a band instead."""
    if levels == 1:
        return [None]
    if points:
        return [0.99 - 0.018 * i for i in range(levels)]
    return [(i + 1) / (levels + 1) for i in reversed(range(levels))]


def _level(axes: Axes, metric: Metric, colour: str, place: float | None) -> None:
    """Draw a run without points: a band, or a bar at `place` when bands would cover each other."""
    axes.axhline(metric.value, color=colour, linewidth=1.8, linestyle="--")
    if not _bounded(metric):
        return
    if place is None:
        axes.axhspan(metric.low or 0, metric.high or 0, color=colour, alpha=0.12, linewidth=0)
    else:
        across = axes.get_yaxis_transform()
        _bar(axes, place, metric, colour, transform=across)


def _bar(axes: Axes, x: float, metric: Metric, colour: str, **options: Any) -> None:
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


def _bounded(metric: Metric) -> bool:
    return all(b is not None and math.isfinite(b) for b in (metric.low, metric.high))


def _running_mean(values: Sequence[float], reach: int) -> list[float]:
    """Return the mean of each value and `reach` on both sides, fewer near the ends."""
    means = []
    for i in range(len(values)):
        near = min(reach, i, len(values) - 1 - i)
        means.append(sum(values[i - near : i + near + 1]) / (2 * near + 1))
    return means


def _words(metric: str) -> str:
    return metric.replace("_", " ")


def _finish_x(axes: Axes, positions: dict[str, float], name: str, log: bool) -> None:
    if not positions:
        axes.set_xticks([])
        return
    if log:
        axes.set_xscale("log", base=2)
    axes.set_xticks(list(positions.values()), list(positions))
    axes.minorticks_off()
    axes.set_xlabel(name)
    if len(positions) == 1:
        (x,) = positions.values()
        axes.set_xlim(x / 2, x * 2) if log else axes.set_xlim(x - 1, x + 1)
