"""How much less data one method takes for what another reaches: curves over sizes, interpolated.

    n(level) = the size at which a curve first reaches a level, linear over log n between its sizes
    ratio    = (largest size of the other) / n(what the other reaches with it)

A ratio is bounded by the sizes that were tried: where the smallest of them already reaches the
level it is at least what it says, and where the largest does not there is none (0). The interval
resamples seeds and items together, the same for all points of both curves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from effbench.stats.base import LEVEL, Floats, Interval


def reaching(sizes: Sequence[float], curve: Sequence[float], level: float) -> float:
    """Return the size at which a curve first reaches a level; infinite where it never does.

    Args:
        sizes: Rising.
        curve: A value for each; higher is better.
        level: To be reached.
    """
    if curve[0] >= level:
        return sizes[0]
    for place in range(1, len(sizes)):
        low, high = curve[place - 1], curve[place]
        if low < level <= high:
            share = (level - low) / (high - low)
            return sizes[place - 1] * (sizes[place] / sizes[place - 1]) ** share
    return math.inf


def data_ratio(
    sizes: Sequence[float], ours: Floats, theirs: Floats, draws: int = 2000, seed: int = 0
) -> Interval:
    """Return how many times less data ours takes for what theirs reaches with the most.

    Args:
        sizes: Rising, of both.
        ours: Outcomes [seeds, sizes, items], higher is better; items are the same everywhere.
        theirs: Likewise; or [seeds, 1, items] where it has one size, the last.
        draws: Of the bootstrap.
        seed: Of these.
    """
    generator = np.random.default_rng(seed)
    seeds, _, items = ours.shape
    found = []
    for draw in range(draws + 1):
        rows = generator.integers(seeds, size=seeds) if draw else np.arange(seeds)
        columns = generator.integers(items, size=items) if draw else np.arange(items)
        mine, other = (x[rows][:, :, columns].mean((0, 2)) for x in (ours, theirs))
        found.append(sizes[-1] / reaching(sizes, mine.tolist(), float(other[-1])))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(found[1:], [tail, 1 - tail])
    return Interval(found[0], float(low), float(high))
