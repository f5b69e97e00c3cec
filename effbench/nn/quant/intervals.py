"""The best intervals of sorted rows by a C++ kernel, where there is one: those of `nested`."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch

from effbench.util import cpp

SOURCE = Path(__file__).with_name("kernels") / "intervals.cpp"
OPTIONS = (*cpp.OPTIONS, "-ffp-contract=off")
"""As written, each operation rounded by itself, so that it finds what torch's operations find."""


def best_intervals(
    mass: torch.Tensor, moment: torch.Tensor, barred: torch.Tensor, clusters: int
) -> torch.Tensor | None:
    """Return the bounds of the best intervals, [N, clusters + 1] int64; None without a kernel.

    Args:
        mass: Running sums, [N, K + 1] float64 on a CPU.
        moment: The same of what is gained by.
        barred: Whether no interval may start at a place, [N, K + 1].
        clusters: Intervals of each row.
    """
    if mass.device.type != "cpu" or cpp.why_off() or (library := _library()) is None:
        return None
    rows, places = mass.shape
    bounds = torch.empty(rows, clusters + 1, dtype=torch.int64)
    given = [t.contiguous() for t in (mass, moment, barred.to(torch.uint8))]
    addresses = [t.data_ptr() for t in given]
    threads = torch.get_num_threads()
    library.best_intervals(*addresses, rows, places, clusters, bounds.data_ptr(), threads)
    return bounds


@cache
def _library() -> ctypes.CDLL | None:
    """Return the library, or None where it cannot be compiled or loaded."""
    found = cpp.library(SOURCE, OPTIONS)
    if isinstance(found, str):
        return None
    try:
        library = ctypes.CDLL(str(found))
    except OSError:
        return None
    library.best_intervals.argtypes = [*[c_void_p] * 3, *[c_int64] * 3, c_void_p, c_int64]
    library.best_intervals.restype = None
    return library
