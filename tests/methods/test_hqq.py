"""HQQ: numbers of the authors' library, the equations by hand, groups, bad input."""

from __future__ import annotations

import pytest
import torch

from effbench.nn.quant import shifted
from effbench.nn.quant.shifted_linear import ShiftedLinear
from effbench.util.errors import UserError

LIBRARY = {2: (4.791313e-02, 3.373785e-02), 3: (2.052774e-02, 1.815857e-02)}
LIBRARY |= {4: (9.664851e-03, 9.124414e-03), 8: (5.694401e-04, 5.503170e-04)}
"""Mean |r| by bits of `heavy_tailed`, rounded and optimised, that hqq 0.2.8.post1 found (axis 1,
groups of 64). It stores float32 numbers; ours are float16, which is 2 % of the error at 8 bits."""


def heavy_tailed() -> torch.Tensor:
    draws = torch.Generator().manual_seed(7)
    x = torch.randn(96, 256, generator=draws, dtype=torch.float64) * 0.02
    return (x * (1 + x.abs() * 50) ** 1.5).float()


def mean_error(weight: torch.Tensor, bits: int, **settings: float) -> float:
    search = shifted.Search(**settings)  # type: ignore[arg-type]
    found = shifted.quantise(weight, bits, 64, search)
    back = shifted.dequantise(found, weight.shape[1], bits, 64, torch.float32)
    return float((weight - back).abs().mean())


@pytest.mark.parametrize("bits", LIBRARY)
def test_errors_are_those_of_the_library(bits: int) -> None:
    plain, best = LIBRARY[bits]
    tolerance = 0.03 if bits == 8 else 0.005
    assert mean_error(heavy_tailed(), bits, rounds=1) == pytest.approx(plain, rel=tolerance)
    assert mean_error(heavy_tailed(), bits, kappa=1.0) == pytest.approx(best, rel=tolerance)


def test_one_round_moves_a_shift_as_the_equations_say() -> None:
    weight = [0.11, -0.32, 0.05, 0.9]
    low, p, beta = float(torch.tensor(-0.32).half()), 0.7, 10.0
    scale = float(torch.tensor((0.9 + 0.32) / 3).half())
    total = 0.0
    for w in weight:
        stepped = scale * min(max(round((w - low) / scale), 0), 3)
        r = w - stepped - low
        e = (1 if r > 0 else -1) * max(abs(r) - abs(r) ** (p - 1) / beta, 0.0)
        total += w - e - stepped
    group = torch.tensor([weight])
    start = group.amin(-1).half()
    found = shifted.moved(group, torch.tensor([[scale]]), start, 3, shifted.Search(rounds=2))
    moved = torch.tensor([total / 4]).half()
    assert float(found) in (float(start), float(moved)) and not moved.equal(start)

    def error(shift: torch.Tensor) -> float:
        codes = shifted.nearest(group, torch.tensor([[scale]]), shift.float()[..., None], 3)
        return float((group - scale * codes - shift.float()).abs().mean())

    assert error(found) == min(error(start), error(moved))


def test_groups_do_not_see_each_other_and_the_last_may_be_shorter() -> None:
    weight = heavy_tailed()[:, :150]
    whole = ShiftedLinear.quantise(linear(weight), 3, 64).dense_weight(torch.float32)
    first = ShiftedLinear.quantise(linear(weight[:, :64]), 3, 64).dense_weight(torch.float32)
    rest = ShiftedLinear.quantise(linear(weight[:, 128:]), 3, 64).dense_weight(torch.float32)
    assert whole[:, :64].equal(first) and whole[:, 128:].equal(rest)


def test_constant_groups_are_exact_to_float16_wherever_they_lie() -> None:
    weight = torch.tensor([0.0, 1e-6, 0.5, -3.0, 100.0])[:, None].repeat(1, 64)
    layer = ShiftedLinear.quantise(linear(weight), 2, 64)
    assert layer.dense_weight(torch.float32).equal(weight.half().float())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    weight = heavy_tailed()
    weight[3, 5] = bad
    with pytest.raises(UserError, match=r"1 of 24576 weights .* not finite"):
        ShiftedLinear.quantise(linear(weight), 4, 64)


def linear(weight: torch.Tensor) -> torch.nn.Linear:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    return layer
