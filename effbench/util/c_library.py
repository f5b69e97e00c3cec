"""What the C library of this process does with memory."""

from __future__ import annotations

import ctypes
import sys
from typing import Any


def c_library(name: str) -> Any:
    """Return a function of the C library this process runs on, or None where there is none such."""
    if sys.platform == "win32":
        return None
    return getattr(ctypes.CDLL(None), name, None)


def give_back() -> None:
    """Give the blocks that the C library keeps free back to the system, holes between others too.

    Weights that were freed one by one would else stay beside what is made in their place.
    """
    trim = c_library("malloc_trim")
    if trim is not None:
        trim(0)
