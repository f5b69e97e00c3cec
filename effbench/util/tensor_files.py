"""What a safetensors file holds, read from its header: no torch, and no weight."""

from __future__ import annotations

import json
from pathlib import Path

LENGTH = 8
"""Bytes, the lowest first, that say how long the header is that follows them."""


def stored_bytes(path: Path) -> dict[str, int]:
    """Return the bytes of each tensor of a whole safetensors file, by name."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(LENGTH), "little")))
    header.pop("__metadata__", None)
    offsets = {name: tensor["data_offsets"] for name, tensor in header.items()}
    return {name: end - start for name, (start, end) in offsets.items()}
