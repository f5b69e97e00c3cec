"""What several runs show side by side: differences with their tests, and what was not equal.

Every run and operating point is held against the first one. Where both kept the outcomes of the
same items, the difference comes from a paired test whose p-value is corrected (Holm) for the rows
of its table. What was measured, counted and modelled never shares a column.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from effbench.records import Metric, Outcomes, Record, strict
from effbench.report.labels import ABSENT, differences, labels
from effbench.report.table import Cell, Table, Value, as_value, modelled, show
from effbench.stats import Difference, finding, holm, paired_difference, verdict

if TYPE_CHECKING:
    from rich.console import Group as RichGroup

USUAL = (
    "peak_bytes",
    "step_seconds",
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "trainable_params",
    "weight_bytes",
    "artefact_bytes",
    "kv_bytes",
)
"""Metrics without a test that a terminal shows unless everything is asked for."""
EQUAL = 0.01
"""Budgets count as equal when the largest exceeds the smallest by at most this share."""


class Kind(NamedTuple):
    """What two metrics must have in common to be compared."""

    evaluator: str
    metric: str
    task: str
    split: str
    phase: str
    obtained: str

    def __str__(self) -> str:
        where = f" of {self.task}" if self.task else ""
        where += f" on {self.split}" if self.split else ""
        when = f" ({self.phase})" if self.phase else ""
        return f"{self.metric}{where}{when}"


@dataclass(frozen=True)
class Row:
    """One run at one operating point against the first one."""

    label: str
    key: str
    point: str
    value: Value
    ratio: float | None = None
    """Value / first value."""
    difference: Difference | None = None
    """Value - first value by a paired test; None for the first row or without shared items."""
    p_adjusted: float | None = None
    """Its p-value, Holm-adjusted over the rows of the table."""
    finding: str = ""
    """`lower`, `higher`, `cannot be told apart`, or why there is no test."""
    verdict: str = ""
    """The same in a sentence."""

    @property
    def name(self) -> str:
        """Label and point."""
        return f"{self.label} {self.point}".rstrip()


@dataclass(frozen=True)
class MetricTable:
    """One metric over all runs and points."""

    kind: Kind
    rows: list[Row]

    @property
    def tested(self) -> bool:
        """Whether any row has a paired test, or says why it has none."""
        return any(row.finding for row in self.rows)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the rows."""
        return tuple(row.name for row in self.rows)

    def table(self) -> Table:
        """Return the table for people."""
        unit = self.rows[0].value.unit
        by = f", {self.kind.evaluator}" if self.kind.evaluator else ""
        warning = modelled(self.kind.obtained)
        title = f"{self.kind}{f', {unit}' if unit else ''}{by}{f', {warning}' if warning else ''}"
        first = self.rows[0].name
        rows: list[tuple[Cell, ...]] = [
            (r.name, r.value._replace(unit=""), _value(r.difference), _p(r.p_adjusted), r.finding)
            for r in self.rows
        ]
        tests = sorted({row.difference.test for row in self.rows if row.difference})
        notes = [f"Difference: against {first}, mean over items, 95 % interval."]
        notes += [f"p: {' and '.join(tests)}, adjusted after Holm."] if tests else []
        return Table(title, ("run", "value", "difference", "p", "finding"), rows, tuple(notes))


@dataclass(frozen=True)
class Budget:
    """Something that a fair comparison holds equal."""

    name: str
    values: list[float | str | None]
    """One per run; None where it is not recorded."""

    @property
    def equal(self) -> bool | None:
        """Whether all runs had the same, within 1 %; None when it is not recorded for all."""
        if any(v is None for v in self.values):
            return None
        numbers = [v for v in self.values if isinstance(v, int | float)]
        if len(numbers) < len(self.values):
            return len(set(self.values)) == 1
        return max(numbers) <= (1 + EQUAL) * min(numbers)


