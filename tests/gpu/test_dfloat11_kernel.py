"""DFloat11's decoding by Triton; without a GPU, in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import context, generator, tiny_model

from effbench.methods.compresses import compress_whole
from effbench.methods.quant.dfloat11 import DFloat11
from effbench.nn.quant import dfloat11, huffman
from effbench.nn.quant.dfloat11_ahead import decoded_ahead
from effbench.util.errors import UserError

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def kernels(triton_runs: None) -> Any:
    from effbench.nn.quant import triton_dfloat11

    return triton_dfloat11


def weights_of(words: torch.Tensor) -> torch.Tensor:
    """Return the bfloat16 numbers with some bits, in any order."""
    words = words[torch.randperm(len(words), generator=generator(1))]
    return words.to(torch.int16).view(BF16)


def normal(count: int) -> torch.Tensor:
    torch.manual_seed(0)
    return (torch.randn(count) * 0.02).bfloat16()


EVERY = torch.arange(2**16, dtype=torch.int32)
CASES: dict[str, tuple[torch.Tensor, list[int]]] = {
    "truth": (normal(20_000), []),
    "all that have a code": (weights_of(EVERY[(EVERY >> 7 & 0xFF) < huffman.POINTER]), []),
    "codes of 1 to 32 bits": (weights_of(torch.arange(1321) % 33 << 7), [*range(1, 33), 32]),
    "constant": (torch.full((5001,), 0.5, dtype=BF16), []),
    "one": (torch.tensor([-3.0], dtype=BF16), []),
    "none": (torch.empty(0, dtype=BF16), []),
}


def encoded(case: str, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, dfloat11.Encoded]:
    weights, lengths = CASES[case]
    if lengths:
        padded = [*lengths, *[0] * (256 - len(lengths))]
        monkeypatch.setattr(huffman, "code_lengths", lambda counts: padded)
    return weights, dfloat11.encode({"w": weights})


def decoded(kernels: Any, unit: dfloat11.Encoded, device: str) -> tuple[bool, torch.Tensor]:
    """Return whether the kernel reported something, and what it wrote: nothing around that."""
    around = torch.full((len(unit.rest) + 512,), 77, dtype=torch.int16, device=device)
    there = dfloat11.Encoded(*(tensor.to(device) for tensor in unit))
    assert there.stream.fits and kernels.decodes(there.stream, there.rest)
    out = around[256:-256].view(BF16)
    damaged = kernels.decode(there.stream, there.rest, out)
    assert (around[:256] == 77).all() and (around[-256:] == 77).all()
    return bool(damaged.any()), out.view(torch.int16).cpu()


@pytest.mark.parametrize("case", CASES)
def test_decoded_weights_are_the_weights(
    kernels: Any, case: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, unit = encoded(case, monkeypatch)
    damaged, found = decoded(kernels, unit, device)
    assert not damaged
    assert found.equal(weights.view(torch.int16))
    if case == "truth":
        assert unit.positions.tolist() == [0, 12_583, 20_000]
    if case == "codes of 1 to 32 bits":
        assert sorted(unit.tables[-1].unique().tolist()) == list(range(33))


@pytest.mark.parametrize("field", ["codes", "gaps", "positions", "tables"])
def test_what_is_damaged_is_reported_or_stays_within_its_memory(
    kernels: Any, field: str, device: str
) -> None:
    """As the torch decoder sees it: the same is reported, and else the same bits are written."""
    weights = normal(14_000)
    whole, told = dfloat11.encode({"w": weights}), 0
    for seed in range(3):
        tensor = getattr(whole, field).clone()
        flat, draws = tensor.view(torch.uint8).flatten(), generator(seed)
        places = torch.randint(len(flat), (3,), generator=draws)
        flat[places] = torch.randint(256, (3,), generator=draws).to(torch.uint8)
        unit = whole._replace(**{field: tensor})
        damaged, found = decoded(kernels, unit, device)
        right = torch.empty(len(weights), dtype=BF16)
        try:
            dfloat11._decode_in_torch(unit, right)
        except (UserError, RuntimeError):
            assert damaged
        else:
            assert damaged or found.equal(right.view(torch.int16))
        told += damaged
    assert told or field == "tables"


MOVED = [(200, 200, 200, 200), (-200, -200, -200, -200), (0, 0, 0, -1), (0, 1000, 1000, 0)]


@pytest.mark.parametrize("moved", MOVED)
def test_positions_that_are_not_those_of_the_weights_are_reported(
    kernels: Any, moved: tuple[int, ...], device: str
) -> None:
    unit = dfloat11.encode({"w": normal(26_000)})
    positions = unit.positions + torch.tensor(moved, dtype=torch.int32)
    assert decoded(kernels, unit._replace(positions=positions), device)[0]


@torch.no_grad()
def test_a_model_decodes_by_the_kernel_in_line_and_ahead(
    kernels: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, decode = [], kernels.decode
    monkeypatch.setattr(dfloat11, "triton_runs", lambda device: True)
    monkeypatch.setattr(kernels, "decode", lambda *args: asked.append(1) or decode(*args))
    dense = tiny_model(dtype=BF16).eval().requires_grad_(False).to(device)
    model = tiny_model(dtype=BF16).eval().requires_grad_(False)
    compress_whole(DFloat11(), model, [], context())
    model, ids = model.to(device), torch.arange(20, device=device).view(1, 20)
    right = dense(ids).logits
    assert model(ids).logits.equal(right)
    with decoded_ahead(model):
        for _ in range(2):
            assert model(ids).logits.equal(right)
    assert len(asked) > 2
    unit = model.model.layers[1].mlp.down_proj.unit
    unit.get_buffer("positions")[-1] -= 1
    dfloat11.decode(unit.encoded, torch.empty(len(unit.rest), dtype=BF16, device=device), True)
    with pytest.raises(UserError, match="damaged"):
        unit.load_state_dict(unit.state_dict())
        unit.weight(0, BF16)
