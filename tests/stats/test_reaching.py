from __future__ import annotations

import math

import numpy as np
import pytest

from effbench.stats.reaching import data_ratio, reaching

SIZES = [100, 200, 400, 800]


@pytest.mark.parametrize(
    ("level", "size"),
    [
        (0.5, 100),
        (0.6, 100),
        (0.65, 100 * 2**0.5),
        (0.7, 200),
        (0.79, 400 * 2**0.9),
        (0.8, 800),
        (0.81, math.inf),
    ],
)
def test_the_size_is_interpolated_over_its_logarithm(level: float, size: float) -> None:
    assert reaching(SIZES, [0.6, 0.7, 0.7, 0.8], level) == pytest.approx(size)


def outcomes(shares: list[float], seeds: int = 5, items: int = 400, seed: int = 0) -> np.ndarray:
    draws = np.random.default_rng(seed)
    return (draws.random((seeds, len(shares), items)) < np.array(shares)[:, None]).astype(float)


def test_a_curve_takes_as_much_as_itself() -> None:
    same = outcomes([0.6, 0.7, 0.8, 0.9])
    found = data_ratio(SIZES, same, same)
    assert found.value == 1
    assert found.low == found.high == 1


def test_a_ratio_is_found_with_its_interval() -> None:
    """Twice the data for each level: the ratio is 2."""
    ours = outcomes([0.6, 0.7, 0.8, 0.9], items=3000)
    theirs = outcomes([0.5, 0.6, 0.7, 0.8], items=3000, seed=1)
    found = data_ratio(SIZES, ours, theirs, draws=300)
    assert found.low < 2 < found.high
    assert found.value == pytest.approx(2, rel=0.15)
    assert found.low > 1.5 and found.high < 2.7
    assert found == data_ratio(SIZES, ours, theirs, draws=300), "the same draws"


def test_ends_of_the_sizes_bound_it() -> None:
    better, worse = outcomes([0.9] * 4), outcomes([0.5] * 4, seed=1)
    assert data_ratio(SIZES, better, worse) == (8, 8, 8)
    assert data_ratio(SIZES, worse, better) == (0, 0, 0)
    assert data_ratio(SIZES, better, worse[:, -1:]) == (8, 8, 8)
