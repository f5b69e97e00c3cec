"""Decoding with layers that most tokens skip."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from effbench.api.session import Cycle
from effbench.nn.decode.session import CachedSession
from effbench.nn.decode.view import as_mask
from effbench.nn.depth.droppable import DroppableLayers, anchors_of, causal_mask


class TemporalSession(CachedSession):
    """Decodes with droppable layers; cache, anchors, padding and phase are its own.

    Every layer reads the prompt. Afterwards k tokens drop the droppable layers, one token
    refreshes them, and so on. Dropped tokens leave gaps in a droppable layer's cache; positions
    stay the true ones. `mask` is that of the prompt, [B, P], or None when nothing is padded.
    """

    def __init__(self, model: torch.nn.Module, droppable: DroppableLayers) -> None:
        super().__init__(model)
        root: Any = model
        self.decoder, self.head = root.model, root.lm_head
        self.droppable = droppable
        layers = len(self.decoder.layers)
        self.cycle = Cycle(droppable.window, layers, len(droppable.layers))
        self.fill, self.policy = droppable.fill, droppable.policy
        self.anchors: dict[int, torch.Tensor] = {}
        """Anchor of each droppable layer, [B, 1, d]."""
        self.position = torch.empty(0)
        """Position of the last token read, [B, 1]."""

    @torch.inference_mode()
    def prefill(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Read prompts [B, P]; return the logits after the last position, [B, V]."""
        if self.anchors:
            raise RuntimeError("a session reads one prompt; start another session")
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self.mask = None if real.all() else real.bool()
        positions = (real.cumsum(1) - 1).clamp(min=0)
        self.position = positions[:, -1:]
        hidden = self.decoder.embed_tokens(input_ids)
        mask = causal_mask(self.decoder.config, hidden, real, positions)
        return self._run(hidden, positions, mask, mask, dropping=False)

    @torch.inference_mode()
    def step(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Read one token per sequence, [B, 1]; return logits [B, V]."""
        dropping = self.cycle.turn()
        self.position = self.position + 1
        hidden = self.decoder.embed_tokens(input_ids)
        ordinary = self._mask_of(0, hidden.dtype)
        gapped = self._mask_of(self.droppable.indices[0], hidden.dtype)
        return self._run(hidden, self.position, ordinary, gapped, dropping)

    def _run(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        ordinary: Any,
        gapped: Any,
        dropping: bool,
    ) -> torch.Tensor:
        rotary = self.decoder.rotary_emb(hidden, position_ids=positions)
        for index, layer in enumerate(self.decoder.layers):
            droppable = self.droppable.drops(index)
            context = {
                "attention_mask": gapped if droppable else ordinary,
                "position_ids": positions,
                "position_embeddings": rotary,
                "past_key_values": self.cache,
            }
            before = hidden
            if not (droppable and dropping):
                hidden = layer(hidden, use_cache=True, **context)
            else:
                if self.fill:
                    layer.self_attn(hidden_states=layer.input_layernorm(hidden), **context)
                hidden = self.droppable.replaced(index, hidden, self.anchors[index], self.policy)
            if droppable and (self.policy[0] == "previous" or not dropping):
                last = anchors_of(before[:, -1:], hidden[:, -1:], self.policy[0])
                self.anchors[index] = last.clone()  # not a view of the whole prompt
        logits: torch.Tensor = self.head(self.decoder.norm(hidden[:, -1:]))
        return logits[:, -1]

    def _mask_of(self, index: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Return which keys of layer `index` one new token sees, as its attention wants it."""
        if self.mask is None:
            return None
        decoded = self.cache.get_seq_length(index) + 1 - self.mask.shape[1]
        seen = F.pad(self.mask, (0, decoded), value=True)[:, None, None]
        return as_mask(seen, self.decoder.config._attn_implementation, dtype)

    def reorder(self, rows: torch.Tensor) -> None:
        """Keep the sequences `rows`, in this order, with their anchors."""
        super().reorder(rows)
        self.anchors = {i: anchor[rows] for i, anchor in self.anchors.items()}
        self.position = self.position[rows]

    def kv_lengths(self) -> list[int]:
        """Return the cached positions of each layer, padding included."""
        return [self.cache.get_seq_length(i) for i in range(len(self.cache.layers))]
