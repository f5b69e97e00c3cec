"""The tuning of a table: the same grid for every arm, chosen on rows that are not reported.

Each arm is tried at every point of the grid, with a seed that no arm is reported at. A best point
at the end of the grid is no optimum yet: the grid goes on there, a bounded number of times. What
was tried is kept by key in `results/tunings/NAME.json`, so that the choice and its cost follow from
records alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from effbench.api.schema import NonNegativeInt, Seed
from effbench.api.spec import Plugin
from effbench.report.comparison.select import Criterion, criterion_of, require_measured, value_of
from effbench.report.labels import better
from effbench.results.records import Record
from effbench.util.errors import UserError

Point = tuple[float, ...]
"""A value of each setting of a tuning, in the order of `Tuning.over`."""


@dataclass(frozen=True)
class Tuning:
    """Which settings are tuned, over which values, and by what they are chosen."""

    over: dict[str, list[float]]
    """Values of each setting, rising; all combinations are tried."""
    metric: str = "loss@validation"
    """A metric on a split that is not reported."""
    at: Literal["best", "mean"] = "best"
    """Which of several operating points counts: the best one, or the mean over them."""
    extend: NonNegativeInt = 2
    """How often the grid goes on at an end where the best point lies."""
    seed: Seed = 1000
    """Seed of the trials; none of those that are reported, which nothing is chosen by."""

    def __post_init__(self) -> None:
        criterion_of(self.metric, "tune.metric=")
        if not self.over:
            raise UserError("There is nothing to tune.", "Name a setting with its values.")
        for name, values in self.over.items():
            if len(values) < 2 or sorted(set(values)) != values:
                raise UserError(
                    f"{name}={values} is no grid.", "Give two values or more, each once, rising."
                )

    @property
    def criterion(self) -> Criterion:
        """What trials are chosen by."""
        return criterion_of(self.metric)

    def grid(self) -> list[Point]:
        """Return all combinations of the values."""
        return list(product(*self.over.values()))

    def words(self, point: Point) -> str:
        """Return the overrides of a point."""
        return " ".join(f"{k}={v:g}" for k, v in zip(self.over, point, strict=True))

    def value(self, record: Record) -> float:
        """Return the metric that a trial is chosen by.

        Raises:
            UserError: When the run has no such metric.
        """
        value = value_of(record, self.criterion)
        if self.at == "mean":
            wanted = (*self.criterion, "")
            found = [m.value for m in record.metrics if (m.name, m.split, m.task) == wanted]
            value = sum(found) / len(found)
        return value

    def score(self, record: Record) -> float:
        """Return its metric with the sign by which less is better; infinity for no number.

        Raises:
            UserError: When the run has no such metric.
        """
        value = self.value(record)
        sign = -1 if better(self.criterion.metric) == "higher" else 1
        return sign * value if math.isfinite(value) else math.inf

    def beyond(self, scores: Mapping[Point, float]) -> list[Point]:
        """Return the next point to try, when the best one lies at an end of the grid; else nothing.

        Args:
            scores: Of the points tried, less being better.
        """
        best, grid = min(scores, key=lambda p: scores[p]), set(self.grid())
        if len(scores.keys() - grid) >= self.extend:
            return []
        for place, values in enumerate(zip(*scores, strict=True)):
            further = _further(sorted(set(values)), best[place])
            point = (*best[:place], further, *best[place + 1 :])
            if further != best[place] and point not in scores:
                return [point]
        return []


def _further(values: Sequence[float], best: float) -> float:
    """Return the value after `best` where that is the first or the last; else `best`.

    The step is the last one of the grid: by a factor where all values are above 0.
    """
    for ordered in (values, values[::-1]):
        end, before = ordered[0], ordered[1]
        if best == end:
            factor = min(values) > 0
            return float(f"{end * end / before if factor else 2 * end - before:.3g}")
    return best


# -- commands of an arm ------------------------------------------------------------------------


def tunes(tuning: Tuning, steps: Sequence[str]) -> bool:
    """Whether an arm is tuned: it trains, and sets nothing itself of what is tuned."""
    place = last_training(steps)
    return place >= 0 and not any(w.partition("=")[0] in tuning.over for w in steps[place].split())


def last_training(steps: Sequence[str]) -> int:
    """Return the place of the last command of an arm that trains; -1 where none does."""
    return max((n for n, step in enumerate(steps) if step.split()[:1] == ["train"]), default=-1)


def with_words(steps: Sequence[str], words: str) -> list[str]:
    """Return the commands of an arm with further words for the last one that trains."""
    place = last_training(steps)
    return [f"{step} {words}" if n == place else step for n, step in enumerate(steps)]


def trial_of(steps: Sequence[str], words: str) -> list[str]:
    """Return the commands of one trial: an arm up to its training."""
    return with_words(steps[: last_training(steps) + 1], words)


def judged(evaluators: Sequence[Plugin], criterion: Criterion, words: Sequence[str]) -> list[str]:
    """Return the words by which a trial is evaluated on the rows that it is chosen by, alone.

    Args:
        evaluators: Of the run as it would be reported.
        criterion: What trials are chosen by.
        words: Which the trial has already; they stand.

    Raises:
        UserError: When a trial would not have the metric.
    """
    said = {word.partition("=")[0] for word in words}
    reading = [e for e in evaluators if e.settings.get("split")]
    moved = [e for e in reading if f"evaluator.{e.name}.split" not in said]
    there = {"split": criterion.split}
    asked = [replace(e, settings=e.settings | there) if e in moved else e for e in evaluators]
    require_measured(asked, criterion)
    return [f"evaluator.{e.name}.split={criterion.split}" for e in moved]
