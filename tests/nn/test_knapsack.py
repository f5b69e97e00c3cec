"""One option an item within a budget: against all choices that there are."""

from __future__ import annotations

import itertools
import random

import pytest

from effbench.nn.quant.knapsack import choose


@pytest.mark.parametrize("seed", range(60))
def test_no_choice_that_fits_loses_less(seed: int) -> None:
    draw = random.Random(seed)
    sizes = [[draw.randint(1, 20) for _ in range(draw.randint(1, 4))] for _ in range(seed % 6 + 1)]
    ties = seed % 3 == 0
    losses = [[draw.randint(0, 3) if ties else draw.random() for _ in size] for size in sizes]
    budget = sum(map(min, sizes)) + draw.randint(0, 30)
    chosen = choose(sizes, losses, budget)

    def total(of: list[list[float]], options: tuple[int, ...]) -> float:
        return sum(item[option] for item, option in zip(of, options, strict=True))

    every = itertools.product(*(range(len(size)) for size in sizes))
    least = min(total(losses, c) for c in every if total(sizes, c) <= budget)  # type: ignore[arg-type]
    assert total(sizes, tuple(chosen)) <= budget  # type: ignore[arg-type]
    assert total(losses, tuple(chosen)) == pytest.approx(least, abs=1e-12)


def test_all_that_fits_is_taken_and_what_cannot_fit_is_refused() -> None:
    sizes, losses = [[3, 4, 5]] * 3, [[9.0, 4.0, 0.0]] * 3
    assert choose(sizes, losses, 10**9) == [2, 2, 2]
    assert choose(sizes, losses, 9) == [0, 0, 0]
    with pytest.raises(ValueError, match="more than 8"):
        choose(sizes, losses, 8)


def test_a_walk_along_the_hulls_would_not_find_it() -> None:
    """Either item gains more for its size than the third one, which fills the budget."""
    sizes, losses = [[0, 6], [0, 6], [0, 10]], [[7.0, 0.0], [7.0, 0.0], [11.0, 0.0]]
    assert choose(sizes, losses, 10) == [0, 0, 1]
