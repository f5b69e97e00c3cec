"""Pictures of a campaign: its values, its differences, and its losses over training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from effbench.report.campaign import Campaign
from effbench.report.page.curves import curves
from effbench.report.plots.canvas import Size
from effbench.report.plots.curves import comparison_plot
from effbench.report.plots.forest import forest_plot
from effbench.report.plots.seeds import Line, seeds_plot
from effbench.results.lookup import earlier
from effbench.results.records import Record
from effbench.results.store import Store
from effbench.util.errors import UserError

Kind = Literal["differences", "values", "curves"]


def plot(
    campaign: Campaign, results: Path, path: Path, kind: Kind = "differences", size: Size = "screen"
) -> Path:
    """Draw a campaign.

    Args:
        campaign: What is drawn: its first metric, or for `curves` the training losses of its runs.
        results: Folder of runs and records.
        path: File to write: PNG, PDF or SVG.
        kind: What is drawn of it.
        size: Of the picture.

    Raises:
        UserError: When a record is missing, or for `curves` all folders of its runs.
    """
    if kind == "curves":
        return seeds_plot(_lines(campaign, results), path, size)
    draw = forest_plot if kind == "differences" else comparison_plot
    metric = campaign.metrics[0]
    return draw(campaign.compared(results, metrics=[metric]), metric, path, size)


def _lines(campaign: Campaign, results: Path) -> dict[str, list[Line]]:
    """Return the training losses of each arm, a line for each run whose folder is there."""
    arms = campaign.records(results)
    found = {arm: _trained(records, results) for arm, records in arms.items()}
    if not any(found.values()):
        raise UserError(
            f"No folder of a training of {campaign.name} is here: records have no losses of steps.",
            f"Train it here: {campaign.command}",
        )
    return found


def _trained(records: Sequence[Record], results: Path) -> list[Line]:
    keys = [r.key for r in (*records, *earlier(records, results / "records"))]
    return [own["training"] for own in curves(keys, Store(results)) if "training" in own]
