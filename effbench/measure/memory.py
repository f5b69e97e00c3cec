"""Peak memory of one phase of a run.

Linux keeps the largest resident size of a process (`VmHWM`) and lets it be set back to the present
one; CUDA's allocator does the same for device memory. Other systems tell only the largest size
since the process began.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""What, written to `CLEAR`, sets `VmHWM` to the present resident size (proc_pid_clear_refs(5))."""

SLACK = 16 * 2**20
"""Bytes by which a peak that was just set back may exceed the resident size."""

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
    reserved_bytes: int = 0
    """Largest pool that CUDA's allocator held, unused parts included."""

    @property
    def added_bytes(self) -> int:
        """What the phase needed beyond what was there when it began."""
        return self.peak_bytes - self.start_bytes


class PeakMemory:
    """A context that measures the peak of the work inside it; `peak` holds it afterwards.

    Phases follow each other: one inside another would set back the outer one's peak.

    Args:
        device: `cpu`, `cuda` or `cuda:N`, or a torch device.
        phase: Name of the phase.
    """

    def __init__(self, device: Any = "cpu", phase: str = "") -> None:
        self.device = str(device)
        self.phase = phase
        self._peak: Peak | None = None
        self._how: How = "resident"
        self._start = 0

    @property
    def peak(self) -> Peak:
        """The result, once the context is left."""
        if self._peak is None:
            raise RuntimeError("the phase is not over yet")
        return self._peak

    def __enter__(self) -> PeakMemory:
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
        reserved = 0
        if self._how == "allocator":
            import torch

            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
            reserved = torch.cuda.max_memory_reserved(self.device)
        elif self._how == "resident":
            peak = _status_bytes("VmHWM")
        else:
            peak = _largest_so_far()
        self._peak = Peak(self.phase, self._start, max(peak, self._start), self._how, reserved)


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
