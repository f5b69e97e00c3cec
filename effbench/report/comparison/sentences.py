"""A comparison in sentences: what differs, what does not, and what was held equal."""

from __future__ import annotations

from collections.abc import Sequence

from effbench.report.comparison.budgets import Budget
from effbench.report.comparison.metric_table import MetricTable, Row
from effbench.report.comparison.seeds import Group
from effbench.stats import FEWEST_SEEDS

APART = "cannot be told apart"


def in_words(
    groups: Sequence[Group], tables: Sequence[MetricTable], budgets: Sequence[Budget]
) -> list[str]:
    """Return what a comparison found, one paragraph each.

    Args:
        groups: What was compared.
        tables: Its metrics.
        budgets: What a fair comparison holds equal.
    """
    tested = [t for t in tables if t.tested]
    lines = [line for table in tested for line in (findings(table), *_margin(table))]
    lines += _coverage(groups) if tested else []
    if len(groups) == 1 and len(groups[0].records) > 1 and not tested:
        seeds = len(groups[0].records)
        lines.append(f"{groups[0].label}: {seeds} seeds of one spec, and nothing to compare with.")
    return lines + (_budgets(budgets) if len(groups) > 1 else [])


def findings(table: MetricTable, numbers: bool = True) -> str:
    """Return the findings of a metric, rows with the same one together.

    Args:
        table: Of the metric.
        numbers: Whether to say by how much, with the interval.
    """
    rows = [row for row in table.rows if row.finding]
    unit = table.rows[0].value.unit
    parts = []
    for found in dict.fromkeys(row.finding for row in rows):
        members = [row for row in rows if row.finding == found]
        values = numbers and found in ("lower", "higher", APART)
        names = [f"{row.name}, by {_difference(row)}" if values else row.name for row in members]
        parts.append(f"{found}: {'; '.join(names)}")
    head = f"{table.kind}{f' ({unit})' if unit else ''}, against {table.against}. "
    text = ". ".join(part[0].upper() + part[1:] for part in parts)
    return f"{head}{text}."


def _difference(row: Row) -> str:
    assert row.difference is not None
    return f"{row.difference.value:.3g} [{row.difference.low:.3g}, {row.difference.high:.3g}]"


def _margin(table: MetricTable) -> list[str]:
    """Return what is equivalent at the stated margin, and what was not shown to be."""
    if table.margin is None:
        return []
    said = {
        "equivalent": "Equivalent",
        "not worse": "Not worse, but not shown to be equivalent",
        "not shown": "Not shown to be equivalent, nor to be no worse",
    }
    parts = []
    for state, words in said.items():
        names = [row.name for row in table.rows if row.at_margin == state]
        parts += [f"{words}: {'; '.join(names)}"] if names else []
    margin = f"{table.margin:.3g} {table.rows[0].value.unit}".rstrip()
    return [f"{table.kind} within a margin of {margin}. {'. '.join(parts)}."]


def _coverage(groups: Sequence[Group]) -> list[str]:
    """Return what the intervals cover: how many seeds there are."""
    single = [g.label for g in groups if len(g.records) == 1 and not g.seedless]
    several = [f"{g.label}: {len(g.records)}" for g in groups if len(g.records) > 1]
    lines = []
    if several:
        lines.append(
            f"Seeds: {'; '.join(several)}. Differences between such groups cover the choice of "
            "seeds and of items."
        )
        if any(1 < len(g.records) < FEWEST_SEEDS for g in groups):
            lines.append(
                f"Fewer than {FEWEST_SEEDS} seeds are few: such intervals cover only roughly as "
                "often as stated, with two that differ more than their items do in 86 to 93 %."
            )
    if single:
        lines.append(
            f"One seed only: {'; '.join(single)}. Intervals with such a run cover the choice of "
            "items alone, not that of the seed."
        )
    return lines


def _budgets(budgets: Sequence[Budget]) -> list[str]:
    equal = [b.name for b in budgets if b.equal]
    unequal = [f"{b.name} ({b.shown()})" for b in budgets if b.equal is False]
    unknown = [b.name for b in budgets if b.equal is None]
    said = {"Equal": equal or ["nothing"], "Not equal": unequal or ["nothing"]}
    said |= {"Not recorded for all": unknown} if unknown else {}
    return [f"{head}: {', '.join(names)}." for head, names in said.items()]
