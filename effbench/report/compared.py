"""What a comparison found, as tables, Markdown, CSV and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from effbench.records import strict
from effbench.report.budgets import Budget
from effbench.report.labels import ABSENT
from effbench.report.table import Cell, Table, Value, modelled, show
from effbench.stats import Difference, OverSeeds

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

OVER = ("items", "Welch", "Wilcoxon")
"""Tests over items or seeds alone, beside the one that covers both."""


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
    """One run, or group of seeds, at one operating point, beside the row it is held against."""

    label: str
    key: str
    """Run keys, joined by `+`."""
    point: str
    value: Value
    """Mean over seeds where there are several."""
    reference: int | None = None
    """Place in its table of the row that it is held against: its own where that is what others are
    held against, None where there is nothing."""
    seeds: int = 1
    """Runs behind it."""
    spread: float | None = None
    """Standard deviation over seeds."""
    ratio: float | None = None
    """Value / value of the reference."""
    difference: Difference | None = None
    """Value - value of the reference by a paired test; None for a reference itself or without
    shared items."""
    covers: str = ""
    """What the interval of the difference covers: `seeds and items`, or `items` alone."""
    items: Difference | None = None
    """The difference over items alone, where the first one covers seeds too."""
    over_seeds: OverSeeds | None = None
    """The difference over seeds alone, where both have several."""
    p_adjusted: float | None = None
    """p-value of the difference, Holm-adjusted over the rows of the table."""
    finding: str = ""
    """`lower`, `higher`, `cannot be told apart`, or why there is no test."""
    verdict: str = ""
    """The same in a sentence."""
    letters: str = ""
    """Rows that share one cannot be told apart, all pairs considered."""
    at_margin: str = ""
    """`equivalent`, `not worse` or `not shown`, where a margin was stated."""

    @property
    def name(self) -> str:
        """Label and point."""
        return f"{self.label} {self.point}".rstrip()


@dataclass(frozen=True)
class MetricTable:
    """One metric over all runs and points."""

    kind: Kind
    rows: list[Row]
    margin: float | None = None
    """Difference that would still count as none."""
    same_points: bool = False
    """Whether rows are held against the first run at their own point, not at its first."""

    @property
    def against(self) -> str:
        """What the rows are held against."""
        first = self.rows[0]
        if self.same_points:
            return f"the first run ({first.label}) at the same point"
        return first.name

    def reference(self, row: Row) -> Row | None:
        """Return the row that one is held against; None for one that is held against none."""
        other = None if row.reference is None else self.rows[row.reference]
        return None if other is row else other

    @property
    def tested(self) -> bool:
        """Whether any row has a paired test, or says why it has none."""
        return any(row.finding for row in self.rows)

    @property
    def of_seeds(self) -> bool:
        """Whether it is about items and has several seeds."""
        return bool(self.kind.evaluator) and any(row.seeds > 1 for row in self.rows)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the rows."""
        return tuple(row.name for row in self.rows)

    @property
    def title(self) -> str:
        """Metric, unit and evaluator."""
        unit = self.rows[0].value.unit
        by = f", {self.kind.evaluator}" if self.kind.evaluator else ""
        warning = modelled(self.kind.obtained)
        return f"{self.kind}{f', {unit}' if unit else ''}{by}{f', {warning}' if warning else ''}"

    def table(self) -> Table:
        """Return the table for people; columns that no row has are left out."""
        rows = self.rows
        seeds = any(row.seeds > 1 for row in rows)
        columns: list[tuple[str, list[Cell], bool]] = [
            ("run", [r.name for r in rows], True),
            ("seeds", [r.seeds for r in rows], seeds),
            ("value", [r.value._replace(unit="") for r in rows], True),
            ("sd over seeds", [_short(r.spread) for r in rows], seeds),
            ("difference", [_value(r.difference) for r in rows], self.tested),
            ("p", [_p(r.p_adjusted) for r in rows], self.tested),
            ("finding", [r.finding for r in rows], self.tested),
            ("letters", [r.letters for r in rows], any(r.letters for r in rows)),
            (f"within {_short(self.margin)}", [r.at_margin for r in rows], bool(self.margin)),
        ]
        seeds = seeds and self.tested
        columns += [(f"p {name}", [_over(r, name) for r in rows], seeds) for name in OVER]
        kept = [(name, cells) for name, cells, there in columns if there]
        body: list[tuple[Cell, ...]] = list(zip(*(cells for _, cells in kept), strict=True))
        return Table(self.title, tuple(name for name, _ in kept), body, self._notes(seeds))

    def _notes(self, seeds: bool) -> tuple[str, ...]:
        if not self.tested:
            return ("Value: mean over seeds, 95 % interval over seeds and items.",)
        covers = sorted({row.covers for row in self.rows if row.covers})
        tests = sorted({row.difference.test for row in self.rows if row.difference})
        notes = [f"Difference: against {self.against}, mean over items, 95 % interval"]
        notes[0] += f" over {' or '.join(covers)}." if covers else "."
        notes += [f"p: {' and '.join(tests)}, adjusted after Holm."] if tests else []
        if any(row.letters for row in self.rows):
            notes.append("Letters: rows that share one cannot be told apart (all pairs, Holm).")
        if seeds:
            notes.append("p items, p Welch, p Wilcoxon: over items or seeds alone, not adjusted.")
        return tuple(notes)


