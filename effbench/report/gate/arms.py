"""The two sides of a gate: a run, or seeds of one, at an operating point."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from effbench.report.comparison.contrast import Side
from effbench.report.comparison.seeds import Group, grouped
from effbench.report.table import points
from effbench.results.lookup import earlier, find
from effbench.results.records import Metric, Outcomes, Record
from effbench.util.errors import UserError, did_you_mean


class Place(NamedTuple):
    """Where items are from."""

    evaluator: str
    task: str
    split: str

    def __str__(self) -> str:
        where = f" of {self.task}" if self.task else ""
        return where + (f" on {self.split}" if self.split else "")


@dataclass(frozen=True)
class Arm:
    """Runs of one spec, one per seed, at one operating point."""

    ref: str
    """As it was named."""
    group: Group
    point: str

    @property
    def records(self) -> list[Record]:
        """One per seed."""
        return self.group.records

    def places(self, metric: str) -> list[Place]:
        """Return where all runs kept the items of a metric, in the order of the first one."""
        kept = [
            [Place(o.evaluator, o.task, o.split) for o in self._kept(r, metric)]
            for r in self.records
        ]
        return [place for place in dict.fromkeys(kept[0]) if all(place in own for own in kept)]

    def outcomes(self, metric: str, place: Place) -> list[Outcomes]:
        """Return the items of a metric, of each run."""
        return [
            o
            for record in self.records
            for o in self._kept(record, metric)
            if place == (o.evaluator, o.task, o.split)
        ]

    def side(self, metric: str, place: Place, number: int) -> Side:
        """Return the items of a metric for a paired test; runs of one number are the same ones."""
        outcomes = self.outcomes(metric, place)
        return Side(number, self.group.made_with, outcomes, self.group.seedless)

    def values(self, metric: str) -> list[list[Metric]]:
        """Return a metric at this point, or of the whole run: all of them, of each run."""
        return [
            [m for m in record.metrics if m.name == metric and m.point in ("", self.point)]
            for record in self.records
        ]

    def names(self) -> set[str]:
        """Return what its runs measured."""
        return {m.name for record in self.records for m in record.metrics}

    def _kept(self, record: Record, metric: str) -> list[Outcomes]:
        return [o for o in record.outcomes if o.metric == metric and o.point in ("", self.point)]


def arm(ref: str, folder: Path) -> Arm:
    """Return what `RUN`, `RUN@POINT` or `RUN+RUN+RUN@POINT` names; several runs are seeds of one.

    Args:
        ref: The name.
        folder: Folder of the records.

    Raises:
        UserError: For an unknown run or point, for runs that are not seeds of one spec, and where
            a run has several points and none is named.
    """
    keys, _, point = ref.partition("@")
    records = [find(folder, key) for key in keys.split("+")]
    groups = grouped(records, earlier(records, folder))
    if len(groups) > 1:
        raise UserError(
            f"{keys} are not runs of one spec that differ in their seed alone.",
            "Join only seeds of one spec with +; see what differs: effbench compare "
            + " ".join(keys.split("+")),
        )
    return Arm(ref, groups[0], _point(ref, point, groups[0]))


def _point(ref: str, point: str, group: Group) -> str:
    there = [p for p in points(group.records[0]) if p]
    if point and point not in there:
        hint = did_you_mean(point, there) if there else "It has one point alone: leave @ out."
        raise UserError(f"{ref} has no operating point {point!r}.", hint)
    if len(there) > 1 and not point:
        raise UserError(
            f"{ref} has {len(there)} operating points.",
            f"Name one of {', '.join(there)}: {ref}@{there[-1]}",
        )
    return point or (there[0] if there else "")
