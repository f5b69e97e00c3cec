"""Coverage: how often intervals hold the truth on simulated data, of the sizes they are used at.

Shares and their differences are not drawn: their outcomes are gone through, each with its
probability, and averaged over true shares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from zlib import crc32

import numpy as np

from effbench.cli.selfcheck.base import Check
from effbench.stats import (
    Interval,
    equivalence,
    mean_interval,
    median_interval,
    ratio_interval,
    seeds_and_items,
    seeds_interval,
    welch,
)
from effbench.stats.base import Floats
from effbench.stats.paired import paired_estimate

Generator = np.random.Generator
Draw = Callable[[Generator], tuple[Interval, float]]
"""Draws one set; returns its interval and the truth."""

SETS, SHORT_SETS = 10_000, 400
"""Simulated sets of a case; the coverage then has a standard error of 0.2 or 1.1 points."""
BOOTSTRAPPED = 4_000
"""Sets of a case that resamples each of them; a standard error of 0.35 points."""
RESAMPLES = 1_000
"""Of each such set."""
SLACK = 1.0
"""Points by which the coverage may miss 95 %."""
SHORT_ERRORS = 3.0
"""Standard errors that the short form, with its few sets, adds to the slack."""


@dataclass(frozen=True)
class Case:
    """An interval on one kind of data."""

    name: str
    draw: Draw
    short: bool = False
    """Whether the short form has it too."""
    sets: int = SETS
    """Simulated sets of the long form."""


def run(short: bool) -> Iterator[Check]:
    """Yield the coverage of every interval."""
    for case in CASES:
        if case.short or not short:
            yield covered(case, SHORT_SETS if short else case.sets, short)
    yield from _enumerated(short)


def covered(case: Case, sets: int, short: bool = False) -> Check:
    """Return how often the intervals of a case hold the truth, with what it has to keep."""
    generator = np.random.default_rng(crc32(case.name.encode()))
    hits = 0
    for _ in range(sets):
        found, truth = case.draw(generator)
        hits += found.low <= truth <= found.high
    error = 100 * math.sqrt(0.95 * 0.05 / sets)
    slack = SLACK + (SHORT_ERRORS * error if short else 0.0)
    return Check(case.name, 100 * hits / sets, 95 - slack, 95 + slack, "%", f"{sets} sets")


# -- outcomes of items -------------------------------------------------------------------------


def _outcomes(kind: str, n: int, generator: Generator) -> tuple[Floats, float]:
    """Return `n` outcomes and their true mean."""
    if kind == "normal":
        return generator.normal(size=n), 0.0
    if kind == "double exponential":
        return generator.laplace(size=n), 0.0
    if kind == "loss-like":
        return generator.gamma(20, 0.12, n), 2.4
    return generator.exponential(size=n), 1.0


def _mean(kind: str, n: int, generator: Generator) -> tuple[Interval, float]:
    x, truth = _outcomes(kind, n, generator)
    return mean_interval(x.tolist(), seed=_seed(generator), resamples=RESAMPLES), truth


def _ratio_of_sums(n: int, generator: Generator) -> tuple[Interval, float]:
    """A loss per token: sums over tokens, linearised per item as `perplexity` does."""
    tokens = generator.integers(5, 60, n).astype(float)
    sums = tokens * generator.gamma(20, 0.12, n) + generator.normal(0, 2, n)
    ratio = sums.sum() / tokens.sum()
    values = ratio + (sums - ratio * tokens) / tokens.mean()
    return mean_interval(values.tolist(), seed=_seed(generator), resamples=RESAMPLES), 2.4


def _groups(kind: str, groups: int, generator: Generator) -> tuple[Floats, list[int], float]:
    """Return outcomes in groups of one to a dozen items, half of whose variance is the group's."""
    sizes = 1 + generator.poisson(5, groups)
    place = np.repeat(np.arange(groups), sizes)
    if kind == "shares":
        right = generator.random(place.size) < generator.beta(0.7, 0.3, groups)[place]
        return right.astype(np.float64), place.tolist(), 0.7
    common, truth = _outcomes(kind, groups, generator)
    own, _ = _outcomes(kind, place.size, generator)
    return common[place] + own, place.tolist(), 2 * truth


def _grouped_mean(kind: str, groups: int, generator: Generator) -> tuple[Interval, float]:
    x, place, truth = _groups(kind, groups, generator)
    seed = _seed(generator)
    return mean_interval(x.tolist(), clusters=place, seed=seed, resamples=RESAMPLES), truth


def _seed(generator: Generator) -> int:
    return int(generator.integers(2**31))


# -- repeats -----------------------------------------------------------------------------------


def _median(kind: str, n: int, generator: Generator) -> tuple[Interval, float]:
    x, _ = _outcomes(kind, n, generator)
    return median_interval(x.tolist()), math.log(2) if kind == "exponential" else 0.0


