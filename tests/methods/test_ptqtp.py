"""PTQTP: what trit planes promise, held against the equations weight by weight."""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import pytest
import torch
from helpers import SHAPE, context, generator, tiny_model

from effbench.methods.chain import chain_cost
from effbench.methods.compresses import compress_whole
from effbench.methods.quant.ptqtp import PTQTP
from effbench.nn.quant import alternating, planes, trits
from effbench.nn.quant.linears import storage_bytes
from effbench.nn.quant.plane_linears import TritLinear
from effbench.nn.quant.trits import Search
from effbench.util.errors import UserError

COUNTS = pytest.mark.parametrize("count", [1, 2, 3])


def drawn(*size: int, seed: int = 1) -> torch.Tensor:
    return 0.1 * torch.randn(*size, generator=generator(seed))


def restored(weight: torch.Tensor, count: int, group: int, **search: Any) -> torch.Tensor:
    found = trits.quantise(weight, count, group, Search(**search))
    return trits.dequantise(found, weight.shape[1], group, torch.float32)


def error(weight: torch.Tensor, count: int, group: int, **search: Any) -> float:
    return float((restored(weight, count, group, **search) - weight).norm() / weight.norm())


# -- the equations -----------------------------------------------------------------------------


def ridge(rows: torch.Tensor, w: torch.Tensor, condition: float) -> torch.Tensor:
    """The scales of one group in float64, λ raised tenfold until the condition is met."""
    strength = 1e-8
    while True:
        a = rows @ rows.T + strength * torch.eye(len(rows), dtype=torch.float64)
        bad = float(a.norm() * torch.linalg.inv(a).norm()) > condition
        if not bad or strength >= 1:
            return torch.linalg.solve(a, rows @ w)
        strength = min(10 * strength, 1.0)


def chosen(w: torch.Tensor, scales: torch.Tensor, orders: list[tuple[int, ...]]) -> torch.Tensor:
    """The trits of one group, by strictly smaller errors in the pinned order."""
    rows = torch.zeros(len(scales), len(w), dtype=torch.float64)
    for j, value in enumerate(w):
        least = float("inf")
        for combination in orders:
            level = sum(c * a for c, a in zip(combination, scales, strict=True))
            if abs(value - level) < least:
                least = float(abs(value - level))
                rows[:, j] = torch.tensor(combination, dtype=torch.float64)
    return rows


PINNED: dict[int, list[tuple[int, ...]]] = {
    1: [(0,), (1,), (-1,)],
    2: [(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)],
}
PINNED[3] = sorted(product((0, 1, -1), repeat=3), key=lambda c: sum(map(abs, c)))


@COUNTS
def test_it_is_the_equations_of_the_paper(count: int) -> None:
    """Group by group and weight by weight; the order of ties is what parts the equal planes."""
    weight, limit = drawn(4, 20), 3
    for row in weight:
        w = row.double()
        scales = (w.abs().mean() / count).repeat(count)
        first = ridge(w.sign().expand(count, -1), w, 1e6)
        torch.testing.assert_close(first, scales, rtol=1e-4, atol=0)
        for _ in range(limit - 1):
            rows = chosen(w, scales.float().double(), PINNED[count])
            scales = ridge(rows, w, 1e6)
        scales = scales.abs().half().double()
        expected = scales @ chosen(w, scales, PINNED[count])
        found = restored(row[None], count, 20, max_iters=limit, tolerance=1e-30)[0]
        torch.testing.assert_close(found, expected.float(), atol=1e-7, rtol=0)
    done = restored(weight, count, 20, tolerance=1e9)
    assert done.equal(restored(weight, count, 20, max_iters=2)), "what ends a search is its end"


@COUNTS
def test_the_first_of_equal_combinations_is_taken(count: int) -> None:
    """Fewer trits that are not zero, then later planes."""
    scales = torch.ones(count, 1)
    found = trits.nearest(torch.tensor([[0.0], [1.0], [-1.0]]), scales)[..., 0]
    assert found[:, 0].tolist() == [0.0] * count
    assert found[:, 1].tolist() == [0.0] * (count - 1) + [1.0]
    assert found[:, 2].equal(-found[:, 1])


