"""Run the trials of a tuning: the grid, and what lies beyond an end where the best one is."""

from __future__ import annotations

from collections.abc import Callable

from effbench.report.tuning import Point, Tuning
from effbench.results.records import Record


def search(tuning: Tuning, trial: Callable[[str], Record]) -> dict[str, str]:
    """Run trials until the best one is no end of the grid, or the grid was extended often enough.

    Args:
        tuning: What to try.
        trial: Runs one, given its words, or finds its record.

    Returns:
        The key of each trial, by its words.
    """
    keys, scores = dict[str, str](), dict[Point, float]()
    wave = tuning.grid()
    while wave:
        for point in wave:
            record = trial(tuning.words(point))
            keys[tuning.words(point)] = record.key
            scores[point] = tuning.score(record)
        wave = tuning.beyond(scores)
    return keys
