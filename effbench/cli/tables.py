"""What `effbench table` shows and runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from effbench.config.files import options
from effbench.report.campaign import AT, Campaign
from effbench.report.campaign_file import campaign_in
from effbench.report.grand import Grand, gathered, is_grand
from effbench.util.errors import UserError, did_you_mean


def campaign_named(name: str, scale: str = "") -> Campaign:
    """Return the campaign of a name or file.

    Args:
        name: Its name, which may end in `@SCALE`, or a file.
        scale: Whose cells are wanted; those of the table itself when empty.

    Raises:
        UserError: When there is none, or it has no cells there.
    """
    name, _, own = name.partition(AT)
    return campaign_in(_path(name)).at(scale or own)


def grand_named(name: str, results: Path) -> Grand:
    """Return the grand table of a name or file.

    Raises:
        UserError: When there is none, or a record is missing.
    """
    return gathered(_path(name), results, campaigns())


def gathers(name: str) -> bool:
    """Whether a table is a grand one, which gathers others.

    Raises:
        UserError: When there is none.
    """
    return is_grand(_path(name.partition(AT)[0]))


def _path(name: str) -> Path:
    known = options("table")
    path = known.get(name) or Path(name)
    if not path.is_file():
        hint = did_you_mean(name, known)
        raise UserError(f"There is no table {name!r}.", f"{hint} See: effbench table")
    return path


def campaigns() -> list[Campaign]:
    """Return the campaigns that come with effbench, by name."""
    paths = [path for path in options("table").values() if path]
    return [campaign_in(path) for path in paths if not is_grand(path)]


def run_campaign(campaign: Campaign, results: Path, say: Callable[[str], None]) -> None:
    """Run what a campaign lacks, and write its whole tables and plots."""
    from effbench.report.campaign_written import write_tables
    from effbench.runner.campaign import run

    run(campaign, results, say)
    for path in write_tables(campaign, results):
        say(f"Written: {path}")


def would_run(campaign: Campaign, results: Path) -> list[str]:
    """Return what running a campaign takes at the most, then the commands of its arms.

    Raises:
        UserError: When its start, or the first command of an arm, is none.
    """
    from effbench.runner.ahead import ahead

    seeds = ", ".join(map(str, campaign.seeds))
    shared = f"with experiment={campaign.experiment} " if campaign.experiment else ""
    start = f", from the run of experiment={campaign.start}" if campaign.start else ""
    lines = [ahead(campaign, results).sentence(), f"Each {shared}and seed {seeds}{start}:"]
    for arm, steps in campaign.arms.items():
        lines += [arm, *(f"  effbench {step}" for step in steps)]
    return lines


def is_planned(campaign: Campaign, results: Path) -> bool:
    """Whether cells at a scale beside the table's own have no runs yet, so that a plan is shown."""
    return AT in campaign.name and not campaign.manifest(results).is_file()
