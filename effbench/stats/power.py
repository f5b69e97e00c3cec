"""How often a difference that is there is found, and how much it takes to find it.

The tests are those of `paired_difference` and `seeds_and_items`: McNemar's exact one for answers
that are right or wrong, Student's t for the others and for groups of seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from effbench.stats.base import ALPHA, t_quantile, z_quantile
from effbench.stats.special import scipy_special

MOST = 10_000_000
"""Items beyond which no answer is looked for."""


def mcnemar_power(n: int, discordance: float, difference: float, alpha: float = ALPHA) -> float:
    """Return how often McNemar's exact test finds a difference between two shares.

    The number of items that only one run gets right is binomial; given it, the test is the sign
    test. Summed over all such numbers that matter.

    Args:
        n: Items.
        discordance: Share of items that one run gets right and the other does not.
        difference: Of the two shares; its size is at most the discordance.
        alpha: Two-sided.

    Raises:
        ValueError: When the difference is larger than the discordance.
    """
    special, difference = scipy_special(), abs(difference)
    if difference > discordance * (1 + 1e-9) or discordance > 1:
        raise ValueError(f"a difference of {difference} needs more discordance than {discordance}")
    if discordance == 0:
        return 0.0
    centre, reach = n * discordance, 9 * math.sqrt(n * discordance) + 9
    m = np.arange(max(0, math.floor(centre - reach)), min(n, math.ceil(centre + reach)) + 1)
    rest = max(1 - discordance, 1e-300)
    ways = special.gammaln(n + 1) - special.gammaln(m + 1) - special.gammaln(n - m + 1)
    weight = np.exp(ways + m * math.log(discordance) + (n - m) * math.log(rest))
    k = _critical(m, alpha)
    share = min(1.0, (1 + difference / discordance) / 2)  # of the differing items, for the better
    found = special.bdtr(np.maximum(k, 0), m, share) + special.bdtr(np.maximum(k, 0), m, 1 - share)
    return float(min(1.0, (weight * np.where(k >= 0, found, 0.0)).sum()))


def _critical(m: np.ndarray, alpha: float) -> np.ndarray:
    """Return the largest k of which `m` differing items are significant, -1 where none is."""
    special = scipy_special()

    def significant(k: np.ndarray) -> np.ndarray:
        return (k < 0) | (2 * special.bdtr(np.maximum(k, 0), m, 0.5) <= alpha)

    k = np.maximum(-1, np.floor((m - 1 - z_quantile(1 - alpha / 2) * np.sqrt(m)) / 2))
    while not (fits := significant(k)).all():
        k = np.where(fits, k, k - 1)
    while (higher := (k < m) & significant(k + 1)).any():
        k = np.where(higher, k + 1, k)
    return k


def t_power(effect: float, df: float, alpha: float = ALPHA) -> float:
    """Return how often a two-sided t-test finds an effect.

    Args:
        effect: True difference over the standard error.
        df: Degrees of freedom.
        alpha: Two-sided.
    """
    special, t = scipy_special(), t_quantile(1 - alpha / 2, df)
    if df > 1e4:
        return float(special.ndtr(abs(effect) - t) + special.ndtr(-abs(effect) - t))
    within = special.nctdtr(df, abs(effect), t) - special.nctdtr(df, abs(effect), -t)
    # SciPy gives NaN for some effects far beyond the critical value, where nothing is left within.
    return 1 - float(within) if math.isfinite(within) else 1.0


def paired_power(n: int, sd: float, difference: float, alpha: float = ALPHA) -> float:
    """Return how often a paired t-test over items finds a difference.

    Args:
        n: Items, two or more.
        sd: Standard deviation over items of the difference between the two runs.
        difference: Of the means.
        alpha: Two-sided.
    """
    return t_power(difference * math.sqrt(n) / sd if sd else math.inf, n - 1, alpha)


def seeds_power(
    seeds: int,
    seed_sd: float,
    difference: float,
    *,
    items: float = math.inf,
    sd: float = 0.0,
    alpha: float = ALPHA,
) -> float:
    """Return how often two groups of runs, as many seeds each, are told apart.

    Args:
        seeds: Of each group, two or more.
        seed_sd: Standard deviation over seeds of a run's mean.
        difference: Of the means.
        items: Items that all runs are evaluated on; infinite when their choice is not in question.
        sd: Standard deviation over items of the difference between the groups.
        alpha: Two-sided.
    """
    over_seeds, over_items = 2 * seed_sd**2 / seeds, sd**2 / items
    variance = over_seeds + over_items
    if variance == 0:
        return 1.0
    square = over_seeds**2 / (2 * (seeds - 1))
    square += over_items**2 / (items - 1) if math.isfinite(items) else 0.0
    return t_power(difference / math.sqrt(variance), variance**2 / square, alpha)


def least(power: Callable[[int], float], target: float, start: int = 2) -> int | None:
    """Return the least number with which the power is reached; None when `MOST` is not enough.

    Args:
        power: Of a number of items or seeds; rises with it.
        target: Power wanted.
        start: Smallest number tried.
    """
    high = start
    while power(high) < target:
        if high >= MOST:
            return None
        high = min(MOST, 2 * high)
    low = high // 2 if high > start else start - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= target else (middle, high)
    return high


def smallest(power: Callable[[float], float], target: float, most: float) -> float | None:
    """Return the smallest difference that is found with the power; None when `most` is not.

    Args:
        power: Of a difference; rises with it.
        target: Power wanted.
        most: Largest difference there can be.
    """
    if power(most) < target:
        return None
    low, high = 0.0, most
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle) >= target else (middle, high)
    return high
