"""A fresh process per run, so that memory peaks and random states are its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile

from effbench.api.schema import plain
from effbench.api.spec import Job
from effbench.results.records import Record, read
from effbench.results.store import Store
from effbench.runner.progress import PACE
from effbench.runner.signals import ASKED, passed_on
from effbench.runner.worker import INTERRUPTED, REASON
from effbench.util.errors import RunFailedError, UserError
from effbench.util.wrap import write

REFUSED = 2
"""Exit status of a run that the user can mend; `effbench.runner.worker` gives it."""


@dataclass(frozen=True)
class Hands:
    """What a run's process is given, and who hears what it says."""

    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables beside those of this process."""
    listen: Callable[[str], None] | None = None
    """Called with each line of its standard error; None lets it write to ours."""
    began: Callable[[subprocess.Popen[str]], None] | None = None
    """Called with the process, which then is in a group of its own: who is called passes signals
    on. None leaves it in ours, where Ctrl-C reaches it by itself."""


def is_done(job: Job, key: str) -> bool:
    """Whether a job, whose key is known, has come to its end before and has its record."""
    store = Store(Path(job.runtime.results))
    return store.run(key).finished and (store.records / f"{key}.json").is_file()


def record_of(job: Job) -> Record | None:
    """Return the record of a job that was run before, or None."""
    key = job.spec.key
    path = Store(Path(job.runtime.results)).records / f"{key}.json"
    return read(path) if is_done(job, key) else None


def execute(job: Job, fresh: bool = False, hands: Hands = Hands()) -> Record:
    """Run a job to its end, or return its record when it has come to it before.

    Args:
        job: What to run.
        fresh: Forget an earlier run of the same key first.
        hands: What its process is given.

    Raises:
        RunFailedError: When the run's process failed or was interrupted.
    """
    store = Store(Path(job.runtime.results))
    if fresh:
        folder = store.run(job.spec.key)
        with folder.locked():
            folder.clear()
    elif record := record_of(job):
        _tidy(store, job.spec.key)
        return record
    # -P: a stray file in the current folder is no module of ours.
    command = [sys.executable, "-P", "-m", "effbench.runner.worker_process"]
    with TemporaryFile() as told:
        status = _run_process(command, json.dumps(plain(job)), told.fileno(), hands)
        told.seek(0)
        reason = told.read().decode()
    if status == REFUSED:
        with store.run(job.spec.key).locked():
            store.run(job.spec.key).discard_unless_begun()
    if status < 0:
        if -status in ASKED and not hands.listen:  # sooner than the process could say so
            write("Stopped before the run began.")
        raise _ended_by(-status)
    if status:
        raise RunFailedError(status, reason)
    record = record_of(job)
    if record is None:
        raise UserError(
            f"Run {job.spec.key} ended without a record.", "Give the command again with --fresh."
        )
    return record


def _tidy(store: Store, key: str) -> None:
    """Remove what a process that was killed at the very end left of a finished run."""
    if store.run(key).leftovers():
        with store.run(key).locked():
            store.sweep(key)


def _ended_by(number: int) -> Exception:
    """Return what there is to say of a process that a signal ended without a word of its own."""
    if number in (signal.SIGINT, *ASKED):
        return RunFailedError(INTERRUPTED)
    name = signal.Signals(number).name
    if name == "SIGKILL":
        return UserError(
            "The run's process was killed (SIGKILL), most likely because memory ran out.",
            "`effbench plan` says what it needs; a smaller train.batch_size needs less. The same "
            "command goes on from the last checkpoint.",
        )
    return UserError(
        f"The run's process crashed ({name}), in a library that it calls.",
        "`effbench doctor` lists known causes. The same command goes on from the last checkpoint.",
    )


def _run_process(command: Sequence[str], text: str, reason: int, hands: Hands) -> int:
    """Run a command with `text` on its standard input; signals let it save before it ends.

    Args:
        command: The words of it.
        text: What it reads.
        reason: Number of an open file that the reason of a failure is written to.
        hands: What it is given.
    """
    pace = {PACE: "1"} if hands.listen else {}
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE if hands.listen else None,
        text=True,
        errors="replace",
        pass_fds=[reason],
        env={**os.environ, **pace, **hands.environment, REASON: str(reason)},
        process_group=0 if hands.began else None,
    )
    if hands.began:
        hands.began(process)
    with process, passed_on(process):
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, and says why itself
            process.stdin.write(text)
            process.stdin.close()
        while True:
            try:
                _hear(process, hands.listen)
                return process.wait()
            except KeyboardInterrupt:
                continue


def _hear(process: subprocess.Popen[str], listen: Callable[[str], None] | None) -> None:
    """Pass on what a process says, until it says no more."""
    if listen and process.stderr:
        for line in process.stderr:
            listen(line.rstrip("\n"))
