"""What other processes take of a machine's cores while something is timed."""

from __future__ import annotations

import os
import time
from pathlib import Path

STAT = Path("/proc/stat")
IDLE = (3, 4)
"""Of the counters of the first line: idle, and waiting for disks."""
COUNTERS = 8
"""Of a machine: user, nice, system, idle, iowait, irq, softirq, steal; guests are in user."""
LITTLE = 0.25
"""Fewer cores of others are not worth a word."""
SHARED = (
    "Shared machine: other processes kept cores busy while it was timed. Ratios, timed in turn, "
    "are fairer than times."
)


class Others:
    """Counts the cores that other processes keep busy, from its making on."""

    def __init__(self) -> None:
        self._began = time.monotonic(), _busy(), _own()

    def cores(self) -> float | None:
        """Return them, a mean over the time since; None where the system does not say."""
        began, busy, own = self._began
        now = _busy()
        if busy is None or now is None:
            return None
        seconds = max(1e-3, time.monotonic() - began)
        return max(0.0, now - busy - (_own() - own)) / seconds

    def sentence(self) -> str:
        """Return that times are those of a shared machine; empty where it was not."""
        return SHARED if (self.cores() or 0.0) >= LITTLE else ""


def _busy() -> float | None:
    """Return the seconds for which cores have been busy, all of them together."""
    try:
        counts = [int(word) for word in STAT.read_text().split("\n", 1)[0].split()[1:]][:COUNTERS]
        return sum(n for i, n in enumerate(counts) if i not in IDLE) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        return None


def _own() -> float:
    """Return the seconds for which this process and those that it waited for have been busy."""
    return sum(os.times()[:4])
