"""The canvas of a plot: axes without a display, labels beside the lines, one file at the end."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from effbench.util.errors import UserError
from effbench.util.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#882255")
"""The palette of Okabe and Ito, distinct for all common forms of colour vision, with Tol's wine in
the place of its yellow."""

MARKERS = "osD^vPX"
"""So that lines stay distinct without colour too: one fewer, so that no two of 56 are alike."""

GREY = "#555555"
LABEL_GAP = 0.055
"""Least distance between two direct labels, as a share of the axis."""


Size = Literal["screen", "column", "page"]
SIZES: dict[Size, tuple[float, float, float]] = {
    "screen": (7.2, 4.2, 10.0),
    "column": (3.35, 2.5, 7.0),
    "page": (6.9, 3.6, 8.0),
}
"""Width and height in inches, and size of the letters in points; `column` and `page` are those of
papers in two columns."""
SMALL = 8.0
"""Most points of the letters of notes and of names within a plot."""
LETTER = 0.6
"""Width of a letter, in sizes of it."""
LINE = 1.3
"""Height of a line of text, in sizes of its letters."""
NOTES = 2
"""Lines of notes above the names below a plot."""
TITLE = 1.2
"""Size of the title of a large picture, in sizes of its other letters."""
ROW = 2.3
"""Height of a row of a list, in sizes of its letters."""


def narrow(size: Size) -> bool:
    """Whether there is no room for names and numbers beside the axes of a picture."""
    return size == "column"


def canvas(size: Size = "screen", rows: float = 0, names: Sequence[str] = ()) -> tuple[Any, Axes]:
    """Return a figure that needs no display and belongs to no global state.

    Args:
        size: Of the picture.
        rows: Rows of a list that it has to hold, from which its height follows; 0 for the size's.
        names: Of series, which a narrow one has to hold below its axes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height, letters = SIZES[size]
    if rows:
        height = (rows * ROW + 9) * letters / 72
    if names and narrow(size):
        lines = math.ceil(len(names) / _across(names, size)) + NOTES
        height += lines * LINE * letters / 72
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.tick_params(labelsize=letters)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


class Look(NamedTuple):
    """How a series is told from the others."""

    name: str
    colour: str
    marker: str
    dot: float
    """Size of a marker, in points."""

    @classmethod
    def of(cls, number: int, name: str, size: Size) -> Look:
        """Return that of a series by its number."""
        marker = MARKERS[number % len(MARKERS)]
        return cls(name, COLOURS[number % len(COLOURS)], marker, 4 if narrow(size) else 6)


def headline(axes: Axes, text: str, size: Size = "screen") -> None:
    """Write the title of a plot over all of its width, in as many lines as it takes."""
    letters = SIZES[size][2] * (TITLE if size == "screen" else 1)
    figure: Any = axes.figure
    figure.suptitle(_title(text, size, letters), x=0.01, ha="left", fontsize=letters)


def _title(text: str, size: Size, letters: float) -> str:
    """Return a title in lines; one that is too long goes on after its last comma or semicolon."""
    cut = max(text.rfind(", "), text.rfind("; ")) + 1
    if cut and "\n" in filled(text, size, letters):
        return "\n".join(filled(part, size, letters) for part in (text[:cut], text[cut + 1 :]))
    return filled(text, size, letters)


def filled(text: str, size: Size, letters: float) -> str:
    """Return a text in lines as long as a picture is wide."""
    return textwrap.fill(text, int(SIZES[size][0] * 72 / letters / LETTER))


def named(axes: Axes, marks: Sequence[tuple[float, str, str]], size: Size) -> None:
    """Write the names of series beside the ends of their lines, or below a plot without room.

    Args:
        axes: Where they are drawn, each with its name as its label.
        marks: Where each series ends, its name and its colour.
        size: Of the picture.
    """
    if narrow(size):
        names_below(axes, [name for _, name, _ in marks], size)
    else:
        direct_labels(axes, marks)


