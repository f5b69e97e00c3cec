"""Draw every table for a paper: values and differences, as PNG, SVG and PDF.

python scripts/figures.py [column|page|screen]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import get_args

from effbench.cli.tables import campaigns
from effbench.report.campaign_plots import plot
from effbench.report.plots.canvas import Size

RESULTS, FOLDER = Path("results"), Path("build/figures")


def main(size: Size) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for campaign in campaigns():
        if not campaign.manifest(RESULTS).is_file():
            continue
        for suffix in ("png", "svg", "pdf"):
            stem = FOLDER / campaign.name
            print(plot(campaign, RESULTS, Path(f"{stem}_values.{suffix}"), "values", size))
            print(plot(campaign, RESULTS, Path(f"{stem}_differences.{suffix}"), size=size))


if __name__ == "__main__":
    sizes = {name: name for name in get_args(Size)}
    main(sizes[sys.argv[1] if sys.argv[1:] else "page"])
