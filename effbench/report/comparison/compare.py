"""Several runs side by side: differences with their tests, and what was not equal.

Runs of one spec with several seeds make one row. Every row is held against the first one, or
against that of the first run at the same operating point. Where both kept the outcomes of the same
items, the difference comes from a paired test whose p-value is corrected (Holm) for the rows of its
table. What was measured, counted and modelled never shares a column.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from effbench.report.comparison.budgets import budgets
from effbench.report.comparison.contrast import (
    OTHER_ITEMS,
    Contrast,
    Side,
    contrast,
    p_of_difference,
)
from effbench.report.comparison.entries import NO_POINT, Entry, check_points, references
from effbench.report.comparison.metric_table import Kind, MetricTable, Row
from effbench.report.comparison.result import Comparison
from effbench.report.comparison.seeds import Group, grouped
from effbench.report.comparison.sentences import in_words
from effbench.report.comparison.versions import different_versions
from effbench.report.labels import better, differences
from effbench.report.table import Value, as_value
from effbench.results.bounds import bounds_of
from effbench.results.records import Metric, Outcomes, Record, as_now
from effbench.stats import ALPHA, equivalent, finding, holm, letters, seeds_interval, verdict
from effbench.stats.intervals import spread_interval
from effbench.util.errors import UserError, did_you_mean

Margins = Mapping[str, float]
"""Margin of a metric, by its name; under an empty name that of all others."""
NOISE = 1e-12
"""What sums of equal numbers may differ by, as a share of them."""


def compare(
    records: Sequence[Record],
    known: Sequence[Record] = (),
    margins: Margins | None = None,
    said: Sequence[str] = (),
    *,
    names: Mapping[str, str] | None = None,
    same_points: bool = False,
    tunings: Sequence[Collection[str]] = (),
    all_pairs: bool = True,
    held: bool = True,
    metrics: Collection[str] = (),
    alone: bool = True,
) -> Comparison:
    """Compare runs, or the operating points of one run, with the first run's first point.

    Args:
        records: The runs; those that differ in their seed only become one row.
        known: All finished runs of the folder: what was tried to tune these, and their parents.
        margins: Differences that would still count as none.
        said: Sentences to begin with, such as how an operating point was chosen.
        names: Names for rows instead of those made from the specs, by their keys joined by `+`.
        same_points: Whether each row is held against the first run at the same point instead.
        tunings: Keys of the runs of each grid that was declared to tune.
        all_pairs: Whether rows get letters, for which each is tested against every other: work
            that grows with the square of the rows.
        held: Whether to say what was held equal, for which tuning trials are counted.
        metrics: Names of those that are compared; all where none of them is in the first run.
        alone: Whether to test over items and over seeds alone too, where one test covers both.

    Raises:
        UserError: For one run at one point alone, for a margin of a metric that is not compared,
            and when no other run has a point of the first one at which to compare.
    """
    known = as_now([*known, *records])
    given = names or {}
    groups = [replace(g, label=given.get(g.keys, g.label)) for g in grouped(records, known)]
    if same_points:
        check_points(groups)
    labels = [group.label for group in groups]
    kinds = [_by_kind(group) for group in groups]
    if any(kind.metric in metrics for kind in kinds[0]):
        kinds = [{k: own for k, own in found.items() if k.metric in metrics} for found in kinds]
    tables, notes = [], different_versions(groups, known)
    missing: dict[tuple[str, ...], list[str]] = {}
    for kind, own in kinds[0].items():
        lacking = [n for n, found in zip(labels, kinds, strict=True) if kind not in found]
        if len(lacking) == len(groups) - 1 and len(own) == 1:
            notes += [_not_shared(kind, labels, kinds)] if len(groups) > 1 else []
            if len(groups) > 1 or len(records) == 1:
                continue
        if lacking:
            missing.setdefault(tuple(lacking), []).append(str(kind))
        entries = [
            Entry(number, group, metrics, _outcomes(group, kind, point))
            for number, (group, found) in enumerate(zip(groups, kinds, strict=True))
            for point, metrics in found.get(kind, {}).items()
        ]
        margin = _margin(kind, margins or {})
        tables.append(_table(kind, entries, margin, same_points, all_pairs, alone))
    if not tables and len(records) == 1:
        raise UserError(
            f"{records[0].key} is one run at one operating point, which has nothing beside it.",
            f"Name another run too, or print this one: effbench runs show {records[0].key[:8]}",
        )
    _check_margins(margins or {}, tables)
    notes += [_lacking(who, what) for who, what in missing.items()]
    equal = budgets(groups, known, tunings) if held else []
    return Comparison(
        labels,
        [group.keys for group in groups],
        tables,
        equal,
        differences([group.records[0] for group in groups]),
        notes,
        [*said, *in_words(groups, tables, equal)],
    )


def margins_of(words: Sequence[str]) -> dict[str, float]:
    """Return margins from words like `0.01` or `accuracy=0.01`.

    Raises:
        UserError: For what is no number above zero.
    """
    found = {}
    for word in words:
        name, _, text = word.rpartition("=")
        try:
            found[name] = float(text)
        except ValueError:
            found[name] = math.nan
        if not 0 < found[name] < math.inf:
            raise UserError(
                f"--margin {word}: {text!r} is no number above zero.",
                "For example: --margin 0.01, or --margin accuracy=0.01 --margin loss=0.02.",
            )
    return found


def _by_kind(group: Group) -> dict[Kind, dict[str, list[Metric]]]:
    """Return the metrics that all runs of a group have, by kind and point."""
    found: dict[Kind, dict[str, list[Metric]]] = {}
    for record in group.records:
        evaluators = {(o.metric, o.task, o.split): o.evaluator for o in record.outcomes}
        for m in record.metrics:
            evaluator = evaluators.get((m.name, m.task, m.split), "")
            kind = Kind(evaluator, m.name, m.task, m.split, m.phase, m.obtained)
            found.setdefault(kind, {}).setdefault(m.point, []).append(m)
    runs = len(group.records)
    whole = {
        kind: {p: metrics for p, metrics in points.items() if len(metrics) == runs}
        for kind, points in found.items()
    }
    return {kind: points for kind, points in whole.items() if points}


def _not_shared(kind: Kind, names: Sequence[str], kinds: Sequence[Mapping[Kind, object]]) -> str:
    others = [
        f"{other.obtained} in {name}"
        for name, found in zip(names, kinds, strict=True)
        for other in found
        if other[1:5] == kind[1:5] and other.obtained != kind.obtained
    ]
    if others:
        return f"{kind} is {kind.obtained} in {names[0]} but {', '.join(others)}: not compared."
    return f"{kind} is only in {names[0]}."


def _lacking(names: Sequence[str], what: Sequence[str]) -> str:
    """Return which runs lack which metrics."""
    if len(names) == 1:
        return f"{names[0]} has no {', '.join(what)}."
    return f"{len(names)} runs have no {', '.join(what)}: {'; '.join(names)}."


def _outcomes(group: Group, kind: Kind, point: str) -> list[Outcomes]:
    wanted = (kind.evaluator, kind.metric, kind.task, kind.split, point)
    found = [
        next(
            (
                o
                for o in record.outcomes
                if (o.evaluator, o.metric, o.task, o.split, o.point) == wanted
            ),
            None,
        )
        for record in group.records
    ]
    return [] if None in found else [o for o in found if o is not None]


def _margin(kind: Kind, margins: Margins) -> float | None:
    return margins.get(kind.metric, margins.get(""))


def _check_margins(margins: Margins, tables: Sequence[MetricTable]) -> None:
    tested = {table.kind.metric for table in tables if table.tested}
    for name in margins:
        if name and name not in tested:
            hint = did_you_mean(name, tested)
            raise UserError(f"There is no test of {name!r} to put a margin on.", hint)


# -- one table ---------------------------------------------------------------------------------


def _table(
    kind: Kind,
    entries: Sequence[Entry],
    margin: float | None,
    same_points: bool,
    all_pairs: bool,
    alone: bool,
) -> MetricTable:
    places = references(entries, same_points)
    rows = [_plain(entry, entries, at) for entry, at in zip(entries, places, strict=True)]
    sides = [entry.side() for entry in entries]
    direction = better(kind.metric)
    found: dict[int, Contrast] = {}
    for i, (side, at) in enumerate(zip(sides, places, strict=True)):
        other = None if at is None else sides[at]
        if side is None or at == i:
            continue
        if at is None:
            rows[i] = replace(rows[i], finding=NO_POINT, verdict=NO_POINT)
        elif other is not None and side.same_items(other):
            found[i] = contrast(side, other, margin, direction, alone)
        elif other is not None:
            rows[i] = replace(rows[i], finding=OTHER_ITEMS, verdict=OTHER_ITEMS)
    _judge(rows, found)
    # Letters are about all pairs of rows, whatever their points.
    lettered = all_pairs and len(rows) > 2 and not same_points
    marks = _letters(rows, sides, found) if lettered else {}
    rows = [replace(row, letters=marks.get(i, "")) for i, row in enumerate(rows)]
    return MetricTable(kind, rows, margin if found else None, same_points)


def _plain(entry: Entry, entries: Sequence[Entry], reference: int | None) -> Row:
    """Return a row without a test: the value, over seeds where there are several."""
    values = np.array([m.value for m in entry.metrics])
    base = 0.0 if reference is None else entries[reference].mean
    value, spread = as_value(entry.metrics[0]), None
    if len(values) > 1:
        spread = float(values.std(ddof=1)) if np.ptp(values) > NOISE * abs(entry.mean) else 0.0
        value = Value(entry.mean, entry.metrics[0].unit, *_bounds(entry, values))
    return Row(
        entry.group.label,
        entry.group.keys,
        entry.point,
        value,
        reference,
        len(values),
        spread,
        value.value / base if base else None,
    )


def _bounds(entry: Entry, values: np.ndarray) -> tuple[float, float] | tuple[None, None]:
    """Return the interval of a mean over seeds, over their items too where these are known."""
    side = entry.side()
    if side is not None and side.same_items(side):
        found = seeds_interval(side.values, side.outcomes[0].clusters, bounds=side.bounds)
    elif np.ptp(values) > 0:
        first = entry.metrics[0]
        found = spread_interval(values).within(bounds_of(first.name, first.unit))
    else:
        return None, None
    return found.low, found.high


def _judge(rows: list[Row], found: Mapping[int, Contrast]) -> None:
    """Put the tests into the rows, adjusted for each other."""
    differences = {i: c.difference for i, c in found.items()}
    adjusted = _adjusted({i: d.p for i, d in differences.items()})
    same = {i: d.equivalence for i, d in differences.items() if d.equivalence}
    equal = _adjusted({i: e.p for i, e in same.items()})
    worse = _adjusted({i: e.p_worse for i, e in same.items() if e.p_worse is not None})
    for i, c in found.items():
        row, d = rows[i], c.difference
        assert row.reference is not None
        rows[i] = replace(
            row,
            difference=d,
            covers=c.covers,
            items=c.items,
            over_seeds=c.seeds,
            p_adjusted=adjusted[i],
            finding=finding(d, adjusted[i]),
            verdict=verdict(row.name, rows[row.reference].name, d, row.value.unit, adjusted[i]),
            at_margin=equivalent(d, equal.get(i), worse.get(i)),
        )


def _adjusted(pvalues: Mapping[int, float]) -> dict[int, float]:
    return dict(zip(pvalues, holm(list(pvalues.values())), strict=True))


def _letters(
    rows: Sequence[Row], sides: Sequence[Side | None], found: Mapping[int, Contrast]
) -> dict[int, str]:
    """Return the letters of all rows that were tested, from all pairs of them."""
    tested = [0, *found] if found else []
    pairs: dict[tuple[int, int], float] = {}
    for (m, i), (n, j) in combinations(enumerate(tested), 2):
        a, b = sides[i], sides[j]
        assert a is not None and b is not None
        pairs[m, n] = found[j].difference.p if i == 0 else p_of_difference(a, b)
    adjusted = holm(list(pairs.values()))
    differ = {pair: p <= ALPHA for pair, p in zip(pairs, adjusted, strict=True)}
    marks = letters([rows[i].value.value for i in tested], differ)
    return dict(zip(tested, marks, strict=True))
