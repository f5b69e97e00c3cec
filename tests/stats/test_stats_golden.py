"""Statistics against SciPy, statsmodels and plain maximum likelihood: the same values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize
from scipy import stats as sp
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestIndPower, TTestPower
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import ttost_paired

from effbench.stats import (
    equivalence,
    holm,
    mcnemar_exact,
    mean_interval,
    median_interval,
    paired_difference,
    welch,
    wilcoxon_exact,
)
from effbench.stats.base import mean_of
from effbench.stats.bootstrap import studentised
from effbench.stats.paired import paired_estimate
from effbench.stats.power import least, mcnemar_power, paired_power, seeds_power, smallest, t_power

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("right, n", [(0, 12), (8, 10), (37, 50), (999, 1000)])
def test_wilson(right: int, n: int) -> None:
    found = mean_interval([1.0] * right + [0.0] * (n - right))
    low, high = proportion_confint(right, n, method="wilson")
    assert (found.low, found.high) == pytest.approx((max(low, 0), high), abs=1e-12)
    scipy = sp.binomtest(right, n).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((scipy.low, scipy.high), abs=1e-12)


@pytest.mark.parametrize("n", [2, 5, 30])
def test_student(n: int) -> None:
    x = RNG.normal(1.0, 2.0, n)
    found, scipy = mean_of(x).student(), sp.ttest_1samp(x, 0.0)
    bounds = scipy.confidence_interval(0.95)
    assert found.interval()[1:] == pytest.approx((bounds.low, bounds.high))
    assert found.p_zero() == pytest.approx(scipy.pvalue)


@pytest.mark.parametrize("n", [6, 7, 20, 101])
def test_the_median_lies_between_scipys_exact_bounds(n: int) -> None:
    x = np.sort(RNG.normal(size=n))
    found = median_interval(x.tolist())
    outer = sp.quantile_test(x, p=0.5).confidence_interval(0.95)
    assert outer.low <= found.low and found.high <= outer.high
    inside = np.searchsorted(x, [outer.low, outer.high])
    assert found.low <= x[inside[0] + 1] and x[inside[1] - 1] <= found.high


def test_the_studentised_bootstrap_against_its_definition() -> None:
    x, rows = RNG.exponential(size=25), 500
    draws = np.random.default_rng(3).integers(0, 25, size=(rows, 25))
    ts = [(x[i].mean() - x.mean()) / sp.sem(x[i]) for i in draws]
    found = studentised(x, seed=3, rows=rows)
    assert found.ts == pytest.approx(np.sort(ts))
    low, high = np.quantile(ts, [0.025, 0.975], method="weibull")
    assert found.interval()[1:] == pytest.approx(
        (x.mean() - high * sp.sem(x), x.mean() - low * sp.sem(x))
    )


def test_the_studentised_bootstrap_is_near_scipys_bca() -> None:
    x = RNG.gamma(2.0, size=600)
    found = mean_interval(x.tolist())
    scipy = sp.bootstrap((x,), np.mean, rng=np.random.default_rng(1)).confidence_interval
    assert (found.low, found.high) == pytest.approx((scipy.low, scipy.high), abs=0.012)


@pytest.mark.parametrize("only_a, only_b, n", [(9, 1, 40), (0, 5, 30), (120, 80, 1000)])
def test_mcnemar(only_a: int, only_b: int, n: int) -> None:
    a = [1.0] * only_a + [0.0] * only_b + [1.0] * (n - only_a - only_b)
    b = [0.0] * only_a + [1.0] * only_b + [1.0] * (n - only_a - only_b)
    table = [[n - only_a - only_b, only_a], [only_b, 0]]
    assert mcnemar_exact(a, b) == pytest.approx(mcnemar(table, exact=True).pvalue)


@pytest.mark.parametrize("only_a, only_b, n", [(9, 3, 44), (0, 5, 30), (12, 12, 80), (7, 0, 10)])
def test_the_score_of_paired_shares_against_maximum_likelihood(
    only_a: int, only_b: int, n: int
) -> None:
    """Tango (1998): the variance is that under the likeliest shares that differ by `d`."""
    x = np.r_[np.ones(only_a), np.zeros(only_b), np.ones(n - only_a - only_b)]
    y = np.r_[np.zeros(only_a), np.ones(only_b), np.ones(n - only_a - only_b)]
    estimate = paired_estimate(x, y)
    for d in (-0.15, 0.05, 0.2):

        def unlikely(q: float, d: float = d) -> float:
            cells = np.array([q + d, q, 1 - 2 * q - d])
            seen = np.array([only_a, only_b, n - only_a - only_b])
            return -float((seen * np.log(np.maximum(cells, 1e-300))).sum())

        q = optimize.minimize_scalar(
            unlikely, bounds=(max(0.0, -d), (1 - d) / 2), method="bounded", options={"xatol": 1e-12}
        ).x
        score = (only_a - only_b - n * d) / math.sqrt(n * (2 * q + d - d * d))
        assert estimate.p_above(d) == pytest.approx(sp.norm.sf(score), abs=1e-6)
        assert estimate.p_below(d) == pytest.approx(sp.norm.cdf(score), abs=1e-6)
    low, high = estimate.interval(0.95)[1:]
    assert estimate.p_above(low) == pytest.approx(0.025, abs=1e-9)
    assert estimate.p_below(high) == pytest.approx(0.025, abs=1e-9)


def test_the_sign_flip() -> None:
    a, b = RNG.normal(0.4, 1.0, 12), RNG.normal(size=12)
    scipy = sp.permutation_test(
        (a, b), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=2**12
    )
    assert paired_difference(a.tolist(), b.tolist()).p == pytest.approx(scipy.pvalue)


@pytest.mark.parametrize("n", [1, 5, 6, 12, 30])
def test_wilcoxon(n: int) -> None:
    a, b = RNG.normal(0.5, 1.0, n), RNG.normal(size=n)
    scipy = sp.wilcoxon(a, b, method="exact")
    assert wilcoxon_exact(a.tolist(), b.tolist()) == pytest.approx(scipy.pvalue)


def test_wilcoxon_with_ties_and_zeros() -> None:
    change = np.array([1.0, 1.0, -1.0, 2.0, 2.0, 3.0, 0.0, -4.0, 5.0])
    zeros = [0.0] * change.size
    scipy = sp.wilcoxon(change[change != 0], method=sp.PermutationMethod(n_resamples=10**6))
    assert wilcoxon_exact(change.tolist(), zeros) == pytest.approx(scipy.pvalue)
    assert wilcoxon_exact(zeros, zeros) == 1.0


def test_welch() -> None:
    a, b = RNG.normal(1.0, 0.2, 4), RNG.normal(0.5, 1.0, 7)
    found, scipy = welch(a.tolist(), b.tolist()), sp.ttest_ind(a, b, equal_var=False)
    bounds = scipy.confidence_interval(0.95)
    assert found.p_zero() == pytest.approx(scipy.pvalue)
    assert found.interval()[1:] == pytest.approx((bounds.low, bounds.high))


@pytest.mark.parametrize("margin", [0.05, 0.4, 2.0])
def test_two_one_sided_tests(margin: float) -> None:
    a, b = RNG.normal(0.1, 1.0, 40), RNG.normal(size=40)
    found = equivalence(paired_estimate(a, b), margin, "higher")
    p, above, below = ttost_paired(a, b, -margin, margin)
    assert found.p == pytest.approx(p)
    assert found.p_worse == pytest.approx(above[1])
    assert equivalence(paired_estimate(a, b), margin, "lower").p_worse == pytest.approx(below[1])


def test_holm() -> None:
    p = RNG.random(9) ** 3
    assert holm(p.tolist()) == pytest.approx(multipletests(p, method="holm")[1])


# -- power -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, d", [(5, 0.8), (30, 0.5), (400, 0.1), (20_000, 0.02)])
def test_power_of_the_paired_t(n: int, d: float) -> None:
    assert paired_power(n, 2.0, 2 * d) == pytest.approx(TTestPower().power(d, n, 0.05), abs=1e-4)


@pytest.mark.parametrize("effect", np.geomspace(30, 1e4, 40))
def test_power_of_a_huge_effect_is_one(effect: float) -> None:
    assert all(t_power(effect, df) == pytest.approx(1.0, abs=1e-3) for df in (2, 8.3, 40, 900))


def test_items_for_the_paired_t() -> None:
    found = least(lambda n: paired_power(n, 1.0, 0.1), 0.8)
    assert found == math.ceil(TTestPower().solve_power(0.1, None, 0.05, 0.8))


@pytest.mark.parametrize("seeds", [2, 5, 12])
def test_power_over_seeds(seeds: int) -> None:
    expected = TTestIndPower().power(1.2 / 0.7, seeds, 0.05)
    assert seeds_power(seeds, 0.7, 1.2) == pytest.approx(expected, abs=1e-6)
    assert seeds_power(seeds, 0.7, 1.2, items=50, sd=10.0) < expected
    assert seeds_power(seeds, 0.0, 0.3, items=60, sd=2.0) == pytest.approx(
        paired_power(60, 2.0, 0.3)
    )


@pytest.mark.parametrize("n, discordance, difference", [(20, 0.4, 0.3), (60, 0.2, 0.1)])
def test_power_of_mcnemar_over_all_outcomes(n: int, discordance: float, difference: float) -> None:
    total = 0.0
    p = [(discordance + difference) / 2, (discordance - difference) / 2, 1 - discordance]
    for a in range(n + 1):
        for b in range(n - a + 1):
            if sp.binomtest(min(a, b), max(a + b, 1)).pvalue <= 0.05:
                total += sp.multinomial.pmf([a, b, n - a - b], n, p)
    assert mcnemar_power(n, discordance, difference) == pytest.approx(total, abs=1e-9)


def test_items_for_mcnemar_are_near_the_normal_formula() -> None:
    """Miettinen (1968), which the exact test needs a few items more than."""
    found = least(lambda n: mcnemar_power(n, 0.1, 0.02), 0.8)
    formula = ((1.96 * 0.1**0.5 + 0.8416 * (0.1 - 0.02**2) ** 0.5) / 0.02) ** 2
    assert found is not None and formula < found < 1.1 * formula
    seen = smallest(lambda d: mcnemar_power(found, 0.1, d), 0.8, 0.1)
    assert seen == pytest.approx(0.02, abs=1e-4)


def test_what_cannot_be_found_is_said() -> None:
    assert least(lambda n: 0.5, 0.8) is None
    assert smallest(lambda d: 0.5, 0.8, 1.0) is None
    assert mcnemar_power(100, 0.0, 0.0) == 0.0
    with pytest.raises(ValueError, match="more discordance"):
        mcnemar_power(100, 0.1, 0.2)
