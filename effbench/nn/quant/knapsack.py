"""One option for each item, so that all together take at most so many bytes and lose the least.

With sizes s and losses l of the options o of each item i (a multiple-choice knapsack):

    min Σ_i l[i, o_i]   under   Σ_i s[i, o_i] <= budget

It is solved exactly. Items are taken in one after the other; what is kept of their combinations are
those that no other one beats in both size and loss, and of these the ones that may still win: their
loss, and the least that the other items can lose when options may be mixed (the linear relaxation,
over the lower hulls of sizes and losses), must not be more than what a greedy walk along the hulls
found at first. Sums are float64, so that choices within 1e-12 of each other are one.

Sources: Nemhauser and Ullmann, Discrete dynamic programming and capital allocation, Management
Science 15(9), 1969 (undominated combinations); Sinha and Zoltners, The multiple-choice knapsack
problem, Operations Research 27(3), 1979 (hulls and relaxation).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

SLACK = 1e-12
"""Share of the best loss known that sums in another order may differ by."""
Numbers = Sequence[Sequence[float]]
Array = npt.NDArray[np.float64]


class Step(NamedTuple):
    """From one option of an item to the next on its lower hull."""

    item: int
    option: int
    size: float
    """What it takes more."""
    gain: float
    """What it loses less."""


def choose(sizes: Numbers, losses: Numbers, budget: int) -> list[int]:
    """Return the option of each item.

    Args:
        sizes: Of the options of each item, which may have different numbers of them.
        losses: Of the same, finite.
        budget: Most of all sizes together.

    Raises:
        ValueError: When the smallest options do not fit.
    """
    if sum(map(min, sizes)) > budget:
        raise ValueError(f"The smallest options take more than {budget}.")
    steps = [_hull(i, *item) for i, item in enumerate(zip(sizes, losses, strict=True))]
    known = _greedy(sizes, losses, steps, budget)
    most = sum(loss[o] for loss, o in zip(losses, known, strict=True))
    most += SLACK * sum(max(map(abs, loss)) for loss in losses)
    taken, lost = np.zeros(1), np.zeros(1)
    trail: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []
    for i, (size, loss) in enumerate(zip(sizes, losses, strict=True)):
        both = [np.add.outer(x, np.array(y)).ravel() for x, y in ((taken, size), (lost, loss))]
        kept = _undominated(*both)
        rest = _relaxed(sizes[i + 1 :], losses[i + 1 :], steps[i + 1 :], budget - both[0][kept])
        kept = kept[both[1][kept] + rest <= most]
        taken, lost = (x[kept] for x in both)
        trail.append(np.divmod(kept, len(size)))
    return _followed(trail, int(lost.argmin()))


def _hull(item: int, sizes: Sequence[float], losses: Sequence[float]) -> list[Step]:
    """Return the steps from the smallest option along the lower hull, the steepest first."""
    hull: list[int] = []
    for option in sorted(range(len(sizes)), key=lambda o: (sizes[o], losses[o])):
        if hull and losses[option] >= losses[hull[-1]]:
            continue
        while len(hull) > 1 and _slope(hull[-2:], sizes, losses) <= _slope(
            [hull[-1], option], sizes, losses
        ):
            hull.pop()
        hull.append(option)
    return [Step(item, b, sizes[b] - sizes[a], losses[a] - losses[b]) for a, b in pairwise(hull)]


def _slope(pair: Sequence[int], sizes: Sequence[float], losses: Sequence[float]) -> float:
    a, b = pair
    return (losses[a] - losses[b]) / (sizes[b] - sizes[a])


def _smallest(sizes: Sequence[float], losses: Sequence[float]) -> int:
    return min(range(len(sizes)), key=lambda o: (sizes[o], losses[o]))


def _greedy(
    sizes: Numbers, losses: Numbers, steps: Sequence[Sequence[Step]], budget: float
) -> list[int]:
    """Return the options after all steps that fit, those that gain most for their size first."""
    chosen = [_smallest(*item) for item in zip(sizes, losses, strict=True)]
    left = budget - sum(size[o] for size, o in zip(sizes, chosen, strict=True))
    stopped: set[int] = set()
    for step in _by_slope(steps):
        if step.size > left or step.item in stopped:
            stopped.add(step.item)
            continue
        chosen[step.item] = step.option
        left -= step.size
    return chosen


def _by_slope(steps: Sequence[Sequence[Step]]) -> list[Step]:
    return sorted((s for item in steps for s in item), key=lambda s: -s.gain / s.size)


def _relaxed(
    sizes: Numbers, losses: Numbers, steps: Sequence[Sequence[Step]], left: Array
) -> Array:
    """Return the least that items can lose in what is left, [n]; infinite where they do not fit."""
    first = [_smallest(*item) for item in zip(sizes, losses, strict=True)]
    size = sum(s[o] for s, o in zip(sizes, first, strict=True))
    loss = sum(x[o] for x, o in zip(losses, first, strict=True))
    walk = _by_slope(steps)
    at = size + np.cumsum([0.0, *(s.size for s in walk)])
    least = loss - np.cumsum([0.0, *(s.gain for s in walk)])
    return np.where(left < size, np.inf, np.interp(left, at, least))


def _undominated(size: Array, loss: Array) -> npt.NDArray[np.int64]:
    """Return which combinations lose less than all that are no larger."""
    order = np.lexsort((loss, size))
    before = np.minimum.accumulate(loss[order])
    better = np.concatenate([[True], before[1:] < before[:-1]])
    return order[better]


def _followed(
    trail: Sequence[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]], last: int
) -> list[int]:
    """Return the options on the way to the last combination."""
    chosen = []
    for before, option in reversed(trail):
        chosen.append(int(option[last]))
        last = int(before[last])
    return chosen[::-1]
