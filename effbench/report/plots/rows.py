"""A list of rows as a plot: name at the left, mark with its interval, number at the right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from effbench.report.plots.canvas import Size, canvas

if TYPE_CHECKING:
    from typing import Any

    from matplotlib.axes import Axes


class Mark(NamedTuple):
    """One row."""

    name: str
    value: float
    low: float | None
    """Lower end of its interval, where it has one."""
    high: float | None
    number: str
    """As people read it."""
    colour: str
    filled: bool = True


def rows_of(marks: Sequence[Mark], size: Size) -> tuple[Any, Axes]:
    """Return a figure with a line for each row, the first one on top."""
    figure, axes = canvas(size, rows=len(marks))
    axes.grid(False)
    axes.grid(axis="x", color="#e5e5e5", linewidth=0.8)
    for place, mark in enumerate(marks):
        if mark.low is not None and mark.high is not None:
            axes.plot([mark.low, mark.high], [place, place], color=mark.colour, linewidth=1.6)
        face = mark.colour if mark.filled else "white"
        axes.plot(
            mark.value, place, marker="o", markersize=6, color=mark.colour, markerfacecolor=face
        )
    _names(axes, marks)
    return figure, axes


def _names(axes: Axes, marks: Sequence[Mark]) -> None:
    places = range(len(marks))
    axes.set_yticks(places, [mark.name for mark in marks])
    axes.set_ylim(len(marks) - 0.5, -0.5)
    numbers = axes.secondary_yaxis("right")
    numbers.set_yticks(places, [mark.number for mark in marks])
    numbers.spines["right"].set_visible(False)
    for axis in (axes, numbers):
        axis.tick_params(axis="y", length=0)
