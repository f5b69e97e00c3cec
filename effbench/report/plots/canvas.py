"""The canvas of a plot: axes without a display, labels beside the lines, one file at the end."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from effbench.util.errors import UserError
from effbench.util.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""The palette of Okabe and Ito: distinct for all common forms of colour vision."""

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
LETTER = 0.75
"""Width of a letter, in sizes of it, with room for the names beside the axes."""
ROW = 2.3
"""Height of a row of a list, in lines of its letters."""


def canvas(size: Size = "screen", rows: int = 0) -> tuple[Any, Axes]:
    """Return a figure that needs no display and belongs to no global state.

    Args:
        size: Of the picture.
        rows: Rows of a list that it has to hold, from which its height follows; 0 for the size's.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height, letters = SIZES[size]
    if rows:
        height = (rows * ROW + 9) * letters / 72
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.tick_params(labelsize=letters)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def headline(axes: Axes, text: str, size: Size = "screen") -> None:
    """Write the title of a plot, in as many lines as a small one needs."""
    width, _, letters = SIZES[size]
    if size != "screen":
        text = textwrap.fill(text, int(width * 72 / letters / LETTER))
    axes.set_title(text, loc="left")


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


def footnote(figure: Any, notes: Sequence[str]) -> None:
    """Write what must be said about a plot below it."""
    if notes:
        figure.supxlabel("; ".join(notes), x=0.01, ha="left", fontsize=8, color=GREY)


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
    from matplotlib.text import Text

    kinds = figure.canvas.get_supported_filetypes()
    kind = path.suffix.removeprefix(".")
    if kind not in kinds:
        raise UserError(f"{path.name} is not a kind of picture.", "End it with .png, .pdf or .svg.")
    powers = _powers(figure)
    for text in figure.findobj(Text):
        if text not in powers:  # a label of a record is text, whatever its dollars hold
            text.set_parse_math(False)
        if size != "screen":
            text.set_fontsize(min(text.get_fontsize(), SIZES[size][2]))
    picture = io.BytesIO()
    with rc_context({"svg.hashsalt": "effbench"}):
        figure.savefig(picture, format=kind, dpi=DPI, metadata=UNDATED.get(kind))
    write_atomic(path, picture.getvalue())
    return path


def _powers(figure: Any) -> set[Any]:
    """Return the labels of logarithmic axes, which matplotlib writes as formulas."""
    from matplotlib.ticker import LogFormatter

    sides = [side for axes in figure.axes for side in (axes.xaxis, axes.yaxis)]
    logs = [side for side in sides if isinstance(side.get_major_formatter(), LogFormatter)]
    return {label for side in logs for label in side.get_ticklabels(which="both")}
