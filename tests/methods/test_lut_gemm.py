"""LUT-GEMM: the authors' numbers, and what scaled signs and products by tables promise."""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import SHAPE, context, generator, logits, tiny_model

from effbench.methods.chain import chain_cost
from effbench.methods.compresses import compress_whole
from effbench.methods.quant.lut_gemm import LUTGEMM
from effbench.methods.quant.rtn import RTN
from effbench.nn.quant import binary, groupwise, planes
from effbench.nn.quant.linears import storage_bytes
from effbench.util.errors import UserError

AUTHORS = Path(__file__).parents[3] / "shared" / "truth" / "lut_gemm_bcq.npz"
"""What naver-aics/lut-gemm (647d49f, examples/bcq.py) makes of `W` with groups of 128."""
BITS = pytest.mark.parametrize("bits", [2, 3, 4])


def drawn(*size: int, seed: int = 1) -> torch.Tensor:
    return 0.1 * torch.randn(*size, generator=generator(seed))


def restored(stored: binary.Binary, columns: int, group: int) -> torch.Tensor:
    return binary.dequantise(stored, columns, group, torch.float32)


def error(weight: torch.Tensor, bits: int, group: int, rounds: int, offset: bool = False) -> float:
    stored = binary.quantise(weight, bits, group, offset, rounds)
    return float((restored(stored, weight.shape[1], group) - weight).norm() / weight.norm())


# -- the authors' numbers ----------------------------------------------------------------------


@pytest.mark.skipif(not AUTHORS.is_file(), reason="the authors' numbers are not there")
@BITS
def test_it_finds_what_the_authors_find(bits: int) -> None:
    """Greedy the same scales and weights; refined as small an error, by another solver."""
    read = {name: torch.from_numpy(values) for name, values in np.load(AUTHORS).items()}
    weight = read["W"]
    found = binary.quantise(weight, bits, 128, rounds=0)
    torch.testing.assert_close(
        found.scales.permute(1, 2, 0).float(), read[f"alpha_q{bits}_r0"], atol=0, rtol=6e-4
    )
    near = (restored(found, 256, 128) - read[f"ret_q{bits}_r0"]).abs()
    assert near.max() < 2e-3 * weight.abs().max()
    theirs = float((read[f"ret_q{bits}_r15"] - weight).norm() / weight.norm())
    assert error(weight, bits, 128, rounds=15) == pytest.approx(theirs, rel=0.01)


# -- the fit -----------------------------------------------------------------------------------


