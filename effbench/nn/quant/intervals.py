"""The best intervals of sorted rows by a C++ kernel, where there is one: those of `nested`."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from effbench.util import cpp

SOURCE = Path(__file__).with_name("kernels") / "intervals.cpp"
OPTIONS = (*cpp.OPTIONS, "-ffp-contract=off")
"""As written, each operation rounded by itself, so that it finds what torch's operations find."""


class Rows(NamedTuple):
    """Sorted rows, as their running sums tell them."""

    mass: torch.Tensor
    """[N, K + 1] float64."""
    moment: torch.Tensor
    """[N, K + 1] float64."""
    barred: torch.Tensor
    """Whether no interval may start at a place, [N, K + 1]."""


def best_intervals(rows: Rows, clusters: int) -> torch.Tensor | None:
    """Return the bounds of the best intervals, [N, clusters + 1] int64; None without a kernel."""
    library = _library(rows)
    if library is None:
        return None
    bounds = torch.empty(len(rows.mass), clusters + 1, dtype=torch.int64)
    _call(library.best_intervals, rows, clusters, bounds)
    return bounds


def best_cuts(rows: Rows, bounds: torch.Tensor) -> torch.Tensor | None:
    """Return bounds [N, C + 1] after the best cut of every interval, [N, 2 C + 1]; as above."""
    library = _library(rows)
    if library is None:
        return None
    clusters = bounds.shape[1] - 1
    cut = torch.empty(len(bounds), 2 * clusters + 1, dtype=torch.int64)
    _call(library.best_cuts, rows, clusters, bounds.contiguous(), cut)
    return cut


def _call(function: Any, rows: Rows, clusters: int, *bounds: torch.Tensor) -> None:
    given = rows.mass.contiguous(), rows.moment.contiguous(), rows.barred.to(torch.uint8)
    addresses, last = [t.data_ptr() for t in given], [t.data_ptr() for t in bounds]
    function(*addresses, *rows.mass.shape, clusters, *last, torch.get_num_threads())


def _library(rows: Rows) -> ctypes.CDLL | None:
    """Return the library for rows on a CPU, or None where it cannot be had."""
    return None if rows.mass.device.type != "cpu" or cpp.why_off() else _loaded()


@cache
def _loaded() -> ctypes.CDLL | None:
    library = cpp.loaded(SOURCE, OPTIONS)
    if library is None:
        return None
    library.best_intervals.argtypes = [*[c_void_p] * 3, *[c_int64] * 3, c_void_p, c_int64]
    library.best_cuts.argtypes = [*[c_void_p] * 3, *[c_int64] * 3, *[c_void_p] * 2, c_int64]
    library.best_intervals.restype = library.best_cuts.restype = None
    return library
