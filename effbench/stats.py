"""Intervals and paired tests over per-item outcomes; the same seed gives the same numbers.

What stands in the literature under these names: the BCa bootstrap (Efron, 1987), Wilson's score
interval (1927), the sign-flip permutation test (Fisher, 1935), McNemar's exact test (1947) and
Holm's step-down correction (1979).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

LEVEL = 0.95
"""Confidence of an interval, unless another one is asked for."""

ALPHA = 0.05
"""A difference counts when its adjusted p-value is at most this."""

EXACT_ITEMS = 18
"""Up to so many differing items a sign-flip test goes through all 2^n signs."""

DRAWS = 10_000_000
"""Random numbers that one bootstrap or permutation may draw; limits the time it takes."""

Floats = npt.NDArray[np.float64]
_NORMAL = NormalDist()


class Interval(NamedTuple):
    """An estimate between two bounds; unbounded when a single item is all there is."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A paired difference a - b: its interval, and the p-value of no difference at all."""

    value: float
    low: float
    high: float
    p: float
    n: int
    test: str


# -- intervals ---------------------------------------------------------------------------------


def mean_interval(
    values: Sequence[float],
    *,
    level: float = LEVEL,
    seed: int = 0,
    clusters: Sequence[int] = (),
) -> Interval:
    """Return the mean over items with its interval.

    BCa bootstrap over items; for outcomes that are all 0 or 1 it is Wilson's score interval, which
    stays honest when every answer is right. Below some thirty items of a skewed quantity the
    bootstrap interval is somewhat too narrow.

    Args:
        values: One per item.
        level: Confidence.
        seed: Of the resampling.
        clusters: Group of each item; whole groups are resampled then. Empty when items are
            independent.
    """
    x = _array(values)
    if len(clusters):
        return _cluster_bootstrap(x, np.asarray(clusters), level, seed)
    if _binary(x):
        return _wilson(float(x.mean()), x.size, level)
    return _bca(x, level, seed)


def median_interval(values: Sequence[float], *, level: float = LEVEL, seed: int = 0) -> Interval:
    """Return the median with its percentile bootstrap interval.

    Args:
        values: Repeated measurements of one quantity.
        level: Confidence.
        seed: Of the resampling.
    """
    x = _array(values)
    value = float(np.median(x))
    if x.size == 1:
        return Interval(value, -math.inf, math.inf)
    medians = np.concatenate([np.median(x[i], axis=1) for i in _resamples(x.size, seed)])
    low, high = np.quantile(medians, ((1 - level) / 2, (1 + level) / 2))
    return Interval(value, float(low), float(high))


def ratio_interval(
    a: Sequence[float], b: Sequence[float], *, level: float = LEVEL, seed: int = 0
) -> Interval:
    """Return the median of the paired ratios a / b with its percentile bootstrap interval.

    Args:
        a: Positive numbers, one per pair.
        b: Positive numbers, one per pair.
        level: Confidence.
        seed: Of the resampling.
    """
    x, y = _pair(a, b)
    return median_interval((x / y).tolist(), level=level, seed=seed)


def _wilson(share: float, n: int, level: float) -> Interval:
    z = _NORMAL.inv_cdf((1 + level) / 2)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


def _bca(x: Floats, level: float, seed: int) -> Interval:
    """Return the mean with its bias-corrected and accelerated bootstrap interval."""
    mean = float(x.mean())
    if x.size == 1 or not math.isfinite(mean):
        return Interval(mean, -math.inf, math.inf)
    if np.ptp(x) == 0:
        return Interval(mean, mean, mean)
    means = np.concatenate([x[i].mean(axis=1) for i in _resamples(x.size, seed)])
    below = float(np.mean(means < mean) + np.mean(means == mean) / 2)
    bias = _NORMAL.inv_cdf(min(max(below, 1 / means.size), 1 - 1 / means.size))
    pull = x - mean  # proportional to how far the jackknife means lie below their own mean
    acceleration = float((pull**3).sum() / (6 * (pull**2).sum() ** 1.5))
    ends = []
    for share in ((1 - level) / 2, (1 + level) / 2):
        z = bias + _NORMAL.inv_cdf(share)
        ends.append(_NORMAL.cdf(bias + z / (1 - acceleration * z)))
    low, high = np.quantile(means, ends)
    return Interval(mean, float(low), float(high))


def _cluster_bootstrap(x: Floats, clusters: npt.NDArray[Any], level: float, seed: int) -> Interval:
    """Return the mean with its percentile bootstrap interval over whole groups of items."""
    _, place = np.unique(clusters, return_inverse=True)
    sums, counts = np.bincount(place, weights=x), np.bincount(place)
    mean = float(x.mean())
    if sums.size == 1:
        return Interval(mean, -math.inf, math.inf)
    means = np.concatenate(
        [sums[i].sum(axis=1) / counts[i].sum(axis=1) for i in _resamples(sums.size, seed)]
    )
    low, high = np.quantile(means, ((1 - level) / 2, (1 + level) / 2))
    return Interval(mean, float(low), float(high))


# -- paired tests ------------------------------------------------------------------------------


