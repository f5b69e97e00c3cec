"""Several tokens at once in our decode engine: a few positions of each sequence, some layers.

A step of the engine is one token through all blocks. Decoding that leaves early, or drafts with the
first layers, needs a part of that, and for several positions at once. Both are the same call of the
C++ kernel, so that each row has the bits that a step of all blocks gives it: speculation loses
nothing in bfloat16 either.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache

from effbench.nn.decode import native
from effbench.nn.decode.native_step import NativeStep
from effbench.nn.decode.static import StaticSession
from effbench.nn.llama.walk import plain, untouched, why_not


class MultiTokenEngine(StaticSession):
    """The caches of a model and its blocks as the kernel runs them.

    Args:
        model: Laid out as Llama is, all of its linears plain, on a CPU.
        mixers: Whether blocks may mix otherwise than by a softmax over scores; nobody then runs
            them as a whole.

    Raises:
        ValueError: When the engine or its kernel does not apply to `model`.
    """

    def __init__(self, model: Any, mixers: bool = False) -> None:
        super().__init__(model, mixers=mixers)
        if self._native is None:
            raise ValueError("the kernel does not apply")
        self.kernel: NativeStep = self._native
        self.cache = Cache(layers=list(self.layers))
        """The same caches, for the modules of transformers."""

    def takes(self, hidden: torch.Tensor) -> bool:
        """Whether the kernel is the way for hidden states [B, W, d], rather than the modules."""
        return hidden.shape[0] * hidden.shape[1] <= native.LARGEST_BATCH

    @torch.inference_mode()
    def run_blocks(
        self, hidden: torch.Tensor, positions: torch.Tensor, starts: torch.Tensor, blocks: range
    ) -> torch.Tensor:
        """Return what blocks make of the next W positions, [B, W, d]; their caches take them in.

        Args:
            hidden: What the first of the blocks reads, [B, W, d].
            positions: Rotary position of each, [B, W].
            starts: Padding on the left of each sequence, [B].
            blocks: Consecutive ones, whose caches are equally long.
        """
        batch, width, _ = hidden.shape
        layers = [self.layers[i] for i in blocks]
        self.make_ready(batch, width, layers)
        out = self.kernel.run_blocks(self, hidden, positions, starts, blocks)
        for layer in layers:
            layer.length += width
        return out

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor, norm: Any, head: Any) -> torch.Tensor:
        """Return the logits [..., V] of hidden states [..., d] after a norm and a head."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        fits = plain(head, self.dtype) and untouched(norm) and norm.weight.dtype == self.dtype
        if not fits or len(rows) > native.LARGEST_BATCH:
            modules: torch.Tensor = head(norm(hidden))
            return modules
        self.make_ready(len(hidden), 0)
        return self.kernel.readout(self, rows, norm, head).view(*hidden.shape[:-1], -1)


def multi_token_engine(model: torch.nn.Module, mixers: bool = False) -> MultiTokenEngine | None:
    """Return the engine of `model` for several tokens; None where its kernel does not apply."""
    if why_not(model, mixers):
        return None
    try:
        return MultiTokenEngine(model, mixers)
    except ValueError:
        return None
