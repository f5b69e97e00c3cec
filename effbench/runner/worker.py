"""The process of one run: `effbench.runner.worker_process`, with the job on standard input."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
import warnings
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from effbench.api.schema import build
from effbench.api.spec import Job
from effbench.api.stages import base as stages
from effbench.results.store import RunFolder, Store
from effbench.runner.progress import Progress
from effbench.runner.signals import INTERRUPTED
from effbench.util.errors import StoppedError, UserError, ran_out_of_memory
from effbench.util.files import places
from effbench.util.wrap import write

REASON = "EFFBENCH_REASON_FD"
"""Variable with the number of an open file for the reason of a failure, besides standard error."""
FITTING = (
    "`effbench plan` says what it needs; a smaller batch needs less. The same command goes on from "
    "the last checkpoint."
)
"""What to do when a run does not fit into memory."""


def main() -> int:
    """Run the job on standard input and return the exit status."""
    return run_text(sys.stdin.read())


def run_text(text: str) -> int:
    """Run a job, given as JSON, and return the exit status."""
    job = build(Job, json.loads(text), "job")
    try:
        with places():
            run_here(job)
    except UserError as error:
        return fail(error)
    except StoppedError as place:
        _say(f"Stopped after {place}; everything is saved. The same command goes on from there.")
        return INTERRUPTED
    except KeyboardInterrupt:
        _say("Stopped. The same command goes on from the last checkpoint.")
        return INTERRUPTED
    return 0


def run_here(job: Job) -> None:
    """Run a job in this process, unless it is finished; wait for whoever is on it.

    Raises:
        UserError: For anything a user can mend.
        StoppedError: When the run was asked to stop; its state is saved.
    """
    store = Store(Path(job.runtime.results))
    folder = store.run(job.spec.key)
    with folder.locked(lambda holder: _say(f"waiting: {holder} is on this very run")):
        store.sweep(job.spec.key)
        if not folder.finished:
            folder.create(job.spec)
            folder.write_json("environment.json", {"command": job.command})
            try:
                _run(job, folder, store)
            except Exception as error:
                with suppress(OSError), (folder.path / "log.txt").open("a") as log:
                    log.write(traceback.format_exc())
                if ran_out_of_memory(error):
                    raise UserError(
                        f"Memory ran out: {str(error).strip().splitlines()[0][:200]}", FITTING
                    ) from error
                raise


def quiet_libraries() -> None:
    """Have libraries say nothing of their own."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # what it warns of is ours to count
    warnings.filterwarnings("ignore")
    logging.getLogger().setLevel(logging.ERROR)


def _run(job: Job, folder: RunFolder, store: Store) -> None:
    quiet_libraries()
    progress = Progress(job.runtime.progress)
    progress.say(f"{job.spec.label}, in {folder.path}")
    with progress.during("loading torch and transformers"):
        from effbench.runner.run import finish, open_run

        run = open_run(job, folder, store, progress)
        import_module(stages.performs(job.spec.stage)).perform(run)
        finish(run)


def fail(error: UserError) -> int:
    """Say why the run failed, to whoever launched it too; return the exit status for it."""
    reason = error.message + (f"\n{error.hint}" if error.hint else "")
    _say(f"Error: {reason}")
    if place := os.environ.get(REASON):
        os.write(int(place), reason.encode())
    return 2


def _say(text: str) -> None:
    with suppress(OSError):  # the terminal may be gone, and that is why the run stops
        write(text)
