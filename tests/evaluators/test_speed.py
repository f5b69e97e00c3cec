"""Speed: what is counted, what is refused, and times that a clock of the test's own gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count, product
from pathlib import Path
from typing import Any

import pytest
import torch

from effbench.api.cost import cost_of
from effbench.api.method_types import Context
from effbench.api.points import UNNAMED, Point
from effbench.api.schema import canonical
from effbench.api.shape import ModelShape
from effbench.api.spec import Machine
from effbench.data.dataset import Data
from effbench.evaluators import beside_dense, paying, speed
from effbench.evaluators.base import Result
from effbench.evaluators.speed import Cell, Speed, compared, timer
from effbench.evaluators.subject import Subject
from effbench.methods.cache.kv_quant import KVQuant
from effbench.methods.chain import chain_cost
from effbench.methods.depth.lora_drop import LoRADrop
from effbench.methods.depth.points import Window
from effbench.methods.none import Unchanged
from effbench.nn.decode.session import CachedSession
from effbench.nn.decode.static import StaticSession
from effbench.resources import others, timing
from effbench.resources.others import SHARED
from effbench.resources.roofline import Ceilings, decode_bytes, decode_flops, prefill_flops
from effbench.results.journal import Journal
from effbench.results.records import Metric
from effbench.runner.open import open_model
from effbench.runner.run import open_run
from effbench.testing.bench import Bench
from effbench.util.errors import UserError

WORDS = ["hardware.device=cpu", "hardware.dtype=float32", "hardware.threads=1"]
SMALL: dict[str, Any] = {"prompt_tokens": 10, "new_tokens": 7, "repeats": 6, "roofline": False}
HIGH = Ceilings(1e15, 1e15, 1e14)


@pytest.fixture
def subject(bench: Bench) -> Subject:
    job = bench.job("eval", *WORDS)
    folder = bench.folder(job)
    folder.create(job.spec)
    work = open_run(job, folder, bench.store)
    opened = open_model(work)
    model = opened.model.requires_grad_(False)
    data = Data(job.spec.dataset, work.tokenizer)
    device, method = torch.device("cpu"), Unchanged()
    cost, shape = cost_of(opened.base, "float32"), ModelShape.of(opened.base)
    return Subject(model, method, UNNAMED, data, device, 0, 0, shape=shape, cost=cost)


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by one second each time it is read."""
    seconds = count()
    monkeypatch.setattr(timing.Clock, "now", lambda self: float(next(seconds)))


def metrics(result: Result) -> dict[tuple[str, str, str], Metric]:
    found = {(m.name, m.phase, m.task): m for m in result.metrics}
    assert len(found) == len(result.metrics)
    return found


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("engine", ["auto", "static", "eager", "generate"])
def test_the_cache_is_counted(subject: Subject, engine: Any, batch: int) -> None:
    found = metrics(Speed(batch_sizes=batch, engine=engine, **SMALL).run(subject))
    per_token = 2 * 4 * 2 * 16 * 4  # keys and values, layers, heads, width, float32
    kv = found["kv_bytes", "decode", ""]
    assert kv.value == batch * (10 + 7) * per_token and kv.obtained == "counted"
    for name, phase in (
        ("prefill_tokens_per_second", "prefill"),
        ("ttft_ms", "prefill"),
        ("decode_tokens_per_second", "decode"),
        ("tpot_ms", "decode"),
    ):
        m = found[name, phase, ""]
        assert m.obtained == "measured" and m.n == 6
        assert m.low is not None and m.high is not None and 0 < m.low <= m.value <= m.high


def test_every_engine_decodes_the_same_tokens(subject: Subject) -> None:
    sessions = {e: speed.session_maker(subject, e)() for e in ("auto", "static", "eager")}  # type: ignore[arg-type]
    assert isinstance(sessions["auto"], StaticSession)
    assert isinstance(sessions["eager"], CachedSession)
    ids = torch.randint(500, (2, 9), generator=torch.Generator().manual_seed(1))
    logits = [s.prefill(ids) for s in sessions.values()]
    torch.testing.assert_close(logits[0], logits[2])
    logits = [s.step(ids[:, :1]) for s in sessions.values()]
    torch.testing.assert_close(logits[0], logits[2], atol=1e-5, rtol=1e-5)
    assert logits[0].equal(logits[1])


@pytest.mark.parametrize("engine", ["auto", "generate"])
def test_times_are_those_of_the_clock(subject: Subject, engine: Any, ticks: None) -> None:
    """One second from the prompt to the first token, one second from token to token."""
    found = metrics(Speed(batch_sizes=2, engine=engine, **SMALL).run(subject))
    expected = {
        ("ttft_ms", "prefill"): 1000,
        ("prefill_tokens_per_second", "prefill"): 2 * 10,
        ("decode_tokens_per_second", "decode"): 2,
        ("tpot_ms", "decode"): 1000,
        ("tpot_p95_ms", "decode"): 1000,
        ("tpot_p99_ms", "decode"): 1000,
    }
    assert {k: found[*k, ""].value for k in expected} == pytest.approx(expected)


def test_percentiles_are_those_of_numpy() -> None:
    import numpy as np

    values = sorted(np.random.default_rng(0).exponential(size=37).tolist())
    for level in (0.0, 0.5, 0.95, 0.99, 1.0):
        assert speed._percentile(values, level) == pytest.approx(np.quantile(values, level))
    assert speed._percentile([3.0], 0.99) == 3.0


def test_shares_are_work_over_time_and_ceiling(
    subject: Subject, ticks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Speed, "_probe", lambda self, subject: HIGH)
    subject.machine = Machine("stated", 0, tflops=2.0, bandwidth_gbs=3.0)
    found = metrics(Speed(batch_sizes=2, **{**SMALL, "roofline": True}).run(subject))
    assert subject.cost and subject.shape
    cost, shape = subject.cost, subject.shape
    prefill, decode = (
        prefill_flops(cost, shape, 2, 10),
        decode_flops(cost, 2, 10, 7),
    )
    moved = decode_bytes(cost, 2, 10, 7)
    for key, value in {
        ("mfu", "prefill"): prefill / 1e15,
        ("mfu", "decode"): decode / 7 / 1e15,
        ("mbu", "decode"): moved / 7 / 1e15,
        ("mfu_stated", "prefill"): prefill / 2e12,
        ("mbu_stated", "decode"): moved / 7 / 3e9,
        ("ceiling_copy", "roofline"): 1e14,
    }.items():
        assert found[*key, ""].value == pytest.approx(value), key


def test_a_share_above_one_is_an_error(
    subject: Subject, ticks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes = []

    def probe(self: Speed, subject: Subject) -> Ceilings:
        probes.append(1)
        return Ceilings(1e15, 1e3, 1e3)

    monkeypatch.setattr(Speed, "_probe", probe)
    with pytest.raises(UserError, match=r"mbu@decode of .* of the probed ceiling cannot be"):
        Speed(**{**SMALL, "roofline": True}).run(subject)
    assert len(probes) == 1 + speed.PROBES, "the machine is looked at again first"
    monkeypatch.setattr(Speed, "_probe", lambda self, subject: HIGH)
    subject.machine = Machine("wrong", 0, tflops=0, bandwidth_gbs=1e-6)
    with pytest.raises(UserError, match="stated ceiling") as error:
        Speed(**{**SMALL, "roofline": True}).run(subject)
    assert "hardware.bandwidth_gbs" in error.value.hint


def test_the_grid_names_its_cells_and_goes_on_where_it_was(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    settings = {**SMALL, "prompt_tokens": [4, 9], "batch_sizes": [1, 2], "baseline": "self"}
    grid = Speed(**settings)
    whole = metrics(grid.run(subject))
    tasks = {"b1 p4 n7", "b1 p9 n7", "b2 p4 n7", "b2 p9 n7"}
    assert {task for *_, task in whole} == tasks
    grid_items: list[str] = []

    def journal(name: str, items: Sequence[str]) -> Journal:
        grid_items[:] = items
        return Journal(tmp_path / "cells", items)

    subject.journal = journal
    timed: list[Cell] = []
    real = Speed._cell

    def watched(self: Speed, subject: Subject, cell: Cell, *rest: Any) -> Any:
        if len(timed) == 2:
            timed.append(cell)
            raise KeyboardInterrupt
        timed.append(cell)
        return real(self, subject, cell, *rest)

    monkeypatch.setattr(Speed, "_cell", watched)
    with pytest.raises(KeyboardInterrupt):
        grid.run(subject)
    kept = Journal(tmp_path / "cells", grid_items)._done
    found = metrics(grid.run(subject))
    assert set(found) == set(whole)
    assert timed == [*grid.cells()[:3], *grid.cells()[2:]]
    for index, cell in enumerate(grid.cells()[:2]):
        speedup = found["speedup", "", str(cell)]
        assert [speedup.value, speedup.low, speedup.high] == kept[index]["gains"]["speedup@"]


def test_cells_that_an_earlier_version_kept_lose_no_gain(subject: Subject, tmp_path: Any) -> None:
    alone = Speed(**SMALL, baseline="self")
    settings = [alone.engine, alone.baseline, alone.repeats, alone.roofline]
    earlier = Journal(tmp_path / "cells", [canonical([str(c), *settings]) for c in alone.cells()])
    earlier.add({0: {"values": {"ttft": [1.0]}, "kv_bytes": 1, "counts": {}, "speedup": [1, 1, 1]}})
    subject.journal = lambda name, items: Journal(tmp_path / "cells", items)
    assert ("speedup", "", "") in metrics(alone.run(subject))


def test_an_engine_is_as_fast_as_itself(subject: Subject, ticks: None) -> None:
    ratio, steps = compared(subject, "auto", "auto", Cell(1, 4, 3), 6)
    assert ratio.speedup == steps.speedup == (1.0, 1.0, 1.0)
    found = metrics(Speed(**SMALL, baseline="self").run(subject))
    assert found["speedup", "", ""].value == 1.0


# -- beside the dense cache ----------------------------------------------------------------------


def test_a_run_says_where_its_cache_pays(bench: Bench) -> None:
    """The whole way: both sides in turn, gains of what was measured, a sentence in the record."""
    grid = ["prompt_tokens=[8,24]", "new_tokens=2", "repeats=6", "roofline=false"]
    words = [f"evaluator.speed.{word}" for word in ("baseline=dense", *grid)]
    own = ["method=kv_quant", "method.window=8", "method.group_size=8", "evaluator=speed"]
    record = bench.run("eval", *own, *words, *WORDS)
    found = {(m.name, m.phase, m.task): m for m in record.metrics}
    weights = found["weight_bytes", "", ""].value
    for task, name in product(("b1 p8 n2", "b1 p24 n2"), ("held_bytes", "dense_held_bytes")):
        assert found[name, "decode", task].value >= weights
    gains = {
        key: {(1, tokens): _gain(found, key, f"b1 p{tokens} n2") for tokens in (8, 24)}
        for key in paying.QUANTITIES
    }
    told = {what: gains[key] for key, what in paying.QUANTITIES.items()}
    assert [n for n in record.notes if n != SHARED] == [paying.sentence("kv_quant", told)]


def test_a_shared_machine_is_said_once(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that is busy, what is the process's own is left out."""
    for busy, said in ((0.0, []), (9.0, [SHARED])):
        monkeypatch.setattr(others, "_busy", map((1 + busy).__mul__, count()).__next__)
        monkeypatch.setattr(others, "_own", count(0.0).__next__)
        assert Speed(**SMALL).run(subject).notes == said
    monkeypatch.undo()
    monkeypatch.setattr(others, "STAT", Path("/nowhere"))
    assert Speed(**SMALL).run(subject).notes == [], "a system that does not say"


def _gain(found: dict[tuple[str, str, str], Metric], key: str, task: str) -> tuple[float, ...]:
    """Return a gain with the ends of its interval as a run has recorded it."""
    metric = found[*key.split("@"), task]  # type: ignore[index]
    assert metric.low is not None and metric.high is not None and metric.n == 6
    return metric.value, metric.low, metric.high


def test_gains_are_of_bytes_and_seconds_in_turn(
    subject: Subject, ticks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside itself: times are those of the clock, and twice the memory is half the gain."""
    held = iter([*([100] * 14)])
    monkeypatch.setattr(beside_dense, "memory_in_use", lambda device: next(held))
    peaks = count(300)
    monkeypatch.setattr(beside_dense, "beyond", lambda peak, before: next(peaks) - before)
    subject.load_base = lambda: subject.model
    result = Speed(**SMALL, baseline="dense").run(subject)
    found = metrics(result)
    assert found["ttft_speedup", "prefill", ""].value == 1.0
    assert found["decode_speedup", "decode", ""].value == found["speedup", "", ""].value == 1.0
    assert found["dense_ttft_ms", "prefill", ""].value == 1000.0
    assert found["dense_tpot_ms", "decode", ""].value == 1000.0
    own, dense = (found[f"{n}held_bytes", "decode", ""].value for n in ("", "dense_"))
    assert found["memory_gain", "decode", ""].value == pytest.approx(dense / own, rel=1e-5)
    [note] = (n for n in result.notes if n != SHARED)
    assert note.startswith("none against the dense cache")


def test_the_dense_model_is_the_one_itself_where_only_the_cache_differs(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = object()
    monkeypatch.setattr(subject, "load_base", lambda: other)
    cached = replace(subject, method=KVQuant(), job={"spec": {"parent": ""}})
    assert cached.dense().model is subject.model
    assert isinstance(cached.dense().session(), StaticSession), "all keys and values are kept"
    assert replace(cached, job={"spec": {"parent": "a run"}}).dense().model is other
    assert replace(subject, job={"spec": {"parent": ""}}).dense().model is other


def test_our_engine_where_it_does_not_apply_is_an_error(subject: Subject) -> None:
    subject.model.model.layers[0].mlp.forward = lambda x: x  # type: ignore[union-attr, index]
    with pytest.raises(UserError, match="engine=static does not apply: the forward pass of a"):
        timer(subject, "static", Cell(1, 4, 3))
    assert timer(subject, "auto", Cell(1, 4, 3))().kv_bytes > 0


@pytest.mark.parametrize(
    "words, message",
    [
        (["evaluator.speed.prompt_tokens=500"], "a context of 532 tokens is more than the 512"),
        (["evaluator.speed.batch_sizes=[1,50000000]"], "b50000000 p128 n32 needs"),
        (["evaluator.speed.new_tokens=[]"], "grid of evaluator.speed is empty"),
        (["evaluator.speed.batch_sizes=0"], "evaluator.speed.batch_sizes"),
        (["evaluator.speed.engine=fast"], "evaluator.speed.engine='fast' is not possible"),
        (["evaluator.speed.baseline=dense", "evaluator.speed.repeats=5"], "no interval"),
        (["evaluator.speed.baseline=dense", "evaluator.speed.engine=generate"], "one loop"),
    ],
)
def test_what_cannot_be_is_refused_before_loading(
    bench: Bench, words: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        bench.job("eval", "evaluator=speed", *words)


def test_a_method_that_decodes_in_its_own_way_has_no_other_engine(bench: Bench) -> None:
    job = ["train", "method=lora_drop", "evaluator=speed"]
    for word in ("engine=auto", "engine=static", "engine=eager", "baseline=whole"):
        bench.job(*job, f"evaluator.speed.{word}")  # type: ignore[arg-type]
    for word in ("engine=generate", "baseline=generate"):
        with pytest.raises(UserError, match="lora_drop decodes in a way of its own"):
            bench.job(*job, f"evaluator.speed.{word}")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="none has no whole model beside each of its points"):
        bench.job("eval", "evaluator=speed", "evaluator.speed.baseline=whole")


def test_a_run_records_shares_of_the_roofline(bench: Bench) -> None:
    trial = [f"evaluator.speed.{k}={v}" for k, v in Speed.trial.items()]
    record = bench.run("eval", "evaluator=speed", *WORDS, *trial)
    found = {(m.name, m.phase): m for m in record.metrics}
    for key in (("mfu", "prefill"), ("mfu", "decode"), ("mbu", "decode")):
        assert 0 < found[key].value < 1
    assert found["ceiling_gemm", "roofline"].value > 1e6


# -- steps that differ by a schedule -------------------------------------------------------------


def dropping(subject: Subject, point: Point) -> Subject:
    draws = torch.Generator().manual_seed(0)
    context = Context(0, subject.device, torch.float32, draws, lambda name: subject.model)
    method = LoRADrop(layers=(1, 2), window=2)
    model = method.prepare(subject.model, context).requires_grad_(False)
    assert subject.shape is not None
    cost, whole = (chain_cost([method], subject.shape, "float32", p) for p in (point, Window(0)))
    return replace(
        subject, model=model, method=method, point=point, dtype="float32", cost=cost, whole=whole
    )


@pytest.mark.parametrize("engine", ["auto", "static", "eager"])
def test_a_schedule_is_counted_and_timed_by_kind(
    subject: Subject, ticks: None, engine: Any
) -> None:
    subject = dropping(subject, Window(2))
    evaluator = Speed(prompt_tokens=10, new_tokens=6, repeats=6, engine=engine, baseline="whole")
    with subject.method.at(subject.model, Window(2)):
        found = metrics(replace(evaluator, roofline=False).run(subject))
    assert found["tpot_drop_ms", "decode", ""].value == 1000.0
    assert found["tpot_refresh_ms", "decode", ""].value == 1000.0
    layers, cached = 4 - 2 * 2 / 3, 2 * (10 + 6) + 2 * (10 + 2)
    assert found["layer_passes", "decode", ""].value == pytest.approx(layers)
    assert found["kv_bytes", "decode", ""].value == cached * 2 * 2 * 16 * 4
    assert subject.cost is not None and subject.whole is not None
    ceiling = subject.whole.bytes_per_token / subject.cost.bytes_per_token
    assert found["speed_ceiling", "decode", ""].value == ceiling > 1
    assert found["decode_speedup", "decode", ""].value == 1.0
    assert found["decode_speedup", "decode", ""].obtained == "measured"
    with subject.method.at(subject.model, Window(0)):
        base = metrics(replace(evaluator, roofline=False).run(replace(subject, point=Window(0))))
    assert not {"tpot_drop_ms", "layer_passes"} & {name for name, *_ in base}


def test_shares_need_whole_cycles(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = dropping(subject, Window(2))
    monkeypatch.setattr(Speed, "_probe", lambda self, subject: HIGH)
    for new, there in ((6, True), (7, False)):
        evaluator = Speed(prompt_tokens=10, new_tokens=new, repeats=1)
        with subject.method.at(subject.model, Window(2)):
            found = metrics(evaluator.run(subject))
        assert (("mbu", "decode", "") in found) == there


def test_every_cell_of_a_grid_is_foreseen(bench: Bench) -> None:
    words = ["evaluator=speed", "evaluator.speed.prompt_tokens=[4,9]", *WORDS]
    words += ["evaluator.speed.batch_sizes=[1,3]", "evaluator.speed.new_tokens=5"]
    words += ["evaluator.speed.repeats=1", "evaluator.speed.roofline=false"]
    record = bench.run("eval", *words)
    cells = {m.task for m in record.metrics if m.name == "tpot_ms"}
    assert cells == {"b1 p4 n5", "b1 p9 n5", "b3 p4 n5", "b3 p9 n5"}
    per_token = next(m.value for m in record.metrics if m.name == "kv_bytes_per_token")
    # The largest prompt: what its activations take is more than what the new tokens add.
    assert record.plan["phases"]["evaluate"]["memory"]["kv cache"] == 3 * 9 * per_token
