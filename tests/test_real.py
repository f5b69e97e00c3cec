"""A short run on the real SmolLM2-135M, as a person would start it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from effbench.cli.selfcheck.accounting import PEAK_BOUND
from effbench.results.events import read_events
from effbench.results.records import Record, read
from effbench.results.store import Store

pytestmark = pytest.mark.real

LINEAR_BYTES = 54_770_040
"""What the decoder linears of SmolLM2-135M take in NF4 with double quantisation."""


def effbench(folder: Path, stage: str, *words: str) -> Record:
    command = [sys.executable, "-c", "from effbench.cli.main import main; main()", stage, *words]
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    store = Store(folder / "results")
    return read(store.records / f"{store.resolve('latest')}.json")


def value(record: Record, name: str, point: str = "") -> float:
    return next(m.value for m in record.metrics if m.name == name and m.point == point)


def test_a_short_run_learns(tmp_path: Path) -> None:
    record = effbench(
        tmp_path,
        "train",
        "method=qdylora",
        "train.max_steps=3",
        "train.batch_size=1",
        "+dataset.limit.train=1",  # the same row in every step, so that their loss must fall
        "dataset.limit.test=2",
        "method.eval_ranks=[16]",
        "run.exact_memory=true",
    )
    steps = list(read_events(tmp_path / "results/runs" / record.key / "events.jsonl", "step"))
    assert [s["step"] for s in steps] == [1, 2, 3]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.1
    assert 0.8 < value(record, "loss", "r16") < 3
    assert value(record, "weight_bytes", "r16") == value(record, "resident_bytes")
    embedding, norms = 49_152 * 576, 61 * 576
    adapters = 4 * value(record, "trainable_params")
    size = 2 if record.spec["hardware"]["dtype"] == "bfloat16" else 4
    expected = LINEAR_BYTES + size * (embedding + norms) + adapters
    assert value(record, "resident_bytes") == expected
    errors = {phase: found["error"] for phase, found in record.plan["phases"].items()}
    assert errors.keys() >= {"load", "train", "evaluate"}
    assert max(map(abs, errors.values())) <= PEAK_BOUND
    assert [(o.metric, len(o.values)) for o in record.outcomes] == [
        ("loss", 2),
        ("bits_per_byte", 2),
    ]
    assert len(list((tmp_path / "results/records").iterdir())) == 1
