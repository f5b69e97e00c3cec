"""Runs and operating points as columns: what the table of a report shows, filters and sorts.

A row is a run at one operating point; what a run has as a whole stands in each of its rows. A
column of texts is its distinct values and a number for each row, one of numbers is its values, and
one that is the same everywhere is that value alone, so that the file stays small.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from effbench.api.stages import base as stages
from effbench.report.labels import better, command_of, flatten
from effbench.report.table import COMPARED, HEADLINES, metric_column, metric_head, points
from effbench.results.records import Metric, Record

DIGITS = 6
"""Significant digits of what is no whole number, as in the outcomes of a record."""

USUAL = tuple(dict.fromkeys((*HEADLINES, *COMPARED, "energy_j")))
"""Metrics that are shown before all of them are asked for, in the order of their columns."""

GROUPS = ("run", "usual", "metrics", "settings", "plan", "environment")
"""Groups of columns, in their order."""

Place = tuple[str, ...]
"""What tells a column from others: its group and its name, and of a metric what it is of."""


@dataclass
class Column:
    """One column.

    Attributes:
        name: Its head.
        group: One of `GROUPS`.
        unit: Of its numbers.
        better: Which direction of a metric is the good one: `lower`, `higher` or empty.
        values: One per row; None where a row has none.
        bounds: Lower and upper ends of 95 % intervals by row, as far as there are any.
    """

    name: str
    group: str
    unit: str = ""
    better: str = ""
    values: list[Any] = field(default_factory=list)
    bounds: dict[int, tuple[float, float]] = field(default_factory=dict)
    place: Place = ()
    """What tells it from others of its group, where its name alone does not."""

    def head(self) -> dict[str, str]:
        """Return what the column is, without what is empty; columns of one `id` are one."""
        told = {"name": self.name, "group": self.group, "unit": self.unit, "better": self.better}
        own = " ".join((self.group, *(self.place or (self.name,))))
        return {"id": own, **{k: v for k, v in told.items() if v}}

    def packed(self) -> dict[str, Any]:
        """Return the values for JSON, without what is empty."""
        return {**_packed(self.values), **self._ends()}

    def _ends(self) -> dict[str, list[Any]]:
        if not self.bounds:
            return {}
        low: list[Any] = [None] * len(self.values)
        high = low.copy()
        for row, ends in self.bounds.items():
            low[row], high[row] = map(_short, ends)
        return {"low": low, "high": high}


class Part:
    """Nested values of which many rows have the same, such as the model of a spec.

    They are laid out once for all rows that share them.
    """

    def __init__(self) -> None:
        self._places: dict[str, int] = {}
        self._flat: list[dict[str, Any]] = []
        self._of_rows: dict[int, int] = {}

    def add(self, rows: Iterable[int], name: str, content: Any) -> None:
        """Give rows their values, under dotted names that begin with `name`."""
        place = self._places.setdefault(json.dumps(content), len(self._flat))
        if place == len(self._flat):
            self._flat.append({k: _scalar(v) for k, v in flatten(content, name).items()})
        self._of_rows |= dict.fromkeys(rows, place)

    def columns(self, group: str, rows: int) -> list[Column]:
        """Return a column for each name."""
        places = [self._of_rows.get(row, -1) for row in range(rows)]
        flat = [*self._flat, {}]
        names = dict.fromkeys(name for values in self._flat for name in values)
        return [Column(n, group, values=[flat[i].get(n) for i in places]) for n in names]


class Rows:
    """Columns that are filled row by row."""

    def __init__(self) -> None:
        self.count = 0
        self._columns: dict[Place, Column] = {}
        self._parts: dict[tuple[str, str], Part] = {}

    @property
    def columns(self) -> list[Column]:
        """All columns, filled up to the last row; those of a group beside each other."""
        for column in self._columns.values():
            column.values += [None] * (self.count - len(column.values))
        parts = (part.columns(group, self.count) for (group, _), part in self._parts.items())
        shared = [c for found in parts for c in found if any(v is not None for v in c.values)]
        return sorted([*self._columns.values(), *shared], key=lambda c: order(c.name, c.group))

    def add(self, record: Record) -> None:
        """Add a row for each operating point of a run."""
        own, there = [*_own(record)], points(record)
        rows = range(self.count, self.count + len(there))
        for group, name, content in _shared(record):
            self._parts.setdefault((group, name), Part()).add(rows, name, content)
        metrics: dict[str, list[Metric]] = {}
        for metric in record.metrics:
            metrics.setdefault(metric.point, []).append(metric)
        for point in there:
            self._put("run", "point", point)
            for group, name, value in own:
                self._put(group, name, value)
            for metric in [*metrics.get("", ()), *(metrics.get(point, ()) if point else ())]:
                self._metric(metric)
            self.count += 1

    def _put(self, group: str, name: str, value: Any) -> None:
        if value is not None and value != "":
            self._set(self._columns.setdefault((group, name), Column(name, group)), value)

    def _metric(self, metric: Metric) -> None:
        place = metric_column(metric)
        column = self._columns.get(place)
        if column is None:
            group = "usual" if metric.name in USUAL else "metrics"
            head = metric_head(metric)
            column = Column(head, group, metric.unit, better(metric.name), place=place)
            self._columns[place] = column
        self._set(column, metric.value)
        if metric.low is not None and metric.high is not None:
            column.bounds[self.count] = metric.low, metric.high

    def _set(self, column: Column, value: Any) -> None:
        if (missing := self.count - len(column.values)) > 0:
            column.values += [None] * missing
        column.values[self.count :] = (value,)


def rows_of(records: Iterable[Record]) -> Rows:
    """Return the rows of runs, in their order."""
    rows = Rows()
    for record in records:
        rows.add(record)
    return rows


def artefact_of(record: Record) -> str:
    """Return the key of the run that made what a run's numbers are of."""
    makes = stages.find(record.stage).makes if record.stage in stages.names() else False
    return record.key if makes or not record.parent else record.parent


