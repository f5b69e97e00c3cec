"""The run that others are held against, and which of its operating points."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from effbench.report.labels import labels
from effbench.report.table import points
from effbench.results.lookup import find
from effbench.results.records import Record
from effbench.util.errors import UserError, did_you_mean


def reference_of(ref: str, folder: Path) -> Record:
    """Return the record that `RUN` or `RUN@POINT` names, with that point before its others.

    Args:
        ref: The name.
        folder: Folder of the records.

    Raises:
        UserError: When there is no such run, or it has no such point.
    """
    key, at, point = ref.partition("@")
    record = find(folder, key)
    there = [p for p in points(record) if p]
    if at and point not in there:
        hint = did_you_mean(point, there) if there else "It has one point alone: leave @ out."
        raise UserError(f"{ref} has no operating point {point!r}.", hint)
    if not at:
        return record
    return replace(record, metrics=sorted(record.metrics, key=lambda m: m.point != point))


def said_of(ref: str, record: Record) -> list[str]:
    """Return which point was taken where there are several and none was named, and how to name one.

    Args:
        ref: As it was named.
        record: What `reference_of` made of it.
    """
    there = points(record)
    if "@" in ref or len(there) < 2:
        return []
    return [
        f"Held against {labels([record])[0]} {there[0]}, the first of its {len(there)} operating "
        f"points; name another as {record.key[:8]}@{there[-1]}."
    ]
