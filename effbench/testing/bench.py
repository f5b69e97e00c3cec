"""Runs inside the process of a test, and ways to break them off."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from effbench.api.schema import canonical
from effbench.api.spec import DatasetSpec, Job, Stage
from effbench.config.compose import compose
from effbench.data import dataset
from effbench.results.events import EventLog, read_events
from effbench.results.records import Record, read
from effbench.results.store import RunFolder, Store

if TYPE_CHECKING:
    import pytest

TINY = ["model=tiny", "dataset=arithmetic", "run.progress=false", "dataset.limit.test=24"]
"""A random model on generated questions: no download, a run in half a second."""


class HardKill(BaseException):
    """Stands for a process that ends without a chance to save anything."""


class Bench:
    """Runs jobs inside the test's process, in a results folder of the test's own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = Store(root)

    def job(self, stage: Stage, *overrides: str) -> Job:
        """Return the job of a command on the tiny model, unless the overrides say another one."""
        own = {o.partition("=")[0] for o in overrides}
        inherited = ("model", "dataset") if "from" in own else ()
        tiny = [t for t in TINY if t.partition("=")[0] not in own and not t.startswith(inherited)]
        return compose(stage, [*tiny, f"run.results={self.root}", *overrides])

    def folder(self, job: Job) -> RunFolder:
        """Return the run folder of a job."""
        return self.store.run(job.spec.key)

    def run(self, stage: Stage, *overrides: str) -> Record:
        """Run to the end; raises what the run's process would print."""
        job = self.job(stage, *overrides)
        self.go(job)
        return read(self.store.records / f"{job.spec.key}.json")

    def go(self, job: Job) -> None:
        """Run a job, or go on with it, as in a process of its own."""
        from effbench.runner.worker import run_here

        forget_accelerator()
        with mock.patch.object(dataset, "read", partial(_read_once, dataset.read)):
            run_here(job)

    def losses(self, job: Job) -> list[float]:
        """Return the loss of each step of a run."""
        return [e["loss"] for e in read_events(self.folder(job).path / "events.jsonl", "step")]

    def artefact(self, job: Job) -> dict[str, bytes]:
        """Return the content of each file of a run's artefact."""
        return contents(self.folder(job).artefact)


_generated: dict[tuple[Any, str, int], Any] = {}


def _read_once(read: Callable[[DatasetSpec, int], Any], spec: DatasetSpec, seed: int = 0) -> Any:
    """Return what a generator gives, rendered once for all tests of a process."""
    if spec.source != "generator":
        return read(spec, seed)
    place = read, canonical(spec), seed if spec.drawn else 0
    if place not in _generated:
        _generated[place] = read(spec, seed)
    texts, readings = _generated[place]
    return {name: list(rows) for name, rows in texts.items()}, deepcopy(readings)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of each file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def forget_accelerator() -> None:
    """accelerate keeps its precision for the life of a process; a run has a process of its own."""
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


def act_after(patch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    """Do something as soon as so many further steps or parts are on the record."""
    seen = 0
    append = EventLog.append

    def watched(log: EventLog, kind: str, **facts: Any) -> None:
        nonlocal seen
        append(log, kind, **facts)
        seen += kind in ("step", "part")
        if kind in ("step", "part") and seen == number:
            act()

    patch.setattr(EventLog, "append", watched)


def ask_to_stop() -> None:
    """Ask this process to stop, as Ctrl-C does."""
    os.kill(os.getpid(), signal.SIGINT)


def kill() -> None:
    """End the run where it is; nothing is saved.

    Raises:
        HardKill: Always.
    """
    raise HardKill


def without_evaluation(patch: pytest.MonkeyPatch) -> None:
    """Leave out the evaluation at the end of a training or compression."""
    from effbench.runner.stages import compress, train

    for module in (train, compress):
        patch.setattr(module, "evaluate", lambda *_: None)
