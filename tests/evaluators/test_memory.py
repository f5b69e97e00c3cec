"""Peaks of decoding beside their prediction, exact counts, and the search for the smallest cap."""

from __future__ import annotations

import subprocess

import pytest
import torch

from effbench.evaluators import memory_cap
from effbench.evaluators.memory import bisect
from effbench.evaluators.memory_cap import succeeds_under
from effbench.nn.decode.static import StaticSession
from effbench.testing.bench import Bench
from effbench.util.errors import UserError

SIZES = ["evaluator=memory", "evaluator.memory.batch_size=2"]
SIZES += ["evaluator.memory.prompt_tokens=6", "evaluator.memory.new_tokens=4"]


def test_peaks_stand_beside_their_prediction(bench: Bench) -> None:
    record = bench.run("eval", "method=none", *SIZES)
    found = {(m.name, m.phase): m for m in record.metrics}
    for phase in ("prefill", "decode"):
        measured, planned = found["peak_bytes", phase], found["planned_peak_bytes", phase]
        assert (measured.obtained, planned.obtained) == ("measured", "modelled")
        error = planned.value / measured.value - 1
        assert found["plan_error", phase].value == pytest.approx(error)
        parts = sum(
            m.value
            for (name, at), m in found.items()
            if at == phase and name.startswith("planned_") and name != "planned_peak_bytes"
        )
        assert planned.value == pytest.approx(found["base_bytes", "start"].value + parts)
    assert found["peak_bytes", "evaluate"].value >= found["peak_bytes", "prefill"].value


def test_the_cache_holds_what_the_cost_says(bench: Bench) -> None:
    record = bench.run("eval", "method=none", *SIZES)
    found = {m.name: m for m in record.metrics}
    assert found["kv_cache_bytes"].value == found["kv_bytes_per_token"].value * 2 * 10
    assert found["weights_bytes"].value == found["weight_bytes"].value
    assert found["kv_cache_bytes"].obtained == "counted"


def test_a_session_is_used_and_no_more(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    step = StaticSession.step

    def counted(self: StaticSession, ids: torch.Tensor) -> torch.Tensor:
        steps.append(ids.shape)
        return step(self, ids)

    monkeypatch.setattr(StaticSession, "step", counted)
    bench.run("eval", "method=none", *SIZES)
    assert steps == [(2, 1)] * 4


@pytest.mark.parametrize("least", [1, 130, 999, 1000, 1001, 5000])
def test_bisection_ends_within_the_tolerance(least: int) -> None:
    tried: list[int] = []

    def succeeds(size: int) -> bool:
        tried.append(size)
        return size >= least

    found = bisect(succeeds, 1000, 10)
    assert least <= found <= max(least + 10, 10)
    assert len(tried) < 20


def test_no_cap_is_large_enough() -> None:
    with pytest.raises(UserError, match="under any cap"):
        bisect(lambda size: False, 1000, 10)


def test_a_trial_in_a_process_of_its_own(bench: Bench) -> None:
    job = bench.job("eval", "method=none", *SIZES)
    from effbench.api.schema import plain

    work = {
        "job": plain(job),
        "point": "",
        "seed": 0,
        "batch_size": 1,
        "prompt_tokens": 4,
        "new_tokens": 2,
    }
    assert succeeds_under(2**40, work, "cpu")
    assert not succeeds_under(2**20, work, "cpu")


def test_a_trial_that_fails_for_another_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 1, "", "Traceback ...\nKeyError: 'weights'\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(UserError, match="not for memory: KeyError: 'weights'"):
        succeeds_under(2**40, {}, "cpu")


def test_what_speaks_of_memory() -> None:
    assert memory_cap.says_out_of_memory("DefaultCPUAllocator: can't allocate memory: you tried")
    assert memory_cap.says_out_of_memory("terminate called after throwing 'std::bad_alloc'")
    assert memory_cap.says_out_of_memory("  File ..., in get_data\nMemoryError: \n")
    assert memory_cap.says_out_of_memory("memory allocation of 4194304 bytes failed")
    assert memory_cap._speaks_of_memory("RuntimeError: can't start new thread")
    assert memory_cap._speaks_of_memory(
        "ThreadPoolBuildError { Os { code: 11, kind: WouldBlock, "
        'message: "Resource temporarily unavailable" } }\nnote: run with `RUST_BACKTRACE=1` ...'
    )
    assert not memory_cap._speaks_of_memory("KeyError: 'weights'")
