"""What `effbench tune` does: trials of one method, the best of them, and what they cost."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from effbench.api.spec import Job
from effbench.config.compose import commanded, compose
from effbench.config.overrides import check_overrides, parse
from effbench.config.start import split_words
from effbench.report.tuned import at_end, chosen, cost
from effbench.report.tuning import Tuning, judged
from effbench.results.records import Record
from effbench.results.tunings import Trials, trials_file
from effbench.runner.local import execute
from effbench.runner.nursery import nursery
from effbench.runner.objective import objective_in
from effbench.runner.tuning import search
from effbench.util.errors import UserError


def tune(
    words: Sequence[str],
    extra: Sequence[Path],
    at: Literal["best", "mean"],
    extend: int,
    say: Callable[[str], None],
) -> list[str]:
    """Run the trials; return the best one, what they cost, and the command that reports it.

    Args:
        words: A file with a spec, if any, and overrides, one or more with several values:
            `train.learning_rate=1e-3,3e-3`.
        extra: Folders with the user's own configs.
        at: Which of several operating points counts.
        extend: How often the grid goes on at an end where the best point lies.
        say: Told each trial as it ends.

    Raises:
        UserError: When nothing has several values, or one is no number.
    """
    tuning, fixed = tuning_in(words, at, extend, extra)
    own = [*fixed, *judged(compose(None, fixed, extra).spec.evaluators, tuning.criterion, fixed)]
    records: dict[str, Record] = {}

    def job(point: str) -> Job:
        said = [*own, *point.split()]
        return commanded(compose(None, said, extra), said)

    def trial(point: str) -> Record:
        record = execute(job(point))
        records[record.key] = record
        say(f"{record.key}  {point}  {tuning.value(record):.5g}")
        return record

    results = Path(job(tuning.words(tuning.grid()[0])).runtime.results)
    with nursery():
        trials = search(tuning, trial)
    name = hashlib.sha256(shlex.join(sorted(words)).encode()).hexdigest()[:12]
    Trials({shlex.join(words): trials}).write(trials_file(results, name))
    best = chosen(tuning, trials, records)
    winner = records[trials[best]]
    command = shlex.join(["effbench", winner.stage, *fixed, *best.split()])
    return [
        f"Best by {tuning.metric}: {best} ({tuning.value(winner):.5g})"
        + at_end(tuning, trials, records),
        cost(records.values()),
        f"Run it: {command}",
    ]


def tuning_in(
    words: Sequence[str],
    at: Literal["best", "mean"] = "best",
    extend: int = 2,
    extra: Sequence[Path] = (),
) -> tuple[Tuning, list[str]]:
    """Return the tuning that some words ask for, and the words that all trials share.

    Raises:
        UserError: For a word that is no override or names nothing, when nothing has several values,
            or one is no number.
    """
    objective, words = objective_in(words)
    files, words = split_words(words)
    check_overrides(words, extra)
    metric = objective.declared()["metric"] if objective else Tuning.metric
    over = {w.partition("=")[0]: _numbers(w) for w in words if parse(w).is_sweep_override()}
    if not over:
        raise UserError(
            "There is nothing to tune: no word has several values.",
            "For example: effbench tune method=lora train.learning_rate=3e-4,1e-3,3e-3",
        )
    if drawn := [name for name in over if name.rpartition(".")[2] == "seed"]:
        raise UserError(
            f"{drawn[0]} is nothing to tune: the luckiest draw would be chosen.",
            f"Leave one value; several are run by: effbench train -m {drawn[0]}=0,1,2",
        )
    shared = [w for w in words if w.partition("=")[0] not in over]
    return Tuning(over, metric, at, extend), [*map(str, files), *shared]


def _numbers(word: str) -> list[float]:
    """Return the values of a word, rising."""
    name, _, values = word.partition("=")
    try:
        return sorted(map(float, values.split(",")))
    except ValueError:
        raise UserError(
            f"{word} is no grid of numbers.",
            f"Write {name}=0.001,0.003; what is no number is compared by: effbench train -m",
        ) from None
