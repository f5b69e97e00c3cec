"""The rows of a table before any test: a metric of a group at a point, and what it is held against.

Without a choice every entry is held against the first one. At the same points it is held against
that of the first group at its own point, so that a family of ranks or depths is compared rank by
rank, depth by depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from effbench.report.comparison.contrast import Side
from effbench.report.comparison.seeds import Group
from effbench.report.table import points
from effbench.results.records import Metric, Outcomes
from effbench.util.errors import UserError

NO_POINT = "the first run has no value at this point"
"""Finding of a row that has outcomes, but nothing to be held against."""


@dataclass(frozen=True)
class Entry:
    """A metric of one group at one point."""

    number: int
    """Of the group."""
    group: Group
    metrics: list[Metric]
    """One per run."""
    outcomes: list[Outcomes]
    """One per run; empty when one of them kept none."""

    @property
    def point(self) -> str:
        """Operating point, empty where the metric has none."""
        return self.metrics[0].point

    @property
    def mean(self) -> float:
        """Mean over the runs."""
        return float(np.mean([m.value for m in self.metrics]))

    def side(self) -> Side | None:
        """Return the outcomes for a test; None when there are none."""
        if not self.outcomes:
            return None
        return Side(self.number, self.group.made_with, self.outcomes, self.group.seedless)


def references(entries: Sequence[Entry], same_points: bool) -> list[int | None]:
    """Return the place of what each entry is held against.

    It is the entry's own place where others are held against it, and None where there is nothing.

    Args:
        entries: Of one table, those of the first group first.
        same_points: Whether each is held against the first group at its own point.
    """
    if not same_points:
        return [0] * len(entries)
    first = {entry.point: i for i, entry in enumerate(entries) if entry.number == 0}
    return [first.get(entry.point) for entry in entries]


def check_points(groups: Sequence[Group]) -> None:
    """Check that something can be held against the first group at the same point.

    Raises:
        UserError: When there is no other group, or none has a point of the first one.
    """
    if len(groups) == 1:
        raise UserError(
            f"There is no second run to hold against {groups[0].label} at the same points.",
            "Name another run. Without --same-points the points of one run are compared with "
            "its first.",
        )
    found = [{p for record in group.records for p in points(record)} for group in groups]
    if not any(found[0] & other for other in found[1:]):
        has = [
            f"{group.label} has {', '.join(filter(None, points(group.records[0]))) or 'none'}"
            for group in groups
        ]
        raise UserError(
            f"No run has an operating point of the first one. Points: {'; '.join(has)}.",
            "Evaluate them at the same points, or compare without --same-points: then every row "
            "is held against the first run's first point.",
        )
