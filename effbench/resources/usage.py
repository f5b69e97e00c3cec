"""What a phase took, and sizes in words."""

from __future__ import annotations

from dataclasses import dataclass

from effbench.results.records import Obtained


@dataclass(frozen=True)
class PhaseUsage:
    """What a phase took."""

    peak_bytes: int
    """The process's largest resident size, or the CUDA allocator's peak."""
    seconds: float
    joules: float = 0.0
    energy: Obtained = "modelled"
    """How the joules were obtained."""


def format_bytes(size: float) -> str:
    """Return bytes as GiB or MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
