"""Compression part by part, and methods one after the other."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch

from effbench.nn.adapters.lowrank import LowRankLinear
from effbench.nn.quant.linears import NF4Linear, PackedLinear
from effbench.results.events import EventLog, read_events
from effbench.results.records import Record
from effbench.runner import evaluation
from effbench.runner.stages import compress
from effbench.testing.bench import Bench, forget_accelerator
from effbench.util.errors import StoppedError, UserError

HARDWARE = ["hardware.device=cpu", "hardware.dtype=float32", "hardware.threads=1"]
DATA = ["dataset=arithmetic", "+dataset.limit.train=16", "+dataset.limit.test=12"]
SMALL = ["train.max_steps=3", "train.batch_size=2"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list[torch.nn.Module]:
    """The models that were evaluated, in order."""
    seen: list[torch.nn.Module] = []
    run_one = evaluation._run_one

    def watched(run: Any, evaluated: evaluation.Evaluated, *rest: Any) -> Any:
        seen.append(evaluated.opened.model)
        return run_one(run, evaluated, *rest)

    monkeypatch.setattr(evaluation, "_run_one", watched)
    return seen


def kinds(model: torch.nn.Module, kind: type) -> int:
    return sum(isinstance(m, kind) for m in model.modules())


def losses(record: Record) -> dict[str, float]:
    return {m.point: m.value for m in record.metrics if m.name == "loss"}


def metric(record: Record, name: str, point: str = "") -> float:
    return next(m.value for m in record.metrics if m.name == name and m.point in ("", point))


def test_finished_parts_are_not_made_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["method=rtn", *DATA, *HARDWARE]
    made, freed = list[int](), list[int]()
    quantise, append = PackedLinear.quantise.__func__, EventLog.append  # type: ignore[attr-defined]

    def counted(cls: type, *rest: Any) -> PackedLinear:
        made.append(1)
        return quantise(cls, *rest)

    def stopped(log: EventLog, kind: str, **facts: Any) -> None:
        append(log, kind, **facts)
        if kind == "part" and len(made) in (5, 17):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(PackedLinear, "quantise", classmethod(counted))
    monkeypatch.setattr(EventLog, "append", stopped)
    monkeypatch.setattr(compress, "give_back", lambda: freed.append(len(made)))
    for parts in (5, 17):
        with pytest.raises(StoppedError, match="part model"):
            bench.run("compress", *words)
        folder = bench.folder(bench.job("compress", *words))
        assert len(list((folder.path / "parts").iterdir())) == parts
    record = bench.run("compress", *words)
    assert len(made) == 28 and freed[-1] == 28
    assert len(freed) == 5 + 17 + 28, "the dense weight of each part is given back"
    assert len(list(read_events(folder.path / "events.jsonl", "part"))) == 28
    assert not (folder.path / "parts").exists()
    assert metric(record, "trainable_params") == 0
    bench.run("compress", *words)
    assert len(made) == 28


def test_an_adapter_on_packed_weights_can_be_evaluated(
    bench: Bench, models: list[torch.nn.Module]
) -> None:
    first = bench.run("compress", "method=rtn", *DATA, *HARDWARE)
    second = bench.run(
        "train", "method=dylora", "method.rank=4", f"from={first.key}", *DATA, *SMALL, *HARDWARE
    )
    third = bench.run("eval", f"from={second.key}", *DATA, *HARDWARE)
    for model in (models[1], models[-1]):
        assert kinds(model, PackedLinear) == kinds(model, LowRankLinear) == 28
    assert (second.parent, third.parent) == (first.key, second.key)
    assert losses(second) == losses(third)
    assert losses(second).keys() == {"r1", "r2", "r4"}
    held = metric(second, "resident_bytes")
    assert metric(third, "weight_bytes", "r4") == metric(second, "weight_bytes", "r4") == held
    assert held < metric(first, "resident_bytes") + 4 * metric(second, "trainable_params") + 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantised_base_that_was_trained_first_stays_quantised(
    bench: Bench, models: list[torch.nn.Module], dtype: str
) -> None:
    hardware = ["hardware.device=cpu", f"hardware.dtype={dtype}", "hardware.threads=1"]
    first = bench.run("train", "method=full", *DATA, *SMALL, "train.learning_rate=0.01", *hardware)
    middle = bench.run("eval", f"from={first.key}", *DATA, *hardware)
    forget_accelerator()
    second = bench.run(
        "train", "method=qlora", "method.rank=4", f"from={first.key}", *DATA, *SMALL, *hardware
    )
    third = bench.run("eval", f"from={second.key}", *DATA, *hardware)
    assert losses(first) == losses(middle)
    assert [kinds(m, NF4Linear) for m in models] == [0, 0, 28, 28]
    assert models[2].get_input_embeddings().weight.dtype == getattr(torch, dtype)  # type: ignore
    assert losses(second) == losses(third)


@pytest.mark.parametrize(
    ("first", "stage", "second"),
    [
        ("lora_drop", "compress", "rtn"),
        ("lora_drop", "train", "lora"),
        ("rtn", "compress", "rtn"),
        ("rtn", "train", "lora_drop"),
        ("rtn", "train", "qdylora"),
        ("rtn", "train", "full"),
    ],
)
def test_an_impossible_pair_is_refused_before_anything_is_loaded(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, first: str, stage: Any, second: str
) -> None:
    own: Any = "compress" if first == "rtn" else "train"
    job = bench.job(own, f"method={first}", *DATA, *SMALL, *HARDWARE)
    folder = bench.folder(job)
    folder.create(job.spec)
    folder.finish()
    monkeypatch.setattr("effbench.models.load.load", None)
    with pytest.raises(UserError, match=f"{second} cannot go on from what {first} left"):
        bench.job(stage, f"method={second}", f"from={job.spec.key}")


def test_a_crash_between_artefact_and_note_is_survived(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["method=rtn", *DATA, *HARDWARE]

    def crash(bench: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("effbench.runner.stages.compress.note_made", crash)
        bench.run("compress", *words)
    assert bench.run("compress", *words).metrics