@dataclass(frozen=True)
class Comparison:
    """Everything that a comparison found."""

    labels: list[str]
    keys: list[str]
    metrics: list[MetricTable]
    budgets: list[Budget]
    differs: dict[str, list[Any]]
    """Dotted keys of the specs that are not the same, with one value per run."""
    notes: list[str]

    def tables(self, full: bool = True) -> list[Table]:
        """Return the tables for people: tested metrics, other numbers, budgets, settings.

        Args:
            full: Whether to show every number that is there, or only the usual ones.
        """
        found = [m.table() for m in self.metrics if m.tested]
        shown = [m for m in self.metrics if full or m.kind.metric in USUAL]
        for obtained in ("measured", "counted", "modelled"):
            rest = [m for m in shown if not m.tested and m.kind.obtained == obtained]
            for names in dict.fromkeys(m.names for m in rest):
                found.append(_plain_table([m for m in rest if m.names == names], obtained))
        if len(self.keys) > 1:
            found += [self._budget_table(), self._settings_table(full)]
        return found

    def rich(self, full: bool = False) -> RichGroup:
        """Return the comparison for a terminal; see `tables`."""
        from rich.console import Group as RichGroup
        from rich.text import Text

        tables = [part for table in self.tables(full) for part in (table.rich(), Text())]
        return RichGroup(*tables, *(Text(f"Note: {note}") for note in self.notes))

    def markdown(self) -> str:
        """Return the comparison as GitHub Markdown."""
        parts = [table.markdown() for table in self.tables()]
        parts += ["\n".join(f"- {note}" for note in self.notes) + "\n"] if self.notes else []
        return "\n".join(parts)

    def csv(self) -> str:
        """Return all metrics as one long CSV, one row per metric, run and point."""
        head = (*Kind._fields, "unit", "run", "key", "point", "value", "difference", "ratio")
        tail = ("p_adjusted", "finding", "verdict")
        rows: list[tuple[Cell, ...]] = [
            (
                *(*m.kind, r.value.unit, r.label, r.key, r.point),
                *(r.value, _value(r.difference), r.ratio, r.p_adjusted, r.finding, r.verdict),
            )
            for m in self.metrics
            for r in m.rows
        ]
        return Table("", (*head, *tail), rows).csv()

    def json(self) -> str:
        """Return the comparison as JSON."""
        metrics = [
            {**m.kind._asdict(), "rows": [_row_json(row) for row in m.rows]} for m in self.metrics
        ]
        budgets = [{**asdict(b), "equal": b.equal} for b in self.budgets]
        whole = {**asdict(replace(self, metrics=[], budgets=[]))}
        whole |= {"metrics": metrics, "budgets": budgets}
        return json.dumps(strict(whole), indent=1, allow_nan=False) + "\n"

    def _budget_table(self) -> Table:
        words = {True: "yes", False: "NO", None: "not recorded for all"}
        rows: list[tuple[Cell, ...]] = [
            (b.name, *(show(v) for v in b.values), words[b.equal]) for b in self.budgets
        ]
        return Table("What was held equal", ("budget", *self.labels, "equal"), rows)

    def _settings_table(self, full: bool) -> Table:
        """Return the settings that differ; unless `full`, only those that all runs have."""
        rows: list[tuple[Cell, ...]] = [
            (key, *(ABSENT if v is None else str(v) for v in values))
            for key, values in self.differs.items()
            if full or ABSENT not in values
        ]
        return Table("What differs between the specs", ("setting", *self.labels), rows)


def compare(records: Sequence[Record]) -> Comparison:
    """Compare runs, or the operating points of one run, with the first run's first point."""
    names = labels(records)
    groups = [_grouped(record) for record in records]
    tables, notes = [], []
    missing: dict[str, list[str]] = {}
    for kind, own in groups[0].items():
        lacking = [n for n, group in zip(names, groups, strict=True) if kind not in group]
        if len(lacking) == len(records) - 1 and len(own) == 1:
            notes += [_not_shared(kind, names, groups)] if len(records) > 1 else []
            continue
        if lacking:
            missing.setdefault(", ".join(lacking), []).append(str(kind))
        entries = [
            (name, record, metric)
            for name, record, group in zip(names, records, groups, strict=True)
            for metric in group.get(kind, [])
        ]
        tables.append(MetricTable(kind, _rows(kind, entries)))
    notes += [f"{who} has no {', '.join(what)}." for who, what in missing.items()]
    return Comparison(
        names,
        [record.key for record in records],
        tables,
        _budgets(records),
        differences(records),
        notes,
    )


def _grouped(record: Record) -> dict[Kind, list[Metric]]:
    evaluators = {(o.metric, o.task, o.split): o.evaluator for o in record.outcomes}
    groups: dict[Kind, list[Metric]] = {}
    for m in record.metrics:
        evaluator = evaluators.get((m.name, m.task, m.split), "")
        kind = Kind(evaluator, m.name, m.task, m.split, m.phase, m.obtained)
        groups.setdefault(kind, []).append(m)
    return groups


def _not_shared(
    kind: Kind, names: Sequence[str], groups: Sequence[dict[Kind, list[Metric]]]
) -> str:
    others = [
        f"{other.obtained} in {name}"
        for name, group in zip(names, groups, strict=True)
        for other in group
        if other[1:5] == kind[1:5] and other.obtained != kind.obtained
    ]
    if others:
        return f"{kind} is {kind.obtained} in {names[0]} but {', '.join(others)}: not compared."
    return f"{kind} is only in {names[0]}."


