"""Every method on the device: it trains as on a CPU, and evaluates to the same numbers."""

from __future__ import annotations

import dataclasses
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from effbench.api import registry
from effbench.nn.decode.session import CachedSession
from effbench.nn.decode.static import StaticSession
from effbench.results.events import read_events
from effbench.results.records import Record
from effbench.runner.open import evaluated
from effbench.testing.bench import Bench, forget_accelerator

pytestmark = pytest.mark.gpu

NAMES = registry.names("methods")
OWN_DRAWS = {"kd": "its teacher's random weights are drawn on the device"}
"""Methods whose numbers differ between devices, and why."""


def words(name: str, folder: Path, device: str) -> list[str]:
    cls = registry.find("methods", name)
    given = dict(cls.needs)
    if "dropout" in {f.name for f in dataclasses.fields(cls)}:
        given["dropout"] = 0.0
    return [
        *("model=folder", f"model.path={folder}", "dataset=arithmetic"),
        *("train.max_steps=4", "train.batch_size=2", "+dataset.limit.train=16"),
        *("+dataset.limit.test=8", f"hardware.device={device}", "hardware.dtype=float32"),
        *(f"method={name}", *(f"method.{k}={v}" for k, v in given.items())),
        *("evaluator=[perplexity,speed,memory]", "evaluator.speed.prompt_tokens=8"),
        *("evaluator.speed.new_tokens=6", "evaluator.speed.repeats=2"),
        *("evaluator.speed.roofline=false", "evaluator.memory.prompt_tokens=8"),
        "evaluator.memory.new_tokens=6",
    ]


def losses(record: Record) -> dict[str, float]:
    return {m.point: m.value for m in record.metrics if m.name == "loss"}


def run(bench: Bench, name: str, folder: Path, device: str) -> tuple[Record, list[float], Any]:
    forget_accelerator()
    stage = registry.find("methods", name).stage
    job = bench.job(stage, *words(name, folder, device))
    record = bench.run(stage, *words(name, folder, device))
    steps = read_events(bench.folder(job).path / "events.jsonl", "step")
    return record, [e["loss"] for e in steps], job


@pytest.mark.parametrize("name", NAMES)
def test_it_does_what_it_does_on_a_cpu(
    name: str, tiny_folder: Path, tmp_path: Path, device: str
) -> None:
    there, steps_there, job = run(Bench(tmp_path / device), name, tiny_folder, device)
    assert all(abs(v) < 20 for v in losses(there).values())
    decoded(Bench(tmp_path / device), job, tmp_path / "scratch", device)
    if name in OWN_DRAWS:
        return
    here, steps_here, _ = run(Bench(tmp_path / "here"), name, tiny_folder, "cpu")
    assert steps_there == pytest.approx(steps_here, abs=2e-3)
    assert losses(there) == pytest.approx(losses(here), abs=4e-3)


def decoded(bench: Bench, job: Any, scratch: Path, device: str) -> None:
    """Check that the method's own sessions and plain ones agree, at some points that are plain."""
    scratch.mkdir()
    opened = evaluated(job, bench.store, scratch)
    model, method = opened.model, opened.method
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 260, (2, 24), generator=draws).to(device)
    points = list(dict.fromkeys([*method.points()[:1], *method.points()[-2:]]))
    for point, rows in product(points, (1, 2)):
        with method.at(model, point), torch.no_grad():
            session = method.session(model, point)
            if not isinstance(session, StaticSession) or "generate" not in method.engines(point):
                continue
            seen = []
            for one in (session, CachedSession(model)):
                out = [one.prefill(ids[:rows, :8])]
                out += [one.step(ids[:rows, i : i + 1]) for i in range(8, 24)]
                seen.append(torch.stack(out).float())
        torch.testing.assert_close(*seen, atol=2e-3, rtol=2e-3)
