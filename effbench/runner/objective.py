"""What a grid is for: a metric that a sweeper makes as good as it can.

`sweep.metric=loss@validation` names it; `sweep.direction=minimize|maximize` is which way is better,
and need not be said where it is known. It is returned to Hydra's sweeper for each run (Optuna and
others choose the next runs by it) and kept with the run's outcome.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

from effbench.report.comparison.select import Criterion, criterion_of, value_of
from effbench.report.labels import better
from effbench.results.records import Record
from effbench.util.errors import UserError, did_you_mean

Direction = Literal["minimize", "maximize"]
PREFIX = "sweep."
KEYS = ("metric", "direction")
JOBS = "jobs"
"""What else is said of a grid: how many runs go on at once."""


class Objective(NamedTuple):
    """A metric and which way it should go."""

    criterion: Criterion
    direction: Direction

    def of(self, record: Record) -> float:
        """Return its value of a finished run; at the best operating point, where there are several.

        Raises:
            UserError: When the run has no such metric.
        """
        return value_of(record, self.criterion)

    def declared(self) -> dict[str, str]:
        """Return it in words, as it is kept with the grid."""
        return {"metric": f"{self.criterion.metric}@{self.criterion.split}"} | {
            "direction": self.direction
        }

    def for_sweeper(self, words: Sequence[str]) -> list[str]:
        """Return the words that tell Optuna's sweeper of the direction, unless they stand there."""
        drawn = any(w.startswith("hydra/sweeper=optuna") for w in words)
        said = any(w.lstrip("+").startswith("hydra.sweeper.direction=") for w in words)
        return [f"hydra.sweeper.direction={self.direction}"] if drawn and not said else []

    def best(self, values: Sequence[float]) -> int | None:
        """Return the place of the best value, None when there is no value."""
        sign = 1 if self.direction == "minimize" else -1
        known = [i for i, value in enumerate(values) if not math.isnan(value)]
        return min(known, key=lambda i: sign * values[i], default=None)


def objective_in(words: Sequence[str]) -> tuple[Objective | None, list[str]]:
    """Return the objective that some words of a grid name, and the other words.

    Raises:
        UserError: For a word of `sweep.` that there is not, and a metric that cannot be chosen by.
    """
    own = dict(w.removeprefix(PREFIX).partition("=")[::2] for w in words if w.startswith(PREFIX))
    for key in own:
        if key not in (*KEYS, JOBS):
            raise UserError(f"Unknown key 'sweep.{key}'.", did_you_mean(key, (*KEYS, JOBS)))
    rest = [w for w in words if w.partition("=")[0] not in {f"{PREFIX}{key}" for key in KEYS}]
    own.pop(JOBS, None)
    if not own:
        return None, rest
    if "metric" not in own:
        raise UserError("sweep.direction is of no metric.", "Set sweep.metric=loss@validation.")
    criterion = criterion_of(own["metric"], "sweep.metric=")
    usual: Direction = "maximize" if better(criterion.metric) == "higher" else "minimize"
    for direction in get_args(Direction):
        if own.get("direction", usual) == direction:
            return Objective(criterion, direction), rest
    raise UserError(
        f"sweep.direction={own['direction']} is no direction.", "It is minimize or maximize."
    )
