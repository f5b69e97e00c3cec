"""Statistics against closed forms, known values and small simulations."""

from __future__ import annotations

import math
from itertools import product
from statistics import NormalDist

import numpy as np
import pytest

from effbench import stats
from effbench.stats import (
    Difference,
    finding,
    holm,
    mcnemar_exact,
    mean_interval,
    median_interval,
    paired_difference,
    ratio_interval,
    verdict,
)


def test_mcnemar_with_one_against_nine() -> None:
    a = [1.0] + [0.0] * 9 + [1.0, 0.0] * 5
    b = [0.0] + [1.0] * 9 + [1.0, 0.0] * 5
    assert mcnemar_exact(a, b) == pytest.approx(0.021484375, abs=1e-15)
    assert mcnemar_exact(b, a) == mcnemar_exact(a, b)
    assert mcnemar_exact(a, a) == 1.0


def test_mcnemar_refuses_what_is_not_binary() -> None:
    with pytest.raises(ValueError, match="0 or 1"):
        mcnemar_exact([0.5, 1.0], [0.0, 1.0])


def test_mcnemar_of_many_items_does_not_overflow() -> None:
    a, b = [1.0] * 3000 + [0.0] * 2000, [0.0] * 3000 + [1.0] * 2000
    assert 0 < mcnemar_exact(a, b) < 1e-40


def test_wilson_interval_against_a_textbook_value() -> None:
    found = mean_interval([1.0] * 8 + [0.0] * 2)
    assert found.value == pytest.approx(0.8)
    assert (found.low, found.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert mean_interval([1.0] * 20).low < 0.9


def test_the_bootstrap_agrees_with_the_normal_interval_of_many_normal_values() -> None:
    x = np.random.default_rng(0).normal(3.0, 2.0, 800)
    found = mean_interval(x.tolist(), seed=1)
    half = NormalDist().inv_cdf(0.975) * x.std(ddof=1) / math.sqrt(x.size)
    assert found.value == pytest.approx(x.mean())
    assert found.low == pytest.approx(x.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(x.mean() + half, abs=0.1 * half)


@pytest.mark.parametrize("draw", ["normal", "exponential"])
def test_coverage_is_near_the_stated_level(draw: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "DRAWS", 0)  # the least number of resamples
    generator = np.random.default_rng(7)
    truth = 0.0 if draw == "normal" else 1.0
    hits = 0
    for trial in range(400):
        found = mean_interval(getattr(generator, draw)(size=40).tolist(), seed=trial)
        hits += found.low <= truth <= found.high
    assert 0.90 <= hits / 400 <= 0.98


def test_the_median_lies_in_its_interval_and_ratios_are_paired() -> None:
    assert median_interval([3.0, 1.0, 2.0]).value == 2.0
    slow, fast = [2.0, 4.0, 20.0, 8.0, 10.0], [1.0, 2.0, 10.0, 4.0, 5.0]
    assert ratio_interval(slow, fast) == (2.0, 2.0, 2.0)
    low, high = median_interval([float(v) for v in range(1, 102)])[1:]
    assert (low, high) == pytest.approx((41, 61), abs=1.5)  # order statistics of the binomial


def test_one_item_has_no_bounds_and_none_is_refused() -> None:
    assert mean_interval([2.5]) == (2.5, -math.inf, math.inf)
    assert "one item is too little" in verdict("A", "B", paired_difference([2.5], [1.0]))
    with pytest.raises(ValueError, match="no items"):
        mean_interval([])
    with pytest.raises(ValueError, match="as many"):
        paired_difference([1.0, 2.0], [1.0])


def test_the_same_seed_gives_the_same_numbers() -> None:
    generator = np.random.default_rng(3)
    a, b = generator.normal(size=(2, 60)).tolist()
    assert paired_difference(a, b, seed=5) == paired_difference(a, b, seed=5)
    assert paired_difference(a, b, seed=5) != paired_difference(a, b, seed=6)


def test_the_exact_sign_flip_goes_through_all_signs() -> None:
    change = [0.3, -0.1, 0.5, 0.2, 0.9, -0.4, 0.7]
    sums = [abs(np.dot(signs, change)) for signs in product((1, -1), repeat=7)]
    expected = sum(s >= abs(sum(change)) - 1e-12 for s in sums) / 2**7
    assert paired_difference(change, [0.0] * 7).p == pytest.approx(expected)
    assert paired_difference([1.5] * 6, [1.0] * 6).p == pytest.approx(2 / 2**6)


def test_the_drawn_sign_flip_comes_near_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    change = np.random.default_rng(1).normal(0.4, 1.0, 16).tolist()
    exact = paired_difference(change, [0.0] * 16).p
    monkeypatch.setattr(stats, "EXACT_ITEMS", 0)
    assert paired_difference(change, [0.0] * 16).p == pytest.approx(exact, abs=0.02)


def test_false_alarms_of_the_paired_test_keep_to_alpha(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "DRAWS", 0)
    generator = np.random.default_rng(11)
    alarms = 0
    for trial in range(300):
        a = generator.exponential(size=25)
        b = a + generator.normal(0, 0.3, 25)
        alarms += paired_difference(a.tolist(), b.tolist(), seed=trial).p <= 0.05
    assert alarms / 300 <= 0.085


def test_pairing_finds_what_the_separate_intervals_hide() -> None:
    generator = np.random.default_rng(2)
    a = generator.gamma(20, 0.12, 300)
    b = a + 0.03 + generator.normal(0, 0.05, 300)
    one, other = mean_interval(a.tolist()), mean_interval(b.tolist())
    assert one.high > other.low
    assert finding(paired_difference(a.tolist(), b.tolist())) == "lower"


def test_binary_outcomes_get_the_exact_test() -> None:
    found = paired_difference([1.0] * 9 + [0.0], [0.0] * 9 + [1.0])
    assert found.test == "McNemar, exact"
    assert found.p == pytest.approx(0.021484375)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_verdicts_in_words() -> None:
    clear = Difference(-0.12, -0.16, -0.08, 0.001, 50, "")
    assert verdict("A", "B", clear, "nats/token") == (
        "A is lower than B by 0.12 [0.08, 0.16] nats/token"
    )
    higher = Difference(0.12, 0.08, 0.16, 0.001, 50, "")
    assert verdict("A", "B", higher) == "A is higher than B by 0.12 [0.08, 0.16]"
    assert verdict("A", "B", higher, p=0.2) == (
        "A and B cannot be told apart: the difference is in [0.08, 0.16]"
    )
    assert finding(Difference(0.01, -0.01, 0.03, 0.04, 50, "")) == "cannot be told apart"


def test_a_diverged_run_is_not_a_finding() -> None:
    found = paired_difference([math.nan] + [1.0] * 30, [2.0] * 31)
    assert found.p == 1.0
    assert finding(found) == "cannot be compared"
    assert "not a finite number" in verdict("A", "B", found)
