"""A decoding step as one CUDA graph: launched as a whole, without Python between its kernels."""

from __future__ import annotations

from functools import cache
from operator import is_
from typing import TYPE_CHECKING

import torch

from effbench.nn.decode import triton_step
from effbench.nn.decode.pointwise import EAGER, Pointwise, fused
from effbench.util.hardware import has_triton

if TYPE_CHECKING:
    from effbench.nn.decode.cache import StaticLayer, Stored
    from effbench.nn.decode.step import Runs, StepSession

WARM_UP = 3
"""Steps that run before the capture, so that libraries have made what they need."""


@cache
def compiled(rows: int) -> Pointwise:
    """Return what a captured step of some rows is made of; eager functions without Triton.

    torch.compile makes each function one kernel. For a single row our own kernels take the products
    and attention too.
    """
    if not has_triton():
        return EAGER
    if rows > 1:
        return fused(torch.compile)
    return fused(torch.compile, triton_step.RowKernels)


class Put:
    """Puts keys and values of one step away, at places that lie on the device."""

    def __init__(self, step: StaticStep) -> None:
        self.step, self.starts = step, step.starts
        self._seen: dict[int, torch.Tensor] = {}

    def place(self, layer: StaticLayer) -> torch.Tensor:
        """Return where the next key and value of a layer go, [1] int64."""
        return self.step.places[layer.lane : layer.lane + 1]

    def __call__(self, layer: StaticLayer, key: torch.Tensor, value: torch.Tensor) -> Stored:
        """Put them away; return the whole of the cache and a mask of what is to be seen."""
        place = self.place(layer)
        if layer.lane not in self._seen:
            columns = self.step.columns[: layer.capacity]
            mask = (columns <= place) & (columns >= self.starts[:, None])
            self._seen[layer.lane] = mask[:, None, None]
        keys, values = layer.buffers
        keys.index_copy_(2, place, key)
        values.index_copy_(2, place, value)
        return keys, values, self._seen[layer.lane]


class StaticStep:
    """A step whose every shape and address is the same from token to token.

    What changes lies in device tensors: the token, its place in each cache and its position. The
    query looks at the whole of a cache through a mask. Layers of one lane share place and mask.
    """

    def __init__(self, session: StepSession, pointwise: Pointwise) -> None:
        self.pointwise = pointwise
        self.token = torch.zeros(session.batch, 1, dtype=torch.long, device=session.device)
        self.lanes = {layer.lane: layer for layer in session.layers}
        """A layer of each lane, for its length and capacity."""
        self.places = torch.zeros(max(self.lanes) + 1, dtype=torch.long, device=session.device)
        self.positions = session.positions.clone()
        self.starts = session.starts.clone()
        self.columns = torch.arange(session.capacity, device=session.device)
        self._moves: dict[Runs, torch.Tensor] = {}
        self.place(session)

    def place(self, session: StepSession) -> None:
        """Take over where the session stands."""
        for lane, layer in self.lanes.items():
            self.places[lane] = layer.length
        self.positions.copy_(session.positions)
        self.starts.copy_(session.starts)

    def logits(self, session: StepSession, runs: Runs | None = None) -> torch.Tensor:
        """Return logits [B, V] of `token` at its places, through the blocks that run."""
        store = Put(self)
        runs = session.every if runs is None else runs
        return session.walk(self.token, self.positions, store, self.pointwise, runs)

    def advance(self, session: StepSession, runs: Runs | None = None) -> None:
        """Go on to the next place in the caches of the blocks that ran."""
        runs = session.every if runs is None else runs
        if runs not in self._moves:
            moved = torch.zeros_like(self.places)
            for layer in session.running(runs):
                moved[layer.lane] = 1
            self._moves[runs] = moved
        self.places += self._moves[runs]
        self.positions += 1


class StepGraph:
    """A captured `StaticStep`, once for each set of blocks that run.

    Capturing writes one key and value at the session's next place, and leaves all else as it was.
    """

    def __init__(self, session: StepSession) -> None:
        self._step = StaticStep(session, compiled(session.batch))
        self._buffers = session.buffers()
        self._captured: dict[Runs, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    def capture(self, session: StepSession, runs: Runs) -> None:
        """Make the graph of a step through the blocks that run, unless it is there."""
        if runs in self._captured:
            return
        anchors = [s.anchor for s in session.stand_ins.values() if s.anchor is not None]
        before = [anchor.clone() for anchor in anchors]
        aside = torch.cuda.Stream(session.device)
        aside.wait_stream(torch.cuda.current_stream(session.device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                self._step.logits(session, runs)
        torch.cuda.current_stream(session.device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._step.logits(session, runs)
        for anchor, old in zip(anchors, before, strict=True):
            anchor.copy_(old)
        self._captured[runs] = graph, logits

    def holds(self, session: StepSession) -> bool:
        """Whether caches and anchors are still those that were captured."""
        now = session.buffers()
        return len(now) == len(self._buffers) and all(map(is_, now, self._buffers))

    def place(self, session: StepSession) -> None:
        """Take over where the session stands."""
        self._step.place(session)

    def run(self, session: StepSession, input_ids: torch.Tensor, runs: Runs) -> torch.Tensor:
        """Return logits [B, V] for one token per sequence, [B, 1]."""
        self.capture(session, runs)
        self._step.token.copy_(input_ids)
        graph, logits = self._captured[runs]
        graph.replay()
        self._step.advance(session, runs)
        return logits.clone()
