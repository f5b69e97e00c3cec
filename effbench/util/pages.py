"""Huge pages for memory that is read again and again."""

from __future__ import annotations

import ctypes
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

HUGE = 2**21
"""Bytes of a huge page."""
MADV_COLLAPSE = 25
"""Advice of Linux 6.1 on: make huge pages of what is there, now; madvise(2)."""
MOST = 2**30
"""Most bytes that are moved: more of them would take longer than what is decoded may."""
FULL = 0.75
"""Least share of a huge page that buffers fill for it to be made. It is in memory as a whole: of
pages with some codes of a packed weight each, as they lie where dense weights lay before, a model
would take several times its bytes."""
MAPS = Path("/proc/self/maps")


class Buffer(Protocol):
    """Some bytes in memory, as a tensor's are."""

    nbytes: int

    def data_ptr(self) -> int:
        """Return where they begin."""


def use_huge_pages(buffers: Iterable[Buffer]) -> int:
    """Put buffers on huge pages where Linux can, in place; return how many pages there are.

    Reading all weights of a model for each token then misses fewer addresses. It copies what it
    moves once, at a few ms a page where memory is new to a virtual machine. No content changes,
    and where it cannot be done nothing happens: other systems, older kernels, pages of files, more
    than `MOST` bytes.
    """
    buffers = list(buffers)
    if sys.platform != "linux" or not MAPS.exists() or sum(b.nbytes for b in buffers) > MOST:
        return 0
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    pages = _filled(buffers)
    own = list(_anonymous())
    whole = [p for p in sorted(pages) if any(low <= p and p + HUGE <= high for low, high in own)]
    return sum(advise(page, HUGE, MADV_COLLAPSE) == 0 for page in whole)


def _filled(buffers: Iterable[Buffer]) -> list[int]:
    """Return the addresses of the huge pages that buffers fill, as far as `FULL` asks for."""
    filled = Counter[int]()
    for begin, size in {b.data_ptr(): b.nbytes for b in buffers}.items():
        for page in range(begin // HUGE * HUGE, begin + size, HUGE):
            filled[page] += min(begin + size, page + HUGE) - max(begin, page)
    return [page for page, size in filled.items() if size >= FULL * HUGE]


def _anonymous() -> Iterator[tuple[int, int]]:
    """Yield the ranges of memory that belong to this process alone."""
    for line in MAPS.read_text().splitlines():
        place, rights, _, _, inode, *_ = line.split()
        if rights == "rw-p" and inode == "0":
            low, _, high = place.partition("-")
            yield int(low, 16), int(high, 16)
