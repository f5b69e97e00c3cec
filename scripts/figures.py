"""Draw every table for a paper: values and differences, and losses over training with a band over
seeds where the folders of its runs are here, and the Pareto plot of the grand table; as PNG, SVG
and PDF.

python scripts/figures.py [column|page|screen] [TABLE...]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from effbench.cli.tables import campaigns, grand_named
from effbench.report.campaign import Campaign
from effbench.report.campaign_plots import plot
from effbench.report.grand_table import pareto
from effbench.report.plots.canvas import Size
from effbench.report.plots.curves import comparison_plot
from effbench.report.plots.forest import forest_plot
from effbench.util.errors import UserError

RESULTS, FOLDER = Path("results"), Path("build/figures")
SUFFIXES = ("png", "svg", "pdf")
GRAND = "grand"


def drawn(campaign: Campaign, size: Size) -> None:
    """Draw a table, from one comparison of its records."""
    metric, stem = campaign.metrics[0], FOLDER / campaign.name
    found = campaign.compared(RESULTS, metrics=[metric])
    for suffix in SUFFIXES:
        for name, draw in (("values", comparison_plot), ("differences", forest_plot)):
            print(draw(found, metric, Path(f"{stem}_{name}.{suffix}"), size))
    try:
        for suffix in SUFFIXES:
            print(plot(campaign, RESULTS, Path(f"{stem}_curves.{suffix}"), "curves", size))
    except UserError as error:  # no folder of a training is here
        print(f"{campaign.name}: no curves: {error.message}")


def main(size: Size, wanted: Sequence[str]) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for campaign in campaigns():
        if campaign.manifest(RESULTS).is_file() and campaign.name in (wanted or (campaign.name,)):
            drawn(campaign, size)
    if GRAND in (wanted or (GRAND,)):
        grand = grand_named(GRAND, RESULTS)
        for suffix in SUFFIXES:
            print(pareto(grand, FOLDER / f"{GRAND}_pareto.{suffix}", size))


if __name__ == "__main__":
    sizes = {name: name for name in get_args(Size)}
    main(sizes[sys.argv[1] if sys.argv[1:] else "page"], sys.argv[2:])
