"""From the words of `effbench report` to its file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from effbench.report.page.curves import curves
from effbench.report.page.evidence import evidence
from effbench.report.page.flipped import flipped
from effbench.report.page.layers import layer_maps
from effbench.report.page.render import page
from effbench.results.lookup import find
from effbench.results.records import Record, read_all
from effbench.results.store import Store
from effbench.util.errors import UserError
from effbench.util.files import write_atomic


def write_report(results: Path, runs: Sequence[str], against: str, path: Path) -> int:
    """Write the report of runs and return how many there are.

    Args:
        results: Folder of runs and records.
        runs: Keys, prefixes or `latest`, in the order of the rows; none for all, latest first.
        against: The run that others are held against; empty for the first of several named ones,
            and for none where none is named.
        path: The file; one that is there is replaced.

    Raises:
        UserError: When there are no records, one cannot be found or read, or the file cannot be
            written; a file that was there is then as it was.
    """
    store = Store(results)
    reference = against or (runs[0] if len(runs) > 1 else "")
    records = _chosen(store.records, runs, outcomes=bool(reference))
    found = None
    if reference:
        known, one = read_all(store.records, outcomes=False), find(store.records, reference)
        records = records if one.key in {r.key for r in records} else [one, *records]
        found = evidence(records, one, known)
        found = replace(found, flips=flipped(records, one, store))
    maps = layer_maps(records, store)
    write_atomic(path, page(records, found, curves(records, store), maps))
    return len(records)


def _chosen(folder: Path, runs: Sequence[str], outcomes: bool) -> list[Record]:
    """Return the records that are meant, each once.

    Raises:
        UserError: When there is none.
    """
    if runs:
        named = [find(folder, run) for run in runs]
        return list({record.key: record for record in named}.values())
    records = read_all(folder, outcomes)[::-1]
    if not records:
        raise UserError(f"There are no records in {folder}.", "Run effbench train first.")
    return records
