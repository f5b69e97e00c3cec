"""What wandb is given of a run."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from effbench.config.compose import compose
from effbench.results.events import EventLog
from effbench.results.records import Metric


class Fake:
    """Stands for the module and for its run."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}
        self.curves: list[tuple[int, dict[str, float]]] = []
        self.summary: dict[str, float] = {}
        self.settings = SimpleNamespace(mode="offline", sync_dir="wandb/offline-run-1")
        self.finished = False

    def init(self, **given: Any) -> Fake:
        self.given = given
        return self

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.curves.append((step, numbers))

    def finish(self) -> None:
        self.finished = True


def test_curves_summary_and_how_to_upload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    job = compose("train", ["model=tiny", "dataset=arithmetic", "seed=3", "run.tracker=wandb"])
    log = EventLog(tmp_path / "events.jsonl", job)
    log.append("step", step=4, loss=2.5, tokens=8)
    log.append("validation", step=4, loss=3.0)
    loss = Metric("loss", 1.5, "nats/token", point="r4", split="test")
    for metric in (
        loss,
        Metric("loss", 1.25, "nats/token", point="r4", split="validation"),
        Metric("accuracy", 0.5, "share", task="piqa"),
        Metric("peak_bytes", 10.0, "bytes", phase="load"),
        Metric("peak_bytes", 20.0, "bytes", phase="train"),
    ):
        log.append("metric", **asdict(metric))
    log.append("note", text="a note")
    log.close()
    assert fake.curves == [(4, {"train/loss": 2.5, "train/tokens": 8}), (4, {"validation/loss": 3})]
    assert fake.summary == {
        "test/loss/r4": 1.5,
        "validation/loss/r4": 1.25,
        "piqa/accuracy": 0.5,
        "load/peak_bytes": 10,
        "train/peak_bytes": 20,
    }
    assert fake.given["group"] == "train lora tiny arithmetic"
    assert set(fake.given["tags"]) >= {"train", "tiny", "arithmetic"}
    assert fake.finished
    assert "wandb sync wandb/offline-run-1" in capsys.readouterr().err
