"""A program in the place of a method: what it is given, what it leaves, how it fails."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from effbench.api.method_types import ProgramUsage
from effbench.config.compose import compose
from effbench.methods.compresses import compress_whole
from effbench.methods.external import External, packages_beside
from effbench.methods.quant.gptq import GPTQ
from effbench.nn.llama.weights import read_tensors
from effbench.resources.memory import PeakMemory
from effbench.results.events import EventLog
from effbench.results.records import read
from effbench.runner import programs
from effbench.runner.programs import run_program
from effbench.testing.bench import Bench, HardKill, without_evaluation
from effbench.testing.models import fresh
from effbench.util.errors import StoppedError, UserError

AUTOROUND = Path(__file__).parents[2] / "scripts" / "external" / "autoround.py"

HALVED = """
import pathlib, shutil, sys, time
from safetensors.numpy import load_file, save_file
held = b"1" * (60 * 2**20)
given, left = map(pathlib.Path, sys.argv[1:3])
shutil.copytree(given, left)
name = "model.safetensors"
halves = {n: t / 2 for n, t in load_file(given / name).items()}
save_file(halves, left / name)
print("halved", len(halves))
if len(sys.argv) > 3:
    shutil.copy(sys.argv[3], sys.argv[4])
while time.process_time() < 0.2:
    pass
