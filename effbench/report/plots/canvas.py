"""The canvas of a plot: axes without a display, labels beside the lines, one file at the end."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effbench.util.errors import UserError
from effbench.util.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""The palette of Okabe and Ito: distinct for all common forms of colour vision."""

GREY = "#555555"
LABEL_GAP = 0.055
"""Least distance between two direct labels, as a share of the axis."""


def canvas() -> tuple[Any, Axes]:
    """Return a figure that needs no display and belongs to no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


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


def save(figure: Any, path: Path) -> Path:
    """Write a figure in the form that the name of the file says.

    Raises:
        UserError: When it says none.
    """
    kinds = figure.canvas.get_supported_filetypes()
    kind = path.suffix.removeprefix(".")
    if kind not in kinds:
        raise UserError(f"{path.name} is not a kind of picture.", "End it with .png, .pdf or .svg.")
    picture = io.BytesIO()
    figure.savefig(picture, format=kind, dpi=160)
    write_atomic(path, picture.getvalue())
    return path
