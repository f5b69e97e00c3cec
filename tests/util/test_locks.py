"""Locks, also on file systems that have none."""

from __future__ import annotations

import errno
import os
import platform
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from config.test_config import SPEC

from effbench.results.index import summaries
from effbench.results.records import SCHEMA, Record, read_all, write
from effbench.results.store import RunFolder, Store
from effbench.util import locks
from effbench.util.cache import make_once
from effbench.util.errors import UserError
from effbench.util.locks import locked


@pytest.fixture(params=["ENOLCK", "ENOTSUP", "ENOSYS", None])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """Let the file system have no locks, and say so in each way that there is."""
    if request.param:

        def refuse(*_: Any) -> None:
            raise OSError(getattr(errno, request.param), "no locks here")

        monkeypatch.setattr("fcntl.flock", refuse)
    return request.param


def test_the_second_one_waits_and_is_told_for_whom(tmp_path: Path, system: str | None) -> None:
    path, said, entered = tmp_path / ".x.lock", [], threading.Event()

    def second() -> None:
        with locked(path, said.append):
            entered.set()

    waiter = threading.Thread(target=second)
    with locked(path):
        waiter.start()
        assert not entered.wait(0.5)
    assert entered.wait(20)
    waiter.join()
    assert len(said) == 1
    assert said[0].startswith(f"process {os.getpid()} on {platform.node()}")
    assert (f"{path}.held is free after 5 minutes" in said[0]) == (system is not None)
    with locked(path, said.append):
        pass
    assert len(said) == 1


def record(key: str) -> Record:
    return Record(SCHEMA, key, key, "train", {}, {}, "", "2026-01-01T00:00:00.000+00:00", 1, [])


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr("fcntl.flock", refuse)


def marker(path: Path, pid: int, machine: str) -> Path:
    """Leave the file of a holder on some machine."""
    held = path.with_name(f"{path.name}.held")
    held.write_text(
        f"filelock/2\npid={pid}\nhost={machine}\nmode=lease\ntoken={'0' * 32}\n"
        f"duration={locks.LEASE_SECONDS!r}\n"
    )
    return held


@pytest.mark.usefixtures("no_flock")
def test_a_marker_of_a_process_that_is_gone_is_taken_over(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    held = marker(tmp_path / ".x.lock", gone.pid, platform.node())
    assert not locks.is_held(tmp_path / ".x.lock")
    with locked(tmp_path / ".x.lock", lambda holder: None):
        assert held.exists() and locks.is_held(tmp_path / ".x.lock")
    assert not any(tmp_path.iterdir())


@pytest.mark.usefixtures("no_flock")
@pytest.mark.parametrize("ahead", [-3600, 0, 3600])
def test_a_holder_elsewhere_is_waited_for_until_nothing_is_heard_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    """Whatever its clock says: its file has a time from there."""
    monkeypatch.setattr(locks, "LEASE_SECONDS", 0.4)
    monkeypatch.setattr(locks, "TOUCH_SECONDS", 0.1)
    held, said = marker(tmp_path / ".x.lock", 1, "elsewhere"), list[str]()
    now, began = time.time(), time.monotonic()

    def touch() -> None:
        for number in range(6):
            os.utime(held, (now + ahead + number, now + ahead + number))
            time.sleep(0.1)

    other = threading.Thread(target=touch)
    other.start()
    with locked(tmp_path / ".x.lock", said.append):
        assert time.monotonic() - began > 0.8
    other.join()
    assert len(said) == 1 and said[0].startswith("process 1 on elsewhere")


@pytest.mark.usefixtures("no_flock")
def test_who_slept_through_its_lock_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "LEASE_SECONDS", 0.2)
    monkeypatch.setattr(locks, "TOUCH_SECONDS", 0.05)
    ended = threading.Event()
    monkeypatch.setattr(locks, "_give_up", lambda loss: ended.set())
    with locked(tmp_path / ".x.lock"):
        assert not ended.wait(0.3), "a holder that is awake keeps it"
        (tmp_path / "new").write_text("another's")
        (tmp_path / "new").replace(tmp_path / ".x.lock.held")
        assert ended.wait(5)


def test_giving_up_ends_the_process_with_a_word() -> None:
    code = (
        "from types import SimpleNamespace\n"
        "from effbench.util.locks import _give_up\n"
        "_give_up(SimpleNamespace(lock_file='x.held', reason='owner-changed'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == locks.TAKEN_OVER
    assert "lost x.held (owner-changed)" in done.stderr


def test_looking_does_not_stumble_over_who_finds_out_that_there_are_no_locks(
    tmp_path: Path, system: str | None
) -> None:
    (tmp_path / ".x.lock").touch()
    assert not locks.is_held(tmp_path / ".x.lock")


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize("count", [8, pytest.param(64, marks=pytest.mark.slow)])
def test_many_writers_at_once_leave_each_record_whole(tmp_path: Path, count: int) -> None:
    """Each run writes files of its own; the same run is made by one after the other."""
    store, inside, most = Store(tmp_path / "results"), [0], [0]

    def write_one(number: int) -> None:
        write(record(f"{number:016x}"), store.records)
        with store.run("shared").locked():
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            inside[0] -= 1
        summaries(store, lambda found: [found.key], [])

    with ThreadPoolExecutor(count) as threads:
        list(threads.map(write_one, range(count)))
    assert most == [1]
    assert [found.key for found in read_all(store.records)] == [f"{n:016x}" for n in range(count)]
    assert len(summaries(store, lambda found: [found.key], [])) == count
    assert not list(store.root.rglob("*.part"))


@pytest.mark.usefixtures("system")
def test_runs_and_the_cache_use_it(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "runs" / "abcd").locked():
        pass
    made = make_once(tmp_path / "x", {}, lambda new: (new / "y").touch(), "making x")  # type: ignore
    assert (made / "y").exists()


def test_a_place_that_cannot_be_written_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with (
        pytest.raises(UserError, match="cannot be written"),
        RunFolder(tmp_path / "runs" / "abcd").locked(),
    ):
        pass


def test_git_sees_neither_runs_nor_locks(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    run = RunFolder(tmp_path / "results" / "runs" / "abcd")
    with run.locked():
        run.create(SPEC)
    status = ["git", "-C", str(tmp_path), "status", "--porcelain", "--untracked-files=all"]
    assert not subprocess.run(status, capture_output=True, text=True, check=True).stdout
