"""One SLURM job for each run of a grid, through submitit, which sends a job on after preemption.

Before a time limit submitit's signal (USR2) reaches the job: the run saves its state, and only then
the job is put back into the queue, where it goes on from there
(https://github.com/facebookincubator/submitit/blob/main/docs/checkpointing.md). SLURM announces a
preemption by SIGTERM, and puts a job that then ends by itself not back into the queue: this does.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn

from hydra_plugins.effbench_launchers._cells import Cell, ClusterLauncher

COMMON = (
    "timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes", "name",
    "stderr_to_stdout",
)  # fmt: skip
"""Settings that submitit has for all its executors; the others are SLURM's."""


@dataclass
class SlurmConfig:
    """Settings of the launcher: `hydra.launcher.*`; None leaves it to SLURM."""

    _target_: str = "hydra_plugins.effbench_launchers._slurm.SlurmLauncher"
    cluster: str = "slurm"
    """`slurm`, or `local`: processes here, to try a grid."""
    submitit_folder: str = "${hydra.sweep.dir}/.submitit/%j"
    """Where jobs are handed over and write what they say; on a disk that all nodes see."""
    timeout_min: int = 60
    """Time limit of a job, in minutes."""
    signal_delay_s: int = 120
    """How many seconds before the limit a run is told to save."""
    max_num_timeout: int = 0
    """How often a job that comes to its limit is put back into the queue."""
    name: str = "effbench"
    cpus_per_task: int | None = None
    gpus_per_node: int | None = None
    tasks_per_node: int = 1
    mem_gb: float | None = None
    nodes: int = 1
    stderr_to_stdout: bool = False
    partition: str | None = None
    qos: str | None = None
    comment: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    gres: str | None = None
    cpus_per_gpu: int | None = None
    gpus_per_task: int | None = None
    mem_per_gpu: str | None = None
    mem_per_cpu: str | None = None
    account: str | None = None
    additional_parameters: dict[str, Any] = field(default_factory=dict)
    """Further options of `sbatch`."""
    array_parallelism: int = 256
    """Jobs at once."""
    setup: list[str] | None = None
    """Commands to run in the job before the run."""


class Resumable:
    """A run that is given to submitit; put back into the queue, it is the same run again."""

    def __call__(self, cell: Cell) -> JobReturn:
        """Run it in this process.

        Raises:
            UncompletedJobError: When the job was told to end, and not because of another job.
        """
        from submitit import JobEnvironment
        from submitit.core.utils import UncompletedJobError

        try:
            return cell.run()
        except KeyboardInterrupt:
            if not _preempted():
                raise UncompletedJobError("It was told to stop, and saved its state.") from None
            JobEnvironment()._requeue(0)
            sys.exit(1)

    def checkpoint(self, cell: Cell) -> Any:
        """Return what is put back into the queue; the run has saved its state by then."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, cell)


class SlurmLauncher(ClusterLauncher):
    """Launches runs as jobs of SLURM."""

    def run(self, cells: Sequence[Cell]) -> Sequence[JobReturn]:
        """Submit all cells as one array, wait, and return what came of them, in order."""
        try:
            jobs = self._executor().map_array(Resumable(), cells)
        except (RuntimeError, OSError) as error:  # no sbatch here, or it refuses
            return [cell.lost(_reason(error)) for cell in cells]
        return [_outcome(cell, job) for cell, job in zip(cells, jobs, strict=True)]

    def _executor(self) -> Any:
        from submitit import AutoExecutor

        own = {k: v for k, v in self.settings.items() if v is not None}
        cluster, folder = own.pop("cluster"), own.pop("submitit_folder")
        limit = {f"{cluster}_max_num_timeout": own.pop("max_num_timeout")}
        executor = AutoExecutor(folder, cluster=cluster, **limit)
        executor.update_parameters(
            **{k if k in COMMON else f"slurm_{k}": v for k, v in own.items()}
        )
        return executor


def _preempted() -> bool:
    """Whether SLURM says that the job of this process makes way for another one."""
    job = os.environ.get("SLURM_JOB_ID", "")
    command = ["scontrol", "--oneliner", "show", "job", job]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return False
    return bool(re.search(r"\bPreemptTime=\d", told.stdout))


def _reason(error: Exception) -> str:
    """Return the line of an error that says most: the last one of a trace, else the first."""
    lines = [line for line in str(error).splitlines() if line.strip(" -")]
    return lines[-1 if "Traceback" in str(error) else 0].strip()


def _outcome(cell: Cell, job: Any) -> JobReturn:
    """Wait for a job and return what came of it."""
    from submitit.core.utils import FailedJobError, UncompletedJobError

    try:
        return cell.answer(job.result())
    except (FailedJobError, UncompletedJobError) as error:
        return cell.lost(f"Job {job.job_id} ({job.state}): {_reason(error)}")


if find_spec("submitit"):
    ConfigStore.instance().store(
        group="hydra/launcher", name="effbench_slurm", node=SlurmConfig, provider="effbench"
    )
