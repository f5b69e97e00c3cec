"""The other processes of a training on several devices: how they start, join, and end.

The run's own process is the first of them. It alone holds the run folder and writes there; the
others do the same work with a folder of logs that nobody reads, and end when training does.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist

from effbench.api.schema import plain
from effbench.api.spec import Job
from effbench.runner.group import Group, Processes
from effbench.runner.run import Run
from effbench.runner.worker import fail
from effbench.util.errors import UserError

GRACE = 5.0
"""Seconds in which a process hears of the end of another one by itself, before it is ended."""
SETTLING = 1.0
"""Seconds in which those that fail together end."""
PATIENCE = timedelta(days=7)
"""How long processes wait for each other: one that is gone is noticed in another way."""


@contextmanager
def spread(run: Run) -> Iterator[None]:
    """Train on as many devices as the run asks for; `run.group` is their processes inside.

    Raises:
        UserError: When there are fewer devices, or another process ended, with its reason.
    """
    if run.job.runtime.parallelism.devices == 1 or run.events.after("made") is not None:
        yield
        return
    _check_devices(run)
    threads = torch.get_num_threads()
    with TemporaryDirectory(prefix="effbench-") as folder:
        peers = Peers.start(run.job, Path(folder))
        try:
            join(run, 0, Path(folder))
            yield
        except RuntimeError as error:
            raise peers.lost(GRACE) or error from error
        finally:
            peers.end()
            if dist.is_initialized():
                dist.destroy_process_group()
            run.group = Group()
            torch.set_num_threads(threads)


def join(run: Run, rank: int, folder: Path) -> None:
    """Join the processes of a run; returns when all have.

    Args:
        run: What they work on; its group is set.
        rank: Which one this is; 0 is the run's own.
        folder: Where they meet.
    """
    size, cuda = run.job.runtime.parallelism.devices, run.device.type == "cuda"
    if cuda:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // size))
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=size,
        timeout=PATIENCE,
    )
    run.group = Processes(rank, size)


def _check_devices(run: Run) -> None:
    """Refuse more devices than there are.

    Raises:
        UserError: Naming `hardware.devices`.
    """
    wanted = run.job.runtime.parallelism.devices
    if run.device.type == "cuda" and torch.cuda.device_count() < wanted:
        raise UserError(
            f"hardware.devices={wanted}, but this machine has {torch.cuda.device_count()}.",
            "Lower it. A training is spread over the devices of one machine.",
        )


@dataclass
class Peers:
    """The processes that were started beside the run's own, and a thread that watches them."""

    folder: Path
    processes: list[subprocess.Popen[bytes]]
    over: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def start(cls, job: Job, folder: Path) -> Peers:
        """Start all of them.

        Args:
            job: Of the run.
            folder: Where they meet, and leave the reason when they fail.
        """
        quiet = replace(job, runtime=replace(job.runtime, progress=False, tracker="none"))
        text = json.dumps(plain(quiet)).encode()
        found = [_started(folder, r, text) for r in range(1, job.runtime.parallelism.devices)]
        peers = cls(folder, found)
        threading.Thread(target=peers.watch, daemon=True).start()
        return peers

    def lost(self, seconds: float = 0) -> UserError | None:
        """Return what there is to say when one has failed; None when none has.

        Args:
            seconds: How long to wait for it.
        """
        until = time.monotonic() + seconds
        while not any(p.poll() for p in self.processes):
            if time.monotonic() >= until:
                return None
            time.sleep(0.05)
        time.sleep(SETTLING)  # others fail because of the first one
        failed = {r: s for r, p in enumerate(self.processes, 1) if (s := p.poll())}
        rank = min(failed, key=lambda r: (failed[r] == UNKNOWN, failed[r]))
        return UserError(
            f"Process {rank + 1} of {len(self.processes) + 1} {self._reason(rank, failed[rank])}",
            "All others were ended. The same command goes on from the last checkpoint.",
        )

    def _reason(self, rank: int, status: int) -> str:
        if status < 0:
            name = signal.Signals(-status).name
            likely = ", most likely because memory ran out" if name == "SIGKILL" else ""
            return f"was ended ({name}){likely}."
        told = self.folder / reason_name(rank)
        lines = told.read_text().strip().splitlines() if told.is_file() else []
        return f"failed: {lines[-1] if lines else f'exit status {status}'}"

    def watch(self) -> None:
        """End this process where one of the others failed and it does not notice by itself."""
        while not self.over.wait(0.2):
            if (lost := self.lost()) and not self.over.wait(GRACE):
                fail(lost)
                os._exit(2)

    def end(self) -> None:
        """Have them ended; after a training they are already."""
        self.over.set()
        for process in self.processes:
            process.kill()
            process.wait()


UNKNOWN = 1
"""Exit status of a process that failed in a way that may be another one's fault."""


def reason_name(rank: int) -> str:
    """Return the name of the file in which a process says why it failed."""
    return f"reason{rank}.txt"


def _started(folder: Path, rank: int, text: bytes) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "effbench.runner.peer", str(folder), str(rank)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(text)
    process.stdin.close()
    return process
