"""What `fetch` and `doctor` print."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from effbench.report.table import Cell, Table
from effbench.report.terminal import print_table

if TYPE_CHECKING:
    from effbench.cli.doctor import Check
    from effbench.data.assets import Status
    from effbench.results.sync import Merge


def print_assets(found: Sequence[Status]) -> None:
    """Print what can be fetched and what is there."""
    rows: list[tuple[Cell, ...]] = [
        (
            status.asset.name,
            str(status.path) if status.path else f"not fetched ({status.asset.megabytes} MB)",
            status.asset.licence,
            status.asset.summary,
        )
        for status in found
    ]
    print_table(Table("", ("asset", "where", "licence", "what"), rows))


def print_checks(found: Sequence[Check]) -> None:
    """Print what was looked at, and what to do about what is missing."""
    rows: list[tuple[Cell, ...]] = [(c.status, c.name, c.found, c.advice) for c in found]
    print_table(Table("", ("", "check", "found", "advice"), rows))


def merged(merge: Merge, dry_run: bool) -> Iterator[str]:
    """Yield lines on what a sync did, or would do."""
    verb = "would be copied" if dry_run else "copied"
    yield f"Records: {len(merge.new)} {verb}, {len(merge.same)} there already."
    if merge.runs:
        yield f"Runs: {len(merge.runs)} {verb}."
    if merge.unfinished:
        yield f"Runs that are not finished, left out: {', '.join(merge.unfinished)}."
    for key, what in merge.conflicts.items():
        yield f"differs  {key}  {what}"
