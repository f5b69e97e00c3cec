"""Names beside marks, where they cover neither marks nor each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any, NamedTuple

from effbench.report.plots.canvas import GREY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

NEAR, FARTHER = 7, (14, 24, 36, 50)
"""Points from a mark to its name; from farther away a thin line leads to it."""
DOT = 4
"""Points from the centre of a mark to its edge."""
LONG = 2
"""Times its height that a box is wide which is that of a name."""
OUTSIDE = 10
"""How much worse it is to leave the axes than to cover something."""
DIRECTIONS = tuple(product((1, -1, 0), (0, 1, -1)))[:8]
"""Right of the mark first, as people look for a name there; never upon it."""


Line = Sequence[tuple[float, float]]


class Spot(NamedTuple):
    """A mark in the units of the axes, with its bar."""

    x: float
    low: float
    y: float
    high: float


def name_marks(
    axes: Axes,
    names: Sequence[tuple[str, Spot]],
    spots: Sequence[Spot],
    letters: float,
    lines: Sequence[Line] = (),
) -> None:
    """Write names beside their marks.

    Each takes the nearest place within the axes that is free, else the one that covers least. The
    layout of the figure is settled by it.

    Args:
        axes: Where the marks are.
        names: What is written, and of which mark.
        spots: All marks, which are not to be covered.
        letters: Size of the names, in points.
        lines: Others that are not to be covered, [points of one] in the units of the axes.
    """
    figure: Any = axes.figure
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    pixel = figure.dpi / 72
    taken = [box for spot in spots for box in _boxes(axes, spot, pixel)]
    taken += [box for line in lines for box in _along(axes, line, pixel)]
    for name, spot in names:
        places = _places(axes, spot, _size(axes, name, letters), pixel)
        best = min(places, key=lambda place: _covers(axes, place, taken) + place.far / 1e3)
        taken += [best.box, *best.leader]
        line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkB": DOT}
        axes.annotate(
            name,
            (spot.x, spot.y),
            best.offset,
            textcoords="offset points",
            fontsize=letters,
            va="bottom",
            zorder=5,
            arrowprops={**line, "relpos": best.corner} if best.leader else None,
        )


def _size(axes: Axes, name: str, letters: float) -> tuple[float, float]:
    """Return width and height of a name, in pixels."""
    text = axes.text(0, 0, name, fontsize=letters, parse_math=False)
    box = text.get_window_extent()
    text.remove()
    return box.width, box.height


class _Place(NamedTuple):
    """Where a name may be."""

    offset: tuple[float, float]
    """Of its lower left corner from its mark, in points."""
    far: int
    """From its mark, in points."""
    box: Bbox
    """What it covers, in pixels."""
    corner: tuple[float, float]
    """Where the line from its mark ends, as shares of its width and height."""
    leader: list[Bbox]
    """What that line covers; nothing where the name is right beside its mark."""


def _boxes(axes: Axes, spot: Spot, pixel: float) -> list[Bbox]:
    """Return what a mark and its bar cover, in pixels."""
    from matplotlib.transforms import Bbox

    ends = [(spot.x, y) for y in (spot.low, spot.y, spot.high)]
    (x, low), (_, y), (_, high) = axes.transData.transform(ends)
    edge, line = DOT * pixel, pixel
    dot = Bbox.from_extents(x - edge, y - edge, x + edge, y + edge)
    return [dot, Bbox.from_extents(x - line, low, x + line, high)]


def _along(axes: Axes, line: Line, pixel: float) -> list[Bbox]:
    """Return what a line covers, in pixels, piece by piece."""
    ends = axes.transData.transform(line).tolist()
    return [box for start, end in pairwise(ends) for box in _pieces(start, end, pixel)]


def _pieces(start: tuple[float, float], end: tuple[float, float], pixel: float) -> list[Bbox]:
    """Return what a straight line covers, in pixels, piece by piece."""
    from matplotlib.transforms import Bbox

    (x0, y0), (x1, y1) = start, end
    count = 1 + int(max(abs(x1 - x0), abs(y1 - y0)) / (DOT * pixel))
    found = []
    for part in ((n + 0.5) / count for n in range(count)):
        x, y = x0 + (x1 - x0) * part, y0 + (y1 - y0) * part
        found.append(Bbox.from_extents(x - pixel, y - pixel, x + pixel, y + pixel))
    return found


def _places(axes: Axes, spot: Spot, size: tuple[float, float], pixel: float) -> Iterator[_Place]:
    """Yield where the name of a mark may be, the nearest first."""
    from matplotlib.transforms import Bbox

    x, y = axes.transData.transform((spot.x, spot.y)).tolist()
    for far, (right, up) in product((NEAR, *FARTHER), DIRECTIONS):
        end = x + far * pixel * right, y + far * pixel * up
        corner = (1 - right) / 2, (1 - up) / 2
        left, foot = (at - part * long for at, part, long in zip(end, corner, size, strict=True))
        beside = far == NEAR and 0 in (right, up)
        yield _Place(
            ((left - x) / pixel, (foot - y) / pixel),
            far,
            Bbox.from_bounds(left, foot, *size),
            corner,
            [] if beside else _pieces((x, y), end, pixel),
        )


def _covers(axes: Axes, place: _Place, taken: Sequence[Bbox]) -> float:
    """Return how much of what is there a name would cover, as shares of it, and its line cross."""
    from matplotlib.transforms import Bbox

    box = place.box
    corners = ((box.x0, box.y0), (box.x1, box.y1))
    outside = sum(not axes.bbox.contains(x, y) for x, y in corners)
    over = (Bbox.intersection(box, other) for other in taken)
    area = sum(own.width * own.height for own in over if own)
    names = [other for other in taken if other.width > LONG * other.height]
    crossed = any(box.overlaps(name) for box in place.leader for name in names)
    return OUTSIDE * outside + (1 + area / (box.width * box.height)) * bool(area) + crossed
