"""Two runs on the same items: the difference with its interval, its test, and equivalence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from effbench.stats.base import (
    ALPHA,
    LEVEL,
    UNBOUNDED,
    Bounds,
    Estimate,
    Floats,
    Interval,
    Mean,
    Student,
    binary,
    chunks,
    mean_of,
    pair,
    places,
    t_quantile,
    t_tail,
    totals,
)
from effbench.stats.bootstrap import studentised
from effbench.stats.intervals import independent
from effbench.stats.shares import alike, least_variance, span_of

EXACT_ITEMS = 18
"""Up to so many differing items a sign-flip test goes through all 2^n signs."""

MANY = 100
"""Items, or groups of items, from which on the difference of any outcomes is bootstrapped. Below,
differences are taken as nearly symmetric, where Student's t covers better."""

Better = Literal["higher", "lower", ""]
"""Which direction of a metric is the good one, where one is."""


@dataclass(frozen=True)
class Equivalence:
    """Whether a difference a - b is smaller than a margin, whatever its sign."""

    margin: float
    low: float
    """Lower end of the 90 % interval, which two one-sided 5 % tests amount to."""
    high: float
    p: float
    """Of a difference as large as the margin (two one-sided tests; Schuirmann, 1987)."""
    p_worse: float | None
    """Of a being worse than b by the margin; None when no direction is the good one."""
    p_beyond: float = 1.0
    """Of a not being worse than b by more than the margin, in either direction when none is the
    good one: small when a is shown to be."""


@dataclass(frozen=True)
class Difference:
    """A difference a - b: its interval, and the p-value of no difference at all."""

    value: float
    low: float
    high: float
    p: float
    n: int
    test: str
    equivalence: Equivalence | None = None
    """At the margin that was asked for."""


@dataclass(frozen=True)
class PairedShares:
    """The difference of two shares of right answers, by Tango's score (1998)."""

    only_a: float
    """Items that a alone gets right."""
    only_b: float
    """Items that b alone gets right."""
    n: float
    """Items; with groups, as many independent ones as tell as much, the counts in proportion."""
    df: float
    """Of Student's t; infinite without groups."""

    @property
    def value(self) -> float:
        """The difference of the shares."""
        return (self.only_a - self.only_b) / self.n

    def interval(self, level: float = LEVEL) -> Interval:
        """Return the two-sided interval, by bisection of the score."""
        if not self.df:
            return Interval(self.value, -math.inf, math.inf)
        z = t_quantile((1 + level) / 2, self.df)
        low = _bisect(lambda d: self._score(d) > z, -1.0, self.value)
        high = _bisect(lambda d: self._score(d) >= -z, self.value, 1.0)
        return Interval(self.value, low, high)

    def p_above(self, bound: float) -> float:
        """Return the p-value of `not above bound`."""
        return t_tail(-self._score(bound), self.df) if self.df else 1.0

    def p_below(self, bound: float) -> float:
        """Return the p-value of `not below bound`."""
        return t_tail(self._score(bound), self.df) if self.df else 1.0

    def _score(self, d: float) -> float:
        """Return the error at a true difference `d` over its standard error there."""
        d, n, a, b = min(1.0, max(-1.0, d)), self.n, self.only_a, self.only_b
        linear, constant = (2 * n - a + b) * d - a - b, -b * d * (1 - d)
        q = (math.sqrt(max(0.0, linear**2 - 8 * n * constant)) - linear) / (4 * n)
        variance = n * (2 * q + d * (1 - d))
        error = a - b - n * d
        if variance <= 0:
            return math.copysign(math.inf, error) if abs(error) > 1e-9 else 0.0
        return error / math.sqrt(variance)


def paired_difference(
    a: Sequence[float],
    b: Sequence[float],
    *,
    level: float = LEVEL,
    seed: int = 0,
    clusters: Sequence[int] = (),
    margin: float | None = None,
    better: Better = "",
    bounds: Bounds = UNBOUNDED,
) -> Difference:
    """Return the mean difference a - b over the same items.

    The interval is Tango's score interval for 0/1 outcomes; else a studentised paired bootstrap
    from `MANY` items on and Student's t below. The p-value, two-sided, is McNemar's exact one for
    0/1 outcomes and a sign-flip permutation otherwise: exact up to `EXACT_ITEMS` differing items,
    drawn at random above. With groups of items, all of it is over whole groups.

    Args:
        a: One outcome per item.
        b: The other run's outcome of the same items, in the same order.
        level: Confidence of the interval.
        seed: Of the resampling.
        clusters: Group of each item; empty when items are independent.
        margin: Difference that would still count as none; adds `Difference.equivalence`.
        better: Which direction is the good one, for `Equivalence.p_worse`.
        bounds: What the mean of a run can be; shares that mostly differ alike are as in
            `paired_seeds`.
    """
    x, y = pair(a, b)
    estimate = paired_estimate(x, y, clusters, seed, bounds=bounds)
    value, low, high = estimate.interval(level)
    p, test = paired_test(x, y, clusters, seed)
    same = None if margin is None else equivalence(estimate, margin, better)
    return Difference(value, low, high, p, x.size, test, same)


