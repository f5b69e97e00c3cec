"""What a comparison found, as tables, Markdown, CSV and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from effbench.report.comparison.budgets import Budget
from effbench.report.comparison.metric_table import MetricTable, Row
from effbench.report.labels import ABSENT, by_name
from effbench.report.table import Cell, Table, show, without_html
from effbench.results.records import strict

if TYPE_CHECKING:
    from rich.console import Group as RichGroup
    from rich.console import RenderableType
    from rich.table import Table as RichTable

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

    def rich(
        self,
        full: bool = False,
        drawn: Callable[[Table], Sequence[RichTable]] = lambda table: [table.rich()],
    ) -> RichGroup:
        """Return the comparison for a terminal.

        Args:
            full: As for `tables`.
            drawn: Makes the drawings of a table.
        """
        from rich.console import Group as RichGroup
        from rich.text import Text

        tables: list[RenderableType] = []
        for table in self.tables(full):
            tables += [*drawn(table), Text()]
        notes = [Text(f"Note: {note}") for note in self.notes]
        head = [Text("In words", style="italic")] if self.words else []
        return RichGroup(*tables, *notes, *head, *(Text(line) for line in self.words))

    def markdown(self) -> str:
        """Return the comparison as GitHub Markdown."""
        parts = [table.markdown() for table in self.tables()]
        parts += ["\n".join(f"- {note}" for note in self.notes) + "\n"] if self.notes else []
        if self.words:
            parts += ["**In words**\n", "\n".join(f"- {line}" for line in self.words) + "\n"]
        return without_html("\n".join(parts))

    def csv(self) -> str:
        """Return all metrics as one long CSV, one row per metric, run or group, and point."""
        rows = [row for metric in self.metrics for row in metric.csv_rows()]
        return Table("", tuple(rows[0]) if rows else (), [tuple(r.values()) for r in rows]).csv()

    def json(self) -> str:
        """Return the comparison as JSON."""
        budgets = [{**asdict(b), "equal": b.equal} for b in self.budgets]
        whole = {**asdict(replace(self, metrics=[], budgets=[]))}
        whole |= {"metrics": [m.json() for m in self.metrics], "budgets": budgets}
        return json.dumps(strict(whole), indent=1, allow_nan=False) + "\n"

    def _budget_table(self) -> Table:
        words = {True: "yes", False: "NO", None: "not recorded for all"}
        rows: list[tuple[Cell, ...]] = [
            (b.name, *(show(v) for v in b.values), words[b.equal]) for b in self.budgets
        ]
        return Table("What was held equal", ("budget", *self.labels, "equal"), rows)

    def _settings_table(self, full: bool) -> Table:
        """Return the settings that differ; unless `full`, only among the runs that have them."""
        rows: list[tuple[Cell, ...]] = [
            (key, *(ABSENT if v is None else str(v) for v in values))
            for key, values in by_name(self.differs).items()
            if full or len({str(v) for v in values if v != ABSENT}) > 1
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
