"""Intervals of means, shares, medians and paired ratios.

Each covers as often as it says on the sizes and shapes that `effbench selfcheck coverage` tries;
where there is too little for that, it is unbounded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from effbench.stats.base import (
    LEVEL,
    UNBOUNDED,
    Bounds,
    Floats,
    Interval,
    Mean,
    array,
    binary,
    mean_of,
    pair,
    t_quantile,
)
from effbench.stats.bootstrap import studentised
from effbench.stats.shares import alike, as_shares, on_scale, per_answer
from effbench.stats.special import scipy_special

FEWEST = 10
"""Items, or groups of items, that a bounded interval of a mean needs: with fewer, that of a skewed
quantity would cover too seldom."""

FEWEST_REPEATS = 6
"""Repeats that a bounded 95 % interval of a median needs: of five, the median lies between the
smallest and the largest in 93.75 % only."""


def mean_interval(
    values: Sequence[float],
    *,
    level: float = LEVEL,
    seed: int = 0,
    clusters: Sequence[int] = (),
    resamples: int = 0,
    bounds: Bounds = UNBOUNDED,
) -> Interval:
    """Return the mean over items with its interval.

    Studentised bootstrap over items, or over whole groups of items; for outcomes that are all 0 or
    1 it is Wilson's score interval, which stays honest when every answer is right. So it is, for
    as many answers as tell as much, for other shares that are few or mostly alike. Unbounded for
    fewer than `FEWEST` items (or groups) unless they are shares.

    Args:
        values: One per item.
        level: Confidence.
        seed: Of the resampling.
        clusters: Group of each item; whole groups are resampled then. Empty when items are
            independent.
        resamples: How many; 0 takes as many as the time allows.
        bounds: What the mean can be; the interval ends there.
    """
    x = array(values)
    shares = as_shares(x, bounds)
    if shares is not None:
        mean = mean_of(shares, clusters)
        if binary(shares) or alike(shares) or mean.groups < FEWEST:
            return on_scale(_share(shares, mean, level), x, bounds)
    return _resampled(x, clusters, level, seed, resamples).within(bounds)


def _resampled(x: Floats, clusters: Sequence[int], level: float, seed: int, rows: int) -> Interval:
    """Return the mean with its bootstrapped interval; the arguments are `mean_interval`'s."""
    mean = mean_of(x, clusters)
    if math.isfinite(mean.value) and np.ptp(x) == 0 and mean.groups >= FEWEST:
        return Interval(mean.value, mean.value, mean.value)
    if mean.groups < FEWEST or not math.isfinite(mean.value):
        return Interval(mean.value, -math.inf, math.inf)
    return studentised(x, clusters, seed=seed, rows=rows).interval(level)


def median_interval(values: Sequence[float], *, level: float = LEVEL, seed: int = 0) -> Interval:
    """Return the median with an interval that holds for any continuous distribution.

    Order statistics, interpolated between the two pairs that cover just more and just less
    (Hettmansperger and Sheather, 1986; Nyblom, 1992). Unbounded when the smallest and the largest
    value cover less: below `FEWEST_REPEATS` at 95 %.

    Args:
        values: Independent repeated measurements of one quantity.
        level: Confidence.
        seed: Not needed; nothing is drawn.
    """
    x = np.sort(array(values))
    n, value = x.size, float(np.median(x))
    bdtr = scipy_special().bdtr
    covered = 1 - 2 * bdtr(np.arange((n + 1) // 2), n, 0.5)  # by the d + 1 outermost pairs
    if not math.isfinite(value) or covered.size == 0 or covered[0] < level:
        return Interval(value, -math.inf, math.inf)
    d = int((covered >= level).sum())  # x[d - 1] and x[n - d] cover at least the level
    inner = float(covered[d]) if d < covered.size else 0.0
    over = (float(covered[d - 1]) - level) / (float(covered[d - 1]) - inner)
    part = (n - d) * over / (d + (n - 2 * d) * over)
    low = (1 - part) * x[d - 1] + part * x[d]
    high = (1 - part) * x[n - d] + part * x[n - d - 1]
    return Interval(value, float(low), float(high))


def ratio_interval(
    a: Sequence[float], b: Sequence[float], *, level: float = LEVEL, seed: int = 0
) -> Interval:
    """Return the median of the paired ratios a / b with its interval, as `median_interval`.

    Args:
        a: Positive numbers, one per pair.
        b: Positive numbers, one per pair.
        level: Confidence.
        seed: Not needed; nothing is drawn.
    """
    x, y = pair(a, b)
    return median_interval((x / y).tolist(), level=level, seed=seed)


def _share(x: Floats, mean: Mean, level: float) -> Interval:
    """Return a share with Wilson's score interval (1927).

    Groups, and outcomes between 0 and 1, enter as the number of independent answers that would
    tell as much, never more than there are (Korn and Graubard, 1998), with Student's t for the few
    groups.
    """
    share, n = min(1.0, max(0.0, mean.value)), float(x.size)
    if mean.groups == n and binary(x):
        return wilson(share, n, math.inf, level)
    if not mean.df:
        return Interval(share, 0.0, 1.0)
    found = independent(share * (1 - share), mean, per_answer(x, mean.groups))
    return wilson(share, found, mean.df, level)


def independent(spread: float, mean: Mean, part: float = 1.0) -> float:
    """Return how many independent items tell as much as the groups of items do.

    Args:
        spread: Variance of a single item.
        mean: Of the items, with its variance over groups. Without any spread it is the number of
            groups.
        part: Of the spread that an item has, by `per_answer`.
    """
    if spread <= 0 or mean.variance <= 0:
        return mean.groups / part
    return min(float(mean.sizes.sum()) / part, spread / mean.variance)


def wilson(share: float, n: float, df: float, level: float) -> Interval:
    """Return the score interval of a share of `n` independent answers, by Student's t."""
    z = t_quantile((1 + level) / 2, df)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


def spread_interval(values: Floats, level: float = LEVEL) -> Interval:
    """Return the mean of a few nearly normal values, such as one per seed, by Student's t."""
    return mean_of(values).student().interval(level)
