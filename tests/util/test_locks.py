"""Locks, also on file systems that have none."""

from __future__ import annotations

import errno
import os
import platform
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from config.test_config import SPEC

from effbench.results.store import RunFolder
from effbench.util.cache import make_once
from effbench.util.errors import UserError
from effbench.util.locks import locked


@pytest.fixture(params=["ENOLCK", "ENOTSUP", None])
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
    assert (f"delete {path}.held" in said[0]) == (system is not None)
    with locked(path, said.append):
        pass
    assert len(said) == 1


def test_a_marker_of_a_process_that_is_gone_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr("fcntl.flock", refuse)
    gone = subprocess.Popen(["true"])
    gone.wait()
    (tmp_path / ".x.lock.held").write_text(f"{gone.pid}\n{platform.node()}\n")
    waited: list[str] = []
    with locked(tmp_path / ".x.lock", waited.append):
        assert (tmp_path / ".x.lock.held").exists()
    assert not any(tmp_path.iterdir())


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
