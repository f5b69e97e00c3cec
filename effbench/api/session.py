"""What a decoding session is."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from effbench.util.lazy import torch


class Session(Protocol):
    """Decodes a batch; everything that changes while decoding lives in here."""

    def prefill(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Read prompts [B, P] (left-padded when a mask is given); return last logits [B, V]."""

    def step(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Read one token per sequence, [B, 1]; return logits [B, V]."""

    def reorder(self, rows: torch.Tensor) -> None:
        """Keep the sequences `rows`, in this order (beam search)."""

    def kv_bytes(self) -> int:
        """Return the bytes of the key/value entries in use."""


@runtime_checkable
class Counting(Protocol):
    """What a session offers beside that when its work depends on the text."""

    def counts(self) -> dict[str, float]:
        """Return what was counted over the tokens decoded so far, by name."""


class Cycle:
    """A schedule that no text changes: k steps that drop layers, one that refreshes them, again.

    Args:
        window: k.
        layers: Layers of the model.
        droppable: How many of them a step drops.
    """

    def __init__(self, window: int, layers: int, droppable: int) -> None:
        self.window, self.layers, self.droppable = window, layers, droppable
        self.tokens = 0
        """Tokens read since the prompt."""
        self.kind = ""
        """`drop` or `refresh`: what the last step did."""
        self.passes = 0
        """Layers that ran for these tokens, each of which read its weights once."""

    def turn(self) -> bool:
        """Go on to the next token; return whether it drops layers."""
        drops = self.tokens % (self.window + 1) < self.window
        self.kind = "drop" if drops else "refresh"
        self.tokens += 1
        self.passes += self.layers - self.droppable * drops
        return drops


@runtime_checkable
class Cyclic(Protocol):
    """What a session has beside that when its steps differ by a schedule."""

    cycle: Cycle
