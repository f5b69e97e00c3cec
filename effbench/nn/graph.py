"""A decoding step as one CUDA graph: launched as a whole, without Python between its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from effbench.nn.pointwise import Pointwise, compiled

if TYPE_CHECKING:
    from effbench.nn.engine import StaticLayer, StaticSession

WARM_UP = 3
"""Steps that run before the capture, so that libraries have made what they need."""


class StaticStep:
    """A step whose every shape and address is the same from token to token.

    What changes lies in device tensors: the token, its place in the cache and its position. The
    query looks at the whole cache through a mask.
    """

    def __init__(self, session: StaticSession, pointwise: Pointwise) -> None:
        self.pointwise = pointwise
        self.token = torch.zeros(session.batch, 1, dtype=torch.long, device=session.device)
        self.place = torch.full((1,), session.length, dtype=torch.long, device=session.device)
        self.positions = session.positions.clone()
        self.starts = session.starts.clone()
        self.columns = torch.arange(session.capacity, device=session.device)

    def logits(self, session: StaticSession) -> torch.Tensor:
        """Return logits [B, V] of `token` at `place`."""
        seen = (self.columns <= self.place) & (self.columns >= self.starts[:, None])
        return session.walk(
            self.token, self.positions, seen[:, None, None], self._store, self.pointwise
        )

    def _store(
        self, layer: StaticLayer, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = layer.buffers
        return keys.index_copy_(2, self.place, key), values.index_copy_(2, self.place, value)

    def advance(self) -> None:
        """Go on to the next place."""
        self.place += 1
        self.positions += 1


class StepGraph:
    """A captured `StaticStep`. Capturing writes one key and value at the session's next place."""

    def __init__(self, session: StaticSession) -> None:
        self._step = StaticStep(session, compiled())
        self._keys = [layer.buffers[0] for layer in session.layers]
        aside = torch.cuda.Stream(session.device)
        aside.wait_stream(torch.cuda.current_stream(session.device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                self._step.logits(session)
        torch.cuda.current_stream(session.device).wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._step.logits(session)

    def holds(self, layers: Sequence[StaticLayer]) -> bool:
        """Whether the cache is still the one that was captured."""
        return all(a is layer.keys for a, layer in zip(self._keys, layers, strict=True))

    def place(self, session: StaticSession) -> None:
        """Take over where the session stands."""
        self._step.place.fill_(session.length)
        self._step.positions.copy_(session.positions)
        self._step.starts.copy_(session.starts)

    def run(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return logits [B, V] for one token per sequence, [B, 1]."""
        self._step.token.copy_(input_ids)
        self._graph.replay()
        self._step.advance()
        return self._logits.clone()
