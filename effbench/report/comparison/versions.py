"""Which versions of effbench's parts made the rows of a comparison."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from effbench.api.stages.base import trains
from effbench.report.comparison.seeds import Group
from effbench.results.records import Record

SAID = "Rows come from different versions of"
"""How a sentence about versions begins."""


def of_versions(notes: Sequence[str]) -> list[str]:
    """Return those notes of a comparison that say which versions made its rows."""
    return [note for note in notes if note.startswith(SAID)]


def different_versions(groups: Sequence[Group], known: Sequence[Record] = ()) -> list[str]:
    """Return a sentence for each part that made the rows in different versions.

    Args:
        groups: What is compared.
        known: Runs that these may have gone on from, whose versions count too.
    """
    by_key = {record.key: record for record in known}
    rows = [_of_group(group, by_key) for group in groups]
    lines = []
    for part in dict.fromkeys(name for row in rows for name in row):
        labels: dict[str, list[str]] = {}
        for group, row in zip(groups, rows, strict=True):
            for number in sorted(row.get(part, ())):
                labels.setdefault(number, []).append(group.label)
        if len(labels) > 1:
            told = "; ".join(f"{n} ({', '.join(labels[n])})" for n in sorted(labels))
            lines.append(f"{SAID} {part}: {told}.")
    return lines


def _of_group(group: Group, known: Mapping[str, Record]) -> dict[str, set[str]]:
    """Return the versions of the parts that made the runs of a group."""
    found: dict[str, set[str]] = {}
    for record in group.records:
        for run in _lineage(record, known):
            versions, sources = run.spec.get("versions") or {}, run.spec.get("sources") or {}
            for part in _parts(run):
                version = f"{versions.get(part, 1)}"
                source = f" with source {sources[part][:8]}" if part in sources else ""
                found.setdefault(part, set()).add(version + source)
    return found


def _lineage(record: Record, known: Mapping[str, Record]) -> Iterator[Record]:
    """Yield a run and those that it went on from, as far as their records are there."""
    while True:
        yield record
        if record.parent not in known:
            return
        record = known[record.parent]


def _parts(record: Record) -> list[str]:
    """Return the parts of a run that can have versions, as `keys.versions_of` names them."""
    evaluators = [f"evaluator.{e['name']}" for e in record.spec.get("evaluators") or ()]
    trained, method = ["train"] if trains(record.stage) else [], record.name_of("method")
    parts = ["model", "dataset", "hardware", *trained, f"method.{method}"]
    if trained and "weight" in ((record.spec.get("dataset") or {}).get("columns") or {}):
        parts.append(f"method.{method}.weighted")
    return [*parts, *evaluators]
