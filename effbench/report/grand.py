"""The grand table: what all tables measured on one model, and what became of their papers' claims.

From each table come the rows that its verdict rests on, which its file names, so that no row is
here because its number is good. Rows are held against each other only where they can be: the same
metric over the same items of the same dataset, cut and evaluated alike, in one dtype. In such a
group each row is held against the untouched model, where that is in one of the tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from effbench.api.schema import build
from effbench.report.campaign import Campaign
from effbench.report.campaign_file import title_of
from effbench.report.claims import OPEN, split_row
from effbench.report.comparison.compare import compare
from effbench.report.comparison.metric_table import MetricTable
from effbench.report.comparison.metric_table import Row as Compared
from effbench.report.comparison.versions import of_versions
from effbench.report.facts import Facts, facts
from effbench.report.speeds import (
    Evaluated,
    at_point,
    decoding_speed,
    decoding_speedup,
    evaluated,
)
from effbench.report.table import Value, points
from effbench.report.verdicts import Tested, retested
from effbench.results.lookup import earlier
from effbench.results.reader import Reader
from effbench.results.records import Outcomes, Record
from effbench.results.store import Store
from effbench.stats import Difference
from effbench.util import yamls
from effbench.util.errors import UserError

KEY = "gathers"
"""Key by which the file of a grand table is told from that of a campaign."""


MISSING = "no records here"
"""State of a verdict that rests on rows whose records are not in this folder of results."""


@dataclass(frozen=True)
class Gathers:
    """What a grand table gathers."""

    model: str
    """Config of conf/model."""


class Ground(NamedTuple):
    """What evaluations must have in common for their numbers to be compared."""

    evaluator: str
    version: int
    metric: str
    task: str
    split: str
    ids: str
    """Hash of the items' ids."""
    items: int
    dataset: str
    length: int
    """Most tokens of a row."""
    dtype: str

    def __str__(self) -> str:
        where = f" of {self.task}" if self.task else ""
        rows = f"{self.items} items of {self.task or self.dataset}, at most {self.length} tokens"
        return f"{self.metric}{where} on {self.split}: {rows}, {self.dtype}"


class Member(NamedTuple):
    """An arm of a table, with the operating points of it that are shown."""

    table: str
    arm: str
    records: list[Record]
    points: list[str]


@dataclass(frozen=True)
class Row:
    """A row of the grand table."""

    table: str
    name: str
    """Arm and operating point."""
    seeds: int
    value: Value
    difference: Value | None
    """From the first row of its group, in the unit of the value, with a 95 % interval."""
    letters: str
    weight_bytes: float | None
    flops_per_token: float | None
    """Of decoding, counted from the shape."""
    tokens_per_second: Value | None
    """Of decoding, where a record of the same artefact or untouched model has it."""
    speedup: Value | None
    """Of decoding over that of the dense model, where such a record timed them in turn."""
    train_tokens: float | None
    """Of the run and those that it went on from, a mean over seeds."""
    train_layer_forwards: float | None
    """Positions times layers, counted as they were trained."""


@dataclass(frozen=True)
class Group:
    """Rows that can be compared with each other."""

    ground: Ground
    rows: list[Row]
    """The first one is what the others are held against."""
    versions: list[str]
    """A sentence for each part of effbench that made the rows in different versions."""


@dataclass(frozen=True)
class System:
    """A table with a verdict: claim, scale and what became of it."""

    campaign: Campaign
    found: list[Tested]
    """The pairs that its verdict rests on; empty where it has no records."""

    @property
    def state(self) -> str:
        """Its verdict, or that its records no longer bear it, or are not here."""
        verdict = self.campaign.verdict
        assert verdict
        if verdict.state not in OPEN and verdict.rests_on and not self.found:
            return MISSING
        stale = "" if all(pair.holds for pair in self.found) else "STALE: "
        return stale + verdict.state

    @property
    def ours(self) -> str:
        """The scale of what we ran, or that it was a benchmark; empty where nothing was."""
        assert self.campaign.verdict
        bench = "benchmark" if self.campaign.verdict.bench else ""
        return self.campaign.scale if self.found else bench


