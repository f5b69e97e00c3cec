"""Items that change sides between a report's reference and the other runs, with their texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from effbench.report.comparison.seeds import grouped
from effbench.report.flips import flips, flips_text
from effbench.report.gate.arms import Arm
from effbench.report.table import points
from effbench.results.records import Record
from effbench.results.store import Store
from effbench.util.errors import UserError

ITEMS = 5
"""Items of each way whose texts are there."""
PAIRS = 100
"""Most pairs of runs, so that many runs do not make a large file."""


def flipped(records: Sequence[Record], against: Record, store: Store) -> list[tuple[str, str]]:
    """Return a line and the items below it, for each metric of each run that is right or wrong.

    Each operating point is held against the same one of the reference, or against its only one.

    Args:
        records: The runs, with their outcomes.
        against: The reference.
        store: Where their run folders may be.
    """
    base, found = {arm.point: arm for arm in _arms(against)}, list[tuple[str, str]]()
    for record in records:
        for arm in _arms(record) if record.key != against.key else ():
            other = base.get(arm.point) or (next(iter(base.values())) if len(base) == 1 else None)
            if other is not None and len(found) < PAIRS:
                found += _held(other, arm, store)
    return found


def _arms(record: Record) -> Iterator[Arm]:
    [group] = grouped([record])
    for point in points(record):
        yield Arm(f"{record.key[:8]}{f'@{point}' if point else ''}", group, point)


def _held(base: Arm, arm: Arm, store: Store) -> list[tuple[str, str]]:
    try:
        shared = flips(base, arm)
    except UserError:  # no items in common that are right or wrong
        return []
    texts = (flips_text(found, base, arm, store, ITEMS) for found in shared)
    name = arm.group.label
    return [(f"{name}: {line}", rest) for line, _, rest in (text.partition("\n") for text in texts)]
