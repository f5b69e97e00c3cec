"""Shares that are not only 0 or 1: halves for ties, means over seeds, linearised ratios.

What a metric can be at all makes it a share, not the outcomes that happened to come up. Its
interval ends there, and outcomes that are all alike, or nearly so, are not taken for certain.
"""

from __future__ import annotations

import math

import numpy as np

from effbench.stats.base import Bounds, Floats, Interval, binary

MADE_UP = 4
"""Answers, right or wrong, that are added to outcomes between 0 and 1 to tell how much they spread:
as many as z^2, so that outcomes which are all alike are not taken for certain (as in Agresti and
Coull, 1998)."""


def as_shares(x: Floats, bounds: Bounds) -> Floats | None:
    """Return outcomes, of which 0 is the least and 1 the most; None when there is no such scale.

    Args:
        x: Outcomes, linearised ones too: of these the mean alone has to be within the bounds.
        bounds: What their mean can be. Outcomes that are all 0 or 1 need none.
    """
    least, most = bounds
    if not math.isfinite(most - least):
        return x if binary(x) else None
    found = (x - least) / (most - least)
    return found if -1e-9 <= float(found.mean()) <= 1 + 1e-9 else None


def alike(x: Floats) -> bool:
    """Return whether more than half of the values are the same: resampling shows too little."""
    return bool(2 * np.unique(x, return_counts=True)[1].max() > x.size)


def on_scale(found: Interval, x: Floats, bounds: Bounds) -> Interval:
    """Return the interval of a share on the scale of the outcomes `x` that `as_shares` took."""
    least, most = bounds
    if not math.isfinite(most - least):
        return found
    low, high = (least + (most - least) * end for end in found[1:])
    return Interval(float(x.mean()), low, high)


def per_answer(x: Floats, groups: int) -> float:
    """Return how much outcomes between 0 and 1 spread, as a part of what 0 and 1 alone would.

    It is 1 for 0 and 1, and more than 0 for others however alike: `MADE_UP` answers are among them.
    """
    share = min(1.0, max(0.0, float(x.mean())))
    most = share * (1 - share)
    part = min(1.0, float(x.var()) / most) if most > 0 and not binary(x) else 1.0
    return (groups * part + MADE_UP) / (groups + MADE_UP)


def span_of(a: Floats, b: Floats, bounds: Bounds) -> float:
    """Return the largest difference of two shares; infinite for outcomes that are none."""
    if binary(a) and binary(b):
        return 1.0
    shares = as_shares(a, bounds) is not None and as_shares(b, bounds) is not None
    return bounds[1] - bounds[0] if shares and math.isfinite(bounds[1] - bounds[0]) else math.inf


def least_variance(items: Floats, span: float, answers: bool = False) -> float:
    """Return the least variance of a mean difference of shares, two of which are made up.

    One all right by each side alone, half each (Agresti and Min, 2005), so that shares which all
    agree, or all differ alike, are not taken for certain. It is 0 for differences of which most are
    not alike: these show their spread themselves.

    Args:
        items: The difference of each item.
        span: As of `span_of`.
        answers: Whether single outcomes are 0 or 1.
    """
    if math.isinf(span) or not (answers or alike(items)):
        return 0.0
    n, parts = items.size + 2, items / span
    variance = ((parts**2).sum() + 1) / n**2 - parts.sum() ** 2 / n**3
    return float(variance) * (n / items.size) ** 2 * span**2