def _speed_ratio(n: int, generator: Generator) -> tuple[Interval, float]:
    """Times of two things in turn on a machine that drifts, with a long tail upwards."""
    drift = np.exp(generator.normal(0, 0.3, n))
    a, b = (drift * (1 + generator.exponential(0.1, n)) for _ in range(2))
    return ratio_interval((1.5 * a).tolist(), b.tolist()), 1.5


# -- pairs -------------------------------------------------------------------------------------


def _difference(kind: str, n: int, generator: Generator) -> tuple[Interval, float]:
    change, truth = _outcomes(kind, n, generator)
    seed = _seed(generator)
    estimate = paired_estimate(change, np.zeros(n), seed=seed, resamples=RESAMPLES)
    return estimate.interval(0.95), truth


def _grouped_difference(kind: str, groups: int, generator: Generator) -> tuple[Interval, float]:
    change, place, truth = _groups(kind, groups, generator)
    estimate = paired_estimate(
        change, np.zeros(change.size), place, _seed(generator), resamples=RESAMPLES
    )
    return estimate.interval(0.95), truth


def _share_difference(n: int, generator: Generator) -> tuple[Interval, float]:
    only_a, only_b, _ = generator.multinomial(n, [0.08, 0.05, 0.87])
    a, b = _answers(only_a, only_b, n)
    return paired_estimate(a, b).interval(0.95), 0.03


def _not_equivalent(n: int, generator: Generator) -> tuple[Interval, float]:
    """Two runs that differ by the margin: equivalence may be found in 5 % of sets."""
    change = generator.normal(0.3, 1.0, n)
    found = equivalence(paired_estimate(change, np.zeros(n)), 0.3)
    return Interval(0.0, -1.0, 1.0 if found.p > 0.05 else -0.5), 0.0


# -- seeds -------------------------------------------------------------------------------------


def _runs(seeds: int, items: Floats, seed_sd: float, own: float, generator: Generator) -> Floats:
    """Return outcomes [seeds, items]: of the item, the method on it, the seed, and noise."""
    method = generator.normal(0, own, items.size)
    seed = generator.normal(0, seed_sd, (seeds, 1))
    return items + method + seed + generator.normal(0, 1, (seeds, items.size))


def _two_groups(
    seeds: tuple[int, int], n: int, seed_sd: float, own: float, generator: Generator
) -> tuple[Interval, float]:
    items = generator.gamma(2, 1.0, n)
    a, b = (_runs(s, items, seed_sd, own, generator) for s in seeds)
    return seeds_and_items(a, b).interval(), 0.0


def _against_untrained(
    seeds: int, n: int, seed_sd: float, generator: Generator
) -> tuple[Interval, float]:
    items = generator.gamma(2, 1.0, n)
    a = _runs(seeds, items, seed_sd, 0.5, generator)
    return seeds_and_items(a, items[None] + 0.0, fixed=True).interval(), 0.0


def _one_group(seeds: int, n: int, generator: Generator) -> tuple[Interval, float]:
    return seeds_interval(_runs(seeds, generator.normal(0, 2, n), 0.2, 0.0, generator)), 0.0


def _shares(seeds: int, generator: Generator) -> tuple[Interval, float]:
    """Answers of 20 to 1,000 items, some harder, under seeds that differ more or less."""
    n, spread = int(generator.choice([20, 100, 300, 1000])), generator.choice([0.0, 0.15, 0.3])
    middle = generator.normal(0, 3)
    hard = generator.normal(0, 2, n) + generator.normal(0, spread, (seeds, 1))
    right = generator.random((seeds, n)) < 1 / (1 + np.exp(-(middle + hard)))
    at, weight = np.polynomial.hermite_e.hermegauss(61)
    truth = weight / weight.sum() / (1 + np.exp(-(middle + math.hypot(2, spread) * at)))
    return seeds_interval(right.astype(np.float64)), float(truth.sum())


def _welch(generator: Generator) -> tuple[Interval, float]:
    a, b = generator.normal(0, 1, 5), generator.normal(0, 3, 7)
    return welch(a.tolist(), b.tolist()).interval(), 0.0