def _rows(kind: Kind, entries: list[tuple[str, Record, Metric]]) -> list[Row]:
    label, first, base = entries[0]
    rows = [Row(label, first.key, base.point, as_value(base))]
    reference = _outcomes(first, kind, base.point)
    for name, record, metric in entries[1:]:
        row = Row(name, record.key, metric.point, as_value(metric))
        if base.value:
            row = replace(row, ratio=metric.value / base.value)
        rows.append(_tested(row, _outcomes(record, kind, metric.point), reference))
    adjusted = iter(holm([row.difference.p for row in rows if row.difference]))
    return [_judged(row, rows[0], next(adjusted)) if row.difference else row for row in rows]


def _tested(row: Row, own: Outcomes | None, reference: Outcomes | None) -> Row:
    if own is None or reference is None:
        return row
    if own.ids != reference.ids or len(own.values) != len(reference.values):
        words = "not the same items: no paired test"
        return replace(row, finding=words, verdict=words)
    return replace(row, difference=paired_difference(own.values, reference.values))


def _judged(row: Row, first: Row, p: float) -> Row:
    assert row.difference is not None
    return replace(
        row,
        p_adjusted=p,
        finding=finding(row.difference, p),
        verdict=verdict(row.name, first.name, row.difference, row.value.unit, p),
    )


def _outcomes(record: Record, kind: Kind, point: str) -> Outcomes | None:
    wanted = (kind.evaluator, kind.metric, kind.task, kind.split, point)
    found = (
        o for o in record.outcomes if (o.evaluator, o.metric, o.task, o.split, o.point) == wanted
    )
    return next(found, None)


# -- budgets -----------------------------------------------------------------------------------


def _budgets(records: Sequence[Record]) -> list[Budget]:
    rows: dict[str, list[float | str | None]] = {
        "base model": [r.name_of("model") or None for r in records],
        "dataset": [r.name_of("dataset") or None for r in records],
        "training tokens": [_metric(r, "train_tokens") for r in records],
        "layer forwards": [_metric(r, "train_layer_forwards") for r in records],
        "optimiser steps": [_steps(r) for r in records],
        "trainable parameters": [_metric(r, "trainable_params") for r in records],
    }
    return [Budget(name, values) for name, values in rows.items()]


def _metric(record: Record, name: str) -> float | None:
    """Return a metric of the whole run, or its largest one over the operating points."""
    return max((m.value for m in record.metrics if m.name == name), default=None)


def _steps(record: Record) -> float | None:
    if record.stage != "train":
        return None
    taken = _metric(record, "train_steps")
    return taken if taken is not None else (record.spec.get("train") or {}).get("max_steps")


# -- parts of tables ---------------------------------------------------------------------------


def _plain_table(metrics: Sequence[MetricTable], obtained: str) -> Table:
    """Return metrics of the same rows, without a test, along the shorter side of the table."""
    titles = {
        "measured": "Measured, without a paired test",
        "counted": "Counted",
        "modelled": "Modelled, not measured",
    }
    heads = [_metric_head(m) for m in metrics]
    names = metrics[0].names
    cells: list[list[Cell]] = [[_with_ratio(row, m.rows[0]) for row in m.rows] for m in metrics]
    if len(names) <= len(metrics):
        rows = [(head, *row) for head, row in zip(heads, cells, strict=True)]
        return Table(titles[obtained], ("metric", *names), rows)
    turned = [(name, *column) for name, column in zip(names, zip(*cells, strict=True), strict=True)]
    return Table(titles[obtained], ("run", *heads), turned)


def _metric_head(metric: MetricTable) -> str:
    unit = metric.rows[0].value.unit
    return f"{metric.kind}, {unit}" if unit and not unit.startswith("bytes") else str(metric.kind)


def _with_ratio(row: Row, first: Row) -> str:
    if row.ratio is None or row.value.value == first.value.value:
        return str(row.value)
    return f"{row.value} ({_times(row.ratio)}×)"


def _times(ratio: float) -> str:
    if abs(ratio) >= 100:
        return f"{ratio:,.0f}"
    return f"{ratio:.2f}" if abs(ratio) >= 0.1 else f"{ratio:.2g}"


def _value(difference: Difference | None) -> Value | None:
    if difference is None:
        return None
    return Value(difference.value, "", difference.low, difference.high)


def _p(p: float | None) -> str:
    if p is None:
        return ""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _row_json(row: Row) -> dict[str, Any]:
    return {**asdict(row), "value": row.value._asdict()}
