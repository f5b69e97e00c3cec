"""A fresh process per run, so that memory peaks and random states are its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from effbench.errors import RunFailedError, UserError
from effbench.records import Record, read
from effbench.schema import plain
from effbench.spec import Job
from effbench.store import Store

REFUSED = 2
"""Exit status of a run that the user can mend; `effbench.worker` gives it."""


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
        return record
    store.run(job.spec.key).create(job.spec)
    status = _run_process([sys.executable, "-m", "effbench.worker"], json.dumps(plain(job)))
    if status == REFUSED:
        with store.run(job.spec.key).locked():
            store.run(job.spec.key).discard_unless_begun()
    if status:
        raise RunFailedError(status)
    record = record_of(job)
    if record is None:
        raise UserError(
            f"Run {job.spec.key} ended without a record.", "Give the command again with --fresh."
        )
    return record


def _run_process(command: Sequence[str], text: str) -> int:
    """Run a command with `text` on its standard input; Ctrl-C lets it save before it ends."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        process.stdin.write(text)
        process.stdin.close()
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue
