"""Peak memory of one phase of a run.

Linux keeps the largest resident size of a process (`VmHWM`) and lets it be set back to the present
one; CUDA's allocator does the same for device memory. Other systems tell only the largest size
since the process began.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal

from effbench.util.c_library import c_library, give_back

STATUS = Path("/proc/self/status")
MAPS, PAGES = Path("/proc/self/maps"), Path("/proc/self/pagemap")
CLEAR = Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""What, written to `CLEAR`, sets `VmHWM` to the present resident size (proc_pid_clear_refs(5))."""

SLACK = 16 * 2**20
"""Bytes by which a peak that was just set back may exceed the resident size."""

EXACT_BLOCK = 16 * 2**10
"""Smallest block, in bytes, that `exact_blocks` has the C library map and give back by itself. With
256 KiB, factors of adapters and their moments left holes in which an evaluation after training
touched up to 60 MiB again."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3)."""

How = Literal["resident", "allocator", "since start"]


@dataclass(frozen=True)
class Peak:
    """Largest memory in use during a phase, in bytes."""

    phase: str
    start_bytes: int
    """In use when the phase began."""
    peak_bytes: int
    method: How
    """`resident`: VmHWM of the process. `allocator`: tensors on the CUDA device. `since start`: the
    process's largest resident size so far, so that phases cannot be told apart."""

    @property
    def added_bytes(self) -> int:
        """What the phase needed beyond what was there when it began."""
        return self.peak_bytes - self.start_bytes


class PeakMemory:
    """A context that measures the peak of the work inside it; `peak` holds it afterwards.

    One may lie inside another: the outer peak is at least the inner one.

    Args:
        device: `cpu`, `cuda` or `cuda:N`, or a torch device.
        phase: Name of the phase.
    """

    _open: ClassVar[list[PeakMemory]] = []
    """Those that are measuring now, the outer ones first."""

    def __init__(self, device: Any = "cpu", phase: str = "") -> None:
        self.device = str(device)
        self.phase = phase
        self._peak: Peak | None = None
        self._how: How = "resident"
        self._start = 0
        self._seen = 0
        """Peak before and in phases inside this one, which set the system's own figure back."""

    @property
    def peak(self) -> Peak:
        """The result, once the context is left."""
        if self._peak is None:
            raise RuntimeError("the phase is not over yet")
        return self._peak

    def __enter__(self) -> PeakMemory:
        for outer in self._open:
            outer._seen = max(outer._seen, outer._largest())
        self._open.append(self)
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._how, self._start = "allocator", torch.cuda.memory_allocated(self.device)
        else:
            self._how = "resident" if _reset_resident_peak() else "since start"
            self._start = _status_bytes("VmRSS") if STATUS.exists() else _largest_so_far()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        peak = max(self._largest(), self._seen, self._start)
        self._open.remove(self)
        for outer in self._open:
            outer._seen = max(outer._seen, peak)
        self._peak = Peak(self.phase, self._start, peak, self._how)

    @classmethod
    def saw(cls, size: int) -> None:
        """Count another process of the work that is measured now, whose resident peak was `size`.

        The peak is that of the largest process. A device's allocator knows of none but this one.
        """
        for one in cls._open:
            if one._how != "allocator":
                one._seen = max(one._seen, size)

    def _largest(self) -> int:
        """Return the peak since the system's figure was last set back."""
        if self._how == "allocator":
            import torch

            torch.cuda.synchronize(self.device)
            return int(torch.cuda.max_memory_allocated(self.device))
        return _status_bytes("VmHWM") if self._how == "resident" else _largest_so_far()


@dataclass(frozen=True)
class FilePages:
    """Where this process has pages of files in memory, most of them code of libraries.

    A process that it forks has all else, but these only from their next use on: what uses them
    first would seem to need them.
    """

    addresses: list[int]

    @classmethod
    def resident(cls) -> FilePages:
        """Return those that are in memory now (proc_pid_pagemap(5)).

        Raises:
            OSError: Where the system does not say.
        """
        found: list[int] = []
        with PAGES.open("rb") as pages:
            for line in MAPS.read_text().splitlines():
                span, access, *_, path = line.split(maxsplit=5) if "/" in line else ("", "", "")
                if access.startswith("r") and access.endswith("p") and path.startswith("/"):
                    first, end = (int(place, 16) // mmap.PAGESIZE for place in span.split("-"))
                    pages.seek(8 * first)
                    entries = memoryview(pages.read(8 * (end - first))).cast("Q")
                    found += [(first + n) * mmap.PAGESIZE for n, e in enumerate(entries) if e >> 63]
        return cls(found)

    def touch(self) -> None:
        """Have them in memory in this process too, which was forked."""
        for address in self.addresses:
            ctypes.c_char.from_address(address).value  # noqa: B018


def release() -> None:
    """Give free memory back to the system, so that a phase does not count what another one left."""
    gc.collect()
    give_back()


def exact_blocks() -> bool:
    """Have every large block given back at once; return whether the C library can do so.

    Otherwise glibc keeps freed blocks for later use and cannot reuse all of them: the resident peak
    of training steps was 14 to 57 % above that of their tensors. The price is time, as each block's
    pages are new.
    """
    change = c_library("mallopt")
    return change is not None and all(
        change(parameter, EXACT_BLOCK) == 1 for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD)
    )


def memory_in_use(device: Any = "cpu") -> int:
    """Return the bytes in use now: tensors on a CUDA device, else the process's resident size."""
    if str(device).startswith("cuda"):
        import torch

        return torch.cuda.memory_allocated(str(device))
    return _status_bytes("VmRSS") if STATUS.exists() else _largest_so_far()


def _reset_resident_peak() -> bool:
    """Set the resident peak back; return whether the system really did so."""
    try:
        CLEAR.write_text(RESET_PEAK)
        return _status_bytes("VmHWM") <= _status_bytes("VmRSS") + SLACK
    except (OSError, KeyError):
        return False


def _status_bytes(name: str) -> int:
    """Return a size from the process's status file, whose `kB` are 1,024 bytes."""
    lines = (line.partition(":") for line in STATUS.read_text().splitlines())
    sizes = {key: value for key, _, value in lines}
    return int(sizes[name].split()[0]) * 1024


def _largest_so_far() -> int:
    """Return the largest resident size since the process began.

    The system gives KiB, on macOS bytes. On Linux a process starts out with the figure of the one
    that launched it, so this may be too large.
    """
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024
