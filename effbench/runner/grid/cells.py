"""The runs of a grid before they run: composed, found done, and what each is planned to take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from effbench.api.spec import Job, Spec, Stage
from effbench.config.compose import commanded, job_from
from effbench.config.vary import Composer
from effbench.resources.planned import predicted
from effbench.results.sweeps import Cell
from effbench.runner.local import is_done
from effbench.util.errors import UserError


class Cells:
    """All runs of a grid with their jobs, in the order of its words.

    Args:
        stage: The command.
        points: The words of each run.
        chosen: The groups and keys that they set.
        extra: Folders with the user's own configs.
        job_of: Makes the job of some words, where they stand over a file or an earlier run.

    Raises:
        UserError: When none of them can be composed: what is wrong with the first one.
    """

    def __init__(
        self,
        stage: Stage,
        points: Sequence[Sequence[str]],
        chosen: set[str],
        extra: Sequence[Path],
        job_of: Callable[[Sequence[str]], Job] | None = None,
    ) -> None:
        compose = Composer(extra)

        def from_configs(point: Sequence[str]) -> Job:
            return commanded(job_from(stage, compose(point), chosen), point)

        self._job_of = job_of or from_configs
        self.jobs: dict[int, Job] = {}
        self._problems: list[UserError] = []
        self.all = [self._cell(number, point) for number, point in enumerate(points)]
        if not self.jobs and self._problems:
            raise self._problems[0]

    def _cell(self, number: int, point: Sequence[str]) -> Cell:
        cell = Cell(number, [word.lstrip("+") for word in point])
        try:
            job = self._job_of(point)
        except UserError as problem:
            self._problems.append(problem)
            cell.state, cell.error = "failed", str(problem)
            return cell
        self.jobs[number] = job
        cell.key, cell.kind = job.spec.key, kind_of(job.spec)
        return cell

    def mark_done(self) -> None:
        """Mark the runs that have come to their end before."""
        for cell in self.all:
            if cell.number in self.jobs and is_done(self.jobs[cell.number], cell.key):
                cell.state = "done"

    def plan(self) -> None:
        """Plan the work of the runs that wait, one of each kind."""
        works: dict[str, float] = {}
        for cell in self.all:
            if cell.state == "waiting":
                if cell.kind not in works:
                    works[cell.kind] = work_of(self.jobs[cell.number])
                cell.work = works[cell.kind]


def kind_of(spec: Spec) -> str:
    """Return what runs that take about as long have in common, in words."""
    train = spec.train
    length = train.epochs or train.max_steps
    names = spec.stage, spec.method.name, spec.model.called, spec.dataset.called
    sizes = f"{length}x{train.rows_per_step}x{spec.dataset.max_length}"
    return " ".join((*names, sizes, *(e.name for e in spec.evaluators)))


def work_of(job: Job) -> float:
    """Return the planned FLOPs of a run's training; 0 where they are not known."""
    try:
        return predicted(job).prediction.flops
    except UserError:
        return 0.0
