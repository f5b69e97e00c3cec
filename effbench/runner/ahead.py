"""What a campaign can take, said before it starts: its runs, and the tokens that they train on.

Both are bounds. A run that two arms share counts once; what is finished already counts too, since
its key is not known before what it goes on from is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from effbench.config.compose import compose
from effbench.report.campaign import Campaign
from effbench.report.tuning import trial_of, tunes
from effbench.util.errors import UserError

Chain = tuple[int, tuple[str, ...]]
"""A seed, and the commands up to that of one run."""


@dataclass(frozen=True)
class Ahead:
    """The most that a campaign takes."""

    trials: int
    """Runs of its tuning, with all that the grid may be extended by."""
    others: int
    """All other runs, its start among them."""
    tokens: int
    """That all of them train on."""
    uncounted: int
    """Runs that train, for how long is not known before."""

    def sentence(self) -> str:
        """Return it in words."""
        tuned = f" ({self.trials} of them trials)" if self.trials else ""
        more = f", and {self.uncounted} runs of unknown length" if self.uncounted else ""
        return (
            f"At most {self.trials + self.others} runs{tuned} and {self.tokens:,} training tokens"
            f"{more}. What is finished is not run again."
        )


def ahead(campaign: Campaign, results: Path) -> Ahead:
    """Return the most that a campaign takes, from its file alone.

    Args:
        campaign: What is to be run.
        results: Folder of runs and records, where an arm may name one that it goes on from.

    Raises:
        UserError: When its start, or the first command of an arm, is none.
    """
    trials, others = set(_trials(campaign)), set(_reported(campaign))
    place = f"run.results={results}"

    @cache
    def most(command: str, first: bool) -> int | None:
        stage, *words = command.split()
        if stage != "train":
            return 0
        return _tokens([f"experiment={campaign.experiment}", *words, place], first)

    taken = [most(steps[-1], len(steps) == 1) for _, steps in (*trials, *others)]
    if campaign.start:
        taken.append(_tokens([f"experiment={campaign.start}", place], True))
    return Ahead(
        len(trials),
        len(others) + bool(campaign.start),
        sum(count or 0 for count in taken),
        taken.count(None),
    )


def _reported(campaign: Campaign) -> Iterator[Chain]:
    """Return the runs of all arms and seeds; those without a seed of their own once."""
    for steps in campaign.arms.values():
        for seed in campaign.seeds:
            yield from _runs(steps, seed)


def _trials(campaign: Campaign) -> Iterator[Chain]:
    """Return the runs of the tuning; points beyond the grid are named by their place."""
    tuning = campaign.tune
    if not tuning:
        return
    points = [tuning.words(point) for point in tuning.grid()]
    for steps in campaign.arms.values():
        if tunes(tuning, steps):
            for words in points:
                yield from _runs(trial_of(steps, words), tuning.seed)
            for further in range(tuning.extend):
                yield -1 - further, tuple(trial_of(steps, points[-1]))


def _runs(steps: Sequence[str], seed: int) -> Iterator[Chain]:
    """Return each run of a chain, with what it goes on from."""
    seed = seed if any(step.split()[0] != "eval" for step in steps) else 0
    for number in range(1, len(steps) + 1):
        yield seed, tuple(steps[:number])


def _tokens(words: Sequence[str], alone: bool) -> int | None:
    """Return the most tokens that a run trains on; None where that is not known before.

    Args:
        words: Of its command.
        alone: Whether it goes on from no run of its arm, after which alone it may be possible.
    """
    try:
        spec = compose(None, list(words)).spec
    except UserError:
        if alone:
            raise
        return None
    train = spec.train
    return None if train.epochs else train.max_steps * train.rows_per_step * spec.dataset.max_length