@dataclass(frozen=True)
class Grand:
    """All systems, and their rows in groups that can be compared."""

    name: str
    title: str
    groups: list[Group]
    systems: list[System]


def is_grand(path: Path) -> bool:
    """Whether a file of conf/table is that of a grand table."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return any(line.startswith(f"{KEY}:") for line in lines)


def gathered(path: Path, results: Path, tables: Sequence[Campaign]) -> Grand:
    """Return the grand table of a file, from records alone.

    Args:
        path: The file.
        results: Folder of runs and records.
        tables: What to gather; those without a verdict are left out.

    Raises:
        UserError: When the file has unknown keys, or a record is missing.
    """
    values = dict(yamls.read(path))
    wanted = build(Gathers, values.pop(KEY) or {}, f"{path.name}.{KEY}", path.name)
    if values:
        raise UserError(f"Unknown key {next(iter(values))!r} in {path.name}.", f"Only {KEY}: is.")
    reader, there = Reader(results / "records"), facts(Store(results))
    systems = [System(table, _found(table, results, reader)) for table in tables if table.verdict]
    known = {fact.key: fact for fact in there}
    found = [s for s in systems if s.found]
    members = [m for s in found for m in _members(s, results, wanted.model, known, reader)]
    others = evaluated(there)
    groups = [_group(ground, own, others, reader) for ground, own in _grounds(members).items()]
    return Grand(path.stem, title_of(path), groups, systems)


def _found(table: Campaign, results: Path, reader: Reader) -> list[Tested]:
    return retested(table, results, reader) if table.manifest(results).is_file() else []


# -- which rows --------------------------------------------------------------------------------


def _members(
    system: System, results: Path, model: str, known: Mapping[str, Facts], reader: Reader
) -> Iterator[tuple[Ground, Member]]:
    """Yield the rows of a verdict, and the untouched model, by what they can be compared with."""
    table, keys = system.campaign, system.campaign.keys(results)
    wanted = {arm: {""} for arm, own in keys.items() if _is_untouched(known[own[0]])}
    metric = table.metrics[0]
    for pair in system.found:
        for name in (pair.pair.row, pair.pair.against) if pair.by_test else ():
            arm, point = split_row(name, keys, table.name)
            wanted.setdefault(arm, set()).add(point)
            metric = pair.pair.metric or metric
    if not wanted:  # nothing was tested
        return
    arms = table.records(results, [arm for arm in keys if arm in wanted], reader)
    for arm, own in ((arm, wanted[arm]) for arm in arms):
        ground = _ground(arms[arm][0], metric)
        if ground and arms[arm][0].name_of("model") == model:
            shown = [p for p in points(arms[arm][0]) if p in own]
            yield ground, Member(table.name, arm, arms[arm], shown or points(arms[arm][0])[-1:])


def _untouched(record: Record) -> bool:
    return record.stage == "eval" and not record.parent and record.name_of("method") == "none"


def _is_untouched(fact: Facts) -> bool:
    return fact.stage == "eval" and not fact.parent and fact.method == "none"


def _ground(record: Record, metric: str) -> Ground | None:
    """Return what a metric of a record can be compared with; None without outcomes of items."""
    own = [o for o in record.outcomes if o.metric == metric]
    if not own:
        return None
    first = min(own, key=lambda o: o.split != "test")
    versions = record.spec.get("versions") or {}
    data = record.spec.get("dataset") or {}
    return Ground(
        first.evaluator,
        versions.get(f"evaluator.{first.evaluator}", 1),
        *(metric, first.task, first.split, first.ids, len(first.values)),
        record.name_of("dataset"),
        int(data.get("max_length") or 0),
        str((record.spec.get("hardware") or {}).get("dtype", "")),
    )


def _grounds(members: Sequence[tuple[Ground, Member]]) -> dict[Ground, list[Member]]:
    """Return the members by ground, largest first, each set of runs once, untouched ones first."""
    found: dict[Ground, dict[str, Member]] = {}
    for ground, member in members:
        own = found.setdefault(ground, {})
        keys = "+".join(record.key for record in member.records)
        have = own.get(keys)
        shown = [*have.points, *member.points] if have else member.points
        own[keys] = (have or member)._replace(points=list(dict.fromkeys(shown)))
    ordered = sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))
    return {
        ground: sorted(own.values(), key=lambda m: not _untouched(m.records[0]))
        for ground, own in ordered
    }


# -- one group ---------------------------------------------------------------------------------


def _group(ground: Ground, members: Sequence[Member], others: Evaluated, reader: Reader) -> Group:
    """Return the rows of a group, held against its first one, with letters for all pairs."""
    runs = [_only(record, ground, m.points) for m in members for record in m.records]
    known = earlier(runs, reader)
    by_name = {f"{m.table}: {m.arm}": m for m in members}
    names = {"+".join(r.key for r in m.records): name for name, m in by_name.items()}
    found = compare(runs, known, names=names, held=False, alone=False)
    rows = []
    for row in _tested(found.metrics).rows:
        member = by_name[row.label]
        asked = member.records, row.point, others, reader
        rows.append(_row(row, member, known, decoding_speed(*asked), decoding_speedup(*asked)))
    return Group(ground, rows, of_versions(found.notes))


def _tested(tables: Sequence[MetricTable]) -> MetricTable:
    return max(tables, key=lambda table: (table.tested, len(table.rows)))


def _only(record: Record, ground: Ground, wanted: Sequence[str]) -> Record:
    """Return a record with the metric of a group alone, at some operating points."""

    def fits(name: str, task: str, split: str, point: str) -> bool:
        return (name, task, split) == ground[2:5] and point in wanted

    metrics = [m for m in record.metrics if fits(m.name, m.task, m.split, m.point)]
    outcomes: list[Outcomes] = [
        o for o in record.outcomes if fits(o.metric, o.task, o.split, o.point)
    ]
    return replace(record, metrics=metrics, outcomes=outcomes)


def _row(
    row: Compared,
    member: Member,
    known: Sequence[Record],
    speed: Value | None,
    speedup: Value | None,
) -> Row:
    d = row.difference
    runs = [_lineage(record, known) for record in member.records]
    return Row(
        member.table,
        f"{member.arm} {row.point}".rstrip(),
        row.seeds,
        row.value,
        _exact(d) if d else None,
        row.letters,
        _mean([at_point(r, "weight_bytes", row.point) for r in member.records]),
        _mean([at_point(r, "flops_per_token", row.point) for r in member.records]),
        speed,
        speedup,
        _mean([_summed(own, "train_tokens") for own in runs]),
        _mean([_summed(own, "train_layer_forwards") for own in runs]),
    )


def _exact(d: Difference) -> Value:
    """Return a difference in which what is left of summing equal numbers is zero."""
    value, low, high = (round(v, 9) for v in (d.value, d.low, d.high))
    return Value(value, "", low, high)


def _lineage(record: Record, known: Sequence[Record]) -> list[Record]:
    """Return a run and those that it went on from."""
    by_key = {r.key: r for r in known}
    found = [record]
    while found[-1].parent in by_key:
        found.append(by_key[found[-1].parent])
    return found


def _summed(runs: Sequence[Record], name: str) -> Value | None:
    """Return the sum of a metric of training over runs."""
    own = [m.value for r in runs for m in r.metrics if m.name == name and m.phase in ("train", "")]
    return Value(sum(own)) if own else None


def _mean(values: Sequence[Value | None]) -> float | None:
    numbers = [v.value for v in values if v is not None]
    return sum(numbers) / len(numbers) if numbers and len(numbers) == len(values) else None
