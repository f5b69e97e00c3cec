"""Runs that are told to stop, or killed: what is saved, what is said, what is left lying about."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from effbench.api.schema import plain
from effbench.api.spec import Job
from effbench.resources.memory import PeakMemory
from effbench.results.events import EventLog, read_events
from effbench.results.store import Store
from effbench.runner import local
from effbench.runner.local import execute
from effbench.runner.signals import stop_signal
from effbench.testing.bench import TINY, Bench
from effbench.util.errors import RunFailedError, UserError

LONG = [
    "method=lora",
    "train.max_steps=100000",
    "train.checkpoint_every=100000",
    "train.batch_size=2",
    "hardware.device=cpu",
    "hardware.dtype=float32",
    "hardware.threads=1",
]


@pytest.fixture
def training(bench: Bench) -> Iterator[tuple[Job, subprocess.Popen[str]]]:
    """A long training, started from the command line, at work."""
    job = bench.job("train", *LONG)
    words = [*TINY, *LONG, f"run.results={bench.root}"]
    launcher = subprocess.Popen(
        [sys.executable, "-c", "from effbench.cli.main import main; main()", "train", *words],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        wait_until(lambda: len(steps(bench, job)) > 2, launcher)
        yield job, launcher
    finally:
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()


def steps(bench: Bench, job: Job) -> list[Any]:
    path = bench.folder(job).path / "events.jsonl"
    return list(read_events(path, "step")) if path.is_file() else []


def wait_until(done: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    for _ in range(6000):
        if done():
            return
        assert process is None or process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.02)
    raise AssertionError("not within two minutes")


def saved_steps(bench: Bench, job: Job) -> int:
    state = torch.load(bench.folder(job).checkpoint, weights_only=True)
    count: int = state["done"]["step"]
    return count


def worker_of(launcher: subprocess.Popen[str]) -> int:
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return int(children[0])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGHUP, signal.SIGKILL)),
    ],
)
def test_what_ends_the_launcher_stops_its_worker_which_saves(
    bench: Bench, training: tuple[Job, subprocess.Popen[str]], number: int
) -> None:
    job, launcher = training
    worker = worker_of(launcher)
    launcher.send_signal(number)
    status = launcher.wait(60)
    assert status == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    wait_until(lambda: not Path(f"/proc/{worker}").exists())
    assert saved_steps(bench, job) == len(steps(bench, job))
    if number != signal.SIGKILL:
        assert launcher.stderr is not None
        said = launcher.stderr.read()
        assert "everything is saved" in said and "Traceback" not in said


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_signal_to_both_processes_saves_too(
    bench: Bench, training: tuple[Job, subprocess.Popen[str]]
) -> None:
    job, launcher = training
    os.killpg(launcher.pid, signal.SIGTERM)
    assert launcher.wait(60) == 130
    assert saved_steps(bench, job) == len(steps(bench, job))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_worker_is_spoken_of(training: tuple[Job, subprocess.Popen[str]]) -> None:
    _, launcher = training
    os.kill(worker_of(launcher), signal.SIGKILL)
    assert launcher.wait(60) == 2
    assert launcher.stderr is not None
    said = launcher.stderr.read()
    assert "most likely because memory ran out" in said and "effbench plan" in said


@pytest.mark.parametrize(
    ("status", "kind"), [(-11, UserError), (-15, RunFailedError), (-2, RunFailedError)]
)
def test_other_signals(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, status: int, kind: type[Exception]
) -> None:
    monkeypatch.setattr("effbench.runner.local._run_process", lambda *_: status)
    with pytest.raises(kind, match="SIGSEGV" if kind is UserError else "130"):
        execute(bench.job("eval"))


AT_WORK = (
    "import os, pathlib, sys, time\n"
    "from effbench.runner.signals import end_with_parent, interrupt_when_asked, stop_signal\n"
    "end_with_parent()\n"
    "interrupt_when_asked()\n"
    "with stop_signal() as stop:\n"
    "    pathlib.Path('begun').touch()\n"
    "    until = time.monotonic() + 100\n"
    "    while not stop.requested and time.monotonic() < until:\n"
    "        time.sleep(0.01)\n"
    "if stop.requested:\n"
    "    pathlib.Path('saved').touch()\n"
)
LAUNCHES = (
    "import signal, subprocess, sys\n"
    "from effbench.runner.signals import passed_on\n"
    "signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup\n"
    f"process = subprocess.Popen([sys.executable, '-c', {AT_WORK!r}])\n"
    "with passed_on(process):\n"
    "    sys.exit(process.wait())\n"
)


@pytest.mark.skipif(sys.platform != "linux", reason="a parent's death is told on Linux")
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGKILL])
def test_a_closed_terminal_and_a_killed_launcher_are_heeded(tmp_path: Path, number: int) -> None:
    """The short form of the above: what both processes do with signals, without a training."""
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHES], cwd=tmp_path)
    wait_until((tmp_path / "begun").exists, launcher)
    launcher.send_signal(number)
    assert launcher.wait(60) == (0 if number == signal.SIGHUP else -signal.SIGKILL)
    wait_until((tmp_path / "saved").exists)


def test_signals_are_requests_and_the_second_ctrl_c_acts() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stop_signal() as stop:
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_file_in_the_current_folder_is_no_module_of_ours(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "yaml.py").write_text("open('ran', 'w')")
    (tmp_path / "logging.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(tmp_path)
    execute(bench.job("eval", "dataset.limit.test=2", "evaluator=[]", "hardware.device=cpu"))
    assert not (tmp_path / "ran").exists()


# -- what is said ----------------------------------------------------------------------------------


def test_the_first_error_is_told_though_nothing_was_measured(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: PeakMemory) -> None:
        raise UserError("there is no such device")

    monkeypatch.setattr(PeakMemory, "__enter__", refuse)
    with pytest.raises(UserError, match="no such device"):
        bench.run("eval", "hardware.device=cpu")


def test_the_first_error_is_told_though_the_disk_is_full(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: EventLog, kind: str, **facts: Any) -> None:
        assert kind == "interrupted"
        raise UserError("no space for an event")

    def fail(*_: Any, **__: Any) -> None:
        raise UserError("what went wrong first")

    monkeypatch.setattr(EventLog, "append", full)
    monkeypatch.setattr("effbench.models.load.load", fail)
    with pytest.raises(UserError, match="what went wrong first"):
        bench.run("eval", "hardware.device=cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_refused_with_a_word(bench: Bench) -> None:
    with pytest.raises(UserError, match="torch sees no CUDA device"):
        bench.run("eval", "hardware.device=cuda", "hardware.dtype=float32")


# -- what is left lying about ----------------------------------------------------------------------


def rubbish(store: Store, key: str) -> list[Path]:
    """Leave what killed processes leave."""
    run = store.run(key).path
    places = [
        run / ".checkpoint.pt.0123abcd.part",
        run / "evaluations" / ".perplexity.json.0123abcd.part",
        run / ".artefact.0123abcd.part" / "weights",
        run / ".artefact.0123abcd.old" / "weights",
        store.records / f".{key}.json.0123abcd.part",
    ]
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    return places


def test_rubbish_is_swept_when_a_run_goes_on(bench: Bench) -> None:
    words = ("dataset.limit.test=2", "hardware.device=cpu")
    job = bench.job("eval", *words)
    bench.folder(job).create(job.spec)
    places = rubbish(bench.store, job.spec.key)
    other = bench.store.records / ".ffff.json.0123abcd.part"
    other.touch()
    bench.run("eval", *words)
    assert not any(place.exists() for place in places)
    assert other.exists(), "another run may be writing it now"


def test_a_finished_run_keeps_nothing_of_its_making(bench: Bench) -> None:
    job = bench.job("eval", "dataset.limit.test=2", "hardware.device=cpu")
    record = bench.run("eval", "dataset.limit.test=2", "hardware.device=cpu")
    run = bench.folder(job)
    places = [*rubbish(bench.store, job.spec.key), run.checkpoint, run.path / "parts" / "x"]
    (run.path / "parts").mkdir()
    for place in places[-2:]:
        place.touch()
    assert execute(job) == record
    assert not any(place.exists() for place in places)
    assert (run.path / "spec.json").exists()


def test_a_failure_carries_the_reason_that_the_process_gave(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = (
        "from effbench.runner.worker import fail\n"
        "from effbench.util.errors import UserError\n"
        "raise SystemExit(fail(UserError('No room.', 'Make some.')))"
    )
    run = local._run_process
    monkeypatch.setattr(
        local, "_run_process", lambda _, *rest: run([sys.executable, "-c", fails], *rest)
    )
    with pytest.raises(RunFailedError) as caught:
        execute(bench.job("eval"))
    assert str(caught.value) == "No room.\nMake some."
    assert caught.value.status == local.REFUSED


def test_the_launcher_writes_nothing_of_the_run(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = bench.job("eval")
    seen: list[bool] = []

    def look(command: list[str], text: str, *_: object) -> int:
        assert json.loads(text) == plain(job)
        seen.append(bench.folder(job).path.exists())
        return 1

    monkeypatch.setattr("effbench.runner.local._run_process", look)
    with pytest.raises(RunFailedError):
        execute(job)
    assert seen == [False]


# -- before there is anything to save ------------------------------------------------------------


def interrupted_while_importing(module: str, caught: bool) -> str:
    """Return code that has a signal come while a module is imported, perhaps to be caught."""
    return (
        "import builtins, os, signal, sys\n"
        "usual = builtins.__import__\n"
        "def importing(name, *rest, **named):\n"
        f"    if name == {module!r}:\n"
        "        builtins.__import__ = usual\n"
        "        try:\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "        except BaseException:\n"
        f"            if not {caught}: raise\n"
        "    return usual(name, *rest, **named)\n"
        "builtins.__import__ = importing\n"
    )


@pytest.mark.parametrize(
    "module", ["effbench.runner", pytest.param("torch", marks=pytest.mark.slow)]
)
def test_a_signal_during_the_imports_of_a_run_is_heeded(bench: Bench, module: str) -> None:
    job = bench.job("eval", "evaluator=[]")
    code = interrupted_while_importing(module, caught=False)
    code += "from effbench.runner.worker_process import main; sys.exit(main())"
    done = in_a_process(code, json.dumps(plain(job)))
    assert done.returncode == 130, done.stderr
    assert done.stderr.startswith("Stopped") and len(done.stderr.splitlines()) == 1
    assert not bench.folder(job).finished


def test_a_signal_that_a_library_catches_is_heeded_at_the_first_step(bench: Bench) -> None:
    job = bench.job("train")
    code = interrupted_while_importing("torch", caught=True)
    code += "from effbench.runner.worker_process import main; sys.exit(main())"
    done = in_a_process(code, json.dumps(plain(job)))
    assert done.returncode == 130, done.stderr
    assert "everything is saved" in done.stderr and len(steps(bench, job)) <= 1


def test_a_process_that_dies_of_a_signal_before_it_can_say_so(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("effbench.runner.local._run_process", lambda *_: -15)
    with pytest.raises(RunFailedError):
        execute(bench.job("eval"))
    assert capsys.readouterr().err == "Stopped before the run began.\n"


def test_a_command_says_that_it_was_stopped() -> None:
    code = interrupted_while_importing("effbench.config.compose", caught=False)
    code += "from effbench.cli.main import main\nsys.argv[1:] = ['plan', 'model=tiny']\nmain()"
    done = in_a_process(code)
    assert (done.returncode, done.stderr) == (130, "Stopped.\n")


def in_a_process(code: str, given: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, input=given, capture_output=True, text=True, check=False)
