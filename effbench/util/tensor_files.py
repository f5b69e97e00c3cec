"""What a safetensors file holds, read from its header: no torch, and no weight."""

from __future__ import annotations

import json
from pathlib import Path

LENGTH = 8
"""Bytes, the lowest first, that say how long the header is that follows them."""


def stored_bytes(path: Path) -> dict[str, int]:
    """Return the bytes of each tensor of a whole safetensors file, by name."""
    return {name: end - start for name, (start, end) in _offsets(path)[1].items()}


def stored_end(path: Path) -> int:
    """Return the bytes that a safetensors file should have, by its header.

    Raises:
        ValueError, LookupError, TypeError: When it has no such header.
    """
    start, offsets = _offsets(path)
    return start + max((int(end) for _, end in offsets.values()), default=0)


def _offsets(path: Path) -> tuple[int, dict[str, tuple[int, int]]]:
    """Return where the tensors begin in a file, and by name where each begins and ends from there.

    Raises:
        ValueError, LookupError, TypeError: When the file has no such header.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH), "little")
        if length > size:
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return LENGTH + length, {name: tensor["data_offsets"] for name, tensor in header.items()}
