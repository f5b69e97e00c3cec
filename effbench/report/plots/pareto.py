"""Quality over cost, with the Pareto front: what nothing else is better than in both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from effbench.report.plots.canvas import (
    GREY,
    SIZES,
    SMALL,
    Look,
    Size,
    canvas,
    fit,
    footnote,
    headline,
    names_below,
    narrow,
    save,
)
from effbench.report.plots.placing import Spot, name_marks
from effbench.report.table import Value, scale
from effbench.util.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FAR = 1.0
"""Differences above are not drawn: they would press all others together."""


class Place(NamedTuple):
    """Something with a cost and a quality, of both of which less is better."""

    name: str
    series: str
    """What shares a colour with it."""
    cost: float
    """Bytes."""
    quality: Value
    """A difference of a loss, with its interval."""


def front(places: Sequence[Place]) -> list[Place]:
    """Return the places that no other is below in both cost and quality, by cost."""
    found: list[Place] = []
    for place in sorted(places, key=lambda p: (p.cost, p.quality.value)):
        if not found or place.quality.value < found[-1].quality.value:
            found.append(place)
    return found


def pareto_plot(
    places: Sequence[Place], title: str, about: str, path: Path, size: Size = "screen"
) -> Path:
    """Plot differences of a loss over bytes, and join the Pareto front, whose places have names.

    Args:
        places: What is drawn; bars are the intervals.
        title: Of the plot.
        about: What the places have in common, and the unit of their quality.
        path: File to write.
        size: Of the picture.

    Raises:
        UserError: When there is nothing to draw, or the file is no picture.
    """
    near = [place for place in places if place.quality.value <= FAR]
    if not near:
        raise UserError("No row has weight_bytes to draw.", "Evaluate with evaluator.memory.")
    factor, unit = scale(max(place.cost for place in near), "bytes")
    series = list(dict.fromkeys(place.series for place in near))
    figure, axes = canvas(size, names=series)
    for number, name in enumerate(series):
        look = Look.of(number, name, size)
        _series(axes, [p for p in near if p.series == name], factor, look)
    best = front(near)
    line = [(p.cost / factor, p.quality.value) for p in best]
    axes.plot(*zip(*line, strict=True), color=GREY, linestyle="--", linewidth=1, zorder=1)
    axes.set_xlabel(f"bytes of the weights ({unit})")
    axes.set_ylabel("difference, lower is better")
    headline(axes, title, size)
    if narrow(size):
        names_below(axes, series, size)
    else:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    far = len(places) - len(near)
    footnote(figure, [about, *([f"{far} rows above {FAR:g} left out"] if far else [])], size)
    fit(figure, size)
    spots = {place: _spot(place, factor) for place in near}
    name_marks(
        axes,
        [(place.name, spots[place]) for place in best],
        [*spots.values()],
        min(SMALL, SIZES[size][2]),
        [line],
    )
    return save(figure, path, size)


def _spot(place: Place, factor: float) -> Spot:
    value, low, high, x = *_bounds(place.quality), place.cost / factor
    return Spot(x, low, value, high)


def _bounds(v: Value) -> tuple[float, float, float]:
    """Return a value with its bounds, which are itself where it has none."""
    return v.value, v.value if v.low is None else v.low, v.value if v.high is None else v.high


def _series(axes: Axes, places: Sequence[Place], factor: float, look: Look) -> None:
    """Draw places of one colour, with bars for those that have an interval."""
    bounds = [_bounds(place.quality) for place in places]
    axes.errorbar(
        [place.cost / factor for place in places],
        [value for value, _, _ in bounds],
        [
            [max(0.0, value - low) for value, low, _ in bounds],
            [max(0.0, high - value) for value, _, high in bounds],
        ],
        color=look.colour,
        marker=look.marker,
        linestyle="",
        markersize=look.dot,
        capsize=2,
        linewidth=1,
        label=look.name,
    )
