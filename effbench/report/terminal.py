"""Records in a terminal."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from effbench.api.account import lines
from effbench.report.table import (
    Cell,
    Table,
    as_value,
    comparison,
    tasks_table,
)
from effbench.util.wrap import write

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

    from effbench.report.comparison.result import Comparison
    from effbench.results.query import Rows
    from effbench.results.records import Metric, Record


EVALUATED = (
    "loss",
    "bits_per_byte",
    "accuracy",
    "accuracy_norm",
    "exact_match",
    "agreement",
    "kl",
    "flips",
    "decode_tokens_per_second",
)
"""Columns of one run, where it has them."""


def print_table(table: Table, named: int = 1) -> None:
    """Print a table: drawn in a terminal, as plain aligned columns elsewhere.

    Args:
        table: In a terminal without room for its words, its columns stand in several below each
            other.
        named: First columns, which say what a row is and are in each of these.
    """
    if sys.stdout.isatty():
        console = _console()
        for part in _drawn(table, named, console):
            console.print(part)
    else:
        print(f"{table.title}\n\n{table.text()}\n" if table.title else f"{table.text()}\n")


CUT = "…"
"""What rich puts in the place of the end of a word that there is no room for."""


def _drawn(table: Table, named: int, console: Console) -> list[RichTable]:
    """Return a table for a terminal, in parts where it has no room for a word of it whole."""
    if not _is_cut(table, console):
        return [table.rich()]
    parts = table.fitted(console.width, named)
    return [part.rich(fold=_is_cut(part, console)) for part in parts]


def _is_cut(table: Table, console: Console) -> bool:
    """Whether a word of a table is cut where it is drawn."""
    with console.capture() as drawn:
        console.print(table.rich())
    return CUT in drawn.get() and CUT not in table.text()


def print_comparison(found: Comparison, full: bool = False) -> None:
    """Print a comparison of runs."""
    console = _console()

    def drawn(table: Table) -> list[RichTable]:
        return _drawn(table, 1 + (table.columns[1:2] == ("point",)), console)

    console.print(found.rich(full, drawn))


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


def print_record(record: Record, full: bool = False) -> None:
    """Print what a run was, what it gave at each operating point, and what it cost.

    Args:
        record: The run.
        full: Print every metric of every point, split and task, too.
    """
    evaluated = _evaluated(record)
    print_table(evaluated, named=int("point" in evaluated.columns))
    tasks = tasks_table(record)
    if tasks.rows:
        for part in _fitted(tasks, 2 if "point" in tasks.columns else 1):
            print_table(part)
    print_table(_every(record) if full else _others(record))
    for line in lines(record.data):
        write(f"Data, {line}", sys.stdout)
    for note in record.notes:
        write(f"Note: {note}", sys.stdout)
    write(f"Key {record.key}: {record.label}, {record.seconds:.0f} s", sys.stdout)
    if not full and (hidden := len(record.metrics) - _shown(record)):
        write(f"{hidden} more metrics: effbench runs show {record.key[:8]} --full", sys.stdout)


def _fitted(table: Table, named: int) -> list[Table]:
    """Return a table in parts that the terminal has room for; whole where it is none."""
    return table.fitted(_console().width, named) if sys.stdout.isatty() else [table]


def _evaluated(record: Record) -> Table:
    own = replace(record, metrics=[m for m in record.metrics if not m.task])
    names = {m.name for m in own.metrics}
    wanted = [n for n in (*EVALUATED, "params", "weight_bytes") if n in names]
    table = comparison([own], wanted)
    rows = [row[1:] for row in table.rows]
    return Table(record.label, table.columns[1:], rows, table.notes)


def _others(record: Record) -> Table:
    rows = [_row(m) for m in record.metrics if _is_other(m)]
    return Table("", ("metric", "phase", "value", "unit", "obtained"), rows)


def _every(record: Record) -> Table:
    """Return every metric of a run, a row each."""
    places = [(m.point, " ".join(filter(None, (m.task, m.split)))) for m in record.metrics]
    rows = [(*_row(m), *place) for m, place in zip(record.metrics, places, strict=True)]
    columns = ("metric", "phase", "value", "unit", "obtained", "point", "data")
    used = [i for i, _ in enumerate(columns) if i < 5 or any(row[i] for row in rows)]
    return Table("", tuple(columns[i] for i in used), [tuple(row[i] for i in used) for row in rows])


def _row(m: Metric) -> tuple[Cell, ...]:
    unit = "" if m.unit.startswith("bytes") else m.unit
    return m.name, m.phase, as_value(m), unit, m.obtained


def _is_other(m: Metric) -> bool:
    """Whether a metric is of the run, and not of an operating point or of data."""
    return not (m.point or m.split or m.task)


def _shown(record: Record) -> int:
    """Return how many metrics are printed without `full`."""
    names = {*EVALUATED, "params", "weight_bytes"}
    return sum(bool(m.task) or _is_other(m) or m.name in names for m in record.metrics)


def print_rows(rows: Rows) -> None:
    """Print the answer to a query."""
    table = Table("", rows.columns, [tuple(_cell(c) for c in row) for row in rows.rows])
    print_table(table)


def _cell(value: object) -> Cell:
    return value if isinstance(value, str | int | float) or value is None else str(value)
