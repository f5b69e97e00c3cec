"""What a step of the engine is told, and what stands in for a block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from effbench.nn.decode.cache import StaticLayer, Store
from effbench.nn.decode.pointwise import EAGER, Pointwise
from effbench.nn.llama.parts import Block
from effbench.nn.quant.linears import QuantisedLinear

Runs = tuple[bool, ...]
"""Whether each block runs in a step."""


@dataclass
class StandIn:
    """What takes the place of a block in a step that leaves it out: start + scale B A h.

    h is what the block would have read, and the start is either h or the anchor.
    """

    a: torch.Tensor | None = None
    """A, [r, d]; None for no map at all."""
    b: torch.Tensor | None = None
    """B, [d, r]."""
    scale: float = 0.0
    anchored: bool = False
    """Whether the start is the block's output when it last ran."""
    running: bool = False
    """Whether the anchor follows the stand-in's own output too."""
    anchor: torch.Tensor | None = None
    """[B, 1, d], the session's own."""

    def __call__(self, hidden: torch.Tensor, pointwise: Pointwise = EAGER) -> torch.Tensor:
        """Return what the next block reads, from what this one would have, [B, 1, d] both."""
        start = hidden if self.anchor is None else self.anchor
        if self.a is not None and self.b is not None:
            change = F.linear(F.linear(hidden.to(self.a.dtype), self.a), self.b)
            start = pointwise.move(start, change, self.scale)
        if self.running:
            self.note(start)
        return start

    def note(self, hidden: torch.Tensor) -> None:
        """Take the output of the block, [B, *, d], for the anchor: its last position."""
        last = hidden[:, -1:]
        if self.anchor is not None and self.anchor.shape == last.shape:
            self.anchor.copy_(last)
        elif self.anchored:
            self.anchor = last.clone(memory_format=torch.contiguous_format)


class StepSession(Protocol):
    """What a step reads of the session it belongs to, which is a `StaticSession`."""

    model: Any
    device: torch.device
    dtype: torch.dtype
    head_dim: int
    scaling: float
    blocks: list[Block]
    caches: list[StaticLayer | None]
    layers: list[StaticLayer]
    packed: list[QuantisedLinear]
    stand_ins: dict[int, StandIn]
    every: Runs
    starts: torch.Tensor
    positions: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor

    def make_ready(
        self, batch: int, length: int, layers: Sequence[StaticLayer] | None = None
    ) -> None:
        """Make room for what comes; see `StaticSession.make_ready`."""

    @property
    def batch(self) -> int:
        """Sequences in the cache."""

    @property
    def capacity(self) -> int:
        """Positions that the largest cache has room for."""

    def buffers(self) -> list[torch.Tensor]:
        """Return the tensors on whose addresses a step depends, those of the weights left out."""

    def running(self, runs: Runs) -> list[StaticLayer]:
        """Return the caches of the blocks that run."""

    def walk(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        store: Store,
        pointwise: Pointwise,
        runs: Runs,
    ) -> torch.Tensor:
        """Return logits [B, V] of one token per sequence, block by block."""
