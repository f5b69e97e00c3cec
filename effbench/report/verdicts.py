"""Whether the verdict of a table holds: its pairs of rows, tested anew from their records.

Each pair is held against each other alone, whatever else is in the table, and p-values are adjusted
(Holm) for the pairs that the verdict rests on. A metric that is counted needs no test.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from effbench.report.campaign import Campaign
from effbench.report.claims import Pair, split_row
from effbench.report.comparison.compare import compare
from effbench.report.comparison.metric_table import MetricTable
from effbench.report.comparison.select import REPORTED
from effbench.report.table import Value, points
from effbench.results.lookup import earlier
from effbench.results.reader import Reader
from effbench.results.records import Record
from effbench.stats import finding, holm
from effbench.util.errors import UserError, did_you_mean

Arms = dict[str, list[Record]]


@dataclass(frozen=True)
class Tested:
    """A pair of rows, and what its records say."""

    pair: Pair
    metric: str
    difference: Value
    """First row - second row, with its 95 % interval where it has one."""
    found: str
    """`lower`, `higher`, `cannot be told apart`, or why there is no test."""
    by_test: bool
    """Whether it was tested, and not only counted."""

    @property
    def holds(self) -> bool:
        """Whether the records say what the verdict rests on."""
        return self.found == self.pair.finding and abs(self.difference.value) >= self.pair.by

    def __str__(self) -> str:
        said = f"{self.pair.row} against {self.pair.against}: {self.metric} {self.found}"
        least = f" by at least {self.pair.by:g}" if self.pair.by else ""
        stale = "" if self.holds else f", where the file has {self.pair.finding}{least}"
        return f"{said} ({self.difference}){stale}"


def retested(campaign: Campaign, results: Path, reader: Reader | None = None) -> list[Tested]:
    """Return the pairs that the verdict of a table rests on, tested anew.

    Args:
        campaign: The table.
        results: Folder of runs and records.
        reader: What has read some of them already.

    Raises:
        UserError: When a record, a row or a metric is missing.
    """
    pairs = campaign.verdict.rests_on if campaign.verdict else []
    if not pairs:
        return []
    names = {_arm(campaign, name) for pair in pairs for name in (pair.row, pair.against)}
    reader = reader or Reader(results / "records")
    arms = campaign.records(results, [arm for arm in campaign.arms if arm in names], reader)
    known = earlier([r for records in arms.values() for r in records], reader)
    tables = [_compared(campaign, arms, pair, known) for pair in pairs]
    adjusted = iter(holm([d.p for table in tables if (d := table.rows[1].difference)]))
    return [
        Tested(pair, str(table.kind), *_found(table, adjusted))
        for pair, table in zip(pairs, tables, strict=True)
    ]


def line(campaign: Campaign, results: Path) -> list[str]:
    """Return the ceiling and the verdict of a table in sentences, stale ones said to be.

    Raises:
        UserError: As `retested` does.
    """
    said = [f"Ceiling: {campaign.ceiling}"] if campaign.ceiling else []
    verdict = campaign.verdict
    if verdict is None:
        return said
    found = retested(campaign, results)
    stale = "" if all(t.holds for t in found) else "STALE, was "
    parts = [f"Verdict: {stale}{verdict.state}. {verdict.reason}"]
    parts += [f"Control: {verdict.control}"] if verdict.control else []
    parts += [f"Rests on: {'; '.join(map(str, found))}."] if found else []
    parts += [f"Rests on: {verdict.bench}."] if verdict.bench else []
    return [*said, " ".join(parts)]


# -- one pair ----------------------------------------------------------------------------------


def _compared(campaign: Campaign, arms: Arms, pair: Pair, known: Sequence[Record]) -> MetricTable:
    """Return the table of two rows, the second of which is held against the first."""
    metric = pair.metric or campaign.metrics[0]
    sides = [_side(campaign, arms, name) for name in (pair.against, pair.row)]
    wanted: dict[str, list[str]] = {}
    for arm, point in sides:
        wanted.setdefault(arm, []).append(point)
    runs = [at_points(record, metric, own) for arm, own in wanted.items() for record in arms[arm]]
    names = {"+".join(r.key for r in arms[arm]): arm for arm in wanted}
    found = compare(runs, known, names=names, held=False, alone=False).metrics
    tables = [table for table in found if len(table.rows) == 2]
    if not tables:
        has = {m.name for arm in wanted for record in arms[arm] for m in record.metrics}
        raise UserError(
            f"{campaign.name}: {pair.row} and {pair.against} have no {metric} in common.",
            did_you_mean(metric, has),
        )
    return min(tables, key=lambda t: (not t.tested, t.kind.split != REPORTED))


def _arm(campaign: Campaign, row: str) -> str:
    return split_row(row, campaign.arms, campaign.name)[0]


def _side(campaign: Campaign, arms: Arms, name: str) -> tuple[str, str]:
    arm, point = split_row(name, arms, campaign.name)
    has = points(arms[arm][0])
    if not point and len(has) == 1:
        return arm, has[0]
    if point not in has:
        said = f"{campaign.name}: the verdict rests on {name!r}, which is no row of the table."
        raise UserError(said, f"Points of {arm}: {', '.join(has)}.")
    return arm, point


def at_points(record: Record, metric: str, wanted: Sequence[str]) -> Record:
    """Return a record with one metric alone, at some operating points in this order.

    Values of the run as a whole, which have no point, count for each of them.
    """
    own = [m for m in record.metrics if m.name == metric]
    kept = [m for p in wanted for m in own if m.point == p] or own
    outcomes = [o for o in record.outcomes if o.metric == metric and o.point in wanted]
    return replace(record, metrics=kept, outcomes=outcomes)


def _found(table: MetricTable, adjusted: Iterator[float]) -> tuple[Value, str, bool]:
    """Return a difference and what it shows; each test takes the next p-value."""
    base, row = table.rows
    unit, d = row.value.unit, row.difference
    if d is not None:
        return Value(d.value, unit, d.low, d.high), finding(d, next(adjusted)), True
    value = row.value.value - base.value.value
    exact = "lower" if value < 0 else "higher" if value > 0 else "equal"
    return Value(value, unit), row.finding or exact, False
