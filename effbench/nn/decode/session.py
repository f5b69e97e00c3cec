"""Decoding sessions: one prompt batch, one cache, one token at a time."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from effbench.api.session import Session
from effbench.nn.decode.cache import held_bytes
from effbench.nn.decode.native import most_likely
from effbench.nn.llama.head import rows_together


class CachedSession:
    """Ordinary decoding with a growing key/value cache in every layer."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.cache = DynamicCache()
        self.mask: torch.Tensor | None = None

    @torch.inference_mode()
    def prefill(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Read prompts [B, P]; return the logits after the last position, [B, V]."""
        self.mask = attention_mask
        return self._forward(input_ids)

    @torch.inference_mode()
    def step(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Read one token per sequence, [B, 1]; return logits [B, V]."""
        if self.mask is not None:
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        return self._forward(input_ids)

    def _forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        positions = None
        if self.mask is not None:
            positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        with rows_together(self.model):
            output: torch.Tensor = self.model(
                input_ids=input_ids,
                attention_mask=self.mask,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
        return output[:, -1]

    def reorder(self, rows: torch.Tensor) -> None:
        """Keep the sequences `rows`, in this order."""
        self.cache.reorder_cache(rows.long())  # type: ignore[arg-type]
        if self.mask is not None:
            self.mask = self.mask[rows]

    def kv_bytes(self) -> int:
        """Return the bytes of all cached keys, values and states."""
        return held_bytes(self.cache)


@torch.inference_mode()
def greedy(session: Session, input_ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Return the `new_tokens` most likely continuations, [B, new_tokens]."""
    token = most_likely(session.prefill(input_ids))[:, None]
    out = [token]
    for _ in range(new_tokens - 1):
        token = most_likely(session.step(token))[:, None]
        out.append(token)
    return torch.cat(out, dim=1)
