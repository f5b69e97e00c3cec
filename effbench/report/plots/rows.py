"""A list of rows as a plot: name at the left, mark with its interval, number at the right.

Where a method has rows at several operating points, it is the heading of these.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from effbench.report.plots.canvas import LINE, ROW, SIZES, Size, canvas, filled, narrow

if TYPE_CHECKING:
    from typing import Any

    from matplotlib.axes import Axes


class Mark(NamedTuple):
    """One row."""

    label: str
    point: str
    """Operating point, where it has one."""
    value: float
    low: float | None
    """Lower end of its interval, where it has one."""
    high: float | None
    number: str
    """As people read it."""
    colour: str
    filled: bool = True

    @property
    def name(self) -> str:
        """Label and point."""
        return f"{self.label} {self.point}".rstrip()


NAME: dict[Size, int] = {"screen": 44, "column": 20, "page": 48}
"""Most characters of a line of a name, so that more than a third of the width is left for marks."""
SHORT = 12
"""Most characters of names beside which a narrow picture has room for numbers in one line."""
DENSE, GAP = 1.7, 0.3
"""Height of a row below a heading, and room between rows of several lines, in sizes of letters."""
STEPS = 3
"""Most steps between the numbers below the marks of a narrow picture."""


class _Line(NamedTuple):
    """A heading, or a row."""

    text: str
    mark: Mark | None
    least: float
    """Its height where its texts have one line, in sizes of their letters."""

    def height(self, number: str) -> float:
        """Return its height beside a number."""
        lines = 1 + max(self.text.count("\n"), number.count("\n"))
        return self.least if lines == 1 else max(self.least, lines * LINE + GAP)


def rows_of(marks: Sequence[Mark], size: Size) -> tuple[Any, Axes]:
    """Return a figure with a line for each row, the first one on top.

    Long names go on below themselves. In a narrow picture intervals stand below their numbers,
    where names leave no room beside them.
    """
    lines = [*_lines(marks, size)]
    widest = max((len(part) for x in lines if x.mark for part in x.text.split("\n")), default=0)
    below = narrow(size) and widest > SHORT
    texts = [line.mark.number if line.mark else "" for line in lines]
    numbers = [text.replace(" [", "\n[") if below else text for text in texts]
    heights = [line.height(number) for line, number in zip(lines, numbers, strict=True)]
    places = [sum(heights[:i]) + height / 2 for i, height in enumerate(heights)]
    figure, axes = canvas(size, rows=sum(heights) / ROW)
    axes.grid(False)
    axes.grid(axis="x", color="#e5e5e5", linewidth=0.8)
    axes.set_ylim(sum(heights), 0)
    rows = [row for row in zip(places, lines, numbers, strict=True) if row[1].mark]
    for place, line, _ in rows:
        if line.mark:
            _drawn(axes, line.mark, place, 4 if narrow(size) else 6)
    if narrow(size):
        axes.locator_params(axis="x", nbins=STEPS)
    _beside(
        axes, [place for place, *_ in rows], [x.text for _, x, _ in rows], [n for *_, n in rows]
    )
    headings = [(place, x.text) for place, x in zip(places, lines, strict=True) if not x.mark]
    _over(axes, headings, SIZES[size][2])
    return figure, axes


def _lines(marks: Sequence[Mark], size: Size) -> Iterator[_Line]:
    """Yield the rows, each below the heading of its method where one has several."""
    headed = max(Counter(mark.label for mark in marks).values(), default=1) > 1
    if not headed:
        yield from (_Line(textwrap.fill(mark.name, NAME[size]), mark, ROW) for mark in marks)
        return
    for label, own in groupby(marks, key=lambda mark: mark.label):
        yield _Line(filled(label, size, SIZES[size][2]), None, DENSE + GAP)
        yield from (_Line(textwrap.fill(mark.point, NAME[size]), mark, DENSE) for mark in own)


def _drawn(axes: Axes, mark: Mark, place: float, dot: float) -> None:
    """Draw a mark with its interval."""
    if mark.low is not None and mark.high is not None:
        axes.plot([mark.low, mark.high], [place, place], color=mark.colour, linewidth=1.6)
    face = mark.colour if mark.filled else "white"
    axes.plot(
        mark.value, place, marker="o", markersize=dot, color=mark.colour, markerfacecolor=face
    )


def _beside(
    axes: Axes, places: Sequence[float], names: Sequence[str], numbers: Sequence[str]
) -> None:
    """Write a name at the left and a number at the right of each row."""
    axes.set_yticks(places, names)
    right = axes.secondary_yaxis("right")
    right.set_yticks(places, numbers)
    right.spines["right"].set_visible(False)
    for axis in (axes, right):
        axis.tick_params(axis="y", length=0)


def _over(axes: Axes, headings: Sequence[tuple[float, str]], letters: float) -> None:
    """Write headings at the left edge of a figure, over what is drawn where they are long.

    Each stands nearer to what is below it than to what is above.
    """
    from matplotlib.transforms import blended_transform_factory

    if not headings:
        return
    axes.spines["left"].set_visible(False)
    figure: Any = axes.figure
    for place, text in headings:
        axes.text(
            *(0.01, place + GAP / 2, text),
            transform=blended_transform_factory(figure.transFigure, axes.transData),
            va="center",
            fontsize=letters,
            zorder=4,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            in_layout=False,
        )