def paired_estimate(
    x: Floats,
    y: Floats,
    clusters: Sequence[int] = (),
    seed: int = 0,
    resamples: int = 0,
    bounds: Bounds = UNBOUNDED,
) -> Estimate:
    """Return the mean difference x - y as an estimate; the arguments are `paired_difference`'s.

    Args:
        x: One outcome per item.
        y: Of the other run.
        clusters: Group of each item.
        seed: Of the resampling.
        resamples: How many; 0 takes as many as the time allows.
        bounds: What the mean of a run can be.
    """
    mean, span = mean_of(x - y, clusters), span_of(x, y, bounds)
    if binary(x) and binary(y):
        return _paired_shares(x, y, mean)
    mostly_alike = math.isfinite(span) and alike(x - y)
    if mean.groups < MANY or not math.isfinite(mean.value) or mean.variance == 0 or mostly_alike:
        error = math.sqrt(max(mean.variance, least_variance(x - y, span)))
        return Student(mean.value, error, mean.df, span)
    return studentised(x - y, clusters, seed=seed, rows=resamples)


def paired_test(
    x: Floats, y: Floats, clusters: Sequence[int] = (), seed: int = 0
) -> tuple[float, str]:
    """Return the two-sided p-value of no difference, and the name of the test."""
    change = x - y
    if len(clusters):
        name = "sign-flip permutation of groups"
        change = totals(change, places(clusters, change.size))
    elif binary(x) and binary(y):
        return mcnemar_exact(x.tolist(), y.tolist()), "McNemar, exact"
    else:
        name = "sign-flip permutation"
    return (_sign_flip(change, seed) if np.isfinite(change).all() else 1.0), name


def mcnemar_exact(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the two-sided exact p-value for 0/1 outcomes of the same items."""
    x, y = pair(a, b)
    if not (binary(x) and binary(y)):
        raise ValueError("McNemar's test needs outcomes that are 0 or 1")
    only_a, only_b = int((x > y).sum()), int((y > x).sum())
    differing = only_a + only_b
    term = ways = 1
    for k in range(min(only_a, only_b)):  # whole numbers, so nothing is rounded or overflows
        term = term * (differing - k) // (k + 1)
        ways += term
    return min(1.0, 2 * ways / 2**differing)


def equivalence(estimate: Estimate, margin: float, better: Better = "") -> Equivalence:
    """Return whether an estimated difference a - b lies within a margin of zero.

    Args:
        estimate: Of the difference.
        margin: Above zero, in the unit of the metric.
        better: Which direction is the good one.

    Raises:
        ValueError: For a margin that is not above zero.
    """
    if not margin > 0:
        raise ValueError(f"a margin must be above zero: {margin}")
    _, low, high = estimate.interval(1 - 2 * ALPHA)
    above, below = estimate.p_above(-margin), estimate.p_below(margin)
    worse = {"higher": above, "lower": below, "": None}[better]
    p = max(above, below) if math.isfinite(estimate.value) else 1.0
    return Equivalence(margin, low, high, p, worse, _beyond(estimate, margin, better))


def _beyond(estimate: Estimate, margin: float, better: Better) -> float:
    """Return the p-value of a not being worse than b by more than the margin."""
    if not math.isfinite(estimate.value):
        return 1.0
    less, more = estimate.p_below(-margin), estimate.p_above(margin)
    return {"higher": less, "lower": more, "": min(1.0, 2 * min(less, more))}[better]


def _paired_shares(x: Floats, y: Floats, mean: Mean) -> PairedShares:
    n = float(x.size)
    only_a, only_b = float((x > y).sum()), float((y > x).sum())
    if mean.groups == x.size:
        return PairedShares(only_a, only_b, n, math.inf)
    if not mean.df:
        return PairedShares(only_a, only_b, n, 0.0)
    spread = (only_a + only_b) / n - mean.value**2
    share = independent(spread, mean) / n
    return PairedShares(only_a * share, only_b * share, n * share, mean.df)


def _bisect(keep_right: Callable[[float], bool], low: float, high: float) -> float:
    """Return where a condition that holds at first ceases to."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if keep_right(middle) else (low, middle)
    return (low + high) / 2


def _sign_flip(change: Floats, seed: int) -> float:
    """Return the share of sign patterns whose sum is at least as far from zero as ours."""
    change = change[change != 0]
    observed = abs(float(change.sum())) - 1e-9 * float(np.abs(change).sum())
    if change.size == 0:
        return 1.0
    if change.size <= EXACT_ITEMS:
        sums = np.zeros(1)
        for step in change:
            sums = np.concatenate([sums + step, sums - step])
        return float(np.mean(np.abs(sums) >= observed))
    generator = np.random.default_rng(seed)
    count = total = 0
    for rows in chunks(change.size):
        flips = generator.integers(0, 2, size=(rows, change.size), dtype=np.int8)
        sums = 2 * (flips @ change) - change.sum()
        count += int((np.abs(sums) >= observed).sum())
        total += rows
    return (count + 1) / (total + 1)
