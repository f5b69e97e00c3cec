"""Runs that are forked from one process: as those of fresh ones, in all that is seen of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from effbench.results.records import Record
from effbench.runner import nursery as module
from effbench.runner.local import execute
from effbench.runner.nursery import Nursery, nursery, nursery_for
from effbench.testing.bench import Bench

WORDS = ["method=lora", "train.max_steps=2", "dataset.limit.test=4", "evaluator=[]"]
ALIKE = 0.02
"""Most by which the memory before a model is loaded may differ from that of a fresh process."""


def test_a_run_is_that_of_a_fresh_process(tmp_path: Path) -> None:
    alone, together = Bench(tmp_path / "alone"), Bench(tmp_path / "together")
    one = alone.job("train", *WORDS)
    fresh = execute(one)
    with nursery():
        assert nursery_for("cpu") is not None
        for seed in (1, 0):
            record = execute(job := together.job("train", *WORDS, f"seed={seed}"))
    assert nursery_for("cpu") is None
    assert together.artefact(job) == alone.artefact(one)
    assert together.losses(job) == alone.losses(one)
    assert base_bytes(record) == pytest.approx(base_bytes(fresh), rel=ALIKE)


QUIETED = """
import sys
from effbench.runner import nursery_process, worker
def quieted():
    sys.exit(bool({"torch", "transformers"} & set(sys.modules)))
worker.quiet_libraries = quieted
nursery_process._import_what_runs_need()
sys.exit("never")
"""


def test_libraries_are_quieted_before_they_are_imported() -> None:
    done = subprocess.run([sys.executable, "-c", QUIETED], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def base_bytes(record: Record) -> float:
    return next(m.value for m in record.metrics if m.name == "base_bytes")


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nursery]:
    """Yield a nursery whose runs are short programs."""
    monkeypatch.setattr(module, "NAME", "light_nursery")
    places = (str(Path(__file__).parent), os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, places)))
    with nursery():
        found = nursery_for("cpu")
        assert found is not None
        yield found


def status_of(light: Nursery, program: str, files: tuple[int, int] = (2, 2)) -> int:
    child = light.fork(program, {"SAID": "yes"}, files)
    assert child is not None
    return child.wait()


def test_statuses_come_through_one_run_after_another(light: Nursery) -> None:
    assert status_of(light, "status = 3") == 3
    assert status_of(light, "import os; status = 0 if os.environ['SAID'] == 'yes' else 1") == 0
    assert status_of(light, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)") == -9
    assert status_of(light, "import signal; status = int(signal.getsignal(2) is None)") == 0
    assert status_of(light, "seen = 1") == status_of(light, "status = int('seen' in globals())")


def test_what_a_run_says_goes_where_it_is_listened_to(light: Nursery, tmp_path: Path) -> None:
    with (tmp_path / "said").open("w") as said, (tmp_path / "reason").open("w") as reason:
        program = "import os, sys; sys.stderr.write('a line'); os.write(reason, b'why')"
        assert status_of(light, program, (said.fileno(), reason.fileno())) == 0
    assert (tmp_path / "said").read_text() == "a line"
    assert (tmp_path / "reason").read_text() == "why"


WAITS = """
import signal, sys, time
def asked(number, frame):
    open({place!r}, "w").write("asked")
    sys.exit(130)
signal.signal(signal.SIGTERM, asked)
open({place!r} + ".begun", "w").close()
time.sleep(60)
"""


def appears(path: Path, seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.02)
    return path.exists()


def test_a_signal_reaches_the_run_alone(light: Nursery, tmp_path: Path) -> None:
    child = light.fork(WAITS.format(place=str(tmp_path / "run")), {}, (2, 2))
    assert child is not None
    assert appears(tmp_path / "run.begun")
    child.send_signal(signal.SIGTERM)
    assert child.wait() == 130
    assert status_of(light, "status = 0") == 0


@pytest.mark.skipif(sys.platform != "linux", reason="others do not tell of a parent's end")
def test_a_run_is_asked_to_stop_when_its_launcher_is_killed(light: Nursery, tmp_path: Path) -> None:
    place = tmp_path / "run"
    launcher = f"""
    from effbench.runner import nursery as module
    module.NAME = "light_nursery"
    with module.nursery():
        module.nursery_for("cpu").fork({WAITS.format(place=str(place))!r}, {{}}, (2, 2)).wait()
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(launcher)]) as process:
        assert appears(tmp_path / "run.begun")
        process.kill()
    assert appears(place)


def test_where_no_run_can_be_forked_processes_are_fresh(
    light: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "NAME", "effbench.no_such_module")
    assert light.fork("", {}, (2, 2)) is None
    monkeypatch.setattr(module, "NAME", "light_nursery")
    assert light.fork("", {}, (2, 2)) is None


def test_runs_on_a_gpu_are_fresh_processes(light: Nursery) -> None:
    assert nursery_for("cuda") is None
