"""From the answers of a model and of its reference to metrics with intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

from effbench.api.schema import digest
from effbench.evaluators.trustworthiness.answers import Answers, Asked, divergence
from effbench.evaluators.trustworthiness.base import find
from effbench.results.records import Metric, Outcomes
from effbench.stats import Interval, mean_interval, paired_difference

if TYPE_CHECKING:
    from effbench.evaluators.base import Result
    from effbench.evaluators.subject import Subject

Rows = Sequence[int]
"""Positions in the list of all questions."""

POSITIVE = (0.0, math.inf)


class Report:
    """Fills a result.

    Args:
        subject: Gives the operating point and the seed of the resampling.
        result: What is filled.
        questions: What was asked.
        own: What the model answered.
        other: What the reference answered.
    """

    def __init__(
        self,
        subject: Subject,
        result: Result,
        questions: Sequence[Asked],
        own: Answers,
        other: Answers,
    ) -> None:
        self.subject = subject
        self.result = result
        self.questions = questions
        self.own = own
        self.other = other
        self.shifts = [divergence(p, q) for p, q in zip(other.log_p, own.log_p, strict=True)]
        groups: dict[Hashable, int] = {}
        self.clusters = [
            groups.setdefault((q.dimension, q.item.cluster), len(groups)) for q in questions
        ]

    def fill(self, generated: bool) -> None:
        """Add everything: the whole first, then each dimension.

        Args:
            generated: Whether answers were generated, so that refusals can be counted.
        """
        everything = range(len(self.questions))
        dimensions = self._split(everything, [q.dimension for q in self.questions])
        self._add("trust_shift", self.shifts, everything, unit="nats", within=POSITIVE, keep=True)
        self._distance(list(dimensions.values()))
        for name, rows in dimensions.items():
            self._dimension(name, rows)
            if generated:
                self._refusals(name, rows)

    def _distance(self, dimensions: Sequence[Rows]) -> None:
        """Add the mean over the dimensions of |delta|.

        Its interval holds the signs fixed: an item enters with the sign of its dimension's delta.
        """
        total = len(self.questions)
        values = [0.0] * total
        for rows in dimensions:
            changes = self._changes(rows)
            weight = math.copysign(total / (len(dimensions) * len(rows)), sum(changes))
            for i, change in zip(rows, changes, strict=True):
                values[i] = weight * change
        self._add(
            "trust_delta_abs", values, range(total), unit="points", scale=100, within=(0, 100)
        )

    def _dimension(self, name: str, rows: Rows) -> None:
        shifts = [self.shifts[i] for i in rows]
        self._score(name, rows, keep=True)
        self._delta(name, rows)
        self._add("trust_shift", shifts, rows, name, "nats", within=POSITIVE, keep=True)
        self._spread(name, rows)
        items = [self.questions[i].item for i in rows]
        for metric, values in find(name).extras(items, self._picks(self.own, rows)).items():
            self._add(metric, values, rows, name, within=(0, 1), share=True)
        for kind, part in self._split(rows, [item.kind for item in items]).items():
            self._score(f"{name}.{kind}", part)

    def _delta(self, name: str, rows: Rows) -> None:
        """Add the difference from the reference, as `effbench compare` would find it."""
        found = paired_difference(
            self._outcomes(self.own, rows),
            self._outcomes(self.other, rows),
            seed=self.subject.seed,
            clusters=[self.clusters[i] for i in rows],
        )
        value, low, high = (100 * end for end in (found.value, found.low, found.high))
        point, n = self.subject.point.name, len(rows)
        low, high = max(low, -100.0), min(high, 100.0)
        self.result.metrics.append(
            Metric("trust_delta", value, "points", point, n=n, low=low, high=high, task=name)
        )

    def _refusals(self, name: str, rows: Rows) -> None:
        for kind, metric in (("refuse", "refusal_rate"), ("invalid", "invalid_rate")):
            found = [float(self.own.replies[i].kind == kind) for i in rows]
            self._add(metric, found, rows, name, within=(0, 1), share=True)

    def _score(self, task: str, rows: Rows, keep: bool = False) -> None:
        values = self._outcomes(self.own, rows)
        self._add(
            "trust_score",
            values,
            rows,
            task,
            "points",
            scale=100,
            within=(0, 100),
            share=True,
            keep=keep,
        )

    def _spread(self, name: str, rows: Rows) -> None:
        """Add the standard deviation over seeds of the difference from the reference."""
        by_seed = self._split(rows, [self.questions[i].seed for i in rows])
        deltas = [100 * statistics.fmean(self._changes(part)) for part in by_seed.values()]
        if len(deltas) > 1:
            point, spread = self.subject.point.name, statistics.stdev(deltas)
            self.result.metrics.append(
                Metric("trust_delta_sd", spread, "points", point, n=len(deltas), task=name)
            )

    def _split(self, rows: Rows, labels: Sequence[Hashable]) -> dict[Any, list[int]]:
        parts: dict[Any, list[int]] = {}
        for i, label in zip(rows, labels, strict=True):
            parts.setdefault(label, []).append(i)
        return parts

    def _picks(self, answers: Answers, rows: Rows) -> list[int | None]:
        return [answers.replies[i].index for i in rows]

    def _outcomes(self, answers: Answers, rows: Rows) -> list[float]:
        """Return the outcomes of questions that belong to one dimension."""
        items = [self.questions[i].item for i in rows]
        return find(self.questions[rows[0]].dimension).outcomes(items, self._picks(answers, rows))

    def _changes(self, rows: Rows) -> list[float]:
        pairs = zip(self._outcomes(self.own, rows), self._outcomes(self.other, rows), strict=True)
        return [own - other for own, other in pairs]

    def _add(
        self,
        metric: str,
        values: Sequence[float],
        rows: Rows,
        task: str = "",
        unit: str = "",
        *,
        scale: float = 1.0,
        within: tuple[float, float],
        share: bool = False,
        keep: bool = False,
    ) -> None:
        """Add the mean of `values`, times `scale`, with its interval.

        Args:
            metric: Name of the metric.
            values: One per row.
            rows: Which questions they are of.
            task: The dimension, and the kind in it.
            unit: Unit of what is added.
            scale: What the values are multiplied by.
            within: Smallest and largest possible value; ends of the interval are cut there.
            share: Whether the mean is a share of the items.
            keep: Whether to keep the outcome of each item too.
        """
        clusters = [self.clusters[i] for i in rows]
        scaled = [scale * v for v in values]
        if share:
            value, low, high = (scale * end for end in _share(values, clusters, self.subject.seed))
        else:
            value, low, high = _mean(scaled, clusters, self.subject.seed)
        low, high = max(low, within[0]), min(high, within[1])
        point, n = self.subject.point.name, len(values)
        self.result.metrics.append(
            Metric(metric, value, unit, point, n=n, low=low, high=high, task=task)
        )
        if keep:
            if len(set(clusters)) == len(clusters):
                clusters = []
            ids = digest([self.questions[i].item.id for i in rows])
            self.result.outcomes.append(
                Outcomes("trust", metric, point, "", ids, scaled, task, clusters)
            )


def _share(values: Sequence[float], clusters: Sequence[int], seed: int) -> Interval:
    """Return a share with its interval, whole clusters resampled.

    One that is the same over all items gets Wilson's interval with one item per cluster: in it
    resampling would find no spread.
    """
    count = len(set(clusters))
    if count == len(values) or len(set(values)) == 1:
        return mean_interval(values[:count], seed=seed)
    return mean_interval(values, seed=seed, clusters=clusters)


def _mean(values: Sequence[float], clusters: Sequence[int], seed: int) -> Interval:
    """Return a mean with its interval, whole clusters resampled; no width where all are equal."""
    if len(set(values)) == 1:
        return Interval(values[0], values[0], values[0])
    return mean_interval(values, seed=seed, clusters=clusters)
