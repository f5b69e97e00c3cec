"""Quality over cost, with the Pareto front: what nothing else is better than in both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from effbench.report.plots.canvas import COLOURS, GREY, canvas, footnote, save
from effbench.report.plots.curves import MARKERS
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


def pareto_plot(places: Sequence[Place], title: str, about: str, path: Path) -> Path:
    """Plot differences of a loss over bytes, and join the Pareto front.

    Args:
        places: What is drawn; bars are the intervals.
        title: Of the plot.
        about: What the places have in common, and the unit of their quality.
        path: File to write.

    Raises:
        UserError: When there is nothing to draw, or the file is no picture.
    """
    near = [place for place in places if place.quality.value <= FAR]
    if not near:
        raise UserError("No row has weight_bytes to draw.", "Evaluate with evaluator.memory.")
    factor, unit = scale(max(place.cost for place in near), "bytes")
    figure, axes = canvas()
    for number, name in enumerate(dict.fromkeys(place.series for place in near)):
        _series(axes, name, [p for p in near if p.series == name], factor, number)
    best = front(near)
    line = [[p.cost / factor for p in best], [p.quality.value for p in best]]
    axes.plot(*line, color=GREY, linestyle="--", linewidth=1, zorder=1)
    for number, place in enumerate(best):
        shift = (6, 8 if number % 2 else -12)  # so that neighbours do not cover each other
        where = (place.cost / factor, place.quality.value)
        axes.annotate(place.name, where, shift, textcoords="offset points", fontsize=8)
    axes.set_xlabel(f"bytes of the weights ({unit})")
    axes.set_ylabel("difference, lower is better")
    axes.set_title(title, loc="left")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    far = len(places) - len(near)
    footnote(figure, [about, *([f"{far} rows above {FAR:g} left out"] if far else [])])
    return save(figure, path)


def _series(axes: Axes, name: str, places: Sequence[Place], factor: float, number: int) -> None:
    """Draw places of one colour, with bars for those that have an interval."""
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    xs = [place.cost / factor for place in places]
    values = [place.quality for place in places]
    low = [max(0.0, v.value - (v.value if v.low is None else v.low)) for v in values]
    high = [max(0.0, (v.value if v.high is None else v.high) - v.value) for v in values]
    axes.errorbar(
        xs,
        [v.value for v in values],
        [low, high],
        color=colour,
        marker=marker,
        linestyle="",
        markersize=6,
        capsize=2,
        linewidth=1,
        label=name,
    )
