"""One Ray task for each run of a grid; one whose worker or machine dies is tried again elsewhere.

A run that is tried again goes on from its last checkpoint. Ray's usage statistics are switched
off (https://docs.ray.io/en/latest/cluster/usage-stats.html).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import chdir
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn

from hydra_plugins.effbench_launchers._cells import Cell, ClusterLauncher

GIB = 2**30


@dataclass
class RayConfig:
    """Settings of the launcher: `hydra.launcher.*`."""

    _target_: str = "hydra_plugins.effbench_launchers._ray.RayLauncher"
    address: str | None = None
    """Of a cluster that is at work (`auto`, `HOST:PORT`); else one is started here for the grid."""
    cluster_cpus: int | None = None
    """Cores of a cluster that is started here, which are as many runs at once; else all."""
    num_cpus: float | None = None
    """Cores of a run; else `hardware.threads`, and 1 where that is not set."""
    num_gpus: float | None = None
    """GPUs of a run; else 1 where the cluster has any and the run may use one."""
    memory_gb: float | None = None
    """Memory that Ray sets aside for a run, in GiB; else none."""
    resources: dict[str, float] = field(default_factory=dict)
    """Resources of the cluster's own, by name."""
    max_retries: int = 3
    """How often a run whose worker dies is tried again."""
    init: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `ray.init`."""


class RayLauncher(ClusterLauncher):
    """Launches runs as tasks of Ray."""

    def run(self, cells: Sequence[Cell]) -> Sequence[JobReturn]:
        """Run all cells as tasks and return what came of them, in order."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        with chdir(cells[0].place.parent):  # its workers import from where it is started
            ray.init(**self._start())
        try:
            tasks = [self._submit(cell, ray.cluster_resources()) for cell in cells]
            return [_outcome(cell, task) for cell, task in zip(cells, tasks, strict=True)]
        finally:
            ray.shutdown()

    def _start(self) -> dict[str, Any]:
        """Return the arguments of `ray.init`."""
        address, common = self.settings["address"], {"logging_level": "warning"}
        if address:
            return {"address": address, **common, **self.settings["init"]}
        own = {"include_dashboard": False, "num_cpus": self.settings["cluster_cpus"]}
        return {**own, **common, **self.settings["init"]}

    def _submit(self, cell: Cell, there: dict[str, float]) -> Any:
        """Return a task, or why the cluster can never run it."""
        import ray

        needs = self._needs(cell, there)
        amounts = {"CPU": needs["num_cpus"], "GPU": needs["num_gpus"], **needs["resources"]}
        for name, amount in amounts.items():
            if amount > there.get(name, 0):
                return f"It needs {amount:g} {name}, the Ray cluster has {there.get(name, 0):g}."
        task = ray.remote(_run).options(max_retries=self.settings["max_retries"], **needs)
        return task.remote(cell)

    def _needs(self, cell: Cell, there: dict[str, float]) -> dict[str, Any]:
        """Return what Ray sets aside for a run."""
        own, hardware = self.settings, cell.config.hardware
        may_use = str(hardware.device) != "cpu" and there.get("GPU", 0) > 0
        memory = own["memory_gb"]
        return {
            "num_cpus": own["num_cpus"] or int(hardware.threads or 0) or 1,
            "num_gpus": float(may_use) if own["num_gpus"] is None else own["num_gpus"],
            "resources": own["resources"],
            **({"memory": int(memory * GIB)} if memory else {}),
        }


def _run(cell: Cell) -> JobReturn:
    return cell.run()


def _outcome(cell: Cell, task: Any) -> JobReturn:
    import ray

    if isinstance(task, str):
        return cell.lost(task)
    try:
        return cell.answer(ray.get(task))
    except ray.exceptions.RayError as error:
        return cell.lost(str(error).strip().splitlines()[-1])


if find_spec("ray"):
    ConfigStore.instance().store(
        group="hydra/launcher", name="effbench_ray", node=RayConfig, provider="effbench"
    )
