"""Nested codes: the best intervals, the best cuts, and levels that fit each other."""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import generator

from effbench.nn.quant import intervals, nested
from effbench.nn.quant.nested import Nested, SortedRows
from effbench.util import cpp

TRUTH = Path(__file__).parents[3] / "shared" / "truth"


def rows(count: int = 5, columns: int = 96, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and sensitivities, some of which are zero."""
    draws = generator(seed)
    weight = torch.randn(count, columns, generator=draws)
    weight[:, 3] = 0
    return weight, torch.randn(count, columns, generator=draws) ** 2


def codes_at(found: Nested, bits: int, widest: int = 8) -> torch.Tensor:
    return found.codes.long() >> (widest - bits)


def values_at(found: Nested, bits: int, widest: int = 8) -> torch.Tensor:
    return found.tables[bits].gather(1, codes_at(found, bits, widest))


def errors(weight: torch.Tensor, values: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    return (mass.double() * (weight.double() - values) ** 2).sum(1)


def spread(values: torch.Tensor, mass: torch.Tensor) -> float:
    """The weighted sum of squared distances from the mean of one cluster."""
    if not mass.sum():
        return 0.0
    mean = (mass * values).sum() / mass.sum()
    return float((mass * (values - mean) ** 2).sum())


@pytest.mark.parametrize("columns, clusters", [(9, 2), (9, 3), (8, 4), (11, 4)])
def test_the_seed_is_the_best_of_all_partitions(columns: int, clusters: int) -> None:
    found = SortedRows.of(*rows(6, columns))
    bounds = found.seed(clusters)
    for row in range(6):
        values, mass = found.values[row], found.mass[row]

        def total(inner: tuple[int, ...], values=values, mass=mass) -> float:  # type: ignore[no-untyped-def]
            ends = [0, *inner, columns]
            return sum(spread(values[i:j], mass[i:j]) for i, j in pairwise(ends))

        best = min(total(inner) for inner in combinations(range(1, columns), clusters - 1))
        assert total(tuple(bounds[row, 1:-1].tolist())) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("clusters", [2, 8, 16])
@pytest.mark.parametrize("columns", [1, 2, 3, 33, 300])
@pytest.mark.parametrize("kind", ["all differ", "many are equal", "some count for nothing"])
def test_the_kernel_finds_the_same_bounds(
    monkeypatch: pytest.MonkeyPatch, kind: str, columns: int, clusters: int
) -> None:
    weight = torch.randn(20, columns, generator=generator(1))
    mass = torch.randn(20, columns, generator=generator(2)) ** 2
    if kind == "many are equal":
        weight = (3 * weight).round()
    if kind == "some count for nothing":
        mass[:, : columns // 2] = 0
    found = SortedRows.of(weight, mass)
    kernel = intervals.best_intervals(intervals.Rows(*found.sums, found.barred), 2)
    assert (kernel is not None) == (cpp.compiler() is not None)
    by_kernel = found.seed(clusters)
    cut = found.split(by_kernel)
    again = found.split(cut)
    monkeypatch.setenv("EFFBENCH_NATIVE", "0")
    assert intervals.best_intervals(intervals.Rows(*found.sums, found.barred), 2) is None
    assert torch.equal(by_kernel, found.seed(clusters))
    assert torch.equal(cut, found.split(by_kernel))
    assert torch.equal(again, found.split(cut))


def test_every_cut_is_the_best_of_its_interval() -> None:
    found = SortedRows.of(*rows())
    bounds = found.seed(8)
    children = found.split(bounds)
    assert children[:, ::2].equal(bounds)
    for row, (edges, cuts) in enumerate(zip(bounds, children[:, 1::2], strict=True)):
        values, mass = found.values[row], found.mass[row]

        def total(low: int, cut: int, high: int, values=values, mass=mass) -> float:  # type: ignore[no-untyped-def]
            left, right = slice(low, cut), slice(cut, high)
            return spread(values[left], mass[left]) + spread(values[right], mass[right])

        for low, cut, high in zip(edges.tolist(), cuts.tolist(), edges[1:].tolist(), strict=False):
            best = min(total(low, j, high) for j in range(low, high + 1))
            assert total(low, cut, high) == pytest.approx(best, rel=1e-9, abs=1e-15)


def test_more_bits_never_lose() -> None:
    weight, mass = rows()
    found = nested.quantise(weight, mass, 3, 8)
    lost = [errors(weight, values_at(found, b), mass) for b in range(3, 9)]
    for fewer, more in pairwise(lost):
        assert (more <= fewer * (1 + 1e-12)).all()
    assert (lost[-1] < 0.01 * lost[0]).all()


def test_a_level_is_the_mean_of_its_weights_and_of_its_children() -> None:
    weight, mass = rows()
    found = nested.quantise(weight, mass, 3, 8)
    mass = mass.double().masked_fill(weight == 0, 0)
    for b in range(3, 9):
        codes, zeros = codes_at(found, b), torch.zeros(len(weight), 2**b, dtype=torch.float64)
        total = zeros.scatter_add(1, codes, mass)
        mean = zeros.scatter_add(1, codes, mass * weight) / total
        used = total > 0
        torch.testing.assert_close(found.tables[b][used], mean[used])
        if b < 8:
            lower = zeros.new_zeros(len(weight), 2 ** (b + 1))
            share = lower.scatter_add(1, codes_at(found, b + 1), mass)
            parts = (share * found.tables[b + 1]).unflatten(1, (-1, 2)).sum(2)
            torch.testing.assert_close((parts / total)[used], found.tables[b][used])


def test_codes_ascend_with_the_weights_and_levels_with_the_codes() -> None:
    weight, mass = rows()
    weight[:, 10:20] = weight[:, 20:30]  # equal weights
    found = nested.quantise(weight, mass, 3, 8)
    order = weight.argsort(1)
    assert (found.codes.gather(1, order).long().diff(dim=1) >= 0).all()
    assert found.codes[:, 10:20].equal(found.codes[:, 20:30])
    for table in found.tables.values():
        assert table.isfinite().all()
        assert (table.diff(dim=1) >= 0).all()


def test_few_values_are_exact() -> None:
    weight = torch.randn(4, 8, generator=generator()).half().float().repeat(1, 5)
    found = nested.quantise(weight, torch.rand(4, 40, generator=generator(1)) + 0.1, 3, 8)
    assert all(values_at(found, b).half().equal(weight.half()) for b in range(3, 9))
    constant = torch.full((2, 16), -0.75)
    found = nested.quantise(constant, None, 3, 8)
    assert all(values_at(found, b).half().equal(constant.half()) for b in range(3, 9))


@pytest.mark.parametrize("factor", [4.0, 3e-7, 1e-30])
def test_the_scale_of_a_row_s_sensitivities_is_nothing(factor: float) -> None:
    weight, mass = rows()
    one = nested.quantise(weight, mass.double(), 3, 6)
    other = nested.quantise(weight, mass.double() * factor, 3, 6)
    assert other.codes.equal(one.codes)
    assert all(other.tables[b].half().equal(one.tables[b].half()) for b in one.tables)


def test_the_order_of_the_columns_is_nothing_but_their_order() -> None:
    weight, mass = rows()
    turned = torch.randperm(weight.shape[1], generator=generator(2))
    one = nested.quantise(weight, mass, 3, 8)
    other = nested.quantise(weight[:, turned], mass[:, turned], 3, 8)
    assert other.codes.equal(one.codes[:, turned])
    assert all(other.tables[b].half().equal(one.tables[b].half()) for b in one.tables)


def test_nothing_that_counts_counts_alike() -> None:
    weight, mass = rows()
    weight[1] = 0
    mass[0] = 0
    found = nested.quantise(weight, mass, 3, 8)
    alike = nested.quantise(weight[:1], torch.ones_like(weight[:1]), 3, 8)
    assert found.tables[8].isfinite().all()
    assert not values_at(found, 3)[1].any()
    assert values_at(found, 8)[0].sub(values_at(alike, 8)[0]).abs().max() < 0.1


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, mass = rows()
    whole = nested.quantise(weight, mass, 3, 5)
    monkeypatch.setattr(nested, "TOGETHER", 1)
    single = nested.quantise(weight, mass, 3, 5)
    assert single.codes.equal(whole.codes)
    assert all(single.tables[b].equal(whole.tables[b]) for b in whole.tables)


@pytest.mark.skipif(not TRUTH.is_dir(), reason="the authors' numbers are not there")
def test_seed_and_cuts_lose_at_most_what_the_authors_do() -> None:
    """Each cut of their own intervals; over several cuts a better one may leave worse ones."""
    numbers = np.load(TRUTH / "any_precision.npz")
    weight, mass = (torch.tensor(numbers[n]).double() for n in ("W", "G"))
    labels = torch.tensor(numbers["labels8"]).long()
    theirs = {
        b: torch.tensor(numbers[f"lut{b}"]).double().gather(1, labels >> (8 - b))
        for b in range(3, 9)
    }
    seed = values_at(nested.quantise(weight, mass, 3, 3), 3, 3)
    assert (errors(weight, seed, mass) <= errors(weight, theirs[3], mass) * (1 + 1e-6)).all()
    found = SortedRows.of(weight, mass)
    for b in range(3, 8):
        clusters = (labels >> (8 - b)).gather(1, found.order)
        edges = torch.arange(2**b + 1).repeat(len(weight), 1)
        cut = found.clusters(found.split(torch.searchsorted(clusters, edges)))
        kept = errors(
            found.values, found.tables(cut, b + 1, b + 1)[b + 1].gather(1, cut), found.mass
        )
        lost = errors(found.values, theirs[b + 1].gather(1, found.order), found.mass)
        assert (kept <= lost * (1 + 1e-6)).all()


def test_what_cannot_be_cut_is_the_left_child() -> None:
    weight = torch.tensor([[2.0, 2.0, 2.0, 2.0], [1.0, 1.0, 5.0, 5.0]])
    found = nested.quantise(weight, None, 1, 4)
    assert not (found.codes & 7).any()  # what three cuts add to the seed's one bit


# -- as the authors' program does -----------------------------------------------------------------


@pytest.mark.skipif(not (TRUTH / "any_precision.npz").exists(), reason="needs the reference files")
def test_released_codes_and_tables_are_those_of_the_program() -> None:
    truth = np.load(TRUTH / "any_precision.npz")
    weight, mass = torch.from_numpy(truth["W"]), torch.from_numpy(truth["G"])
    found = nested.quantise(weight, mass, 3, 8, "released")
    assert np.array_equal(found.codes.numpy(), truth["labels8"].astype(np.uint8))
    for bits in range(3, 9):
        used = torch.zeros(4, 2**bits, dtype=torch.bool).scatter_(1, codes_at(found, bits), True)
        expected = torch.from_numpy(truth[f"lut{bits}"]).double()
        torch.testing.assert_close(found.tables[bits][used], expected[used], rtol=2e-6, atol=1e-8)


def test_the_released_search_ends_among_neighbours_and_the_best_is_never_worse() -> None:
    weight, mass = rows(4, 200)
    mass[3] = 0  # as if all counted
    best, released = (nested.quantise(weight, mass, 3, 6, seed) for seed in ("optimal", "released"))  # type: ignore[arg-type]
    counted = mass.masked_fill(weight == 0, 0)
    lost = [errors(weight, values_at(found, 3, 6), counted) for found in (best, released)]
    assert (lost[0] <= lost[1] * (1 + 1e-9) + 1e-12).all() and not lost[0].equal(lost[1])
    for row in range(4):
        order = weight[row].argsort()
        codes = released.codes[row][order].int()
        assert (codes.diff() >= 0).all(), "codes ascend with the weights"


def test_released_intervals_of_which_little_counts() -> None:
    weight = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]])
    for mass in (torch.eye(9)[4:5], torch.zeros(1, 9), torch.ones(1, 9)):
        found = nested.quantise(weight, mass, 2, 6, "released")
        assert all(table.isfinite().all() for table in found.tables.values())
    assert values_at(found, 6, 6).allclose(weight.double()), "nine values, none of them shared"
