"""The checks of the numbers in their short form, and that each fails when it should."""

from __future__ import annotations

import numpy as np
import pytest

from effbench.cli.selfcheck import aa, coverage
from effbench.cli.selfcheck.base import Check, families, run
from effbench.stats import Interval, Student
from effbench.stats.base import mean_of
from effbench.util.errors import UserError


def test_a_check_keeps_its_bounds() -> None:
    assert Check("x", 1.0, 1.0, 2.0).passed
    assert not Check("x", 0.9, 1.0, 2.0).passed
    assert not Check("x", float("nan"), 1.0, 2.0).passed


def test_families_are_found_by_their_files() -> None:
    assert {"aa", "coverage"} <= set(families())
    assert "base" not in families()
    with pytest.raises(UserError, match="no checks 'covrage'") as caught:
        list(run(["covrage"]))
    assert "'coverage'" in caught.value.hint


# -- coverage ----------------------------------------------------------------------------------


def test_every_interval_covers() -> None:
    checks = list(coverage.run(short=True))
    assert len(checks) >= 15
    assert [c for c in checks if not c.passed] == []


def narrowed(case: coverage.Case, share: float) -> coverage.Case:
    def draw(generator: np.random.Generator) -> tuple[Interval, float]:
        (value, low, high), truth = case.draw(generator)
        found = Interval(value, value + share * (low - value), value + share * (high - value))
        return found, truth

    return coverage.Case(case.name, draw)


@pytest.mark.parametrize("name", ["mean of 24 items, normal", "difference over 12 items, normal"])
def test_an_interval_that_is_too_narrow_fails(name: str) -> None:
    (case,) = [c for c in coverage.CASES if c.name == name]
    assert coverage.covered(case, 400, short=True).passed
    assert not coverage.covered(narrowed(case, 0.7), 400, short=True).passed


def test_an_interval_that_is_slightly_too_narrow_fails_the_long_form() -> None:
    (case,) = [c for c in coverage.CASES if c.name == "Welch over 5 and 7 seeds"]
    assert coverage.covered(case, 4000).passed
    assert not coverage.covered(narrowed(case, 0.9), 4000).passed


def test_the_interval_of_answers_without_wilson_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def wald(values: list[float]) -> Interval:
        share = float(np.mean(values))
        half = 1.96 * (share * (1 - share) / len(values)) ** 0.5
        return Interval(share, share - half, share + half)

    assert coverage.shares_coverage(24) == pytest.approx(0.9537, abs=1e-3)
    monkeypatch.setattr(coverage, "mean_interval", wald)
    assert coverage.shares_coverage(24) < 0.93


def test_differences_of_shares_are_gone_through() -> None:
    assert coverage.differences_coverage(16) == pytest.approx(0.97, abs=0.02)


def test_seeds_that_are_left_out_fail() -> None:
    """An interval over items alone does not hold when seeds differ."""

    def draw(generator: np.random.Generator) -> tuple[Interval, float]:
        items = generator.gamma(2, 1.0, 100)
        a, b = (coverage._runs(3, items, 0.3, 0.0, generator) for _ in range(2))
        return mean_of(a.mean(axis=0) - b.mean(axis=0)).student().interval(), 0.0

    assert coverage.covered(coverage.Case("items alone", draw), 400).value < 70


# -- A/A ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def losses() -> np.ndarray:
    return aa.trainings(2 * aa.SEEDS * aa.SHORT_COMPARISONS)


def test_a_method_against_itself(losses: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aa, "trainings", lambda seeds: losses[:seeds])
    (check,) = aa.run(short=True)
    assert check.passed, check.value


def test_trainings_differ_by_their_seed_alone(losses: np.ndarray) -> None:
    assert np.array_equal(aa.trainings(2), losses[:2])
    assert losses.shape[1] == aa.ITEMS
    assert losses.mean(axis=1).std() > 0.005


def test_a_method_against_itself_over_items_alone_fails(
    losses: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def items_alone(a: np.ndarray, b: np.ndarray) -> Student:
        return mean_of(a.mean(axis=0) - b.mean(axis=0)).student()

    monkeypatch.setattr(aa, "trainings", lambda seeds: losses[:seeds])
    monkeypatch.setattr(aa, "_difference", items_alone)
    (check,) = aa.run(short=True)
    assert check.value < 60 and not check.passed


def test_the_command_says_what_failed(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = coverage.covered(narrowed(coverage.CASES[0], 0.5), 300)
    monkeypatch.setattr(coverage, "run", lambda short: iter([narrow]))
    status, out, err = cli("selfcheck", "coverage")
    assert status == 2
    assert out.startswith("FAILED  coverage: mean of 12 items, normal: ")
    assert "1 checks failed" in err
