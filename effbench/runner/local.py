"""A fresh process per run, so that memory peaks and random states are its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile

from effbench.api.schema import plain
from effbench.api.spec import Job
from effbench.results.records import Record, read
from effbench.results.store import Store
from effbench.runner.signals import ASKED, passed_on
from effbench.runner.worker import INTERRUPTED, REASON
from effbench.util.errors import RunFailedError, UserError

REFUSED = 2
"""Exit status of a run that the user can mend; `effbench.runner.worker` gives it."""


def record_of(job: Job) -> Record | None:
    """Return the record of a job that was run before, or None."""
    store = Store(Path(job.runtime.results))
    path = store.records / f"{job.spec.key}.json"
    return read(path) if store.run(job.spec.key).finished and path.is_file() else None


def execute(job: Job, fresh: bool = False) -> Record:
    """Run a job to its end, or return its record when it has come to it before.

    Args:
        job: What to run.
        fresh: Forget an earlier run of the same key first.

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
    command = [sys.executable, "-P", "-m", "effbench.runner.worker"]
    with TemporaryFile() as told:
        status = _run_process(command, json.dumps(plain(job)), told.fileno())
        told.seek(0)
        reason = told.read().decode()
    if status == REFUSED:
        with store.run(job.spec.key).locked():
            store.run(job.spec.key).discard_unless_begun()
    if status < 0:
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


def _run_process(command: Sequence[str], text: str, reason: int) -> int:
    """Run a command with `text` on its standard input; signals let it save before it ends.

    Args:
        command: The words of it.
        text: What it reads.
        reason: Number of an open file that the reason of a failure is written to.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        text=True,
        pass_fds=[reason],
        env={**os.environ, REASON: str(reason)},
    )
    with process, passed_on(process):
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, and says why itself
            process.stdin.write(text)
            process.stdin.close()
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue
