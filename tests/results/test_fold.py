"""The record of a run is what its events amount to."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from effbench.results.events import EventLog, read_events
from effbench.results.fold import fold
from effbench.results.records import Metric, Record
from effbench.testing.bench import Bench
from effbench.testing.models import given

LORA = ["method=lora", "method.rank=2", "train.max_steps=4", "train.checkpoint_every=2"]


def event(kind: str, **facts: Any) -> dict[str, Any]:
    return {"time": 0.0, "event": kind, **facts}


def phase(name: str, seconds: float, kind: str = "phase") -> dict[str, Any]:
    return event(kind, name=name, seconds=seconds, peak_bytes=7, joules=1.0, energy="measured")


def metric(name: str) -> dict[str, Any]:
    return event("metric", **asdict(Metric(name, 1.0, "")))


def test_metrics_stand_where_they_came_from_and_the_last_phase_counts() -> None:
    load, again = phase("load", 1.0), phase("load", 2.0)
    found = fold([load, metric("a"), again, metric("b"), phase("train", 3.0)], 0)
    names = ["peak_bytes", "phase_seconds", "energy_j", "a", "b"]
    assert [m.name for m in found.metrics] == [*names, "peak_bytes", "phase_seconds", "energy_j"]
    assert [m.value for m in found.metrics if m.name == "phase_seconds"] == [2.0, 3.0]


def test_a_stopped_phase_waits_until_it_is_finished() -> None:
    stopped = [phase("train", 5.0, "interrupted"), phase("load", 1.0)]
    assert fold(stopped, 0).interrupted["train"]["seconds"] == 5.0
    assert not fold([*stopped, phase("train", 9.0)], 0).interrupted


def test_steps_become_losses_and_speed_once_it_is_made() -> None:
    steps = [
        event("step", step=i, loss=5.0 - i, seconds=0.5, tokens=10 * i, layer_forwards=i)
        for i in (1, 2, 3, 4)
    ]
    assert not fold(steps, 0).metrics
    found = {m.name: m.value for m in fold([*steps, event("made")], 0).metrics}
    assert (found["train_loss_first"], found["train_loss_last"]) == (4.0, 1.0)
    assert (found["train_steps"], found["train_tokens"]) == (4, 100)
    assert found["train_tokens_per_second"] == 80.0  # of the fourth step: three warm up


def test_losses_are_told_in_the_unit_of_the_method() -> None:
    step = event("step", step=1, loss=1.0, seconds=1.0, tokens=1, layer_forwards=1)
    for facts, unit in (({}, "nats/token"), ({"loss_unit": "nats/row"}, "nats/row")):
        found = {m.name: m.unit for m in fold([step, event("made", **facts)], 0).metrics}
        assert found["train_loss_first"] == found["train_loss_last"] == unit


@pytest.mark.parametrize(
    ("method", "settings", "unit"),
    [
        ("lora", {}, "nats/token"),
        ("kd", {"teacher": "tiny"}, "nats/token"),
        ("reward", {}, "nats/row"),
        ("prboost", {}, "nats/row"),
        ("ptloss", {"teacher": "tiny"}, "nats/token"),
        ("ptloss", {"teacher": "tiny", "over": "answers"}, "nats/row"),
        ("dorm", {"objective": "ratings", "search": "heads"}, ""),
        ("dorm", {}, "nats/row"),
    ],
)
def test_a_method_says_what_its_loss_is_in(
    method: str, settings: dict[str, Any], unit: str
) -> None:
    assert given(method, **settings).loss_unit == unit


def of_run(bench: Bench, record: Record) -> Any:
    return fold(read_events(bench.store.run(record.key).path / "events.jsonl"), 0)


@pytest.mark.parametrize(
    ("stage", "words"), [("train", LORA), ("compress", ["method=rtn"]), ("eval", [])]
)
def test_a_record_is_what_the_events_amount_to(stage: str, words: list[str], bench: Bench) -> None:
    record = bench.run(stage, *words, "hardware.device=cpu", "hardware.dtype=float32")
    found = of_run(bench, record)
    assert (found.metrics, found.notes, found.plan) == (record.metrics, record.notes, record.plan)
    assert len(found.metrics) == len({tuple(asdict(m).items()) for m in found.metrics})


def test_a_run_stopped_at_any_event_has_each_metric_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*LORA, "evaluator=perplexity", "hardware.device=cpu", "hardware.dtype=float32"]
    append, stopped_at = EventLog.append, set[str]()

    def append_and_stop(self: EventLog, kind: str, **facts: Any) -> None:
        append(self, kind, **facts)
        place = f"{kind} {facts.get('name', facts.get('step', ''))} {facts.get('phase', '')}"
        if place not in stopped_at and kind != "interrupted":
            stopped_at.add(place)
            raise KeyboardInterrupt

    monkeypatch.setattr(EventLog, "append", append_and_stop)
    record = None
    while record is None:
        try:
            record = bench.run("train", *words)
        except KeyboardInterrupt:
            continue
    monkeypatch.undo()
    assert len(stopped_at) > 20
    whole = Bench(bench.root.parent / "whole").run("train", *words)
    assert [(m.name, m.phase, m.point) for m in record.metrics] == [
        (m.name, m.phase, m.point) for m in whole.metrics
    ]
    same = {"train_loss_first", "train_loss_last", "train_tokens", "train_steps", "loss"}
    assert {m.name: m.value for m in record.metrics if m.name in same} == {
        m.name: m.value for m in whole.metrics if m.name in same
    }


def test_a_phase_counts_with_what_it_took_before_it_was_stopped(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*LORA, "evaluator=[]", "hardware.device=cpu", "hardware.dtype=float32"]
    append = EventLog.append

    def append_and_stop(self: EventLog, kind: str, **facts: Any) -> None:
        if kind == "interrupted":
            facts |= {"seconds": 1e6, "joules": 1e7, "peak_bytes": 10**15}
        append(self, kind, **facts)
        if kind == "step":
            raise KeyboardInterrupt

    monkeypatch.setattr(EventLog, "append", append_and_stop)
    with pytest.raises(KeyboardInterrupt):
        bench.run("train", *words)
    monkeypatch.undo()
    record = bench.run("train", *words)
    took = {m.name: m.value for m in record.metrics if m.phase == "train"}
    assert took["peak_bytes"] == 10**15
    assert 1e6 < took["phase_seconds"] < 1e6 + 600
    assert took.get("energy_j", took.get("energy_modelled_j")) > 1e7
