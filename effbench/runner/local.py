"""A process per run, so that memory peaks and random states are its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from effbench.api.schema import plain
from effbench.api.spec import Job
from effbench.results.records import Record, read
from effbench.results.store import Store
from effbench.runner.nursery import Child, Nursery, nursery_for
from effbench.runner.progress import PACE
from effbench.runner.signals import ASKED, INTERRUPTED, passed_on
from effbench.runner.worker import REASON
from effbench.util.errors import RunFailedError, UserError
from effbench.util.wrap import write

Process = subprocess.Popen[str] | Child
"""Of one run."""

STDERR = 2
"""Number of this process's own standard error."""
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
    made = store.missing()
    if fresh:
        folder = store.run(job.spec.key)
        with folder.locked():
            folder.clear()
    elif record := record_of(job):
        _tidy(store, job.spec.key)
        return record
    # -P: a stray file in the current folder is no module of ours.
    command = [sys.executable, "-P", "-m", "effbench.runner.worker_process"]
    home = None if hands.began else nursery_for(job.spec.hardware.device)
    with TemporaryFile() as told:
        status = _run_process(command, json.dumps(plain(job)), told.fileno(), hands, home)
        told.seek(0)
        reason = told.read().decode()
    if status == REFUSED:
        with suppress(UserError, OSError):  # a folder that cannot be written has been named by now
            with store.run(job.spec.key).locked():
                store.run(job.spec.key).discard_unless_begun()
            store.give_back(made)
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


def _run_process(
    command: Sequence[str], text: str, reason: int, hands: Hands, home: Nursery | None = None
) -> int:
    """Run a job in a process and return its exit status; signals let it save before it ends.

    Args:
        command: The words of a fresh process.
        text: The job, which that reads.
        reason: Number of an open file that the reason of a failure is written to.
        hands: What it is given.
        home: What it is forked from instead, where that can be done.

    Raises:
        RunFailedError: When Ctrl-C came before there was a process.
    """
    variables = {**({PACE: "1"} if hands.listen else {}), **hands.environment}
    errors, theirs = _pipe() if hands.listen else (None, STDERR)
    with closing(errors) if errors else nullcontext():
        try:
            process: Process = (home and home.fork(text, variables, [theirs, reason])) or _started(
                command, variables, reason, theirs, bool(hands.began)
            )
        finally:
            if errors:
                os.close(theirs)
        if hands.began and isinstance(process, subprocess.Popen):
            hands.began(process)
        with process, passed_on(process):
            while True:
                try:
                    _give(process, text)
                    _hear(errors, hands.listen)
                    return process.wait()
                except KeyboardInterrupt:
                    continue


def _started(
    command: Sequence[str], variables: Mapping[str, str], reason: int, errors: int, apart: bool
) -> subprocess.Popen[str]:
    """Start a run's process from the ground up.

    Args:
        command: The words of it.
        variables: Its environment beside that of this process.
        reason: Number of an open file that the reason of a failure is written to.
        errors: Number of that of its standard error.
        apart: Whether it is in a group of its own.
    """
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stderr=errors,
        text=True,
        pass_fds=[reason],
        env={**os.environ, **variables, REASON: str(reason)},
        process_group=0 if apart else None,
    )


def _give(process: Process, text: str) -> None:
    """Write a job to the standard input of a process that has not had it, and close that."""
    if isinstance(process, subprocess.Popen) and process.stdin and not process.stdin.closed:
        with suppress(BrokenPipeError), process.stdin:  # it has ended, and says why itself
            process.stdin.write(text)


def _pipe() -> tuple[IO[str], int]:
    """Return where standard error is read, and the number of where it is written."""
    read_end, write_end = os.pipe()
    return os.fdopen(read_end, errors="replace"), write_end


def _hear(errors: IO[str] | None, listen: Callable[[str], None] | None) -> None:
    """Pass on what a process says, until it says no more."""
    if errors and listen:
        for line in errors:
            listen(line.rstrip("\n"))
