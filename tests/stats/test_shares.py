"""Shares with outcomes between 0 and 1: intervals within what a share can be, never of no width."""

from __future__ import annotations

import math

import numpy as np
import pytest

from effbench.results.bounds import bounds_of
from effbench.stats import (
    Interval,
    mean_interval,
    paired_difference,
    paired_seeds,
    seeds_and_items,
    seeds_interval,
)

SHARE = (0.0, 1.0)
TIES, ONE_TIE = np.full((3, 40), 0.5), np.ones((3, 40))
ONE_TIE[0, 0] = 0.5


def interval(values: np.ndarray, bounds: tuple[float, float] = SHARE) -> Interval:
    """Return the interval of the runs; that of the first one where there is only one."""
    if len(values) == 1:
        return mean_interval(values[0].tolist(), bounds=bounds, resamples=200)
    return seeds_interval(values, bounds=bounds)


@pytest.mark.parametrize("runs", [1, 3])
def test_a_tie_among_right_answers_leads_to_no_more_than_all(runs: int) -> None:
    found = interval(ONE_TIE[:runs])
    assert found.value == ONE_TIE[:runs].mean()
    assert 0.9 < found.low < found.value < found.high < 1
    assert interval(100 * ONE_TIE[:runs], (0.0, 100.0)) == pytest.approx([100 * x for x in found])


@pytest.mark.parametrize("runs", [1, 3])
def test_nothing_but_ties_is_not_certain(runs: int) -> None:
    found = interval(TIES[:runs])
    assert found.value == 0.5
    assert 0.44 < found.low < 0.47 and found.high == pytest.approx(1 - found.low)
    few = interval(TIES[:runs, :7])
    assert 0 < few.low < 0.4 and few.high < 1


def test_ties_and_right_answers_differ_but_not_for_certain() -> None:
    right = np.ones_like(TIES)
    for found in (
        seeds_and_items(right, TIES, bounds=SHARE).interval(),
        paired_seeds(right, TIES, bounds=SHARE).interval(),
        paired_difference([1.0] * 40, [0.5] * 40, bounds=SHARE),
    ):
        assert 0.3 < found.low < 0.5 == found.value < found.high < 0.7
    same = paired_difference(TIES[0].tolist(), TIES[0].tolist(), bounds=SHARE)
    assert same.low < 0 < same.high and same.p == 1.0
    assert seeds_and_items(right, right - 1, bounds=SHARE).interval().high == 1.0


def test_linearised_ratios_end_where_a_share_does() -> None:
    values = [1.02, 1.01, 0.99, 0.97, 1.0, 1.03, 0.98, 0.96, 1.01, 1.0, 0.93, 1.05]
    for found in (interval(np.array([values])), interval(np.array([values, values]))):
        assert 0.85 < found.low < found.value < found.high <= 1
    assert interval(np.array([values]), (-math.inf, math.inf)).high > 1


def test_what_is_no_share_is_left_as_it_is() -> None:
    percents = 100 * TIES
    assert seeds_interval(percents, bounds=SHARE) == seeds_interval(percents)
    values = np.linspace(0.01, 0.4, 12)[None].repeat(2, 0) ** 12
    assert seeds_interval(values).low < 0 == seeds_interval(values, bounds=(0.0, math.inf)).low


@pytest.mark.parametrize("share", [0.5, 0.9, 0.988])
@pytest.mark.parametrize("runs", [1, 3])
def test_shares_with_ties_are_covered_as_often_as_stated(share: float, runs: int) -> None:
    """Half of the items answer alike in all runs."""
    generator, hits, draws = np.random.default_rng(7), 0, 300
    half = 0.7 * min(share, 1 - share)
    for _ in range(draws):
        at = generator.random((runs, 40))
        at[:, :20] = at[0, :20]
        found = interval(np.where(at < share - half, 1.0, np.where(at < share + half, 0.5, 0.0)))
        assert 0 <= found.low < found.high <= 1
        hits += found.low <= share <= found.high
    assert 0.92 <= hits / draws <= 0.99


def test_shares_are_told_by_their_names() -> None:
    shares = "pair_accuracy macro_f1 acc_norm exact_match_best_of_4 inst_level_loose_acc flips"
    assert all(bounds_of(name) == SHARE for name in [*shares.split(), "refusal_rate"])
    assert bounds_of("trust_score") == (0.0, 100.0)
    assert bounds_of("kept_rules", "rules") == bounds_of("step_seconds", "s") == (0.0, math.inf)
    assert bounds_of("speed", "tokens/s") == bounds_of("x", "positions x layers") == (0.0, math.inf)
    assert all(math.isinf(bounds_of("loss", unit)[0]) for unit in ("nats/token", "nats", ""))
    assert all(math.isinf(bounds_of(n)[1]) for n in ("loss", "score_best_of_2", "score_margin"))
