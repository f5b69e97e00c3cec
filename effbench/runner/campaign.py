"""Run a campaign: its start and its tuning where it has them, then all arms, seed by seed.

What is finished is not run again, nor is an arm of one command whose record is there; a run that
an earlier version made counts too, and this is said.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from effbench.api.keys import earlier_keys
from effbench.api.spec import Spec
from effbench.config.compose import compose
from effbench.report.campaign import Campaign
from effbench.report.comparison.select import Criterion
from effbench.report.tuning import Tuning, judged, trial_of, tunes
from effbench.results.records import Record, read
from effbench.results.store import Store
from effbench.results.tunings import Trials, trials_file
from effbench.runner.ahead import ahead
from effbench.runner.local import execute
from effbench.runner.nursery import nursery
from effbench.runner.tuning import search
from effbench.util.files import write_atomic

Say = Callable[[str], None]


def run(campaign: Campaign, results: Path, say: Say) -> None:
    """Run what is not finished, and note the key of every run.

    Args:
        campaign: What to run.
        results: Folder of runs and records.
        say: Told what it takes at the most, then each command.

    Raises:
        RunFailedError: When a run failed or was interrupted; the same command goes on from there.
    """
    say(ahead(campaign, results).sentence())
    with nursery():
        keys = _made(campaign, results, say)
    path = campaign.manifest(results)
    write_atomic(path, json.dumps(keys, indent=1) + "\n")


def _made(campaign: Campaign, results: Path, say: Say) -> dict[str, list[str]]:
    """Return the keys of the runs of each arm, after all were made."""
    runs = _Runs(campaign, results, say, _start(campaign.start, results, say))
    runs.check()
    if campaign.tune:
        runs.tune(campaign.tune)
    arms = campaign.tuned_arms(results)
    keys: dict[str, list[str]] = {}
    for seed in campaign.seeds:
        for arm, steps in arms.items():
            key = runs.chain(steps, seed)
            if key not in keys.setdefault(arm, []):
                keys[arm].append(key)
    return keys


def _start(experiment: str, results: Path, say: Say) -> str:
    """Return the key of the run that all arms go on from, made if it is missing; else nothing."""
    if not experiment:
        return ""
    job = compose(None, [f"experiment={experiment}", *_place(results)])
    say(f"effbench {job.spec.stage} experiment={experiment}")
    return execute(job).key


def _place(results: Path) -> list[str]:
    """Return the words of where a run is kept, and of whether it shows how far it is."""
    return [f"run.progress={str(sys.stderr.isatty()).lower()}", f"run.results={results}"]


@dataclass(frozen=True)
class _Runs:
    """Makes the runs of a campaign."""

    campaign: Campaign
    results: Path
    say: Say
    start: str
    """Key of the run that all arms go on from; empty without."""

    def check(self) -> None:
        """Compose the first command of each arm, so that what is wrong with it is said by now.

        Raises:
            UserError: When one is no command of what all arms go on from.
        """
        for steps in self.campaign.arms.values():
            stage, *words = self._words(steps[0], 0, self.start, self.campaign.seeds[0])
            compose(stage, [*words, *_place(self.results)])

    def _words(self, step: str, number: int, key: str, seed: int) -> list[str]:
        """Return a command of an arm as it is run.

        Args:
            step: The command.
            number: Which of its arm; 0 is the first.
            key: Of the run that it goes on from; empty for none.
            seed: Of a run that has one.
        """
        stage, *words = step.split()
        # A run that only reads out what was trained has its data from there.
        shared = not (stage == "eval" and number)
        return [
            stage,
            *([f"experiment={self.campaign.experiment}"] if shared else []),
            *([f"from={key}"] if key else []),
            *words,
            *([] if stage == "eval" else [f"seed={seed}"]),
        ]

    def chain(self, steps: Sequence[str], seed: int, by: Criterion | None = None) -> str:
        """Return the key of the last run of an arm, after all of them were made.

        Args:
            steps: Its commands.
            seed: Of each run that has one.
            by: On whose rows the last one is evaluated; None for those that it says itself.
        """
        key = self.start
        for number, step in enumerate(steps):
            stage, *words = self._words(step, number, key, seed)
            place = _place(self.results)
            if by and number == len(steps) - 1:
                words += judged(compose(stage, [*words, *place]).spec.evaluators, by, words)
            self.say(f"effbench {stage} {' '.join(words)}")
            job = compose(stage, [*words, *place])
            alone = len(steps) == 1
            key = done(job.spec, self.results, alone, self.say) or execute(job).key
        return key

    def tune(self, tuning: Tuning) -> None:
        """Run the trials of every arm that is tuned, and note their keys."""
        tried = {
            arm: search(tuning, partial(self._trial, tuning, steps))
            for arm, steps in self.campaign.arms.items()
            if tunes(tuning, steps)
        }
        Trials(tried).write(trials_file(self.results, self.campaign.name))

    def _trial(self, tuning: Tuning, steps: Sequence[str], words: str) -> Record:
        """Return the record of one trial of an arm."""
        key = self.chain(trial_of(steps, words), tuning.seed, tuning.criterion)
        return read(Store(self.results).records / f"{key}.json")


def done(spec: Spec, results: Path, alone: bool, say: Say) -> str:
    """Return the key under which a run is there, by an earlier version too; else nothing.

    Args:
        spec: The run.
        results: Folder of runs and records.
        alone: Whether its record is enough, since nothing goes on from it.
        say: Told that an earlier version made it.
    """
    store = Store(results)
    for key in (spec.key, *earlier_keys(spec)):
        record = store.records / f"{key}.json"
        if record.is_file() and (alone or store.run(key).finished):
            if key != spec.key:
                said = json.dumps(read(record).spec["versions"] or "the first ones")
                say(f"  there as {key}, with versions {said}")
            return key
    return ""
