"""What the statistics share: levels, checked arrays, and the mean over items or groups of items."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from effbench.stats.special import scipy_special

LEVEL = 0.95
"""Confidence of an interval, unless another one is asked for."""

ALPHA = 0.05
"""A difference counts when its adjusted p-value is at most this."""

DRAWS = 10_000_000
"""Random numbers that one bootstrap or permutation may draw; limits the time it takes."""

Floats = npt.NDArray[np.float64]
Bounds = tuple[float, float]
"""Least and largest value that a quantity can have by what it is: 0 and 1 for a share."""
UNBOUNDED: Bounds = (-math.inf, math.inf)


class Interval(NamedTuple):
    """An estimate between two bounds; unbounded where there is too little for honest ones."""

    value: float
    low: float
    high: float

    def within(self, bounds: Bounds) -> Interval:
        """Return it cut at the bounds, unless the estimate itself is not between them."""
        least, most = bounds
        if not least <= self.value <= most:
            return self
        return Interval(self.value, max(least, self.low), min(most, self.high))


class Estimate(Protocol):
    """A quantity whose interval and one-sided tests come from the same distribution."""

    @property
    def value(self) -> float:
        """The estimate itself."""

    def interval(self, level: float) -> Interval:
        """Return the two-sided interval at a level."""

    def p_above(self, bound: float) -> float:
        """Return the one-sided p-value of `not above bound`."""

    def p_below(self, bound: float) -> float:
        """Return the one-sided p-value of `not below bound`."""


@dataclass(frozen=True)
class Student:
    """An estimate whose error over its standard error follows Student's t."""

    value: float
    error: float
    """Standard error."""
    df: float
    """Degrees of freedom; zero where the standard error cannot be known."""
    most: float = math.inf
    """Largest size that the quantity can have: 1 for a difference of shares."""

    def interval(self, level: float = LEVEL) -> Interval:
        """Return the two-sided interval."""
        if not self.df:
            return Interval(self.value, -math.inf, math.inf)
        half = t_quantile((1 + level) / 2, self.df) * self.error
        low, high = self.value - half, self.value + half
        return Interval(self.value, max(low, -self.most), min(high, self.most))

    def p_above(self, bound: float) -> float:
        """Return the p-value of `not above bound`."""
        return self._tail(bound - self.value)

    def p_below(self, bound: float) -> float:
        """Return the p-value of `not below bound`."""
        return self._tail(self.value - bound)

    def p_zero(self) -> float:
        """Return the two-sided p-value of zero."""
        return min(1.0, 2 * min(self.p_above(0.0), self.p_below(0.0)))

    def _tail(self, distance: float) -> float:
        if not self.df:
            return 1.0
        if self.error == 0:
            return 0.0 if distance < 0 else 1.0
        return t_tail(distance / self.error, self.df)


class Mean(NamedTuple):
    """The mean over items, with what its uncertainty follows from."""

    value: float
    variance: float
    """Of the mean; CR2 for groups of items, s^2 / n for items alone."""
    df: float
    """Degrees of freedom of the variance (Bell and McCaffrey, 2002); n - 1 for items alone."""
    sums: Floats
    """Deviations from the mean, summed over each group: [groups]."""
    sizes: Floats
    """Items in each group: [groups]."""

    @property
    def groups(self) -> int:
        """Independent units: groups, or items where there are no groups."""
        return self.sums.size

    def student(self) -> Student:
        """Return the mean as an estimate."""
        return Student(self.value, math.sqrt(self.variance), self.df)


def mean_of(x: Floats, clusters: Sequence[int] = ()) -> Mean:
    """Return the mean over items whose groups, if any, are independent.

    The variance is the cluster-robust CR2 with the degrees of freedom that it has when items are
    equally and independently spread (Bell and McCaffrey, 2002; Pustejovsky and Tipton, 2018).

    Args:
        x: One per item.
        clusters: Group of each item; empty when items are independent.

    Raises:
        ValueError: When there are not as many groups as items.
    """
    n, mean = x.size, float(x.mean())
    sums, sizes = x - mean, np.ones(n)
    if len(clusters):
        place = places(clusters, n)
        sums, sizes = totals(sums, place), totals(sizes, place)
    if sums.size == 1 or not math.isfinite(mean):
        return Mean(mean, math.inf, 0.0, sums, sizes)
    rest = 1 - sizes / n
    variance = float((sums**2 / rest).sum()) / n**2
    # The squared trace over the trace of the square of w (C - c c' / n) w, w^2 = 1 / rest.
    diagonal, outer = sizes / rest, sizes**2 / rest / n
    square = float(((diagonal - outer) ** 2).sum() + outer.sum() ** 2 - (outer**2).sum())
    return Mean(mean, variance, n**2 / square, sums, sizes)


def places(clusters: Sequence[int], n: int) -> npt.NDArray[np.intp]:
    """Return the groups numbered from 0.

    Raises:
        ValueError: When there are not `n` of them.
    """
    if len(clusters) != n:
        raise ValueError(f"every item needs its group: {n} and {len(clusters)}")
    return np.unique(np.asarray(clusters), return_inverse=True)[1].reshape(-1)


def totals(values: Floats, place: npt.NDArray[np.intp]) -> Floats:
    """Return the sum of the values in each group, [groups]."""
    return np.bincount(place, weights=values).astype(np.float64)


def array(values: Sequence[float]) -> Floats:
    """Return values as an array.

    Raises:
        ValueError: When there are none.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0:
        raise ValueError("no items to take a statistic of")
    return x


def pair(a: Sequence[float], b: Sequence[float]) -> tuple[Floats, Floats]:
    """Return two sequences of the same items as arrays.

    Raises:
        ValueError: When they are not as many.
    """
    x, y = array(a), array(b)
    if x.shape != y.shape:
        raise ValueError(f"paired values must be as many: {x.size} and {y.size}")
    return x, y


def binary(x: Floats) -> bool:
    """Return whether all values are 0 or 1."""
    return bool(np.isin(x, (0.0, 1.0)).all())


def chunks(n: int, rows: int = 0) -> Iterator[int]:
    """Yield row counts, about a million numbers at a time.

    Args:
        n: Numbers in a row.
        rows: What they add up to; 0 takes 1,000 to 10,000 by `DRAWS`.
    """
    left = rows or min(10_000, max(1_000, DRAWS // n))
    size = max(1, 1_000_000 // n)
    while left > 0:
        yield min(size, left)
        left -= size


def resamples(n: int, seed: int, rows: int = 0) -> Iterator[npt.NDArray[Any]]:
    """Yield arrays [rows, n] of indices drawn with replacement."""
    generator = np.random.default_rng(seed)
    for count in chunks(n, rows):
        yield generator.integers(0, n, size=(count, n))


def z_quantile(share: float) -> float:
    """Return a quantile of the normal distribution."""
    return float(scipy_special().ndtri(share))


def t_quantile(share: float, df: float) -> float:
    """Return a quantile of Student's t; the normal one for infinite degrees of freedom."""
    return z_quantile(share) if math.isinf(df) else float(scipy_special().stdtrit(df, share))


def t_tail(t: float, df: float) -> float:
    """Return the probability that Student's t is below `t`."""
    return float(scipy_special().ndtr(t) if math.isinf(df) else scipy_special().stdtr(df, t))
