"""Blocks whose products the C++ kernel makes, while a cache of any kind attends.

A cache that does not keep everything says itself what queries see (`effbench.nn.decode.view`). The
rest of a block does not depend on it: norms, projections, rotary positions and the MLP are those of
our engine. One call of the kernel goes from what one block's attention mixed to the queries, keys
and values of the next one, so that a step of L blocks is L + 1 calls and L times attention.

Positions are rows of their own, whichever sequence they are of; many go in by parts.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

from effbench.nn.decode import native, prompts
from effbench.nn.decode.native_step import matrix_of, readable
from effbench.nn.decode.verify import MultiTokenEngine, multi_token_engine
from effbench.nn.llama.walk import untouched

Angles = tuple[torch.Tensor, torch.Tensor]
"""Cosine and sine that each position is turned by, [B or 1, W, D]."""
States = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Queries [B, H, W, D], keys and values [B, G, W, D]."""
Attend = Callable[[int, torch.Tensor, States], torch.Tensor]
"""From a block's index, what it reads [B, W, d] and its states to what they mix to,
[B, W, H, D]."""


class Between:
    """The blocks of a model as the kernel runs them from attention to attention.

    Args:
        engine: Of the model; it reads nothing, and is asked for blocks and sizes alone.
    """

    def __init__(self, engine: MultiTokenEngine) -> None:
        self.engine, self.kernel = engine, engine.kernel
        count = len(engine.blocks)
        self.lengths, self.runs = (ctypes.c_int64 * count)(), (ctypes.c_uint8 * count)(*[1] * count)
        self.scratch = torch.empty(0)
        self.places = torch.arange(prompts.CHUNK_ROWS)
        self.starts = torch.zeros(prompts.CHUNK_ROWS, dtype=torch.long)

    @classmethod
    def of(cls, model: torch.nn.Module, mixers: bool = False) -> Between | None:
        """Return that of a model whose blocks all attend, each by itself; None for any other.

        With `mixers`, some may mix otherwise than by a softmax over scores.
        """
        engine = multi_token_engine(model, mixers)
        if engine is None:
            return None
        attentions = [block.attention for block in engine.blocks]
        return cls(engine) if all(a is not None and a.source is None for a in attentions) else None

    def takes(self, hidden: torch.Tensor) -> bool:
        """Whether the kernel is the way for hidden states [B, W, d], rather than the modules."""
        few = hidden.shape[0] * hidden.shape[1] <= native.LARGEST_BATCH
        return few or prompts.takes(self.engine, hidden[:, :, 0], padded=False)

    def scaling(self, index: int) -> float:
        """Return what a block's scores are multiplied by."""
        own = self.engine.blocks[index].attention
        assert own is not None
        return own.scaling

    def reserve(self) -> None:
        """Move the weights to where they are read fastest, before any clock runs."""
        self.kernel.settle(self.engine)

    def through(
        self, hidden: torch.Tensor, angles: Angles, blocks: range, attend: Attend
    ) -> torch.Tensor:
        """Return what blocks make of hidden states, [B, W, d].

        Args:
            hidden: What the first of the blocks reads, [B, W, d].
            angles: Of their positions.
            blocks: Consecutive ones.
            attend: Their attention.
        """
        batch, width, _ = hidden.shape
        turns = [t.expand(batch, -1, -1).flatten(0, 1).contiguous() for t in angles]
        rows, states = self._stretch(hidden.flatten(0, 1), turns, blocks.start, None, True)
        for index in blocks:
            query, keys, values = (t.unflatten(0, (batch, width)).transpose(1, 2) for t in states)
            reads = rows.unflatten(0, (batch, width))
            mixed = attend(index, reads, (query, keys, values))
            mixed = mixed.flatten(2).flatten(0, 1).contiguous()
            rows, states = self._stretch(rows, turns, index, mixed, index + 1 < blocks.stop)
        return rows.unflatten(0, (batch, width))

    def _stretch(
        self,
        rows: torch.Tensor,
        turns: list[torch.Tensor],
        index: int,
        mixed: torch.Tensor | None,
        asks: bool,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return hidden states [R, d] and the queries, keys and values [R, H or G, D] of a block.

        Args:
            rows: Hidden states that a block reads, [R, d].
            turns: Cosine and sine of each, [R, D].
            index: The block.
            mixed: What its attention mixed, [R, H D]: the rest of it runs, and the states are those
                of the next block. None: the states are its own, and none of it runs.
            asks: Whether there are to be queries, keys and values at all.
        """
        own = self.engine.blocks[index if mixed is None else index + 1] if asks else None
        rows = rows.contiguous()
        out, states = rows, []
        if mixed is not None:
            out = torch.empty_like(rows)
        if own is not None:
            assert own.attention is not None
            heads, kv_heads = own.attention.heads, own.attention.kv_heads
            states = [
                rows.new_empty(len(rows), n, self.engine.head_dim)
                for n in (heads, kv_heads, kv_heads)
            ]
        for start in range(0, len(rows), prompts.CHUNK_ROWS):
            part = slice(start, start + prompts.CHUNK_ROWS)
            self._call(
                rows[part],
                [t[part] for t in turns],
                index,
                None if mixed is None else mixed[part],
                out[part],
                [t[part] for t in states],
            )
        return out, states

    def _call(
        self,
        rows: torch.Tensor,
        turns: list[torch.Tensor],
        index: int,
        mixed: torch.Tensor | None,
        out: torch.Tensor,
        states: list[torch.Tensor],
    ) -> None:
        """Run the kernel for at most `prompts.CHUNK_ROWS` rows; see `_stretch`."""
        sizes = native.Model.from_buffer_copy(self.kernel.sizes)
        sizes.cos, sizes.sin = (t.data_ptr() for t in turns)
        step = native.Step(first=index, last=index + (mixed is not None))
        if mixed is not None:
            step.mixed, step.outputs = mixed.data_ptr(), out.data_ptr()
        if states:
            step.queries, step.keys, step.values = (t.data_ptr() for t in states)
        self._run(sizes, step, rows)

    def _run(self, sizes: native.Model, step: native.Step, rows: torch.Tensor) -> None:
        """Run the kernel for hidden states [R, d]; fill in what all calls have in common."""
        self.kernel.follow_packed(self.engine)
        count = len(rows)
        need = self.kernel.kernels.scratch_floats(sizes, count, 0)
        if len(self.scratch) < need:
            self.scratch = torch.empty(need)
        step.batch, step.width, step.threads = count, 1, torch.get_num_threads()
        step.inputs, step.scratch = rows.data_ptr(), self.scratch.data_ptr()
        step.positions, step.starts = self.places.data_ptr(), self.starts.data_ptr()
        step.lengths, step.runs = ctypes.addressof(self.lengths), ctypes.addressof(self.runs)
        self.kernel.kernels.decode(sizes, step, self.engine.dtype)

    def logits(self, hidden: torch.Tensor, norm: Any, head: Any) -> torch.Tensor:
        """Return the logits [..., V] of hidden states [..., d] after a norm and a head."""
        rows = hidden.reshape(-1, hidden.shape[-1]).contiguous()
        fits = readable(head, self.engine.dtype) and untouched(norm)
        if not fits or norm.weight.dtype != rows.dtype or len(rows) > native.LARGEST_BATCH:
            modules: torch.Tensor = head(norm(hidden))
            return modules
        out = rows.new_empty(len(rows), head.out_features)
        sizes = native.Model.from_buffer_copy(self.kernel.sizes)
        sizes.norm, sizes.eps = norm.weight.data_ptr(), norm.variance_epsilon
        sizes.head, sizes.vocab = matrix_of(head), head.out_features
        self._run(sizes, native.Step(logits=out.data_ptr()), rows)
        return out.view(*hidden.shape[:-1], -1)
