"""Decoding that computes an attention map once for all layers that share it.

A step has one query, so that a map is [B, H, 1, S] and cheap to hand on: layers that take it skip
scores and softmax, and read no keys. A prompt's map would be [B, H, T, T], which fused attention
never makes; there the layers take queries and keys, and each attends for itself. Maps live for one
step; nothing of them is cached.
"""

from __future__ import annotations

import torch

from effbench.nn.decode.shared import SharedSession
from effbench.nn.llama.shared_attention import copying


class CopyingSession(SharedSession):
    """Decodes a model that shares attention; prompts are read with fused attention."""

    @torch.inference_mode()
    def step(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Read one token per sequence, [B, 1]; return logits [B, V]."""
        with copying(self.model):
            return super().step(input_ids)
