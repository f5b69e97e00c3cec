"""Decoding of models whose layers share states: one cache entry for each layer that has one."""

from __future__ import annotations

import torch

from effbench.nn.decode.session import CachedSession
from effbench.nn.llama.shared_attention import last_logits


class SharedSession(CachedSession):
    """Decodes with a growing cache; layers that leave nothing in it read a prompt's last position.

    Args:
        model: A Llama that shares.
        shortcut: Whether they do; else every layer reads the whole prompt.
    """

    def __init__(self, model: torch.nn.Module, shortcut: bool = True) -> None:
        super().__init__(model)
        self.shortcut = shortcut

    @torch.inference_mode()
    def prefill(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Read prompts [B, P]; return the logits after the last position, [B, V]."""
        if not self.shortcut:
            return super().prefill(input_ids, attention_mask)
        self.mask = attention_mask
        positions = None
        if attention_mask is not None:
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        return last_logits(self.model, input_ids, attention_mask, positions, self.cache)