# -- invariants --------------------------------------------------------------------------------


@COUNTS
def test_the_error_never_rises_over_iterations(count: int) -> None:
    errors = [error(drawn(16, 128), count, 64, max_iters=n) for n in range(1, 12)]
    assert all(later <= now + 1e-6 for now, later in pairwise(errors))
    assert errors[-1] < errors[0]


@pytest.mark.parametrize("heavy", [False, True])
def test_more_planes_are_better_and_one_is_better_than_the_mean(heavy: bool) -> None:
    """The last is the ternary rounding of BitNet, mean|w| of each group its scale."""
    weight = drawn(16, 256) * (drawn(16, 256, seed=2).abs() * 10 if heavy else 1)
    groups = weight.view(16, 2, 128)
    mean = groups.abs().mean(2, keepdim=True)
    naive = float(((groups / mean).round().clamp(-1, 1) * mean - groups).norm() / weight.norm())
    one, two, three = (error(weight, count, 128) for count in (1, 2, 3))
    assert three < two < one < naive


def test_errors_on_gaussian_weights_are_those_known() -> None:
    """Anchors computed apart from this code: 0.433 and 0.167 at groups of 128."""
    weight = drawn(64, 1024)
    assert error(weight, 1, 128) == pytest.approx(0.433, abs=0.004)
    assert error(weight, 2, 128) == pytest.approx(0.167, abs=0.004)


def test_one_trit_is_found_again_and_a_sum_of_two_is_a_fixed_point() -> None:
    """From the start of the paper two planes may end in another optimum, even for 0.5 and 0.125."""
    draws = torch.randint(-1, 2, (2, 128, 8), generator=generator(3)).float()
    assert error(0.5 * draws[0].T, 1, 128) < 1e-3
    scales = torch.tensor([[0.5], [0.125]]).repeat(1, 8)
    w = (scales[:, None] * draws).sum(0)
    assert trits.nearest(w, scales).equal(draws)
    found = alternating.best_scales(draws, w)
    torch.testing.assert_close(found, scales.double(), atol=1e-7, rtol=0)


@COUNTS
def test_given_the_scales_no_other_trit_is_better(count: int) -> None:
    weight = drawn(4, 64)
    stored = trits.quantise(weight, count, 32)
    rows = trits.trits_of(stored.planes, 64).double()
    scales = torch.stack(list(alternating.per_weight(stored.scales, 32, 64))).double()
    least = (weight - (scales * rows).sum(0)).abs()
    for k, trit in product(range(count), (-1, 0, 1)):
        other = rows.clone()
        other[k] = trit
        assert ((weight - (scales * other).sum(0)).abs() >= least - 1e-8).all()
    assert (stored.scales >= 0).all()


@COUNTS
@pytest.mark.parametrize("columns", [40, 576])
def test_trits_are_stored_as_they_are(count: int, columns: int) -> None:
    """Two's complement of 2 bits, negative before not zero; products of planes are of the sum."""
    weight = drawn(6, columns)
    stored = trits.quantise(weight, count, 32)
    rows = trits.trits_of(stored.planes, columns)
    assert set(rows.unique().tolist()) == {-1, 0, 1}
    for k, plane in enumerate(rows):
        pair = stored.planes[2 * k : 2 * k + 2]
        assert planes.unpack(pair[:1], columns).bool().equal(plane < 0)
        assert planes.unpack(pair[1:], columns).bool().equal(plane != 0)
    x = torch.randn(3, columns, generator=generator(4))
    parts = zip(rows, alternating.per_weight(stored.scales, 32, columns), strict=True)
    product_of_planes = sum(x @ (plane * scales).T for plane, scales in parts)
    dense = trits.dequantise(stored, columns, 32, torch.float32)
    torch.testing.assert_close(product_of_planes, x @ dense.T)