def order(name: str, group: str) -> tuple[int, int]:
    """Return where a column stands; a sort keeps those of a group in order of appearance.

    Notes, which are wide and mostly empty, stand behind the usual metrics.
    """
    if (group, name) == ("run", "notes"):
        return GROUPS.index("usual"), len(USUAL)
    return GROUPS.index(group), USUAL.index(name.partition(" ")[0]) if group == "usual" else 0


# -- what a run says in each of its rows -------------------------------------------------------


def _own(record: Record) -> Iterable[tuple[str, str, Any]]:
    """Yield group, name and value of what is the run's own, besides its metrics."""
    yield "run", "key", record.key
    yield "run", "started", record.started[:16].replace("T", " ")
    yield "run", "stage", record.stage
    for part in ("method", "model", "dataset"):
        yield "run", part, record.name_of(part)
    yield "run", "seed", record.spec.get("seed")
    yield "run", "label", record.label
    artefact = artefact_of(record)
    yield "run", "artefact", "" if artefact == record.key else artefact  # which the script knows
    yield "run", "seconds", record.seconds
    yield "run", "command", command_of(record)
    yield "run", "notes", " ".join(record.notes)
    yield from (("plan", *pair) for pair in _plan(record))


def _shared(record: Record) -> Iterable[tuple[str, str, Any]]:
    """Yield group, name and content of what many runs have in common.

    The training of a run that trained nothing is left out, and names that have columns already.
    """
    trained = stages.trains(record.stage)
    for name, content in record.spec.items():
        if name not in ("stage", "seed") and (trained or name != "train"):
            yield "settings", name, _without(content, "name")
    yield "environment", "", _without(record.environment, "command")


def _without(content: Any, name: str) -> Any:
    """Return nested values without one of them."""
    if not isinstance(content, dict):
        return content
    return {k: v for k, v in content.items() if k != name}


def _plan(record: Record) -> Iterable[tuple[str, Any]]:
    """Yield what was predicted of each phase, and what was measured of it."""
    for phase, found in (record.plan.get("phases") or {}).items():
        if isinstance(found, dict):
            yield f"{phase}: predicted bytes", _number(found.get("peak_bytes"))
            yield f"{phase}: measured bytes", _number(found.get("measured_bytes"))
            yield f"{phase}: error", _number(found.get("error"))


def _scalar(value: Any) -> Any:
    """Return a value of a spec as a cell: numbers and texts as they are, others as JSON."""
    if not isinstance(value, bool) and isinstance(value, str | int | float | None):
        return value
    return json.dumps(value, ensure_ascii=False)


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) else None


# -- packing -----------------------------------------------------------------------------------


def _packed(values: Sequence[Any]) -> dict[str, Any]:
    """Return values as `value`, `numbers`, or `levels` with `codes`, whichever fits."""
    distinct = dict.fromkeys(values)
    if len(distinct) == 1:
        return {"value": _short(next(iter(distinct)))}
    if all(v is None or isinstance(v, int | float) for v in distinct):
        short = {v: _short(v) for v in distinct}
        return {"numbers": [short[v] for v in values]}
    texts = [None if v is None else str(v) for v in values]
    levels = {text: code for code, text in enumerate(dict.fromkeys(texts))}
    return {"levels": [*levels], "codes": [levels[text] for text in texts]}


def _short(value: Any) -> Any:
    """Return a value with few digits; whole numbers stay exact, `inf` and `nan` become texts."""
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return str(value)
    return int(value) if value.is_integer() and abs(value) < 2**53 else float(f"{value:.{DIGITS}g}")
