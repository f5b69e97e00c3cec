"""What caches need beside what they keep, from sizes alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from effbench.api.parts import Mixer

BLOCK = 128
"""Positions by which the buffers of our engine are larger than the prompt."""
GATHERED = 1 << 22
"""Numbers of keys that are gathered at a time, for queries that each see other ones."""
LOOKING = 512
"""Queries of a prompt that look at a time, where each sees other columns."""
MOST_DRAFTS = 16
"""Longest window of drafts, unless the first one is longer."""


def most_drafts(window: int) -> int:
    """Return the most tokens that are drafted at a time, given how many are at first."""
    return max(window, MOST_DRAFTS)


def states(mixer: Mixer, rows: int, tokens: int, element: int) -> float:
    """Return the bytes of the keys of some tokens in one layer; its values take as many."""
    return rows * tokens * mixer.kv_heads * mixer.head_dim * element
