"""The runs of a grid at work, here or wherever a launcher takes them, and what is kept of each."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effbench.api.spec import Job, Stage
from effbench.config.compose import commanded, job_from
from effbench.report.comparison.select import require_measured
from effbench.report.grid import counts
from effbench.results.store import Store
from effbench.results.sweeps import OUTCOME, Cell, settle
from effbench.runner.grid.cells import Cells
from effbench.runner.grid.room import need_of, this_machine
from effbench.runner.grid.schedule import Schedule
from effbench.runner.grid.screen import Screen
from effbench.runner.local import Hands, execute, record_of
from effbench.runner.nursery import nursery
from effbench.runner.objective import Objective
from effbench.runner.signals import INTERRUPTED
from effbench.util.errors import RunFailedError, UserError
from effbench.util.files import mendable
from effbench.util.wrap import write


@dataclass(frozen=True)
class Outcome:
    """How one run of a grid ended."""

    overrides: list[str]
    key: str
    error: str = ""
    value: float | None = None
    """Of the objective, where the grid has one and the run ended well."""
    seconds: float = 0.0
    """What it took; 0 where it was done before."""


@dataclass(frozen=True)
class Work:
    """How each run of a grid is run."""

    stage: Stage
    chosen: set[str]
    """The groups and keys that the grid's words set."""
    fresh: bool
    """Whether what is finished is run again."""
    objective: Objective | None

    def of_config(
        self, config: Callable[[], dict[str, Any]], point: Sequence[str], place: Path
    ) -> float:
        """Run what Hydra composed, and return its value of the objective; NaN without one.

        Args:
            config: Gives its composed config.
            point: Its words.
            place: Folder of its outcome.

        Raises:
            KeyboardInterrupt: When it was interrupted.
        """
        cell = Cell(0, [word.lstrip("+") for word in point])
        try:
            job = commanded(job_from(self.stage, config(), self.chosen), point)
            cell.key = job.spec.key
            self.of_job(job, cell, Hands())
        except UserError as problem:
            cell.error = str(problem)
        if cell.state == "interrupted":
            raise KeyboardInterrupt
        keep(cell, place)
        return math.nan if cell.value is None else cell.value

    def of_job(self, job: Job, cell: Cell, hands: Hands) -> None:
        """Run a job to its end, and fill in what came of it."""
        begun = time.time()
        try:
            if self.objective:
                require_measured(job.spec.evaluators, self.objective.criterion)
            record = execute(job, self.fresh, hands)
            cell.value = self.objective.of(record) if self.objective else None
            cell.state = "done"
        except UserError as problem:
            cell.state, cell.error = "failed", str(problem)
        except RunFailedError as problem:
            stopped = problem.status == INTERRUPTED
            cell.state = "interrupted" if stopped else "failed"
            cell.error = "" if stopped else str(problem)
        cell.seconds = time.time() - begun

    def settle(self, cells: Cells) -> None:
        """Find out which runs of a grid there is nothing to do for, and plan the others."""
        if not self.fresh:
            cells.mark_done()
        for cell in cells.all:
            if cell.state == "done":
                self._judge(cells.jobs[cell.number], cell)
        cells.plan()

    def _judge(self, job: Job, cell: Cell) -> None:
        """Fill in the value of a run that was done before."""
        record = record_of(job) if self.objective else None
        try:
            cell.value = self.objective.of(record) if self.objective and record else None
        except UserError as problem:
            cell.state, cell.error = "failed", str(problem)


def keep(cell: Cell, place: Path) -> None:
    """Write down what came of a run.

    Args:
        cell: The run.
        place: Its folder in that of the grid.
    """
    with mendable(place):  # not forced to the disk one by one: a grid may have thousands
        place.mkdir(parents=True, exist_ok=True)
        (place / OUTCOME).write_text(json.dumps(vars(_outcome(cell))))


def _outcome(cell: Cell) -> Outcome:
    return Outcome(cell.words, cell.key, cell.error, cell.value, cell.seconds)


def run_here(cells: Cells, jobs: int, work: Work, folder: Path) -> None:
    """Run on this machine what of a grid is not done.

    Args:
        cells: Its runs.
        jobs: Most of them at once.
        work: How each is run.
        folder: Of the grid.

    Raises:
        RunFailedError: When the grid was interrupted.
    """

    def perform(cell: Cell, hands: Hands) -> None:
        work.of_job(cells.jobs[cell.number], cell, hands)
        if cell.state != "interrupted":
            keep(cell, folder / str(cell.number))

    store = Store(folder.parents[1])
    keep_ended(cells, folder)
    jobs = max(1, min(jobs, sum(cell.state == "waiting" for cell in cells.all)))
    with Screen(cells.all, jobs) as screen:
        schedule = Schedule(cells.all, lambda c: store.run(c.key).held, perform, screen)
        for cell in cells.all:
            if cell.state == "failed":
                screen.ended(cell)
        if jobs == 1:
            with nursery():
                schedule.in_turn()
        else:
            schedule.side_by_side(jobs, this_machine(jobs), lambda c: need_of(cells.jobs[c.number]))
    keep_ended(cells, folder)
    if schedule.stopped:
        write(f"Stopped. {counts(cells.all)}. The same command goes on.")
        raise RunFailedError(INTERRUPTED)


def keep_ended(cells: Cells, folder: Path) -> None:
    """Write down what came of runs that were done before, could not be, or are twins of others.

    Args:
        cells: All runs of the grid.
        folder: Of the grid.
    """
    own = {path.name for path in folder.iterdir()}
    ended = [c for c in cells.all if c.state in ("done", "failed") and str(c.number) not in own]
    with mendable(folder):
        settle(folder, {cell.number: vars(_outcome(cell)) for cell in ended})
