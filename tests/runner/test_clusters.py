"""Grids on clusters of this machine: Ray, submitit without SLURM, SLURM itself; with accidents."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import network_guard
import pytest
from slurm_here import found, slurm

from effbench.results.events import read_events
from effbench.results.store import Store
from effbench.results.sweeps import outcomes_in

RUN = [
    "model=tiny",
    "dataset=arithmetic",
    "run.progress=false",
    "dataset.limit.test=8",
    "method.rank=2",
    "train.batch_size=2",
    "train.max_steps=150",
    "train.checkpoint_every=10",
    "hardware.device=cpu",
    "hardware.dtype=float32",
    "hardware.threads=1",
]
"""Long enough to be hit, short enough to end."""
MAIN = [sys.executable, "-P", "-c", "from effbench.cli.main import main; main()"]
STRAY = ("yaml", "logging", "effbench", "ray", "submitit")
"""Modules in the folder where a grid is given, with names that a run imports."""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]
RAY = [
    pytest.mark.skipif(not find_spec("ray"), reason="needs effbench[ray]"),
    pytest.mark.usefixtures("only_metadata"),
]
METADATA = ("169.254.169.254:", "metadata.google.internal:")
"""What a new Ray cluster asks in which cloud it is, though nothing is reported: its own addresses
for that, on the machine's link."""


def with_ray(test: Callable[..., None]) -> Callable[..., None]:
    for mark in RAY:
        test = mark(test)
    return test


@pytest.fixture
def only_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(network_guard.TRIED, str(tmp_path / "tried"))
    yield
    told = network_guard.attempts().splitlines()
    assert all(line.startswith(METADATA) for line in told), told


needs_submitit = pytest.mark.skipif(not find_spec("submitit"), reason="needs effbench[slurm]")