def paired_difference(
    a: Sequence[float], b: Sequence[float], *, level: float = LEVEL, seed: int = 0
) -> Difference:
    """Return the mean difference a - b over the same items.

    The interval is a BCa bootstrap over items. The p-value, two-sided, is McNemar's exact one for
    0/1 outcomes and a sign-flip permutation otherwise: exact up to `EXACT_ITEMS` differing items,
    drawn at random above.

    Args:
        a: One outcome per item.
        b: The other run's outcome of the same items, in the same order.
        level: Confidence of the interval.
        seed: Of the resampling.
    """
    x, y = _pair(a, b)
    change = x - y
    mean, low, high = _bca(change, level, seed)
    if _binary(x) and _binary(y):
        return Difference(mean, low, high, mcnemar_exact(a, b), x.size, "McNemar, exact")
    p = _sign_flip(change, seed) if math.isfinite(mean) else 1.0
    return Difference(mean, low, high, p, x.size, "sign-flip permutation")


def mcnemar_exact(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the two-sided exact p-value for 0/1 outcomes of the same items."""
    x, y = _pair(a, b)
    if not (_binary(x) and _binary(y)):
        raise ValueError("McNemar's test needs outcomes that are 0 or 1")
    only_a, only_b = int((x > y).sum()), int((y > x).sum())
    differing = only_a + only_b
    term = ways = 1
    for k in range(min(only_a, only_b)):  # whole numbers, so nothing is rounded or overflows
        term = term * (differing - k) // (k + 1)
        ways += term
    return min(1.0, 2 * ways / 2**differing)


def holm(pvalues: Sequence[float]) -> list[float]:
    """Return the p-values adjusted for being one of several, in the order given."""
    adjusted = [0.0] * len(pvalues)
    running = 0.0
    for rank, index in enumerate(sorted(range(len(pvalues)), key=pvalues.__getitem__)):
        running = max(running, min(1.0, (len(pvalues) - rank) * pvalues[index]))
        adjusted[index] = running
    return adjusted


def finding(difference: Difference, p: float | None = None) -> str:
    """Return `lower`, `higher` or `cannot be told apart` for a paired difference a - b.

    A direction is named only when the p-value is at most `ALPHA` and the interval lacks zero.

    Args:
        difference: Of a and b.
        p: p-value adjusted for the other rows of the table; the difference's own when None.
    """
    p = difference.p if p is None else p
    if not math.isfinite(difference.value):
        return "cannot be compared"
    if p > ALPHA or difference.low <= 0 <= difference.high:
        return "cannot be told apart"
    return "lower" if difference.value < 0 else "higher"


def verdict(a: str, b: str, difference: Difference, unit: str = "", p: float | None = None) -> str:
    """Return in one sentence what a paired difference a - b shows.

    Args:
        a: Name of the first run.
        b: Name of the second run.
        difference: Of a and b.
        unit: Of the difference.
        p: As for `finding`.
    """
    found = finding(difference, p)
    low, high, tail = difference.low, difference.high, f" {unit}" if unit else ""
    if found == "cannot be compared":
        return f"{a} and {b} {found}: an outcome is not a finite number"
    if found == "cannot be told apart" and math.isinf(low):
        return f"{a} and {b} {found}: one item is too little"
    if found == "cannot be told apart":
        return f"{a} and {b} {found}: the difference is in {_span(low, high)}{tail}"
    if found == "lower":
        low, high = -high, -low
    return f"{a} is {found} than {b} by {abs(difference.value):.3g} {_span(low, high)}{tail}"


def _span(low: float, high: float) -> str:
    return f"[{low:.3g}, {high:.3g}]"


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
    for rows in _chunks(change.size):
        flips = generator.integers(0, 2, size=(rows, change.size), dtype=np.int8)
        sums = 2 * (flips @ change) - change.sum()
        count += int((np.abs(sums) >= observed).sum())
        total += rows
    return (count + 1) / (total + 1)


# -- parts -------------------------------------------------------------------------------------


def _array(values: Sequence[float]) -> Floats:
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0:
        raise ValueError("no items to take a statistic of")
    return x


def _pair(a: Sequence[float], b: Sequence[float]) -> tuple[Floats, Floats]:
    x, y = _array(a), _array(b)
    if x.shape != y.shape:
        raise ValueError(f"paired values must be as many: {x.size} and {y.size}")
    return x, y


def _binary(x: Floats) -> bool:
    return bool(np.isin(x, (0.0, 1.0)).all())


def _chunks(n: int) -> Iterator[int]:
    """Yield row counts that add up to 1,000 to 10,000 rows, about a million numbers at a time."""
    left = min(10_000, max(1_000, DRAWS // n))
    size = max(1, 1_000_000 // n)
    while left > 0:
        yield min(size, left)
        left -= size


def _resamples(n: int, seed: int) -> Iterator[npt.NDArray[Any]]:
    """Yield arrays [rows, n] of item indices drawn with replacement."""
    generator = np.random.default_rng(seed)
    for rows in _chunks(n):
        yield generator.integers(0, n, size=(rows, n))
