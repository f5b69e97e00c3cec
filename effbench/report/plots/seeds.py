"""Losses over training of several methods: the mean over seeds, with a band of their spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from effbench.report.plots.canvas import (
    COLOURS,
    Size,
    canvas,
    footnote,
    headline,
    named,
    save,
)
from effbench.util.errors import UserError

Line = tuple[Sequence[float], Sequence[float]]
"""Steps and losses of one run."""


def seeds_plot(lines: Mapping[str, Sequence[Line]], path: Path, size: Size = "screen") -> Path:
    """Plot the mean loss of each method over its steps; the band is the least and the most.

    Args:
        lines: Of each method, one line for each seed. A line of other steps than the first one's
            is read at those steps.
        path: File to write.
        size: Of the picture.

    Raises:
        UserError: When there is no line.
    """
    there = {name: own for name, own in lines.items() if own}
    if not there:
        raise UserError("There are no losses to plot.", "Only training writes them.")
    figure, axes = canvas(size, names=[*there])
    ends = []
    for number, (name, own) in enumerate(there.items()):
        colour = COLOURS[number % len(COLOURS)]
        steps, losses = over_seeds(own)
        axes.plot(steps, losses.mean(axis=0), color=colour, linewidth=1.8, label=name)
        axes.fill_between(
            steps, losses.min(axis=0), losses.max(axis=0), color=colour, alpha=0.15, linewidth=0
        )
        ends.append((float(losses[:, -1].mean()), name, colour))
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("training loss")
    headline(axes, "Loss over training", size)
    most = max(map(len, there.values()))
    named(axes, ends, size)
    footnote(figure, [f"bands: least and most of up to {most} seeds"] if most > 1 else [], size)
    return save(figure, path, size)


def over_seeds(lines: Sequence[Line]) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps of the first line, and the losses of all of them there [seeds, steps]."""
    steps = np.asarray(lines[0][0], dtype=np.float64)
    return steps, np.array([np.interp(steps, own, losses) for own, losses in lines])