@contextmanager
def grid(folder: Path, *words: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    """Start the command of a grid of two seeds in a folder, whose modules must not be run."""
    folder.mkdir(exist_ok=True)
    for module in STRAY:
        (folder / f"{module}.py").write_text("open(__file__ + '.ran', 'w')")
    told = (folder / "said").open("w")
    command = [*MAIN, "train", "-m", "seed=0,1", *RUN, *words]
    process = subprocess.Popen(
        command, cwd=folder, env={**os.environ, **env}, stdout=told, stderr=told, text=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)
    assert not list(folder.glob("*.ran"))


def steps(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the steps of training that each run of a grid has logged, and when."""
    logs = (folder / "results" / "runs").glob("*/events.jsonl")
    return {p.parent.name: [(e["step"], e["time"]) for e in read_events(p, "step")] for p in logs}


def until(done: Callable[[], Any], folder: Path, seconds: float = 300) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := done():
            return value
        time.sleep(0.05)
    raise AssertionError((folder / "said").read_text()[-3000:])


def at_work(folder: Path) -> list[str]:
    """Return the keys of the runs that have a checkpoint and are not finished."""
    store = Store(folder / "results")
    runs = [store.run(key) for key in steps(folder)]
    return [r.key for r in runs if r.checkpoint.exists() and not r.finished]


def processes(*words: str) -> list[int]:
    """Return the processes of this machine whose command has some words."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = place.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if all(word in command for word in words):
            found.append(int(place.parent.name))
    return found


def parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def below(process: int, root: int) -> bool:
    with suppress(OSError):  # it has ended meanwhile
        while process > 1 and process != root:
            process = parent(process)
    return process == root


def workers(launcher: subprocess.Popen[str]) -> list[int]:
    """Return the processes of runs that a launcher of this test has started, at any depth."""
    return [p for p in processes("effbench.runner.worker") if below(p, launcher.pid)]


def whole(folder: Path, went_on: Sequence[str] = (), when: float = 0) -> None:
    """Check that both runs are finished, with each step once.

    Args:
        folder: Of the grid.
        went_on: Keys of those that were stopped after their first checkpoint: they keep its steps.
        when: Seconds since the epoch of that.
    """
    said = (folder / "said").read_text()
    assert len(list((folder / "results" / "records").glob("*.json"))) == 2, said
    assert said.count("  done") == 2, said
    for key, logged in steps(folder).items():
        assert [number for number, _ in logged] == list(range(1, 151))
        if key in went_on:
            assert logged[9][1] < when < logged[-1][1]


@with_ray
def test_ray_runs_a_grid_with_two_workers(tmp_path: Path) -> None:
    words = ["launcher=ray", "hydra.launcher.cluster_cpus=2", "train.max_steps=2"]
    with grid(tmp_path, *words) as process:
        assert process.wait(300) == 0, (tmp_path / "said").read_text()
    said = (tmp_path / "said").read_text()
    assert said.count("  done") == 2, said
    assert len(list((tmp_path / "results" / "records").glob("*.json"))) == 2


@with_ray
def test_ray_tries_a_run_again_whose_worker_is_killed_and_it_goes_on(tmp_path: Path) -> None:
    with grid(tmp_path, "launcher=ray", "hydra.launcher.cluster_cpus=2") as process:
        keys, when = until(lambda: at_work(tmp_path), tmp_path), time.time()
        for victim in (p for p in processes("ray::_run") if below(p, process.pid)):
            os.kill(victim, signal.SIGKILL)
        assert process.wait(400) == 0, (tmp_path / "said").read_text()
    whole(tmp_path, keys, when)


@with_ray
def test_what_a_ray_cluster_cannot_run_is_told(tmp_path: Path) -> None:
    words = ["launcher=ray", "hydra.launcher.cluster_cpus=2", "hydra.launcher.num_gpus=4"]
    with grid(tmp_path, *words) as process:
        assert process.wait(300) == 2
    said = (tmp_path / "said").read_text()
    assert said.count("failed: It needs 4 GPU, the Ray cluster has 0.") == 2, said


@needs_submitit
def test_a_job_that_is_signalled_saves_is_put_back_and_goes_on(tmp_path: Path) -> None:
    words = ["launcher=slurm", "hydra.launcher.cluster=local", "hydra.launcher.timeout_min=30"]
    with grid(tmp_path, *words) as process:
        keys, when = until(lambda: at_work(tmp_path), tmp_path), time.time()
        for running in workers(process):
            os.kill(parent(running), signal.SIGUSR2)
        assert process.wait(400) == 0, (tmp_path / "said").read_text()
    whole(tmp_path, keys, when)


@needs_submitit
def test_a_job_that_vanishes_does_not_end_the_others(tmp_path: Path) -> None:
    words = ["launcher=slurm", "hydra.launcher.cluster=local", "hydra.launcher.timeout_min=30"]
    with grid(tmp_path, *words) as process:
        until(lambda: at_work(tmp_path), tmp_path)
        job = parent(workers(process)[0])
        for victim in (parent(job), job):
            os.kill(victim, signal.SIGKILL)
        assert process.wait(400) == 2
    said = (tmp_path / "said").read_text()
    assert said.count("  done") == 1 and said.count("failed: Job ") == 1, said
    with grid(tmp_path) as process:
        assert process.wait(400) == 0
    whole(tmp_path)


needs_slurm = pytest.mark.skipif(
    not found(), reason="needs SLURM's daemons, and root to start them"
)
SLURM = [
    "launcher=slurm",
    "hydra.launcher.partition=low",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.gpus_per_node=null",
    "hydra.launcher.mem_gb=null",
]


def jobs(folder: Path, env: dict[str, str]) -> str:
    """Return what SLURM says of all jobs, a line each."""
    command = ["scontrol", "-o", "show", "job"]
    told = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=True)
    return told.stdout


def without_errors(folder: Path) -> None:
    grids = (folder / "results" / "sweeps").iterdir()
    assert not any(outcome["error"] for grid in grids for outcome in outcomes_in(grid))


@needs_submitit
@needs_slurm
def test_slurm_preempts_a_job_which_saves_is_requeued_and_goes_on(tmp_path: Path) -> None:
    words = [*SLURM, "hydra.launcher.timeout_min=30"]
    with slurm(tmp_path / "slurm") as env, grid(tmp_path, *words, **env) as process:
        keys, when = until(lambda: at_work(tmp_path), tmp_path), time.time()
        command = ["sbatch", "-p", "high", "-c", "2", "-o", "/dev/null", "--wrap", "sleep 5"]
        subprocess.run(command, env=env, cwd=tmp_path, check=True, capture_output=True)
        assert process.wait(500) == 0, (tmp_path / "said").read_text()
        assert "Restarts=1" in jobs(tmp_path, env)
    whole(tmp_path, keys, when)
    without_errors(tmp_path)


@needs_submitit
@needs_slurm
def test_a_job_at_its_time_limit_saves_is_requeued_and_goes_on(tmp_path: Path) -> None:
    # SLURM's clock for such signals is a minute: they come up to that much early
    words = [*SLURM, "hydra.launcher.timeout_min=2", "hydra.launcher.signal_delay_s=60"]
    words += ["hydra.launcher.max_num_timeout=30", "train.batch_size=96"]
    with slurm(tmp_path / "slurm") as env, grid(tmp_path, *words, **env) as process:
        assert process.wait(1500) == 0, (tmp_path / "said").read_text()
        assert re.search("Restarts=[1-9]", told := jobs(tmp_path, env)), told
    whole(tmp_path)
    without_errors(tmp_path)
