"""One operating point per method, chosen on one split and reported on another.

The best of several points on the split that is reported is too good: it is partly the best by luck.
So the point is chosen by a metric on other rows, and the metrics of these rows are not shown. Runs
of one spec with several seeds have one point in common, the one whose mean over them is best: a
setting is chosen once for a method, not anew for each seed. Of equal points the first is taken.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from effbench.api import registry
from effbench.api.spec import Plugin
from effbench.report.comparison.seeds import Group, grouped
from effbench.report.labels import better
from effbench.results.records import Record
from effbench.util.errors import UserError, did_you_mean

REPORTED = "test"
"""The split that is there to be reported, and never to choose on."""


class Criterion(NamedTuple):
    """What a point is chosen by: a metric on a split of the run's own dataset."""

    metric: str
    split: str

    def __str__(self) -> str:
        return f"{self.metric} on {self.split}"


@dataclass(frozen=True)
class Selection:
    """Records that are left with one operating point each."""

    records: list[Record]
    words: list[str]
    """One sentence per method: which point was chosen, on which split, among how many."""


def criterion_of(word: str, option: str = "--select ") -> Criterion:
    """Return the criterion of a word like `loss@validation`.

    Args:
        word: The word.
        option: What it was given to, for messages.

    Raises:
        UserError: For another form, for the split that is reported, and for a metric of which
            neither high nor low values are the good ones.
    """
    metric, _, split = word.partition("@")
    if not metric or not split:
        raise UserError(
            f"{option}{word} is no metric on a split.", f"For example: {option}loss@validation"
        )
    if split == REPORTED:
        raise UserError(
            f"{option}{word} would choose on the split that is reported.",
            f"Choose on other rows: {option}{metric}@validation",
        )
    if not better(metric):
        raise UserError(
            f"{option}{word}: whether more or less of {metric} is better is not known.",
            "Choose by a loss or an accuracy.",
        )
    return Criterion(metric, split)


def value_of(record: Record, criterion: Criterion) -> float:
    """Return the metric that a criterion names, of several operating points the best one.

    Raises:
        UserError: When the record does not have it.
    """
    values = {
        m.point: m.value for m in record.metrics if (m.name, m.split, m.task) == (*criterion, "")
    }
    if not values:
        there = sorted(
            {m.name for m in record.metrics if m.split == criterion.split and not m.task}
        )
        raise UserError(
            f"Run {record.key} has no {criterion}.",
            f"It has on {criterion.split}: {', '.join(there)}. Choose by one of them, or name an "
            f"evaluator that measures {criterion.metric}."
            if there
            else f"Evaluate on it: evaluator.NAME.split={criterion.split}",
        )
    return values[_best(values, criterion)]


def require_measured(evaluators: Sequence[Plugin], criterion: Criterion) -> None:
    """Refuse a metric to choose by that runs with some evaluators will not have.

    What evaluators of other packages give is not known unless they say so.

    Raises:
        UserError: With the evaluators that give it, or the setting by which they read the split.
    """
    asked = {e.name: registry.find("evaluators", e.name) for e in evaluators}
    if any(not (cls.headline or cls.gives) for cls in asked.values()):
        return
    able = [e for e in evaluators if _gives(asked[e.name], criterion.metric)]
    if not able:
        every = {name: registry.find("evaluators", name) for name in registry.names("evaluators")}
        others = [name for name, cls in every.items() if criterion.metric in _named(cls)]
        known = [name for cls in every.values() for name in _named(cls) if better(name)]
        raise UserError(
            f"No run will have {criterion}: {_none_of(asked)} {criterion.metric}.",
            f"Ask one that does: evaluator={' or '.join(others)}"
            if others
            else did_you_mean(criterion.metric, known),
        )
    splits = [e.settings.get("split") or () for e in able]
    if not any(criterion.split in ([s] if isinstance(s, str) else s) for s in splits):
        raise UserError(
            f"No run will have {criterion}: {able[0].name} reads other rows.",
            f"Have it read them: evaluator.{able[0].name}.split={criterion.split}"
            if splits[0]
            else "Choose by a metric on the dataset's own rows, such as loss@validation.",
        )


