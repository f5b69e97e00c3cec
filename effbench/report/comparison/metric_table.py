"""One metric of a comparison: its rows, what each is held against, and the forms of its table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from effbench.report.table import Cell, Table, Value, modelled
from effbench.stats import Difference, OverSeeds

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


FEW_ITEMS = 60
"""Items below which the interval of a ratio, such as a loss per token, is said to be rough."""


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
        by = f", by evaluator {self.kind.evaluator}" if self.kind.evaluator else ""
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

    def csv_rows(self) -> list[dict[str, Cell]]:
        """Return the rows for CSV by column, numbers unrounded."""
        return [_csv_row(self, row) for row in self.rows]

    def json(self) -> dict[str, Any]:
        """Return the table for JSON."""
        rows = [_row_json(self, row) for row in self.rows]
        own = {"margin": self.margin, "same_points": self.same_points, "rows": rows}
        return {**self.kind._asdict(), **own}

    @property
    def _items(self) -> int:
        return max((row.difference.n for row in self.rows if row.difference), default=0)

    def _notes(self, seeds: bool) -> tuple[str, ...]:
        if not self.tested:
            return ("Value: mean over seeds, 95 % interval over seeds and items.",)
        covers = sorted({row.covers for row in self.rows if row.covers})
        tests = sorted({row.difference.test for row in self.rows if row.difference})
        notes = [f"Difference: against {self.against}, mean over items, 95 % interval"]
        notes[0] += f" over {' or '.join(covers)}." if covers else "."
        notes += [f"p: {' and '.join(tests)}, adjusted after Holm."] if tests else []
        if self.kind.evaluator and "/" in self.rows[0].value.unit and 0 < self._items < FEW_ITEMS:
            notes.append(
                f"{self._items} items: where they differ much in length, such intervals of a ratio "
                "cover less often than stated."
            )
        if any(row.letters for row in self.rows):
            notes.append("Letters: rows that share one cannot be told apart (all pairs, Holm).")
        if seeds:
            notes.append("p items, p Welch, p Wilcoxon: over items or seeds alone, not adjusted.")
        return tuple(notes)


# -- cells -------------------------------------------------------------------------------------


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