"""
"""A program that halves all weights, copies the calibration rows to where it is told, and takes at
the least 60 MiB and 0.2 seconds of the processor."""


def left_by(how: str, words: Sequence[str]) -> ProgramUsage:
    """Leave what no program should, as one of these words would."""
    given, left = map(Path, words[-2:])
    if how == "nothing":
        return ProgramUsage(0.0, 0.0, 0)
    if how == "deeper":
        shutil.copytree(given, left / "model-w4")
        return ProgramUsage(0.0, 0.0, 0)
    shutil.copytree(given, left)
    weights = left / "model.safetensors"
    if how == "packed":
        (left / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    elif how == "config":
        (left / "config.json").write_text("[")
    elif how == "no weights":
        weights.unlink()
    elif how == "torn":
        weights.write_bytes(weights.read_bytes()[:100])
    else:
        tensors = load_file(weights)
        first = min(tensors)
        if how == "lacks":
            del tensors[first]
        if how == "shape":
            tensors[first] = tensors[first][:1].contiguous()
        if how == "nan":
            tensors[first][0] = float("nan")
        save_file(tensors, weights)
    return ProgramUsage(0.0, 0.0, 0)


def script(folder: Path, text: str) -> str:
    path = folder / "program.py"
    path.write_text(text)
    return f"{sys.executable} {path} {{input}} {{output}}"


def test_weights_are_what_the_program_makes_of_them(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_evaluation(monkeypatch)
    command = f"{script(tmp_path, HALVED)} {{rows}} {tmp_path}/of-{{seed}}.jsonl"
    words = ["method=external", f"method.command={json.dumps(command)}", "hardware.dtype=float32"]
    job = bench.job("compress", *words, "method.draw=true", "seed=3")
    bench.go(job)
    record = read(bench.store.records / f"{job.spec.key}.json")
    made = read_tensors(bench.folder(job).artefact / "weights.safetensors")
    _, model, _, _ = fresh("none")
    for name, weight in model.named_parameters():
        assert made[name].equal(weight.detach() / 2)
    rows = [json.loads(line) for line in (tmp_path / "of-3.jsonl").read_text().splitlines()]
    assert len(rows) == 64 and all(row["input_ids"] for row in rows)
    drawn = External(draw=True).calibration_rows(1000, 3)
    assert drawn == GPTQ(draw=True).calibration_rows(1000, 3), "the rows of other methods"
    assert drawn != External().calibration_rows(1000, 3) == list(range(64))
    found = {m.name: m for m in record.metrics if m.name.startswith("program_")}
    assert found["program_peak_bytes"].value > 60 * 2**20
    assert found["program_cpu_seconds"].value >= 0.2
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert size < found["program_bytes"].value < 1.2 * size
    assert {m.phase for m in found.values()} == {"compress"}
    assert not list(bench.folder(job).path.glob(".program*"))


def test_a_program_that_has_ended_is_not_run_again(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_evaluation(monkeypatch)
    count = tmp_path / "count"
    command = script(tmp_path, f"open({str(count)!r}, 'a').write('x')\n{HALVED}")
    words = ["method=external", f"method.command={json.dumps(command)}", "hardware.dtype=float32"]
    job = bench.job("compress", *words)
    append = EventLog.append

    def killed(log: EventLog, kind: str, **facts: Any) -> None:
        append(log, kind, **facts)
        if kind == "part":
            raise HardKill

    with monkeypatch.context() as patch:
        patch.setattr(EventLog, "append", killed)
        with pytest.raises(HardKill):
            bench.go(job)
    bench.go(job)
    assert count.read_text() == "x"
    record = read(bench.store.records / f"{job.spec.key}.json")
    assert [m.name for m in record.metrics].count("program_seconds") == 1


def test_the_key_knows_the_program_and_what_is_installed_beside_it(tmp_path: Path) -> None:
    def key(command: str) -> str:
        words = ["method=external", "model=tiny", "dataset=arithmetic"]
        return compose("compress", [*words, f"method.command={json.dumps(command)}"]).spec.key

    command = script(tmp_path, "print(1)")
    before = key(command)
    assert key(command) == before
    script(tmp_path, "print(2)")
    assert key(command) != before
    home = tmp_path / "venv"
    packages = home / "lib" / "python3.11" / "site-packages"
    (packages / "tool-1.0.dist-info").mkdir(parents=True)
    (home / "bin").mkdir()
    program = home / "bin" / "tool"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert packages_beside(program) == []
    (home / "pyvenv.cfg").touch()
    assert packages_beside(program) == ["tool-1.0"]
    old = key(f"{program} {{input}} {{output}}")
    (packages / "tool-1.0.dist-info").rename(packages / "tool-1.1.dist-info")
    assert key(f"{program} {{input}} {{output}}") != old


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("", "does not say where {input} goes"),
        ("cp -r {input}", "does not say where {output} goes"),
        ("{input} {output}", "does not say where {input} goes"),
        ("cp '{input} {output}", "cannot be read: No closing quotation"),
        ("no-such-program {input} {output}", "no-such-program, which is no program here"),
    ],
)
def test_commands_that_cannot_be_run_are_refused_at_once(command: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        External(command=command).sealed()
    assert said in error.value.message and error.value.hint


def test_rows_are_drawn_only_for_a_program_that_takes_them() -> None:
    with pytest.raises(UserError, match="takes none"):
        External(command="cp -r {input} {output}", draw=True).sealed()
    External(command="cp -r {input} {output} {rows}", draw=True).sealed()


def test_the_program_of_auto_round_cuts_rows_into_samples_of_one_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library leaves out shorter ones without an error where one is long enough."""
    monkeypatch.setitem(sys.modules, "auto_round", SimpleNamespace(AutoRound=None))
    samples = runpy.run_path(str(AUTOROUND))["_samples"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input_ids": [1, 2, 3]}\n{"input_ids": [4, 5]}\n{"input_ids": [6, 7]}\n')
    assert [s.tolist() for s in samples(rows, 3)] == [[[1, 2, 3]], [[4, 5, 6]]]
    with pytest.raises(SystemExit, match="has 7 tokens, and --seqlen is 8"):
        samples(rows, 8)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("nothing", "left no output/config.json."),
        ("deeper", "left no output/config.json, but output/model-w4/config.json."),
        ("config", "output/config.json is no JSON object"),
        ("packed", "left gptq weights"),
        ("no weights", "left no *.safetensors"),
        ("torn", "model.safetensors cannot be read"),
        ("lacks", "lacks 1 of"),
        ("shape", "in output and"),
        ("nan", "no finite number"),
    ],
)
def test_what_is_no_such_model_is_refused(how: str, said: str, tmp_path: Path) -> None:
    method, model, _, ctx = fresh("external", command="program {input} {output}")
    before = {n: p.clone() for n, p in model.named_parameters()}
    ctx.folder, ctx.program = tmp_path, partial(left_by, how)
    with pytest.raises(UserError) as error:
        compress_whole(method, model, [], ctx)  # type: ignore[arg-type]
    assert said in error.value.message and error.value.hint
    assert all(p.equal(before[n]) for n, p in model.named_parameters())
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (
            "print('one'); print('\\x1b[31mno such\\x1b[0m bits'); raise SystemExit(3)",
            "status 3:\none\nno such bits",
        ),
        ("raise SystemExit(1)", "status 1:\nIt said nothing."),
        ("import os; os.kill(os.getpid(), 9)", "most likely because memory ran out"),
        ("import os; os.kill(os.getpid(), 11)", "ended by SIGSEGV"),
    ],
)
def test_a_program_that_fails_is_quoted(program: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        run_program([sys.executable, "-c", program])
    assert said in error.value.message
    assert len(error.value.message.splitlines()) < 6


def test_a_program_is_measured_as_it_is_and_not_as_who_started_it() -> None:
    held = torch.ones(96 * 2**20 // 4)  # ours, and no part of it
    small = "import time; time.sleep(0.1)"
    with PeakMemory() as memory:
        used = run_program([sys.executable, "-c", small])
    assert used.peak_bytes < held.nbytes / 2 and used.seconds >= 0.1
    large = "x = b'1' * (300 * 2**20)"  # and gone at once: no look from outside would see it
    with PeakMemory() as outer:
        child = run_program(["sh", "-c", f'{sys.executable} -c "$0"; true', large])
    assert 300 * 2**20 < child.peak_bytes < 330 * 2**20, "of the largest process of the family"
    assert outer.peak.peak_bytes >= child.peak_bytes
    assert memory.peak.peak_bytes > used.peak_bytes


@pytest.mark.parametrize("heeds", [True, False])
def test_a_program_ends_with_the_run_that_asks_for_it(
    heeds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is gone, and waited for, when the run goes on."""
    monkeypatch.setattr(programs, "GRACE_SECONDS", 30 if heeds else 0.2)
    told, ignored = tmp_path / "pid", "" if heeds else "signal.signal(15, signal.SIG_IGN);"
    child = (
        f"import os, signal, sys, time; {ignored}"
        "open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
    )
    begun = time.monotonic()
    with pytest.raises(StoppedError, match="begin anew"):
        run_program(
            [sys.executable, "-c", child, str(told)],
            stop=lambda: told.exists() and bool(told.read_text()),
        )
    assert time.monotonic() - begun < 20
    with pytest.raises(ProcessLookupError):
        os.kill(int(told.read_text()), 0)


def test_a_program_ends_when_the_run_is_killed(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    child = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
    words = [sys.executable, "-c", child, str(told)]
    asks = f"from effbench.runner.programs import run_program\nrun_program({words!r})"
    run = subprocess.Popen([sys.executable, "-c", asks])
    assert _within(20, lambda: told.is_file() and bool(told.read_text()))
    run.kill()
    run.wait()
    assert _within(20, lambda: not _lives(int(told.read_text())))


def _within(seconds: float, holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not (held := holds()) and time.monotonic() < end:
        time.sleep(0.05)
    return held


def _lives(number: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        status = Path(f"/proc/{number}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_what_it_says_is_shown() -> None:
    shown: list[str] = []
    program = "import time; print('layer 3 of 7', flush=True); time.sleep(0.5)"
    run_program([sys.executable, "-c", program], show=shown.append)
    assert "layer 3 of 7" in shown
