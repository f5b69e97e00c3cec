"""Two rows of a comparison on the same items: the test that covers as much as their runs allow."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from effbench.results.bounds import bounds_of
from effbench.results.records import Outcomes
from effbench.stats import (
    Better,
    Bounds,
    Difference,
    OverSeeds,
    Student,
    equivalence,
    over_seeds,
    paired_difference,
    paired_seeds,
    paired_test,
    seeds_and_items,
)

OTHER_ITEMS = "not the same items: no paired test"


@dataclass(frozen=True)
class Side:
    """The outcomes of a group of runs at one operating point."""

    group: int
    """Which group of runs they are of."""
    seeds: list[tuple[int, ...]]
    """Of each run."""
    outcomes: list[Outcomes]
    """Of each run."""
    seedless: bool
    """Whether no seed enters them."""

    @property
    def values(self) -> np.ndarray:
        """Outcomes as an array [seeds, items]."""
        return np.array([o.values for o in self.outcomes], dtype=np.float64)

    @property
    def bounds(self) -> Bounds:
        """What the mean of a run can be."""
        return bounds_of(self.outcomes[0].metric)

    def same_items(self, other: Side) -> bool:
        """Return whether all runs of both saw the same items."""
        mine, own = self.outcomes[0], self.outcomes + other.outcomes
        return all(o.ids == mine.ids and len(o.values) == len(mine.values) for o in own)


@dataclass(frozen=True)
class Contrast:
    """What two sides show."""

    difference: Difference
    """By the test that covers the most."""
    covers: str
    """`seeds and items`, or `items` alone."""
    items: Difference | None = None
    """The test over items alone, of outcomes averaged over seeds, where it is not the first one."""
    seeds: OverSeeds | None = None
    """The tests over seeds alone, where both sides have several."""


def contrast(
    a: Side, b: Side, margin: float | None = None, better: Better = "", alone: bool = True
) -> Contrast:
    """Return what the difference a - b shows.

    Runs are paired by their seed where both sides have the same seeds: rows, their order and the
    start are alike then. Otherwise each side has seeds of its own, unless no seed enters one of
    them.

    Args:
        a: One side.
        b: The other side, on the same items.
        margin: Difference that would still count as none.
        better: Which direction of the metric is the good one.
        alone: Whether to test over items and over seeds alone too, where one test covers both.
    """
    joint = _joint(a, b)
    if joint is None:
        return Contrast(_over_items(a, b, margin, better), "items")
    same = None if margin is None else equivalence(joint, margin, better)
    value, low, high = joint.interval()
    size = a.values.shape[1]
    whole = Difference(value, low, high, joint.p_zero(), size, "t over seeds and items", same)
    if not alone:
        return Contrast(whole, "seeds and items")
    return Contrast(whole, "seeds and items", _over_items(a, b, margin, better), _over_seeds(a, b))


def _over_items(a: Side, b: Side, margin: float | None, better: Better) -> Difference:
    """Return what the items alone show, each a mean over seeds."""
    x, y = (side.values.mean(axis=0).tolist() for side in (a, b))
    clusters = a.outcomes[0].clusters
    return paired_difference(x, y, clusters=clusters, margin=margin, better=better, bounds=a.bounds)


def p_of_difference(a: Side, b: Side) -> float:
    """Return the p-value of `contrast` alone, which takes less time."""
    joint = _joint(a, b)
    if joint is not None:
        return joint.p_zero()
    means = a.values.mean(axis=0), b.values.mean(axis=0)
    return paired_test(*means, a.outcomes[0].clusters)[0]


def _joint(a: Side, b: Side) -> Student | None:
    """Return the difference over seeds and items; None when the seeds are too few for one."""
    x, y, clusters = a.values, b.values, a.outcomes[0].clusters
    if a.group == b.group or (len(x) > 1 and _same_seeds(a, b)):
        pairs = [b.seeds.index(s) for s in a.seeds] if _same_seeds(a, b) else slice(None)
        return paired_seeds(x, y[pairs], clusters, a.bounds) if len(x) > 1 else None
    if len(x) > 1 and len(y) > 1:
        return seeds_and_items(x, y, clusters, bounds=a.bounds)
    if len(x) > 1 and b.seedless:
        return seeds_and_items(x, y, clusters, fixed=True, bounds=a.bounds)
    if len(y) > 1 and a.seedless:
        turned = seeds_and_items(y, x, clusters, fixed=True, bounds=a.bounds)
        return replace(turned, value=-turned.value)
    return None


def _same_seeds(a: Side, b: Side) -> bool:
    """Whether both have runs of the same seeds, one of each."""
    return len({*a.seeds}) == len(a.seeds) and sorted(a.seeds) == sorted(b.seeds)


def _over_seeds(a: Side, b: Side) -> OverSeeds | None:
    """Return the tests over the means of the runs, seeds that both sides have first."""
    if len(a.seeds) < 2 or len(b.seeds) < 2:
        return None
    both = [s for s in a.seeds if s in b.seeds]
    means = [
        [float(side.values[side.seeds.index(s)].mean()) for s in _ordered(side, both)]
        for side in (a, b)
    ]
    return over_seeds(means[0], means[1], len(both))


def _ordered(side: Side, first: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return [*first, *(s for s in side.seeds if s not in first)]
