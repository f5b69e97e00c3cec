"""What caches need for a moment beside what they keep, from sizes alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from effbench.api.parts import Mixer

GATHERED = 1 << 22
"""Numbers of keys that are gathered at a time, for queries that each see other ones."""


def states(mixer: Mixer, rows: int, tokens: int, element: int) -> float:
    """Return the bytes of the keys of some tokens in one layer; its values take as many."""
    return rows * tokens * mixer.kv_heads * mixer.head_dim * element
