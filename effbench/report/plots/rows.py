"""A list of rows as a plot: name at the left, mark with its interval, number at the right."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from effbench.report.plots.canvas import LINE, ROW, Size, canvas, narrow

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


NAME: dict[Size, int] = {"screen": 44, "column": 20, "page": 48}
"""Most characters of a line of a name, so that more than a third of the width is left for marks."""
STEPS = 3
"""Most steps between the numbers below the marks of a narrow picture."""


def rows_of(marks: Sequence[Mark], size: Size) -> tuple[Any, Axes]:
    """Return a figure with a line for each row, the first one on top.

    Long names go on below themselves. In a narrow picture intervals stand below their numbers.
    """
    names = [textwrap.fill(mark.name, NAME[size]) for mark in marks]
    numbers = [mark.number.replace(" [", "\n[") if narrow(size) else mark.number for mark in marks]
    most = max((text.count("\n") + 1 for text in (*names, *numbers)), default=1)
    figure, axes = canvas(size, rows=len(marks) * max(1.0, most * LINE / ROW))
    axes.grid(False)
    axes.grid(axis="x", color="#e5e5e5", linewidth=0.8)
    dot = 4 if narrow(size) else 6
    for place, mark in enumerate(marks):
        if mark.low is not None and mark.high is not None:
            axes.plot([mark.low, mark.high], [place, place], color=mark.colour, linewidth=1.6)
        face = mark.colour if mark.filled else "white"
        axes.plot(
            mark.value, place, marker="o", markersize=dot, color=mark.colour, markerfacecolor=face
        )
    if narrow(size):
        axes.locator_params(axis="x", nbins=STEPS)
    _beside(axes, names, numbers)
    return figure, axes


def _beside(axes: Axes, names: Sequence[str], numbers: Sequence[str]) -> None:
    """Write a name at the left and a number at the right of each row."""
    places = range(len(names))
    axes.set_yticks(places, names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    right = axes.secondary_yaxis("right")
    right.set_yticks(places, numbers)
    right.spines["right"].set_visible(False)
    for axis in (axes, right):
        axis.tick_params(axis="y", length=0)
