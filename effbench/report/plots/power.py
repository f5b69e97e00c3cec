"""The smallest difference that a number of items shows, as a curve."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from effbench.report.plots.canvas import COLOURS, canvas, direct_labels, footnote, headline, save
from effbench.report.plots.curves import words
from effbench.report.power import STATED, Case, Wanted, smallest_difference

REACH = 30.0
"""The axis goes from this factor below to this factor above the items at hand."""


def power_plot(case: Case, wanted: Wanted, path: Path) -> Path:
    """Plot the smallest difference over the number of items, for each number of seeds.

    Args:
        case: How much the methods vary.
        wanted: Power, alpha, and the items and seeds there are.
        path: File to write.

    Raises:
        UserError: When the file is no picture.
    """
    middle = wanted.items or case.items or 1000
    items = np.geomspace(max(20, middle / REACH), middle * REACH, 25).astype(int)
    lines: dict[str, int | None] = {"one pair of runs": None}
    if case.seed_sd is not None:
        lines |= {f"{s} seeds": s for s in ([wanted.seeds] if wanted.seeds else [3, 5, 10])}
    scale, unit = (100, "points") if case.shares else (1, case.unit)
    figure, axes = canvas()
    axes.set_xscale("log")
    axes.set_yscale("log")
    ends = []
    for (name, seeds), colour in zip(lines.items(), COLOURS, strict=False):
        found = [smallest_difference(case, int(n), seeds, wanted) for n in items]
        values = [math.nan if d is None else scale * d for d in found]
        axes.plot(items, values, color=colour, linewidth=1.8)
        ends.append((values[-1], name, colour))
    axes.set_xlabel("items")
    axes.set_ylabel(f"smallest difference ({unit})" if unit else "smallest difference")
    of = "" if case.metric == STATED else f" of {words(case.metric)}"
    head = f"Difference{of} that is seen in {wanted.power:.0%} of cases"
    headline(axes, head)
    footnote(figure, [f"alpha {wanted.alpha:g}", "one pair of runs: over items alone"])
    direct_labels(axes, ends)
    return save(figure, path)