def names_below(axes: Axes, names: Sequence[str], size: Size) -> None:
    """Write the names of series below a plot, as many beside each other as there is room for."""
    figure: Any = axes.figure
    figure.legend(
        loc="outside lower left",
        ncols=_across(names, size),
        fontsize=SIZES[size][2],
        frameon=False,
        alignment="left",
        borderaxespad=0,
    )


def _across(names: Sequence[str], size: Size) -> int:
    """Return how many names stand beside each other below a plot."""
    width, _, letters = SIZES[size]
    longest = max(map(len, names), default=0) + 6  # with the mark and the room around it
    return min(len(names), max(1, int(width * 72 / letters / LETTER / longest)))


def direct_labels(axes: Axes, marks: Sequence[tuple[float, str, str]]) -> None:
    """Write each series' name to the right of its end, moved apart where they would touch."""
    to_axes = axes.transScale + axes.transLimits
    right = axes.get_xlim()[1]
    finite = [m for m in marks if math.isfinite(m[0])]
    ordered = sorted(
        (float(to_axes.transform((right, value))[1]), name, c) for value, name, c in finite
    )
    heights = [height for height, _, _ in ordered]
    for _ in range(50):
        for below, above in pairwise(range(len(heights))):
            overlap = LABEL_GAP - (heights[above] - heights[below])
            if overlap > 0:
                heights[below] -= overlap / 2
                heights[above] += overlap / 2
        if heights and len(heights) * LABEL_GAP < 1:  # else there is no room for all within
            heights[0], heights[-1] = max(0.0, heights[0]), min(1.0, heights[-1])
    for height, (_, name, colour) in zip(heights, ordered, strict=True):
        axes.annotate(
            name,
            (1.02, height),
            xycoords="axes fraction",
            color=colour,
            va="center",
            fontweight="bold",
            fontsize=9,
        )


def footnote(figure: Any, notes: Sequence[str], size: Size = "screen") -> None:
    """Write what must be said about a plot below it, above the names where these stand there."""
    if not notes:
        return
    letters = min(SMALL, SIZES[size][2])
    text = filled("; ".join(notes), size, letters)
    if not figure.legends:
        figure.supxlabel(text, x=0.01, ha="left", fontsize=letters, color=GREY)
        return
    [below] = figure.legends
    below.set_title(text)
    below.get_title().set_color(GREY)


DPI = 160
UNDATED: dict[str, dict[str, None]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
"""Left out of a file, so that the same numbers give the same bytes."""


def save(figure: Any, path: Path, size: Size = "screen") -> Path:
    """Write a figure in the form that the name of the file says.

    Args:
        figure: What is written.
        path: File to write.
        size: Of the picture; no letter of a small one is larger than its size says.

    Raises:
        UserError: When it says none.
    """
    from matplotlib import rc_context

    kinds = figure.canvas.get_supported_filetypes()
    kind = path.suffix.removeprefix(".")
    if kind not in kinds:
        raise UserError(f"{path.name} is not a kind of picture.", "End it with .png, .pdf or .svg.")
    fit(figure, size)
    picture = io.BytesIO()
    with rc_context({"svg.hashsalt": "effbench"}):
        figure.savefig(picture, format=kind, dpi=DPI, metadata=UNDATED.get(kind))
    write_atomic(path, picture.getvalue())
    return path


def fit(figure: Any, size: Size) -> None:
    """Leave no letter of a small picture larger than its size says, and no label a formula."""
    from matplotlib.text import Text

    powers = _powers(figure)
    for text in figure.findobj(Text):
        if text not in powers:  # a label of a record is text, whatever its dollars hold
            text.set_parse_math(False)
        if size != "screen":
            text.set_fontsize(min(text.get_fontsize(), SIZES[size][2]))


def _powers(figure: Any) -> set[Any]:
    """Return the labels of logarithmic axes, which matplotlib writes as formulas."""
    from matplotlib.ticker import LogFormatter

    sides = [side for axes in figure.axes for side in (axes.xaxis, axes.yaxis)]
    logs = [side for side in sides if isinstance(side.get_major_formatter(), LogFormatter)]
    return {label for side in logs for label in side.get_ticklabels(which="both")}
