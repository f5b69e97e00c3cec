"""Statistics against closed forms, known values and small simulations."""

from __future__ import annotations

import math
import sys
from importlib import import_module
from itertools import product
from statistics import NormalDist
from types import ModuleType

import numpy as np
import pytest

from effbench.stats import (
    Difference,
    Interval,
    Student,
    base,
    equivalence,
    equivalent,
    finding,
    holm,
    letters,
    mcnemar_exact,
    mean_interval,
    median_interval,
    over_seeds,
    paired,
    paired_difference,
    paired_seeds,
    ratio_interval,
    seeds_and_items,
    seeds_interval,
    special,
    verdict,
    welch,
)
from effbench.stats.base import mean_of


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


def skewed(n: int, seed: int = 0) -> list[float]:
    return np.random.default_rng(seed).exponential(size=n).tolist()


def test_the_bootstrap_leans_to_the_long_tail() -> None:
    found = mean_interval(skewed(30), seed=1)
    assert found.high - found.value > 1.3 * (found.value - found.low)


def test_whole_groups_are_resampled() -> None:
    values = np.repeat(np.random.default_rng(4).normal(size=25), 8)
    alone, grouped = mean_interval(values[::8].tolist()), mean_interval(values.tolist())
    found = mean_interval(values.tolist(), clusters=np.repeat(np.arange(25), 8).tolist())
    assert found == pytest.approx(alone, rel=1e-9)
    assert grouped.high - grouped.low < 0.5 * (found.high - found.low)


def test_groups_of_answers_count_as_fewer_answers() -> None:
    answers, groups = [1.0, 0.0, 1.0, 1.0] * 25, np.repeat(np.arange(100), 5)
    repeated = np.repeat(answers, 5).tolist()
    found = mean_interval(repeated, clusters=groups.tolist())
    alone = mean_interval(answers)
    assert (found.low, found.high) == pytest.approx((alone.low, alone.high), abs=0.01)
    right = mean_interval([1.0] * 500, clusters=groups.tolist())
    assert right.low == pytest.approx(mean_interval([1.0] * 100).low, abs=0.002)
    single = mean_interval([1.0, 0.0, 1.0], clusters=[7, 7, 7])
    assert (single.low, single.high) == (0.0, 1.0)


def test_groups_must_be_as_many_as_items() -> None:
    with pytest.raises(ValueError, match="every item needs its group: 3 and 2"):
        mean_interval([1.0, 2.0, 3.0], clusters=[0, 1])


