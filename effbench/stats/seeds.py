"""Groups of runs that differ in their seed only: an interval that covers seeds and items at once.

With outcomes y[s, i] of seed s on item i, the mean varies with the choice of seeds and of items.
The two variances are estimated apart and added, their common part (the noise of a single outcome,
which both contain) taken off once. The degrees of freedom are Satterthwaite's (1946). For a single
group these are too many when its few seeds make up most of the variance (coverage falls to 92 % in
simulations); there it is the harmonic mean of those of the parts, weighted by their variances.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from effbench.stats.base import (
    LEVEL,
    UNBOUNDED,
    Bounds,
    Floats,
    Interval,
    Student,
    binary,
    mean_of,
)
from effbench.stats.intervals import wilson
from effbench.stats.shares import as_shares, least_variance, on_scale, per_answer, span_of

FEWEST_SEEDS = 5
"""Seeds from which on an interval over seeds covers in 95 ± 1 %."""


@dataclass(frozen=True)
class OverSeeds:
    """Tests of two groups of runs over the mean of each run alone."""

    welch: float
    """p-value of Welch's t (1947): groups with different spread."""
    wilcoxon: float | None
    """p-value of the signed-rank test over seeds that both groups have; None when they do not."""
    pairs: int
    """Seeds that both groups have."""


class Part(NamedTuple):
    """A component of a variance."""

    variance: float
    df: float


def seeds_and_items(
    a: Floats,
    b: Floats | None = None,
    clusters: Sequence[int] = (),
    fixed: bool = False,
    bounds: Bounds = UNBOUNDED,
) -> Student:
    """Return the mean of a group, or the difference a - b of two, over seeds and items.

    Honest from `FEWEST_SEEDS` seeds on; with fewer it covers only roughly as often as
    stated: more often where both groups spread alike, less where the smaller one spreads more.

    Args:
        a: Outcomes of the first group, [seeds, items], two seeds or more.
        b: Outcomes of the second one on the same items; None for the mean of `a` alone.
        clusters: Group of each item; empty when items are independent.
        fixed: Whether `b` is one run that depends on no seed, such as an untrained model.
        bounds: What the mean of a group can be.

    Raises:
        ValueError: For a single seed, or for other items.
    """
    sides = [a] if b is None or fixed else [a, b]
    if any(side.ndim != 2 or side.shape[0] < 2 for side in sides):
        raise ValueError("two seeds or more are needed")
    if b is not None and a.shape[1] != b.shape[1]:
        raise ValueError(f"paired values must be as many: {a.shape[1]} and {b.shape[1]}")
    items = a.mean(axis=0) - (0.0 if b is None else b.mean(axis=0))
    over_items = mean_of(items, clusters)
    span = math.inf if b is None else span_of(a, b, bounds)
    if b is not None:
        least = least_variance(items, span, binary(a) and binary(b))
        over_items = over_items._replace(variance=max(over_items.variance, least))
    seeds = [Part(float(s.mean(axis=1).var(ddof=1)) / len(s), len(s) - 1) for s in sides]
    value, total = float(items.mean()), sum(part.variance for part in seeds)
    if not math.isfinite(value):
        return Student(value, math.inf, 0.0)
    noise = [_noise(side) for side in sides]
    surplus = over_items.variance - sum(part.variance for part in noise)
    variance = total + max(0.0, surplus)
    if surplus <= 0 or not over_items.df:
        df = _satterthwaite(variance, seeds, seeds)
    elif len(seeds) == 1:
        df = _harmonic([*seeds, Part(surplus, over_items.df)])
    else:
        parts = [*seeds, Part(over_items.variance, over_items.df), *noise]
        df = _satterthwaite(variance, parts, seeds)
    return Student(value, math.sqrt(variance), df, span)


def paired_seeds(
    a: Floats, b: Floats, clusters: Sequence[int] = (), bounds: Bounds = UNBOUNDED
) -> Student:
    """Return the difference a - b of two groups over seeds, which both have, and items.

    Args:
        a: Outcomes of the first group, [seeds, items], two seeds or more.
        b: Of the second one, of the same seeds and items in the same order.
        clusters: Group of each item; empty when items are independent.
        bounds: What the mean of a group can be.
    """
    found = seeds_and_items(a - b, clusters=clusters)
    span = span_of(a, b, bounds)
    least = least_variance((a - b).mean(axis=0), span, binary(a) and binary(b))
    return replace(found, error=max(found.error, math.sqrt(least)), most=span)


def _noise(side: Floats) -> Part:
    """Return what single outcomes, beyond their seed and their item, add to the mean."""
    seeds, items = side.shape
    rest = side - side.mean(axis=1, keepdims=True) - side.mean(axis=0) + side.mean()
    df = (seeds - 1) * (items - 1)
    return Part(float((rest**2).sum()) / df / (seeds * items) if df else 0.0, df)