@COUNTS
def test_chunks_and_threads_change_no_bit(count: int) -> None:
    weight, search = drawn(400, 300), Search(max_iters=3)  # a ragged last group
    whole = trits.quantise(weight, count, 64, search)
    few = trits.quantise(weight[:3], count, 64, search, chunk=64)
    assert few.planes.equal(whole.planes[:, :3])
    assert few.scales.equal(whole.scales[:, :3])
    before = torch.get_num_threads()
    try:
        for chunk, threads in ((2**14, 1), (2**20, 3)):
            torch.set_num_threads(threads)
            again = trits.quantise(weight, count, 64, search, chunk)
            assert again.planes.equal(whole.planes)
            assert again.scales.equal(whole.scales)
    finally:
        torch.set_num_threads(before)


@COUNTS
def test_a_group_alone_is_the_group_among_others(count: int) -> None:
    """Zeros and what is no number stay in their group, and rows end with a shorter one."""
    weight = drawn(4, 80)
    clean = restored(weight, count, 32)
    assert restored(weight[:, 64:], count, 32).equal(clean[:, 64:])
    weight[0, :32], weight[1, 5], weight[2, 40] = 0, float("nan"), float("inf")
    found = restored(weight, count, 32)
    assert not found[0, :32].any()
    assert found[0, 32:].equal(clean[0, 32:])
    assert found[1, 32:].equal(clean[1, 32:])
    assert found[2, :32].equal(clean[2, :32])
    assert found[3].equal(clean[3])
    assert not restored(torch.zeros(2, 32), count, 32).any()


# -- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    linear = torch.nn.Linear(16, 4)
    with torch.no_grad():
        linear.weight[1, 2] = value
    with pytest.raises(UserError, match=r"1 of 64 weights of a \(4, 16\) matrix are not finite"):
        PTQTP().compressed(linear)


def test_huge_weights_saturate() -> None:
    assert restored(torch.full((1, 16), 1e6), 1, 16).eq(65504).all()


# -- cost and artefact -------------------------------------------------------------------------


@COUNTS
@pytest.mark.parametrize("group", [24, 128])
def test_cost_is_what_is_stored(count: int, group: int) -> None:
    method, model = PTQTP(planes=count, group_size=group, max_iters=1), tiny_model()
    compress_whole(method, model, [], context())
    assert chain_cost([method], SHAPE, "float32").resident_bytes == storage_bytes(model)


def test_settings_reach_the_search() -> None:
    linear = torch.nn.Linear(64, 32, bias=False).requires_grad_(False)
    linear.weight.copy_(drawn(32, 64))
    for settings in ({"max_iters": 2}, {"tolerance": 0.05}, {"condition": 3.0}):
        planes: Any = PTQTP(group_size=32, **settings).compressed(linear)
        expected = trits.quantise(linear.weight, 2, 32, Search(**settings))
        assert planes.planes.equal(expected.planes) and planes.scales.equal(expected.scales)
        assert not planes.scales.equal(trits.quantise(linear.weight, 2, 32).scales), settings


def test_two_planes_of_groups_of_128_take_four_bits_and_a_quarter() -> None:
    assert PTQTP().format.bytes(4096, 11008, element=2) * 8 == 4.25 * 4096 * 11008


def test_a_layer_is_printed_with_its_sizes() -> None:
    layer = TritLinear.quantise(torch.nn.Linear(16, 4), 2, 8)
    assert "planes=2, group_size=8" in repr(layer)


@COUNTS
def test_trits_are_the_nearest_at_the_scales_that_are_stored(count: int) -> None:
    weight = drawn(256, 128)
    found = trits.quantise(weight, count, 64)
    groups = weight.reshape(-1, 64).T.contiguous()
    scales = found.scales.float().reshape(count, -1)
    expected = trits.nearest(groups, scales).transpose(1, 2).reshape(count, 256, 128)
    assert trits.trits_of(found.planes, 128).equal(expected.to(torch.int8))


def test_the_ridge_is_the_least_power_of_ten_that_is_enough() -> None:
    """Planes that are the same have a singular matrix of normal equations."""
    w = drawn(64, 3)
    plane = w.sign()
    found = alternating.best_scales(torch.stack([plane, plane]), w, 1e6)
    for column in range(3):
        rows = plane[:, column].double().repeat(2, 1)
        expected = ridge(rows, w[:, column].double(), 1e6)
        torch.testing.assert_close(found[:, column], expected, atol=0, rtol=1e-9)
