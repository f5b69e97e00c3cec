"""What a launcher sends to a machine: one run of a grid, and what came of it."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from effbench.results.sweeps import settled_in

GONE = "The same command goes on from its last checkpoint."
"""What to do about a run whose machine or process is gone."""


@dataclass(frozen=True)
class Cell:
    """One run of a grid."""

    context: HydraContext
    task: TaskFunction
    config: DictConfig
    """The composed config, Hydra's own part included."""
    singletons: Any
    """Hydra's state in the process that launches."""
    folder: str
    """Where the command was given: relative paths are meant from there."""

    @property
    def place(self) -> Path:
        """Folder of the run in that of its grid."""
        sweep = self.config.hydra.sweep
        return Path(self.folder, str(sweep.dir), str(sweep.subdir))

    def run(self) -> JobReturn:
        """Run it in this process; what fails in it is in the answer."""
        os.chdir(self.folder)
        setup_globals()
        Singleton.set_state(self.singletons)
        return run_job(
            hydra_context=self.context,
            task_function=self.task,
            config=self.config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )

    def answer(self, done: JobReturn) -> JobReturn:
        """Return what Hydra's sweeper gets for a run; one that failed does not end the grid."""
        if done.status == JobStatus.COMPLETED:
            return done
        return self.lost(str(done._return_value))

    def lost(self, reason: str) -> JobReturn:
        """Note that a run came to no end of its own, and return an answer without a value.

        Args:
            reason: What is known of it.
        """
        from effbench.results import sweeps
        from effbench.runner.grid.work import keep

        words = [str(word).lstrip("+") for word in self.config.hydra.overrides.task]
        error = f"{reason.strip() or 'Its process ended without a word.'}\n{GONE}"
        keep(sweeps.Cell(0, words, error=error), self.place)
        return _answer(words, self.config)


class ClusterLauncher(Launcher, ABC):
    """Launches those runs of a grid of which nothing is written down yet.

    Args:
        settings: The keys of `hydra.launcher`.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings: dict[str, Any] = {name: _plain(v) for name, v in settings.items()}

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep the grid that is to be launched."""
        self._context, self._task, self._config = hydra_context, task_function, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Return what came of all runs, in order, once they have ended.

        Args:
            job_overrides: The words of each.
            initial_job_idx: Number of the first of them.
        """
        points = dict(enumerate((list(words) for words in job_overrides), initial_job_idx))
        settled = settled_in(Path(str(self._config.hydra.sweep.dir)))
        cells = {n: self._cell(point, n) for n, point in points.items() if str(n) not in settled}
        done = dict(zip(cells, self.run(list(cells.values())) if cells else [], strict=True))
        return [done.get(n) or _answer(point, self._config) for n, point in points.items()]

    @abstractmethod
    def run(self, cells: Sequence[Cell]) -> Sequence[JobReturn]:
        """Run cells elsewhere, at least one, and return what came of them, in order."""

    def _cell(self, point: list[str], number: int) -> Cell:
        config = self._context.config_loader.load_sweep_config(self._config, point)
        with open_dict(config.hydra.job):
            config.hydra.job.id = f"{config.hydra.job.name}_{number}"
            config.hydra.job.num = number
        state = Singleton.get_state()
        return Cell(self._context, self._task, config, state, str(Path.cwd()))


def _answer(words: Sequence[str], config: DictConfig) -> JobReturn:
    """Return what Hydra's sweeper gets for a run that has no value."""
    return JobReturn(words, config, status=JobStatus.COMPLETED, _return_value=math.nan)


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