def _satterthwaite(variance: float, parts: Sequence[Part], seeds: Sequence[Part]) -> float:
    """Return the degrees of freedom of a sum; never fewer than the smaller group's."""
    least = min(part.df for part in seeds)
    square = sum(part.variance**2 / part.df for part in parts if part.df)
    return max(least, variance**2 / square) if square > 0 else least


def _harmonic(parts: Sequence[Part]) -> float:
    """Return the harmonic mean of the degrees of freedom, weighted by the variances."""
    total = sum(part.variance for part in parts)
    return total / sum(part.variance / part.df for part in parts)


def over_seeds(a: Sequence[float], b: Sequence[float], pairs: int = 0) -> OverSeeds:
    """Return the tests over the mean of each run.

    Args:
        a: One mean per seed, two or more.
        b: Of the other group; its first `pairs` seeds are the first ones of `a`, in that order.
        pairs: Seeds that both have.
    """
    signed = wilcoxon_exact(a[:pairs], b[:pairs]) if pairs >= 2 else None
    return OverSeeds(welch(a, b).p_zero(), signed, pairs)


def welch(a: Sequence[float], b: Sequence[float]) -> Student:
    """Return the difference of two means by Welch's t.

    Raises:
        ValueError: When a group has fewer than two values.
    """
    groups = [np.asarray(g, dtype=np.float64) for g in (a, b)]
    if any(g.size < 2 for g in groups):
        raise ValueError("two seeds or more are needed")
    parts = [Part(float(g.var(ddof=1)) / g.size, g.size - 1) for g in groups]
    variance = sum(part.variance for part in parts)
    value = float(groups[0].mean() - groups[1].mean())
    return Student(value, math.sqrt(variance), _satterthwaite(variance, parts, parts))


def wilcoxon_exact(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the exact two-sided p-value of the signed-rank test (Wilcoxon, 1945).

    Pairs without a difference are dropped; equal differences share the mean of their ranks, and
    the distribution is over all signs of the ranks that there are.
    """
    change = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    change = change[change != 0]
    if not change.size:
        return 1.0
    _, place, count = np.unique(np.abs(change), return_inverse=True, return_counts=True)
    doubled = (2 * np.cumsum(count) - count + 1)[place]  # twice the mean rank of each tie
    ways = np.ones(1)
    for rank in doubled:
        longer = np.zeros(ways.size + rank)
        longer[: ways.size] += ways / 2
        longer[rank:] += ways / 2
        ways = longer
    below = int(doubled[change < 0].sum())
    least = min(below, int(doubled.sum()) - below)
    return float(min(1.0, 2 * ways[: least + 1].sum()))


def seeds_interval(
    values: Floats,
    clusters: Sequence[int] = (),
    level: float = LEVEL,
    bounds: Bounds = UNBOUNDED,
) -> Interval:
    """Return the mean of a group of runs [seeds, items] with an interval over seeds and items.

    Of shares it is Wilson's for as many independent answers as tell as much (Korn and Graubard,
    1998): within [0, 1], and not of width 0 where all answers are alike.

    Args:
        values: Outcomes, [seeds, items], two seeds or more.
        clusters: Group of each item; empty when items are independent.
        level: Confidence.
        bounds: What the mean can be; the interval ends there. Both ends make it a share.
    """
    shares = as_shares(values, bounds)
    if shares is None or len(values) < 2:
        return seeds_and_items(values, clusters=clusters).interval(level).within(bounds)
    return on_scale(_shares_interval(shares, clusters, level), values, bounds)


def _shares_interval(values: Floats, clusters: Sequence[int], level: float) -> Interval:
    """Return the interval of shares, [seeds, items]; the arguments are `seeds_interval`'s."""
    share, items = min(1.0, max(0.0, float(values.mean()))), mean_of(values.mean(axis=0), clusters)
    if not items.df:
        return Interval(share, 0.0, 1.0)
    part = per_answer(values, items.groups)
    if share in (0.0, 1.0) or np.ptp(values) == 0:
        df = items.df if len(clusters) else math.inf
        return wilson(share, items.groups / part, df, level)
    noise = _noise(values)
    seeds = Part(float(values.mean(axis=1).var(ddof=1)) / len(values), len(values) - 1)
    own = max(0.0, seeds.variance - noise.variance)
    variance = max(items.variance, noise.variance) + own
    parts = [Part(items.variance, items.df), *([seeds, noise] if own else [])]
    df = _satterthwaite(variance, parts, [seeds]) if own else items.df
    return wilson(share, min(values.size / part, share * (1 - share) / variance), df, level)
