"""Ranks of a low-rank cache: the authors' lists, sums that are exact, and who keeps more."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from effbench.nn.decode.ranks import (
    Sizes,
    Spectra,
    chosen,
    depths,
    equal_errors,
    ordered,
    sloped,
    tails,
)
from effbench.util.errors import UserError

AUTHORS = Path(__file__).parents[3] / "shared" / "truth" / "lorc_ranks.npz"
ORDERS = ("progressive", "uniform", "reversed", "error")


def spectra_of(layers: int = 6, width: int = 32, seed: int = 0) -> Spectra:
    """Return singular values that fall off faster in some layers than in others."""
    draws = torch.Generator().manual_seed(seed)
    speed = 0.05 + torch.rand(2, layers, 1, generator=draws)
    keys, values = torch.exp(-speed * torch.arange(width)).tolist()
    return Spectra(keys, values)


@pytest.mark.skipif(not AUTHORS.exists(), reason="needs the authors' rank lists")
@pytest.mark.parametrize(("name", "least"), [("d128", 128), ("d100", 100), ("d32", 32)])
def test_the_authors_lists_follow_from_their_condition_numbers(name: str, least: int) -> None:
    truth = np.load(AUTHORS)
    way, expected = depths(np.log(truth["kappa"]).sum(1).tolist()), truth[name].tolist()
    by_formula = [1024 * (1 - t * (1 - least / 1024)) for t in way]
    found = sloped(way, Sizes(32, 1024, 1), sum(expected))
    for ranks in (by_formula, found):
        # They round up, down, or stop short of the last decimal.
        assert max(abs(a - b) for a, b in zip(ranks, expected, strict=True)) < 1.25


def test_conditions_are_those_of_keys_and_of_values() -> None:
    found = Spectra([[4.0, 2.0, 1.0], [5.0, 5.0, 0.0]], [[6.0, 3.0, 3.0], [0.0, 0.0, 0.0]])
    assert found.log_conditions() == pytest.approx([math.log(4 * 2), math.log(1e6)])


def test_layers_that_are_alike_lie_on_a_straight_line_from_all_to_the_least() -> None:
    way = depths([math.log(7.0)] * 5)
    assert way == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert sloped(way, Sizes(5, 64, 1), 5 * 36) == [64, 50, 36, 22, 8]
    assert depths([0.0] * 3) == [1.0] * 3 and depths([2.0]) == [1.0]


@pytest.mark.parametrize("kept", [0.5, 0.61, 0.75, 0.9, 1])
@pytest.mark.parametrize("order", ORDERS)
def test_ranks_are_units_that_add_up_to_what_is_kept(order: str, kept: float) -> None:
    sizes = Sizes(6, 32, 4, protect=1)
    for ranks in chosen(order, spectra_of(), sizes, (kept, kept)):  # type: ignore[arg-type]
        assert sum(ranks) == 4 * int(kept * 48)
        assert all(rank % 4 == 0 and 4 <= rank <= 32 for rank in ranks)
        assert ranks[0] == 32
        if order == "progressive":
            assert all(a >= b for a, b in pairwise(ranks))
        if order == "reversed":
            assert all(a <= b for a, b in pairwise(ranks[1:]))
        if order == "uniform":
            assert max(ranks[1:]) - min(ranks[1:]) <= 4


def test_the_first_layer_keeps_all_and_the_last_one_least() -> None:
    conditions = spectra_of().log_conditions()
    ranks = sloped(ordered("progressive", conditions, 0), Sizes(6, 32, 1), 96)
    assert ranks[0] == 32 and ranks[-1] == min(ranks) < 16
    backwards = sloped(ordered("reversed", conditions, 0), Sizes(6, 32, 1), 96)
    assert sorted(backwards) == sorted(ranks) and backwards[-1] == 32


def test_what_multiplies_a_weight_or_is_dead_decides_nothing() -> None:
    found = spectra_of()
    scaled = Spectra([[3.0 * s for s in own] for own in found.keys], found.values)
    assert scaled.log_conditions() == pytest.approx(found.log_conditions())
    dead = Spectra([[1.0, 0.0]], [[1.0, 1.0]])
    assert dead.log_conditions() == pytest.approx([math.log(1e6)])
    assert Spectra([[0.0, 0.0]], [[0.0, 0.0]]).log_conditions() == [0.0]


def test_a_unit_goes_where_its_lack_costs_most() -> None:
    """No other ranks of the same sum have a smaller largest error."""
    found, sizes = spectra_of(3, 8).keys, Sizes(3, 8, 1)
    ranks = equal_errors(found, sizes, 12)
    errors = [tails(own, 1) for own in found]

    def worst(chosen: tuple[int, ...]) -> float:
        return max(own[rank] for own, rank in zip(errors, chosen, strict=True))

    every = [(a, b, 12 - a - b) for a in range(1, 9) for b in range(1, 9) if 1 <= 12 - a - b <= 8]
    assert sum(ranks) == 12 and worst(tuple(ranks)) == min(map(worst, every))


def test_tails_are_the_root_of_the_share_of_squares() -> None:
    assert tails([4.0, 2.0, 2.0, 1.0], 2) == pytest.approx([1.0, math.sqrt(5 / 25), 0.0])


def test_shares_that_cannot_be_met_are_refused_with_the_least() -> None:
    with pytest.raises(UserError, match=r"kept_values=0\.2 is less than progressive") as error:
        chosen("progressive", spectra_of(), Sizes(6, 32, 8), (0.5, 0.2))
    assert error.value.hint == "Keep 0.38 or more."
    chosen("progressive", spectra_of(), Sizes(6, 32, 8), (0.38, 0.38))