CASES: Sequence[Case] = (
    *(
        Case(f"mean of {n} items, {kind}", partial(_mean, kind, n), n in (24, 50), BOOTSTRAPPED)
        for kind, n in [
            ("normal", 12),
            ("normal", 24),
            ("loss-like", 12),
            ("loss-like", 100),
            ("exponential", 24),
            ("exponential", 50),
            ("exponential", 200),
            ("double exponential", 200),
        ]
    ),
    Case("loss per token over 60 items", partial(_ratio_of_sums, 60), sets=BOOTSTRAPPED),
    *(
        Case(f"mean over {n} groups, {kind}", partial(_grouped_mean, kind, n), n == 20, sets)
        for kind, n, sets in [
            ("normal", 20, BOOTSTRAPPED),
            ("exponential", 100, BOOTSTRAPPED),
            ("shares", 30, SETS),
            ("shares", 100, SETS),
        ]
    ),
    *(
        Case(f"median of {n} repeats, {kind}", partial(_median, kind, n), n == 7)
        for n in (6, 7, 11, 25)
        for kind in ("normal", "exponential")
    ),
    *(Case(f"ratio of {n} pairs of times", partial(_speed_ratio, n), n == 16) for n in (7, 16)),
    *(
        Case(f"difference over {n} items, {kind}", partial(_difference, kind, n), n == 12, sets)
        for kind, n, sets in [
            ("normal", 12, SETS),
            ("double exponential", 60, SETS),
            ("loss-like", 60, SETS),
            ("exponential", 120, BOOTSTRAPPED),
        ]
    ),
    *(
        Case(f"difference over {n} groups, {kind}", partial(_grouped_difference, kind, n), n == 20)
        for kind, n in [("normal", 20), ("loss-like", 60)]
    ),
    Case("difference of shares over 400 items", partial(_share_difference, 400), True),
    Case("not equivalent at the margin", partial(_not_equivalent, 60), True),
    *(
        Case(
            f"{s[0]} and {s[1]} seeds, {n} items, sd {sd:g} over seeds, {own:g} over items",
            partial(_two_groups, s, n, sd, own),
            n == 100,
        )
        for s, n, sd, own in [
            ((5, 5), 100, 0.3, 0.0),
            ((5, 5), 100, 0.3, 1.0),
            ((5, 8), 100, 0.2, 0.5),
            ((5, 5), 24, 0.5, 0.5),
            ((5, 5), 400, 0.2, 0.0),
            ((5, 5), 400, 0.05, 1.0),
        ]
    ),
    Case("8 seeds against an untrained model", partial(_against_untrained, 8, 100, 0.3)),
    Case("mean over 8 seeds and 100 items", partial(_one_group, 8, 100)),
    *(
        Case(f"share over {seeds} seeds", partial(_shares, seeds), seeds == 5)
        for seeds in (2, 3, 5, 8)
    ),
    Case("Welch over 5 and 7 seeds", _welch),
)


# -- shares, gone through ----------------------------------------------------------------------


def _enumerated(short: bool) -> Iterator[Check]:
    for n in (24,) if short else (12, 24, 100, 1000):
        yield _bounded(f"share of {n} answers", shares_coverage(n), "true shares of 5 to 95 %")
    for n in (30,) if short else (60, 120):
        detail = "10 to 40 % of answers differ"
        yield _bounded(f"difference of shares, {n} answers", differences_coverage(n), detail)


def _bounded(name: str, share: float, detail: str) -> Check:
    return Check(name, 100 * share, 95 - SLACK, 95 + SLACK, "%", detail)


def shares_coverage(n: int) -> float:
    """Return the coverage of the interval of a share of `n` answers, over many true shares."""
    from scipy.special import bdtr

    right = np.arange(n + 1)
    bounds = np.array([mean_interval([1.0] * k + [0.0] * (n - k))[1:] for k in right])
    found = []
    for share in np.linspace(0.05, 0.95, 181):
        below = np.concatenate([[0.0], bdtr(right, n, share)])
        held = (bounds[:, 0] <= share) & (share <= bounds[:, 1])
        found.append(float(np.diff(below)[held].sum()))
    return float(np.mean(found))


def differences_coverage(n: int) -> float:
    """Return the coverage of the interval of a difference of shares, over many true ones."""
    from scipy.special import gammaln

    cells = np.array([(a, b) for a in range(n + 1) for b in range(n + 1 - a)])
    bounds = np.array(
        [paired_estimate(*_answers(a, b, n)).interval(0.95)[1:] for a, b in cells.tolist()]
    )
    a, b = cells.T
    ways = gammaln(n + 1) - gammaln(a + 1) - gammaln(b + 1) - gammaln(n - a - b + 1)
    found = []
    for discordance in np.linspace(0.1, 0.4, 7):
        for truth in np.linspace(0, 0.8 * discordance, 7):
            p, q = (discordance + truth) / 2, (discordance - truth) / 2
            rest = (n - a - b) * math.log(1 - discordance)
            weight = np.exp(ways + a * math.log(p) + b * math.log(q) + rest)
            held = (bounds[:, 0] <= truth) & (truth <= bounds[:, 1])
            found.append(float(weight[held].sum()))
    return float(np.mean(found))


def _answers(only_a: int, only_b: int, n: int) -> tuple[Floats, Floats]:
    """Return the answers of two runs of which each alone gets some right."""
    a, b = np.ones(n), np.ones(n)
    b[:only_a], a[only_a : only_a + only_b] = 0.0, 0.0
    return a, b