def _none_of(asked: Collection[str]) -> str:
    if not asked:
        return "no evaluator is asked, which would give it,"
    return f"{' and '.join(asked)} {'gives' if len(asked) == 1 else 'give'} no"


def _named(cls: Any) -> tuple[str, ...]:
    return tuple(filter(None, (cls.headline, *cls.gives, *cls.beside)))


def _gives(cls: Any, metric: str) -> bool:
    """Whether a metric is one of an evaluator's, or one of them in a form of its own."""
    return any(metric.startswith(name) for name in _named(cls))


def select_points(
    records: Sequence[Record], criterion: Criterion, known: Sequence[Record] = ()
) -> Selection:
    """Return the records with the metrics of the chosen point alone, those of the split left out.

    A run with one point needs no choice, and no metric on the split.

    Args:
        records: The runs.
        criterion: What to choose by.
        known: Runs that these may have gone on from; see `grouped`.

    Raises:
        UserError: When a run with several points lacks the metric on that split or on any other.
    """
    found: dict[str, Record] = {}
    words = []
    for group in grouped(records, known):
        every = sorted({m.point for r in group.records for m in r.metrics if m.point})
        point = every[0] if every else ""
        if len(every) > 1:
            values = _values(group, criterion)
            point = _best(values, criterion)
            words.append(_said(group, criterion, values, point))
        found |= {r.key: _at(r, point, criterion.split) for r in group.records}
    return Selection([found[r.key] for r in records], words)


def _values(group: Group, criterion: Criterion) -> dict[str, float]:
    """Return the metric at each point that all runs of a group have it at, a mean over them."""
    runs = [
        {
            m.point: m.value
            for m in record.metrics
            if (m.name, m.split, m.task) == (*criterion, "") and m.point
        }
        for record in group.records
    ]
    shared = [p for p in runs[0] if all(p in run for run in runs)]
    if not shared:
        raise _lacks(group, criterion)
    if not any(_reported(r, criterion) for r in group.records):
        raise UserError(
            f"{group.label} has {criterion.metric} on no split but {criterion.split}: "
            "nothing would be left to report.",
            _evaluate_on(group, f"{criterion.split},{REPORTED}"),
        )
    return {p: sum(run[p] for run in runs) / len(runs) for p in shared}


def _reported(record: Record, criterion: Criterion) -> bool:
    own = [m for m in record.metrics if m.name == criterion.metric and not m.task]
    return any(m.split != criterion.split for m in own)


def _lacks(group: Group, criterion: Criterion) -> UserError:
    names = {m.name for r in group.records for m in r.metrics if m.split and not m.task}
    if criterion.metric not in names:
        hint = did_you_mean(criterion.metric, names)
        return UserError(f"{group.label} has no {criterion.metric}.", hint)
    return UserError(
        f"{group.label} has no {criterion}, to choose a point by.",
        _evaluate_on(group, f"{criterion.split},{REPORTED}"),
    )


def _evaluate_on(group: Group, splits: str) -> str:
    return (
        f"Evaluate it there: effbench eval from={group.records[0].key[:8]} "
        f"'evaluator.perplexity.split=[{splits}]'"
    )


def _best(values: dict[str, float], criterion: Criterion) -> str:
    sign = -1 if better(criterion.metric) == "higher" else 1
    return min(values, key=lambda point: sign * values[point])


def _said(group: Group, criterion: Criterion, values: dict[str, float], point: str) -> str:
    seeds = len(group.records)
    mean = f", a mean over {seeds} seeds" if seeds > 1 else ""
    return (
        f"{group.label}: {point} was chosen among {len(values)} points by {criterion} "
        f"({values[point]:.4g}{mean}); what is shown is on other rows."
    )


def _at(record: Record, point: str, split: str) -> Record:
    """Return a record with what it has at one point, and what has no point."""
    return replace(
        record,
        metrics=[m for m in record.metrics if m.point in ("", point) and m.split != split],
        outcomes=[o for o in record.outcomes if o.point in ("", point) and o.split != split],
    )