@dataclass(frozen=True)
class Comparison:
    """Everything that a comparison found."""

    labels: list[str]
    """One per run, or group of seeds."""
    keys: list[str]
    """Keys of each, joined by `+`."""
    metrics: list[MetricTable]
    budgets: list[Budget]
    differs: dict[str, list[Any]]
    """Dotted keys of the specs that are not the same, with one value per run or group."""
    notes: list[str]
    words: list[str] = field(default_factory=list)
    """What differs, what cannot be told apart, what was held equal: in sentences."""

    def tables(self, full: bool = True) -> list[Table]:
        """Return the tables for people: tested metrics, other numbers, budgets, settings.

        Args:
            full: Whether to show every number that is there, or only the usual ones.
        """
        found = [m.table() for m in self.metrics if m.tested or m.of_seeds]
        plain = [m for m in self.metrics if not (m.tested or m.of_seeds)]
        shown = [m for m in plain if full or m.kind.metric in USUAL]
        for obtained in ("measured", "counted", "modelled"):
            rest = [m for m in shown if m.kind.obtained == obtained]
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
        notes = [Text(f"Note: {note}") for note in self.notes]
        head = [Text("In words", style="italic")] if self.words else []
        return RichGroup(*tables, *notes, *head, *(Text(line) for line in self.words))

    def markdown(self) -> str:
        """Return the comparison as GitHub Markdown."""
        parts = [table.markdown() for table in self.tables()]
        parts += ["\n".join(f"- {note}" for note in self.notes) + "\n"] if self.notes else []
        if self.words:
            parts += ["**In words**\n", "\n".join(f"- {line}" for line in self.words) + "\n"]
        return "\n".join(parts)

    def csv(self) -> str:
        """Return all metrics as one long CSV, one row per metric, run or group, and point."""
        rows = [_csv_row(table, row) for table in self.metrics for row in table.rows]
        return Table("", tuple(rows[0]) if rows else (), [tuple(r.values()) for r in rows]).csv()

    def json(self) -> str:
        """Return the comparison as JSON."""
        metrics = [
            {
                **m.kind._asdict(),
                "margin": m.margin,
                "same_points": m.same_points,
                "rows": [_row_json(m, row) for row in m.rows],
            }
            for m in self.metrics
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
    cells: list[list[Cell]] = [[_with_ratio(m, row) for row in m.rows] for m in metrics]
    notes = (f"×: against {metrics[0].against}.",) if metrics[0].same_points else ()
    if len(names) <= len(metrics):
        rows = [(head, *row) for head, row in zip(heads, cells, strict=True)]
        return Table(titles[obtained], ("metric", *names), rows, notes)
    turned = [(name, *column) for name, column in zip(names, zip(*cells, strict=True), strict=True)]
    return Table(titles[obtained], ("run", *heads), turned, notes)


def _metric_head(metric: MetricTable) -> str:
    unit = metric.rows[0].value.unit
    return f"{metric.kind}, {unit}" if unit and not unit.startswith("bytes") else str(metric.kind)


def _with_ratio(table: MetricTable, row: Row) -> str:
    other = table.reference(row)
    if other is None or row.ratio is None or row.value.value == other.value.value:
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


def _over(row: Row, name: str) -> str:
    """Return the p-value of a test over items or seeds alone."""
    seeds = row.over_seeds
    if name == "items":
        return _p(row.items.p if row.items else None)
    return _p(None if seeds is None else seeds.welch if name == "Welch" else seeds.wilcoxon)


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _csv_row(table: MetricTable, row: Row) -> dict[str, Cell]:
    """Return one row of the CSV by column, numbers unrounded."""
    same = row.difference.equivalence if row.difference else None
    return {
        **table.kind._asdict(),
        "unit": row.value.unit,
        "run": row.label,
        "key": row.key,
        "point": row.point,
        "seeds": row.seeds,
        "value": row.value,
        "sd_over_seeds": row.spread,
        "against": _against(table, row),
        "difference": _value(row.difference),
        "covers": row.covers,
        "ratio": row.ratio,
        "p_adjusted": row.p_adjusted,
        "finding": row.finding,
        "verdict": row.verdict,
        "letters": row.letters,
        "margin": table.margin,
        "at_margin": row.at_margin,
        "p_equivalence": same.p if same else None,
        "p_items": row.items.p if row.items else None,
        "p_welch": row.over_seeds.welch if row.over_seeds else None,
        "p_wilcoxon": row.over_seeds.wilcoxon if row.over_seeds else None,
    }


def _row_json(table: MetricTable, row: Row) -> dict[str, Any]:
    found = {k: v for k, v in asdict(row).items() if k != "reference"}
    return {**found, "value": row.value._asdict(), "against": _against(table, row)}


def _against(table: MetricTable, row: Row) -> str:
    """Return the name of the row that one is held against, empty for none."""
    other = table.reference(row)
    return other.name if other else ""
