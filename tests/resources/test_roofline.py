"""Ceilings and shares against counts by hand and torch's own FLOP counter."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest
import torch
from helpers import SHAPE, tiny_model

from effbench.api.cost import cost_of
from effbench.methods.cache.streaming import Streaming
from effbench.methods.chain import inference_cost
from effbench.nn.decode.session import CachedSession
from effbench.resources import roofline, timing
from effbench.resources.counting import flops
from effbench.resources.roofline import (
    Ceilings,
    decode_bytes,
    decode_flops,
    prefill_flops,
    probe,
    share,
)
from effbench.util.errors import UserError

COST = cost_of(SHAPE, "float32")


def test_flops_are_those_of_torchs_counter() -> None:
    model = tiny_model().eval().requires_grad_(False)
    model.set_attn_implementation("eager")  # it multiplies the masked half as well
    ids = torch.randint(SHAPE.vocab_size, (3, 10))
    session = CachedSession(model)
    counted = flops(lambda: session.prefill(ids))
    masked = 3 * (SHAPE.flops_per_token(1) - SHAPE.flops_per_token()) * (10 * 10 - 55)
    assert prefill_flops(COST, SHAPE, 3, 10) + masked == counted
    counted = sum(flops(lambda t=t: session.step(ids[:, t : t + 1])) for t in range(4))  # type: ignore[misc]
    assert decode_flops(COST, 3, 10, 4) == counted


@pytest.mark.usefixtures("without_kernels")
def test_flops_of_a_bounded_cache_are_of_what_it_keeps() -> None:
    method = Streaming(sinks=2, window=5)
    cost = inference_cost([method], SHAPE, "float32")
    model = tiny_model().eval().requires_grad_(False)
    model.set_attn_implementation("eager")
    session, ids = method.session(model), torch.randint(SHAPE.vocab_size, (3, 14))
    session.prefill(ids[:, :4])  # three steps until it is full, and seven after that
    counted = sum(flops(lambda t=t: session.step(ids[:, t : t + 1])) for t in range(4, 14))  # type: ignore[misc]
    assert decode_flops(cost, 3, 4, 10) == counted < decode_flops(COST, 3, 4, 10)


def test_bytes_are_weights_and_the_cache_so_far() -> None:
    model, ids = tiny_model().eval(), torch.randint(SHAPE.vocab_size, (3, 10))
    read = sum(p.numel() * 4 for n, p in model.named_parameters() if "embed_tokens" not in n)
    session, expected = CachedSession(model), 0
    session.prefill(ids)
    for t in range(4):
        session.step(ids[:, t : t + 1])
        expected += read + session.kv_bytes()
    assert decode_bytes(COST, 3, 10, 4) == expected


def test_ceilings_are_work_over_the_least_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock of the test's own: the second of the timed repeats is always the fastest."""
    turns = count()
    times = [9.0, 0.5, 2.0]

    def seconds(self: Any, work: Any) -> float:
        work()
        return times[next(turns) % 3]

    monkeypatch.setattr(timing.Clock, "seconds", seconds)
    monkeypatch.setattr(roofline, "SIDES", (64, 128, 4096))
    found = probe("cpu", torch.float32, working_set=2**21, side=32, repeats=3)
    assert found == Ceilings(2 * 32**3 / 0.5, 2**21 / 0.5, 2**21 / 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_probe_is_plausible_and_keeps_to_its_memory(dtype: torch.dtype) -> None:
    done: list[tuple[int, int]] = []
    found = probe(
        *("cpu", dtype),
        working_set=1e12,
        most=2**22,
        side=128,
        repeats=2,  # type: ignore[arg-type]
        progress=lambda what, n, of: done.append((n, of)),
    )
    assert 1e7 < found.gemm < 1e16 and 1e7 < found.gemv < 1e13 and 1e7 < found.copy < 1e13
    assert found.bandwidth == max(found.gemv, found.copy)
    assert [n for n, _ in done] == list(range(1, done[0][1] + 1))


def test_the_best_of_two_probes() -> None:
    assert Ceilings(1, 5, 3).best(Ceilings(2, 4, 3)) == Ceilings(2, 5, 3)


def test_a_share_is_at_most_all() -> None:
    assert share("mbu", 50.0, 2.0, 100.0, "probed") == 0.25
    assert share("mbu", 200.0, 2.0, 100.0, "probed") == 1.0
    for source, advice in (("probed", "idle machine"), ("stated", "hardware.tflops")):
        with pytest.raises(UserError, match="mbu of 101") as error:
            share("mbu", 202.0, 2.0, 100.0, source)
        assert advice in error.value.hint
