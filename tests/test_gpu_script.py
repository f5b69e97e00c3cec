"""`make gpu`: what it refuses, what it does with a stage that fails, and the rehearsal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))

import gpu  # noqa: E402
import gpu_stage  # noqa: E402

GOOD = """'A stage.'
SECONDS = 60
def run(stage):
    from gpu_stage import Row
    stage.note(Row("seen", 2.0, at_least=1.0))
"""
BAD = '"""Another."""\nSECONDS = 60\ndef run(stage):\n    raise MemoryError("CUDA out of memory")\n'
SLOW = '"""A third."""\nSECONDS = 1\ndef run(stage):\n    import time\n    time.sleep(60)\n'


@pytest.fixture
def three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of the scripts alone, with three stages."""
    here = tmp_path / "scripts"
    (here / "gpu").mkdir(parents=True)
    for name in ("gpu.py", "gpu_stage.py"):
        (here / name).write_text((SCRIPTS / name).read_text())
    for name, text in (("10_slow", SLOW), ("20_bad", BAD), ("30_good", GOOD)):
        (here / "gpu" / f"{name}.py").write_text(text)
    return here


def called(scripts: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(scripts / "gpu.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)


def test_a_stage_that_fails_stops_no_other_and_what_is_done_is_kept(
    three: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = called(three, "--rehearse", "--out", str(out))
    assert first.returncode == 1
    states = {
        n: json.loads((out / f"{n}.json").read_text())["state"] for n in ("slow", "bad", "good")
    }
    assert states == {"slow": "out of time", "bad": "failed", "good": "done"}
    assert "CUDA out of memory" in first.stdout
    assert "reached" in (out / "table.md").read_text()
    again = called(three, "--rehearse", "--out", str(out), "--only", "good")
    assert again.returncode == 0
    assert "finished before" in again.stdout


def test_what_is_left_of_the_budget_ends_a_stage_and_starts_no_further_one(
    three: Path, tmp_path: Path
) -> None:
    done = called(three, "--rehearse", "--budget", "10", "--out", str(tmp_path / "out"))
    assert "slow: not started, 10 s are left" in done.stdout
    assert "(not run)" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "decod"], "There is no stage 'decod'."),
        (["--budget", "20"], "--budget 20 is less than the 200 s of the first stage, tests."),
    ],
)
def test_what_cannot_be_is_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert gpu.main([*words, "--out", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


def test_without_a_device_it_points_at_the_rehearsal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "make gpu-rehearsal" in capsys.readouterr().err
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(gpu.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    answer = subprocess.CompletedProcess([], 0, "Some GPU, 470.1\n", "")
    monkeypatch.setattr(gpu.subprocess, "run", lambda *a, **k: answer)
    assert gpu.main(["--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "Some GPU, 470.1" in said
    assert "older" in said


def test_every_stage_says_what_it_is_and_how_long_it_may_take() -> None:
    for name, path in gpu_stage.stages().items():
        module = gpu_stage.load(path)
        assert (module.__doc__ or "").strip(), name
        assert 0 < module.SECONDS <= 540, name
        assert callable(module.run), name


@pytest.mark.parametrize("name", [n for n in gpu_stage.stages() if n not in ("tests", "profile")])
def test_a_stage_is_rehearsed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert gpu._run_here(name, tmp_path, tiny=True) == 0
    check(tmp_path, [name])


@pytest.mark.slow
def test_the_rehearsal_runs_every_stage(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = called(SCRIPTS, "--rehearse", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    check(out, list(gpu_stage.stages()))


def check(out: Path, names: list[str]) -> None:
    """Each stage has rows, all with a value, and no record knows where it was made."""
    for name in names:
        assert gpu_stage.rows(out, name), name
        assert all(row.value is not None for row in gpu_stage.rows(out, name)), name
    records = [p.read_text() for p in (out / "results" / "records").glob("*.json")]
    assert records or names == ["low_bits"]  # which runs nothing
    assert not any(str(out) in text for text in records)