@BITS
def test_the_signs_are_those_of_the_nearest_sum(bits: int) -> None:
    """Of all sums, one by one; and each scale is the best one for the signs."""
    weight = drawn(3, 24)
    stored = binary.quantise(weight, bits, 24)
    for row, found, scales in zip(
        weight, restored(stored, 24, 24), stored.scales[..., 0].T.double(), strict=True
    ):
        sums = [
            sum(s * float(a) for s, a in zip(signs, scales, strict=True))
            for signs in product((-1, 1), repeat=bits)
        ]
        expected = torch.tensor([min(sums, key=lambda v: abs(v - float(w))) for w in row])
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@BITS
def test_scales_solve_the_least_squares(bits: int) -> None:
    from effbench.nn.quant.alternating import best_scales

    w = drawn(32, 5)
    signs = binary.signs_of(binary.greedy(w, bits)[0], bits)
    found = best_scales(signs, w)
    for m in range(5):
        expected = torch.linalg.lstsq(signs[:, :, m].T.double(), w[:, m].double()).solution
        torch.testing.assert_close(found[:, m], expected, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("offset", [False, True])
def test_rounds_and_bits_never_hurt(offset: bool) -> None:
    weight = drawn(16, 256) + 0.02
    for group in (32, 256):
        refined = [error(weight, bits, group, 15, offset) for bits in range(2, 7)]
        greedy = [error(weight, bits, group, 0, offset) for bits in range(2, 7)]
        some = [error(weight, bits, group, 2, offset) for bits in range(2, 7)]
        assert all(a < b < c for a, b, c in zip(refined, some, greedy, strict=True))
        assert refined == sorted(refined, reverse=True)
        assert greedy == sorted(greedy, reverse=True)


def test_errors_on_gaussian_weights_are_those_known() -> None:
    """Anchors computed apart from this code, of 2, 3 and 4 bits at groups of 128."""
    for bits, greedy, refined in ((2, 0.359, 0.338), (3, 0.240, 0.188), (4, 0.179, 0.104)):
        weight = drawn(64, 1024)
        assert error(weight, bits, 128, 0) == pytest.approx(greedy, abs=0.004)
        assert error(weight, bits, 128, 15) == pytest.approx(refined, abs=0.004)


@pytest.mark.parametrize("rounds", [0, 1, 15])
def test_scales_are_sorted_and_not_negative(rounds: int) -> None:
    """A spike in a group makes the second greedy scale larger than the first, and in heavy tails
    so are those of least squares.
    """
    weight = drawn(8, 128)
    weight[4:] = (10 * weight[4:]) ** 5
    weight[0, :64], weight[0, 5] = 0, 1
    stored = binary.quantise(weight, 4, 64, rounds=rounds)
    assert (stored.scales >= 0).all()
    assert (stored.scales.diff(dim=0) <= 0).all()
    assert restored(stored, 128, 64)[0, 5] == stored.scales[:, 0, 0].float().sum()


def test_an_offset_takes_the_mean_out() -> None:
    weight = drawn(8, 128) + 1
    assert error(weight, 3, 64, 15, offset=True) < 0.7 * error(weight, 3, 64, 15)
    offsets = binary.quantise(weight, 3, 64, offset=True).offsets
    torch.testing.assert_close(offsets, weight.view(8, 2, 64).mean(2))


@pytest.mark.parametrize("offset", [False, True])
def test_chunks_and_threads_change_no_bit(offset: bool) -> None:
    weight = drawn(400, 300) + 0.02  # a ragged last group
    whole = binary.quantise(weight, 3, 64, offset, rounds=2)
    few = binary.quantise(weight[:3], 3, 64, offset, rounds=2, chunk=64)
    assert few.planes.equal(whole.planes[:, :3])
    assert few.scales.equal(whole.scales[:, :3])
    before = torch.get_num_threads()
    try:
        for chunk, threads in ((2**14, 1), (2**20, 3)):
            torch.set_num_threads(threads)
            again = binary.quantise(weight, 3, 64, offset, 2, chunk)
            for a, b in zip(again, whole, strict=True):
                assert a is b is None or (a is not None and b is not None and a.equal(b))
    finally:
        torch.set_num_threads(before)


def test_a_group_alone_is_the_group_among_others() -> None:
    weight = drawn(4, 80)
    clean = restored(binary.quantise(weight, 3, 32), 80, 32)
    tail = restored(binary.quantise(weight[:, 64:], 3, 32), 16, 32)
    assert tail.equal(clean[:, 64:])
    weight[0, :32], weight[1, 5], weight[2, 40] = 0, float("nan"), float("inf")
    found = restored(binary.quantise(weight, 3, 32), 80, 32)
    assert not found[0, :32].any()
    assert found[0, 32:].equal(clean[0, 32:])
    assert found[1, 32:].equal(clean[1, 32:])
    assert found[2, :32].equal(clean[2, :32])
    assert found[3].equal(clean[3])


def test_a_group_of_one_size_is_exact() -> None:
    """All signs agree there: the equations are singular."""
    weight = 0.5 * torch.ones(2, 32) * torch.tensor([1.0, -1.0]).repeat(16)
    torch.testing.assert_close(restored(binary.quantise(weight, 3, 32), 32, 32), weight)


# -- round-to-nearest as signs -----------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
def test_rounded_codes_become_the_same_weights(bits: int) -> None:
    weight = drawn(8, 144) + 0.03
    weight[0, :64] = 0
    codes = groupwise.quantise(weight, bits, 64, symmetric=False)
    expected = groupwise.dequantise(codes, 144, bits, 64, torch.float32)
    assert restored(binary.from_groups(codes, 144, bits, 64), 144, 64).equal(expected)


def test_a_converted_model_is_the_rounded_model() -> None:
    models = []
    for method in (RTN(bits=3, group_size=32), LUTGEMM(bits=3, group_size=32, source="rtn")):
        model = tiny_model()
        compress_whole(method, model, [], context())
        models.append(model)
    assert logits(models[0]).equal(logits(models[1]))


# -- the product by tables ---------------------------------------------------------------------


def test_tables_hold_all_sums() -> None:
    x = torch.randn(2, 20, generator=generator(5))
    table = binary.tables(x)
    assert table.shape == (2, 3, 256)
    filled = torch.nn.functional.pad(x, (0, 4)).view(2, 3, 8)
    for p in (0, 1, 77, 128, 255):
        signs = torch.tensor([1.0 if p >> j & 1 else -1.0 for j in range(8)])
        torch.testing.assert_close(table[..., p], (filled * signs).sum(-1))
    torch.testing.assert_close(table.flip(-1), -table, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize(("columns", "group"), [(576, 64), (576, 40), (256, 256), (100, 32)])
@pytest.mark.parametrize("offset", [False, True])
def test_the_product_is_that_of_the_expanded_weight(
    bits: int, columns: int, group: int, offset: bool
) -> None:
    stored = binary.quantise(drawn(11, columns) + 0.02, bits, group, offset, rounds=2)
    for rows in (1, 3):
        x = torch.randn(rows, columns, generator=generator(6))
        work = binary.Work()
        found = binary.table_product(x, stored, group, work)
        dense = restored(stored, columns, group)
        torch.testing.assert_close(found, x @ dense.T, atol=1e-4, rtol=0)
        per_table = -(columns // -8)
        assert work.lookups == rows * 11 * per_table * bits
        assert work.built == rows * 256 * per_table
        assert work.multiplications == rows * 11 * -(columns // -group) * (bits + offset)


def test_a_table_does_not_stand_across_groups() -> None:
    stored = binary.quantise(drawn(2, 40), 2, 20)
    with pytest.raises(ValueError, match="groups of 20"):
        binary.table_product(torch.ones(1, 40), stored, 20)
    with pytest.raises(UserError, match=r"method\.group_size=20 is no multiple of 8") as refused:
        LUTGEMM(group_size=20).resolve(SHAPE)
    assert "32, 64 or 128" in refused.value.hint


def test_signs_lie_in_the_order_of_planes() -> None:
    stored = binary.quantise(drawn(5, 300), 3, 64)
    codes = planes.unpack(stored.planes, 300)
    assert planes.pack(codes, 3).equal(stored.planes)
    signs = binary.signs_of(codes, 3)
    scales = stored.scales.float().repeat_interleave(64, 2)[..., :300]
    torch.testing.assert_close((signs * scales).sum(0), restored(stored, 300, 64))


# -- cost and bad input ------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "offset"), [(24, False), (128, True)])
def test_cost_is_what_is_stored(group: int, offset: bool) -> None:
    method, model = LUTGEMM(bits=3, group_size=group, rounds=0, offset=offset), tiny_model()
    compress_whole(method, model, [], context())
    assert chain_cost([method], SHAPE, "float32").resident_bytes == storage_bytes(model)
    assert LUTGEMM(bits=3).format.bytes(4096, 4096, element=2) * 8 == 3.375 * 4096**2


@pytest.mark.parametrize("source", ["weights", "rtn"])
def test_weights_that_are_not_finite_are_refused(source: str) -> None:
    linear = torch.nn.Linear(16, 4)
    with torch.no_grad():
        linear.weight[1, 2] = float("nan")
    with pytest.raises(UserError, match=r"1 of 64 weights of a \(4, 16\) matrix are not finite"):
        LUTGEMM(source=source).compressed(linear)  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{"rounds": 1}, {"offset": True}])
def test_settings_reach_the_fit(settings: dict[str, Any]) -> None:
    linear = torch.nn.Linear(64, 32, bias=False).requires_grad_(False)
    linear.weight.copy_(drawn(32, 64))
    found: Any = LUTGEMM(bits=3, group_size=32, **settings).compressed(linear)
    expected = binary.quantise(linear.weight, 3, 32, **settings)
    for own, wanted in zip((found.planes, found.scales, found.offsets), expected, strict=True):
        assert own is wanted is None or own.equal(wanted)
    assert not found.scales.equal(binary.quantise(linear.weight, 3, 32).scales)


def test_no_round_of_refinement_loses_in_any_group() -> None:
    groups = drawn(256, 32).T.contiguous()
    codes, scales = binary.greedy(groups, 3)
    ends = [binary.refined(groups, codes, scales, rounds) for rounds in (1, 2, 3, 5, 8)]
    losses = [binary._error(groups, binary.nearest(groups, end), end) for end in ends]
    for before, after in pairwise(losses):
        assert (after <= before).all()


def test_the_sign_of_zero_is_plus() -> None:
    codes, scales = binary.greedy(torch.zeros(8, 2), 2)
    assert (codes == 3).all() and not scales.any()