def test_too_few_have_no_bounds() -> None:
    unbounded = (-math.inf, math.inf)
    assert mean_interval(skewed(9))[1:] == unbounded
    assert mean_interval(skewed(40), clusters=list(range(8)) * 5)[1:] == unbounded
    assert all(math.isfinite(b) for b in mean_interval(skewed(10)))
    assert median_interval([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, *unbounded)
    six = median_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert 1.0 <= six.low < 2.0 and 5.0 < six.high <= 6.0
    assert all(math.isfinite(b) for b in median_interval([1.0, 2.0, 3.0, 4.0, 5.0], level=0.9))


def test_the_same_value_everywhere_is_certain() -> None:
    assert mean_interval([0.5] * 12) == (0.5, 0.5, 0.5)
    assert mean_interval([0.5] * 3) == (0.5, -math.inf, math.inf)  # too few to be certain
    assert paired_difference([2.5] * 200, [1.5] * 200).low == 1.0


def test_the_median_lies_in_its_interval_and_ratios_are_paired() -> None:
    assert median_interval([3.0, 1.0, 2.0]).value == 2.0
    slow, fast = [2.0, 4.0, 20.0, 8.0, 10.0, 6.0], [1.0, 2.0, 10.0, 4.0, 5.0, 3.0]
    assert ratio_interval(slow, fast) == (2.0, 2.0, 2.0)
    low, high = median_interval([float(v) for v in range(1, 102)])[1:]
    assert (low, high) == pytest.approx((41, 61), abs=1.5)  # order statistics of the binomial


def test_one_item_has_no_bounds_and_none_is_refused() -> None:
    assert mean_interval([2.5]) == (2.5, -math.inf, math.inf)
    assert verdict("A", "B", paired_difference([2.5], [1.0])) == (
        "A and B: one item, too little to compare"
    )
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
    monkeypatch.setattr(paired, "EXACT_ITEMS", 0)
    assert paired_difference(change, [0.0] * 16).p == pytest.approx(exact, abs=0.02)


def test_false_alarms_of_the_paired_test_keep_to_alpha(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "DRAWS", 0)
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


# -- pairs -------------------------------------------------------------------------------------


def test_without_a_differing_answer_the_difference_is_still_uncertain() -> None:
    answers = [1.0, 0.0] * 50
    found = paired_difference(answers, answers)
    assert found.value == 0 and found.p == 1.0
    assert found.low == pytest.approx(-0.037, abs=1e-3) and found.high == -found.low


def test_groups_widen_a_paired_difference() -> None:
    generator = np.random.default_rng(8)
    groups = np.repeat(np.arange(30), 6)
    change = generator.normal(0.3, 1.0, 30)[groups] + generator.normal(0, 0.1, 180)
    zeros = [0.0] * 180
    alone = paired_difference(change.tolist(), zeros)
    found = paired_difference(change.tolist(), zeros, clusters=groups.tolist())
    assert found.test == "sign-flip permutation of groups"
    assert found.high - found.low > 1.8 * (alone.high - alone.low)
    assert found.p > alone.p


def test_groups_widen_a_difference_of_shares() -> None:
    a = np.repeat([1.0, 1.0, 0.0, 1.0, 1.0] * 8, 5)
    b = np.repeat([1.0, 0.0, 1.0, 1.0, 0.0] * 8, 5)
    groups = np.repeat(np.arange(40), 5).tolist()
    found = paired_difference(a.tolist(), b.tolist(), clusters=groups)
    each = paired_difference(a[::5].tolist(), b[::5].tolist())
    assert (found.low, found.high) == pytest.approx((each.low, each.high), abs=0.02)
    assert paired_difference(a.tolist(), b.tolist()).low > found.low


# -- equivalence -------------------------------------------------------------------------------


def test_equivalence_needs_the_whole_interval_within_the_margin() -> None:
    estimate = Student(0.2, 0.1, 40.0)
    wide, narrow = equivalence(estimate, 0.4), equivalence(estimate, 0.3)
    assert wide.high < 0.4 and wide.p < 0.05
    assert narrow.high > 0.3 and narrow.p > 0.05
    assert wide.p_worse is None
    with pytest.raises(ValueError, match="above zero"):
        equivalence(estimate, 0.0)


def test_not_worse_looks_at_one_side_alone() -> None:
    better = Student(0.5, 0.1, 40.0)
    assert equivalence(better, 0.3, "higher").p_worse == pytest.approx(0.0, abs=1e-6)
    assert equivalence(better, 0.3, "lower").p_worse > 0.9
    assert equivalence(better, 0.3, "higher").p > 0.9


def test_equivalence_of_pairs_in_words() -> None:
    answers = [1.0, 0.0, 1.0, 1.0] * 100
    other = [0.0, 1.0, *answers[2:]]
    assert equivalent(paired_difference(answers, other, margin=0.02, better="higher")) == (
        "equivalent"
    )
    worse = [0.0] * 30 + answers[30:]
    assert equivalent(paired_difference(worse, answers, margin=0.02, better="higher")) == (
        "not shown"
    )
    assert equivalent(paired_difference(answers, worse, margin=0.02, better="higher")) == (
        "not worse"
    )
    assert equivalent(paired_difference(answers, other)) == ""


def test_the_tests_and_the_intervals_of_an_estimate_agree() -> None:
    generator = np.random.default_rng(6)
    for a, b in (
        (generator.exponential(size=150), generator.normal(1, 0.3, 150)),  # bootstrap
        (generator.integers(0, 2, 80), generator.integers(0, 2, 80)),  # shares
        (generator.normal(size=20), generator.normal(size=20)),  # Student's t
    ):
        estimate = paired.paired_estimate(a.astype(float), b.astype(float))
        _, low, high = estimate.interval(0.9)
        assert estimate.p_above(low) == pytest.approx(0.05, abs=2e-3)
        assert estimate.p_below(high) == pytest.approx(0.05, abs=2e-3)


# -- seeds -------------------------------------------------------------------------------------


def runs_of(seeds: int, items: int, seed_sd: float, shift: float = 0.0, of: int = 0) -> np.ndarray:
    generator = np.random.default_rng(of)
    level = generator.normal(0, seed_sd, (seeds, 1)) + shift
    return np.linspace(1, 3, items) + level + generator.normal(0, 0.3, (seeds, items))


def test_the_choice_of_seeds_widens_the_interval() -> None:
    a, b = runs_of(4, 200, 0.5), runs_of(4, 200, 0.5, of=1)
    found = seeds_and_items(a, b).interval()
    means = welch(a.mean(axis=1).tolist(), b.mean(axis=1).tolist()).interval()
    items = paired_difference(a.mean(axis=0).tolist(), b.mean(axis=0).tolist())
    assert found == pytest.approx(means, rel=0.05)
    assert found.high - found.low > 4 * (items.high - items.low)


def test_the_choice_of_items_counts_where_seeds_agree() -> None:
    a = runs_of(5, 40, 0.0)
    lean = np.random.default_rng(5).normal(0, 1.0, 40)
    found = seeds_and_items(a + lean, runs_of(5, 40, 0.0, of=1)).interval()
    assert found.high - found.low == pytest.approx(2 * 2.02 * lean.std(ddof=1) / 40**0.5, rel=0.2)


def test_a_run_without_a_seed_adds_no_spread_of_its_own() -> None:
    a, fixed = runs_of(3, 60, 0.4), runs_of(1, 60, 0.0, of=1)
    found = seeds_and_items(a, fixed, fixed=True)
    seeds, items = a.mean(axis=1).var(ddof=1) / 3, (0.3**2 + 0.3**2 / 3) / 60
    assert found.error == pytest.approx(math.sqrt(seeds + items - 0.3**2 / 180), rel=0.05)
    assert 2 <= found.df < 4
    assert seeds_interval(a).value == pytest.approx(a.mean())
    with pytest.raises(ValueError, match="two seeds"):
        seeds_and_items(a, fixed)
    with pytest.raises(ValueError, match="as many"):
        seeds_and_items(a, runs_of(3, 59, 0.4))


def test_shares_over_seeds_stay_between_0_and_1_and_are_never_certain() -> None:
    right, one_wrong = np.ones((3, 8)), np.ones((3, 8))
    one_wrong[0, 0] = 0
    for found in map(seeds_interval, (right, one_wrong, 1 - right)):
        assert 0 <= found.low < found.high <= 1
        assert found.high - found.low > 0.3
    assert seeds_interval(one_wrong, [0] * 8)[1:] == (0.0, 1.0)
    apart = seeds_and_items(right, 1 - right)
    low, high = apart.interval()[1:]
    assert 0.5 < low < high == 1.0
    assert 1e-4 < apart.p_zero() < 0.05
    same = seeds_and_items(right, right)
    assert same.p_zero() == 1.0
    assert same.interval().high > 0.1


def test_runs_of_the_same_seeds_are_paired() -> None:
    a = runs_of(4, 200, 0.5)
    b = a + 0.1 + np.random.default_rng(3).normal(0, 0.05, a.shape)
    assert paired_seeds(b, a).p_zero() < 1e-3 < 0.4 < seeds_and_items(b, a).p_zero()


def test_answers_of_a_single_group_that_differ_show_nothing() -> None:
    found = paired_difference([1.0, 1.0, 1.0], [0.0, 0.0, 0.0], clusters=[0, 0, 0])
    assert (found.value, found.low, found.high, found.p) == (1.0, -math.inf, math.inf, 1.0)


def test_five_seeds_cannot_reach_significance_by_ranks() -> None:
    found = over_seeds([5.0, 6.0, 7.0, 8.0, 9.0], [1.0, 2.0, 2.5, 3.0, 4.5], pairs=5)
    assert found.wilcoxon == pytest.approx(0.0625)
    assert found.welch < 0.01
    assert over_seeds([5.0, 6.0], [1.0, 2.0]).wilcoxon is None


def test_a_diverged_seed_gives_no_bounds() -> None:
    a = runs_of(3, 20, 0.1)
    a[0, 0] = math.nan
    assert seeds_and_items(a, runs_of(3, 20, 0.1, of=1)).interval()[1:] == (-math.inf, math.inf)


# -- letters -----------------------------------------------------------------------------------


def shares(found: list[str], i: int, j: int) -> bool:
    return bool(set(found[i]) & set(found[j]))


def test_letters_by_hand() -> None:
    assert letters([1.0, 2.0, 3.0], {(0, 2): True}) == ["a", "ab", "b"]
    assert letters([3.0, 2.0, 1.0], {(0, 2): True, (0, 1): True, (1, 2): True}) == ["c", "b", "a"]
    assert letters([1.0, 2.0], {}) == ["a", "a"]
    assert letters([], {}) == []


def test_rows_share_a_letter_exactly_when_they_do_not_differ() -> None:
    generator = np.random.default_rng(9)
    for rows in (3, 6, 9):
        for _ in range(30):
            differ = {(i, j): bool(generator.integers(0, 2)) for j in range(rows) for i in range(j)}
            found = letters(list(range(rows)), differ)
            assert all(shares(found, i, j) != different for (i, j), different in differ.items())
            columns = [{i for i, f in enumerate(found) if x in f} for x in set("".join(found))]
            assert not any(a <= b for a in columns for b in columns if a is not b)


def test_the_variance_over_groups_against_the_matrices_of_its_definition() -> None:
    generator = np.random.default_rng(12)
    clusters = [0] * 3 + [1] * 7 + [2] * 2 + [3] * 5 + [4]
    x = generator.normal(size=18)
    n, ones = 18, np.ones((18, 1))
    residual = np.eye(n) - ones @ ones.T / n
    e, meat, columns = residual @ x, 0.0, []
    for g in range(5):
        pick = np.array(clusters) == g
        values, vectors = np.linalg.eigh(residual[np.ix_(pick, pick)])
        adjust = vectors @ np.diag(values**-0.5) @ vectors.T
        meat += (ones[pick].T @ adjust @ e[pick]).item() ** 2
        columns.append(residual[:, pick] @ adjust @ ones[pick] / n)
    gram = np.hstack(columns).T @ np.hstack(columns)
    found = mean_of(x, clusters)
    assert found.variance == pytest.approx(meat / n**2)
    assert found.df == pytest.approx(np.trace(gram) ** 2 / np.trace(gram @ gram))
    alone = mean_of(x)
    assert (alone.variance, alone.df) == pytest.approx((x.var(ddof=1) / n, n - 1))
    assert isinstance(alone.student().interval(), Interval)


@pytest.mark.parametrize("answers", [[1, 1, 0, 1], [1, 1, 1, 1], [0.5, 2, 3, 1]])
def test_items_of_one_group_are_too_little_whatever_they_are(answers) -> None:
    difference = paired_difference(answers, [0, 0, 0, 0], clusters=[7] * 4)
    assert finding(difference) == "too little to compare"
    assert "4 items in one group" in verdict("A", "B", difference)


def test_two_seeds_that_differ_more_than_their_items_cover_less_often() -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(200):
        share = np.clip(0.5 + 0.15 * rng.standard_normal((2, 1)), 0, 1)
        found = seeds_interval((rng.random((2, 300)) < share).astype(float))
        hits += found.low <= 0.5 <= found.high
    assert 0.8 < hits / 200 < 0.94, "what the sentence below a comparison says of two seeds"


FUNCTIONS = ("bdtr", "gammaln", "nctdtr", "ndtr", "ndtri", "stdtr", "stdtrit")


def test_functions_of_scipy_are_the_same_without_the_package_around_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = import_module("scipy.special")
    monkeypatch.delitem(sys.modules, "scipy.special")
    found = special.scipy_special.__wrapped__()
    assert found is not whole and "scipy.special" not in sys.modules
    assert [getattr(found, name) for name in FUNCTIONS] == [getattr(whole, n) for n in FUNCTIONS]


def test_a_scipy_that_is_built_otherwise_is_imported_as_a_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def otherwise(name: str) -> ModuleType:
        if name.endswith("_ufuncs"):
            raise ImportError(name)
        return import_module(name)

    whole = import_module("scipy.special")
    monkeypatch.delitem(sys.modules, "scipy.special")
    monkeypatch.setattr(special, "import_module", otherwise)
    found = special.scipy_special.__wrapped__()
    assert found.__name__ == "scipy.special" and found.stdtr is whole.stdtr
