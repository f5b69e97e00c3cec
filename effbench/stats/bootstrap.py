"""The studentised bootstrap of a mean, over items or over whole groups of items.

Its interval is second-order right: skewed outcomes are covered as often as stated from far fewer
items on than by Student's t or by a percentile bootstrap (Hall, 1988; Efron and Tibshirani, 1993,
chapter 12).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from effbench.stats.base import LEVEL, Floats, Interval, Mean, mean_of, resamples


@dataclass(frozen=True)
class Studentised:
    """An estimate whose error over its standard error follows its bootstrap distribution."""

    value: float
    error: float
    """Standard error."""
    ts: Floats
    """Sorted errors of the resampled means, each over its own standard error."""

    def interval(self, level: float = LEVEL) -> Interval:
        """Return the two-sided interval."""
        tail = (1 - level) / 2
        low, high = (_quantile(self.ts, share) for share in (tail, 1 - tail))
        return Interval(self.value, self.value - high * self.error, self.value - low * self.error)

    def p_above(self, bound: float) -> float:
        """Return the p-value of `not above bound`."""
        t = (self.value - bound) / self.error
        return float((self.ts >= t).sum() + 1) / (self.ts.size + 1)

    def p_below(self, bound: float) -> float:
        """Return the p-value of `not below bound`."""
        t = (self.value - bound) / self.error
        return float((self.ts <= t).sum() + 1) / (self.ts.size + 1)


def studentised(
    x: Floats, clusters: Sequence[int] = (), *, seed: int = 0, rows: int = 0
) -> Studentised:
    """Return the mean over items as an estimate.

    Args:
        x: One per item, not all the same.
        clusters: Group of each item; whole groups are resampled then.
        seed: Of the resampling.
        rows: Resamples; 0 takes as many as the time allows.
    """
    mean = mean_of(x, clusters)
    ts = [_errors(mean.sums[i], mean.sizes[i]) for i in resamples(mean.groups, seed, rows)]
    return Studentised(mean.value, _error(mean), np.sort(np.concatenate(ts)))


def _error(mean: Mean) -> float:
    """Return the standard error that the resampled means have theirs from too."""
    groups = mean.groups
    return math.sqrt(groups / (groups - 1) * float((mean.sums**2).sum())) / float(mean.sizes.sum())


def _errors(sums: Floats, sizes: Floats) -> Floats:
    """Return the studentised error of each resample [rows, groups]; infinite without any spread."""
    groups, items = sums.shape[1], sizes.sum(axis=1)
    mean = sums.sum(axis=1) / items
    rest = sums - mean[:, None] * sizes
    error = np.sqrt(groups / (groups - 1) * np.einsum("ij,ij->i", rest, rest)) / items
    far = np.where(mean > 0, math.inf, np.where(mean < 0, -math.inf, 0.0))
    spread = error > 1e-12 * np.abs(mean)
    return np.divide(mean, error, out=far, where=spread)


def _quantile(ts: Floats, share: float) -> float:
    """Return an interpolated quantile of sorted values that may be infinite."""
    place = share * (ts.size + 1) - 1
    below = min(max(math.floor(place), 0), ts.size - 1)
    above = min(below + 1, ts.size - 1)
    if not (math.isfinite(ts[below]) and math.isfinite(ts[above])):
        return float(ts[below] if share < 0.5 else ts[above])
    part = min(max(place - below, 0.0), 1.0)
    return float(ts[below] + part * (ts[above] - ts[below]))
