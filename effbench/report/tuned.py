"""What came of a tuning, from records alone: the best trial of each arm, and the cost of all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from effbench.report.tuning import Point, Tuning, with_words
from effbench.results.records import Record, read
from effbench.results.tunings import Trials, read_trials, trials_file
from effbench.util.errors import UserError


@dataclass(frozen=True)
class Tuned:
    """A tuning with its trials."""

    tuning: Tuning
    trials: Trials
    records: dict[str, Record]
    """Of all trials, by key."""

    @classmethod
    def read(cls, tuning: Tuning, results: Path, name: str, again: str) -> Tuned:
        """Return the tuning of a table.

        Args:
            tuning: What its file says.
            results: Folder of runs and records.
            name: Of the table.
            again: What to do where something is missing.

        Raises:
            UserError: When the trials or the record of one are missing.
        """
        path, found = trials_file(results, name), dict[str, Record]()
        if not path.is_file():
            raise UserError(f"The trials of {name} were not made here.", again)
        trials = read_trials(path)
        for key in trials.runs():
            if not (record := results / "records" / f"{key}.json").is_file():
                raise UserError(f"Record {key} of a trial of {name} is not here.", again)
            found[key] = read(record)
        return cls(tuning, trials, found)

    def commands(self, arms: Mapping[str, list[str]]) -> dict[str, list[str]]:
        """Return the commands of all arms, with the words of the best trial where there are any."""
        best = {arm: chosen(self.tuning, t, self.records) for arm, t in self.trials.arms.items()}
        return {a: with_words(s, best[a]) if a in best else s for a, s in arms.items()}

    def sentence(self) -> str:
        """Return what was chosen for each arm, among how many trials, and what all of them cost."""
        counts = sorted({len(trials) for trials in self.trials.arms.values()})
        each = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
        how = "" if self.tuning.at == "best" else ", mean over operating points"
        taken = [
            f"{arm} {chosen(self.tuning, trials, self.records)}"
            + at_end(self.tuning, trials, self.records)
            for arm, trials in self.trials.arms.items()
        ]
        return (
            f"Tuned: {each} trials each, by {self.tuning.criterion}{how}, seed "
            f"{self.tuning.seed}: {'; '.join(taken)}. {cost(self.records.values())}"
        )


def chosen(tuning: Tuning, trials: Mapping[str, str], records: Mapping[str, Record]) -> str:
    """Return the words of the best trial; of equal ones the first.

    Args:
        tuning: Says by what.
        trials: Keys of the trials of one arm, by their words.
        records: By key.
    """
    return min(trials, key=lambda words: tuning.score(records[trials[words]]))


def at_end(tuning: Tuning, trials: Mapping[str, str], records: Mapping[str, Record]) -> str:
    """Say that the best trial is at an end of what was tried: a better one may lie beyond."""
    points = [_point(words) for words in trials]
    best = zip(_point(chosen(tuning, trials, records)), zip(*points, strict=True), strict=True)
    ends = any(value in (min(tried), max(tried)) for value, tried in best)
    return " (at the end of the grid)" if ends else ""


def _point(words: str) -> Point:
    """Return the values in the words of a trial."""
    return tuple(float(word.partition("=")[2]) for word in words.split())


def cost(records: Iterable[Record]) -> str:
    """Return what some runs took to train, in words."""
    runs = list(records)
    tokens = sum(m.value for r in runs for m in r.metrics if m.name == "train_tokens")
    seconds = sum(
        m.value for r in runs for m in r.metrics if (m.name, m.phase) == ("phase_seconds", "train")
    )
    return (
        f"Cost of tuning: {len(runs)} runs, {tokens:,.0f} tokens, {seconds / 60:.1f} min training."
    )
