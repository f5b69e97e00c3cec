"""What a campaign leaves in results/tables: its whole comparison and a plot of each metric."""

from __future__ import annotations

from pathlib import Path

from effbench.report.campaign import AT, Campaign
from effbench.report.comparison.result import Comparison
from effbench.report.plots.curves import comparison_plot
from effbench.util.files import write_atomic


def write_tables(campaign: Campaign, results: Path) -> list[Path]:
    """Write the whole comparison as Markdown and CSV, and a plot of each metric; return the files.

    Raises:
        UserError: When a record is missing.
    """
    found, name, tables = campaign.compared(results), campaign.name, results / "tables"
    files = _write(found, tables / name, campaign, campaign.title)
    for metric in campaign.metrics:
        files.append(comparison_plot(found, metric, tables / f"{name}_{metric}.png"))
    if campaign.points:
        first = next(iter(campaign.arms))
        about = f"[{name}]({name}.md), each arm against {first} at the same operating point."
        same = campaign.compared(results, same_points=True)
        files += _write(same, tables / f"{name}_points", campaign, about)
    return files


def _write(found: Comparison, stem: Path, campaign: Campaign, about: str) -> list[Path]:
    made = f"Made by `{_target(campaign.name)}`."
    tuned = "".join(f"{line}\n\n" for line in campaign.tuned(stem.parents[1]))
    text = f"# {stem.name}\n\n{about}\n\n{made}\n\n{tuned}{found.markdown()}"
    files = [stem.with_suffix(".md"), stem.with_suffix(".csv")]
    for path, content in zip(files, (text, found.csv()), strict=True):
        write_atomic(path, content)
    return files


def _target(name: str) -> str:
    """Return the command of make that writes the files of a table."""
    name, _, scale = name.replace("_", "-").partition(AT)
    return f"make table-{name} SCALE={scale} RUN=1" if scale else f"make campaign-{name}"
