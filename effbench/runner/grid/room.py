"""What of a machine the runs of a grid have: memory by the plan, a GPU each, some of the cores."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from effbench.api.spec import Job
from effbench.resources.planned import predicted
from effbench.util.errors import UserError
from effbench.util.hardware import cores, gpus, memory_bytes

PROCESS_BYTES = 2**30
"""Of a process before its model is loaded: 0.4 to 0.5 GiB were measured on CPUs (`base_bytes` of
the records), and its data comes on top."""
CUDA_PROCESS_BYTES = 3 * 2**30
"""The same with CUDA's libraries; an estimate."""
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Need:
    """What a run takes of a machine, in bytes; `device` is None where it takes no GPU."""

    memory: int
    """Of all its processes."""
    device: int | None = None
    """Of each of its GPUs."""
    devices: int = 1
    """GPUs, where it takes any."""


@dataclass(frozen=True)
class Share:
    """What a run has of the machine, until it is given back."""

    need: Need | None
    """None: all of it."""
    gpus: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


class Room:
    """What a machine has for the runs of a grid.

    Args:
        memory: Bytes that are free; 0 where that is not known, and then one run goes at a time.
        devices: Bytes of each GPU, by what CUDA_VISIBLE_DEVICES calls it.
        threads: Of each run.
    """

    def __init__(self, memory: int, devices: Mapping[str, int], threads: int) -> None:
        self._memory, self._devices, self._threads = memory, dict(devices), threads
        self._taken: list[Share] = []

    def take(self, need: Need | None) -> Share | None:
        """Return a share for a run, or None while there is no room for it.

        What is not known, or is more than the whole machine, runs alone.
        """
        if any(share.need is None for share in self._taken):
            return None
        if need is None or not self._possible(need):
            return None if self._taken else self._given(Share(None))
        gpus = self._free_gpus(need)
        if gpus is None or need.memory > self._memory - self._used():
            return None
        devices = {} if need.device is None else {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
        return self._given(Share(need, gpus, dict.fromkeys(THREADS, str(self._threads)) | devices))

    def give_back(self, share: Share) -> None:
        """Take a share back from a run that has ended."""
        self._taken.remove(share)

    def _given(self, share: Share) -> Share:
        self._taken.append(share)
        return share

    def _possible(self, need: Need) -> bool:
        """Whether a run would fit into the whole machine."""
        return need.memory <= self._memory and len(self._large(need)) >= _wanted(need)

    def _large(self, need: Need) -> list[str]:
        """Return the GPUs that are large enough for a run."""
        return [name for name, size in self._devices.items() if size >= (need.device or 0)]

    def _used(self) -> int:
        return sum(share.need.memory for share in self._taken if share.need)

    def _free_gpus(self, need: Need) -> tuple[str, ...] | None:
        """Return GPUs that no other run has; None while there are too few."""
        used = {name for share in self._taken for name in share.gpus}
        free = [name for name in self._large(need) if name not in used]
        wanted = _wanted(need)
        return tuple(free[:wanted]) if len(free) >= wanted else None


def _wanted(need: Need) -> int:
    """Return how many GPUs a run takes."""
    return 0 if need.device is None else need.devices


def this_machine(jobs: int) -> Room:
    """Return what this machine has for so many runs at once."""
    return Room(memory_bytes()[1], devices_here(), max(1, cores() // jobs))


def devices_here() -> dict[str, int]:
    """Return the bytes of each GPU that this process may use, by what CUDA calls it."""
    sizes = [gpu.memory_mib * 2**20 for gpu in gpus()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return {str(number): size for number, size in enumerate(sizes)}
    names = [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    known = {str(number): size for number, size in enumerate(sizes)}
    return {name: known.get(name, min(sizes)) for name in names} if sizes else {}


def need_of(job: Job) -> Need | None:
    """Return what a run is predicted to take; None where that cannot be said."""
    try:
        found = predicted(job)
    except UserError:
        return None
    devices = job.runtime.parallelism.devices
    if job.spec.hardware.device == "cuda":
        return Need(devices * CUDA_PROCESS_BYTES, found.prediction.peak, devices)
    return Need(devices * (PROCESS_BYTES + found.prediction.peak))
