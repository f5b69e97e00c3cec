"""A campaign on one page: its main metric, the paper's claims, what was found and how firmly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from effbench.report import verdicts
from effbench.report.campaign import Campaign
from effbench.report.comparison.metric_table import MetricTable, Row
from effbench.report.comparison.result import Comparison
from effbench.report.comparison.sentences import APART, findings
from effbench.report.comparison.versions import of_versions
from effbench.report.table import Cell, Table, Value
from effbench.results.records import Record
from effbench.util.errors import UserError, did_you_mean

Form = Literal["terminal", "markdown", "latex", "csv"]


def rendered(
    campaign: Campaign,
    results: Path,
    form: Form = "terminal",
    full: bool = False,
    width: int = 0,
) -> str:
    """Return the table of a campaign, from its records alone.

    Args:
        campaign: What is compared.
        results: Folder of runs and records.
        form: Of the text.
        full: Whether to show every metric with its tests, budgets and settings.
        width: Of the terminal that it is for, in characters; 0 for none.

    Raises:
        UserError: When a record is missing, or none has the campaign's metric with a test.
    """
    found = campaign.compared(results, metrics=() if full else campaign.metrics[:1])
    tables = found.tables() if full else [short(campaign, found, form)]
    if form == "csv" and full:
        return found.csv()
    lines = [*found.notes, *found.words] if full else _held(found)
    lines += [*campaign.tuned(results), *paper_lines(campaign), *verdicts.line(campaign, results)]
    lines += sentences(campaign, found, campaign.records(results))
    return with_lines(tables, lines, form, width)


def with_lines(tables: Sequence[Table], lines: Sequence[str], form: Form, width: int = 0) -> str:
    """Return tables and the sentences below them in a form; CSV is the first table alone.

    Args:
        tables: One below the other.
        lines: The sentences.
        form: Of the text.
        width: As for `rendered`.
    """
    if form == "csv":
        return tables[0].csv()
    if form == "latex":
        return "\n".join([*(table.latex() for table in tables), *latex_comments(lines)]) + "\n"
    if form == "markdown":
        listed = "\n".join(f"- {line}" for line in lines)
        return "\n".join([*(table.markdown() for table in tables), listed]) + "\n"
    text = [f"{table.title}\n\n{_within(table, width)}\n" for table in tables]
    return "\n".join([*text, *lines]) + "\n"


def _within(table: Table, width: int) -> str:
    """Return a table in lines of a terminal; in several below each other where it has no room."""
    bare = replace(table, notes=())
    text = bare.text(width)
    if width and max(map(len, text.splitlines())) > width:
        text = "\n\n".join(part.text(width) for part in bare.fitted(width, 1))
    return "\n".join([text, *table.notes])


def latex_comments(lines: Sequence[str]) -> list[str]:
    """Return sentences as comments of LaTeX."""
    return [f"% {' '.join(line.split())}" for line in lines]


def short(campaign: Campaign, found: Comparison, form: Form = "terminal") -> Table:
    """Return the main metric alone: value, difference from the first arm, its p-value, finding.

    Its unit is in a head, and for a terminal, which has little room, in a note.
    """
    table = _main(campaign, found)
    rows: list[tuple[Cell, ...]] = [
        (row.name, row.seeds, row.value._replace(unit=""), *_tested(row)) for row in table.rows
    ]
    unit = table.rows[0].value.unit
    head = str(table.kind) if form == "terminal" or not unit else f"{table.kind} ({unit})"
    columns = ("arm", "seeds", head, "difference", "p", "finding")
    notes = (
        f"{table.kind}{f' in {unit}' if unit else ''}; difference against {table.against}, with "
        "95 % intervals; p adjusted after Holm.",
    )
    return Table(campaign.title, columns, rows, notes)


def _tested(row: Row) -> tuple[Cell, ...]:
    d, p = row.difference, row.p_adjusted
    if d is None or p is None:
        return None, "", row.finding
    return Value(d.value, "", d.low, d.high), "<0.001" if p < 0.001 else f"{p:.3f}", row.finding


def _main(campaign: Campaign, found: Comparison) -> MetricTable:
    name = campaign.metrics[0]
    tested = [m for m in found.metrics if m.tested]
    fits = [m for m in tested if m.kind.metric == name]
    if not fits:
        hint = did_you_mean(name, {m.kind.metric for m in tested})
        raise UserError(f"{campaign.name} has no test of {name}.", hint)
    return fits[0]


# -- sentences ---------------------------------------------------------------------------------


def sentences(campaign: Campaign, found: Comparison, arms: dict[str, list[Record]]) -> list[str]:
    """Return what was asked, what the paired tests found, and what would overturn it.

    Args:
        campaign: With the question.
        found: Its arms side by side.
        arms: The records behind them.
    """
    table = _main(campaign, found)
    overturn = f"{_overturn(table, arms)} {campaign.overturn}".rstrip()
    return [
        f"Asked: {campaign.title}",
        f"Found: {findings(table, numbers=False)}",
        f"Would overturn it: {overturn}",
    ]


def _overturn(table: MetricTable, arms: dict[str, list[Record]]) -> str:
    """Return what the tests do not cover, and how large a difference they may have missed."""
    runs = [record for records in arms.values() for record in records]
    models = ", ".join(dict.fromkeys(r.name_of("model") for r in runs))
    data = ", ".join(dict.fromkeys(r.name_of("dataset") for r in runs))
    items = max(row.difference.n for row in table.rows if row.difference)
    seeds = max(row.seeds for row in table.rows)
    said = f"other seeds than these (at most {seeds} of an arm), other rows ({items} items), "
    said += f"other models than {models}, or other data than {data}."
    open_ = [row.difference for row in table.rows if row.difference and row.finding == APART]
    most = max((max(abs(d.low), abs(d.high)) for d in open_), default=0.0)
    if most:
        said += f" Rows that cannot be told apart may still differ by up to {most:.2g}."
    return said


def _held(found: Comparison) -> list[str]:
    """Return what was held equal, what was not, and notes on versions."""
    equal = [b.name for b in found.budgets if b.equal]
    other = [b.name for b in found.budgets if b.equal is False]
    said = f"Held equal: {', '.join(equal) or 'nothing'}."
    said += f" Not equal: {', '.join(other)}." if other else ""
    return [said, *of_versions(found.notes)]


def paper_lines(campaign: Campaign) -> list[str]:
    """Return the paper's claims, each with its source and scale."""
    return [
        f"Paper: {c.claim} ({'; '.join(filter(None, (c.source, c.sure, c.scale, c.held)))})"
        for c in campaign.paper
    ]
