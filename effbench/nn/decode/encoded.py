"""Decoding of encoder-decoders: prompts are read once, and answers grow behind a start token."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache

from effbench.nn.decode.cache import held_bytes
from effbench.nn.model_kinds.seq2seq import beginning


class EncodedSession:
    """Ordinary decoding: the encoder's last states, and a growing cache in every decoder layer."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model: Any = model
        self.cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        self.mask: torch.Tensor | None = None
        self.states: Any = None

    @torch.inference_mode()
    def prefill(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Read prompts [B, P]; return the logits of each answer's first token, [B, V].

        Args:
            input_ids: Closed as the tokenizer closes a text.
            attention_mask: [B, P], 0 where a prompt is padded, on either side.
        """
        if attention_mask is not None:  # a model with learned positions begins at the first one
            order = attention_mask.argsort(dim=1, descending=True, stable=True)
            input_ids, attention_mask = (x.gather(1, order) for x in (input_ids, attention_mask))
        self.mask = attention_mask
        self.states = self.model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)
        return self.step(beginning(self.model, input_ids))

    @torch.inference_mode()
    def step(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Read one token of each answer, [B, 1], or those before it; return logits [B, V]."""
        output: torch.Tensor = self.model(
            encoder_outputs=self.states,
            attention_mask=self.mask,
            decoder_input_ids=input_ids,
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        return output[:, -1]

    def reorder(self, rows: torch.Tensor) -> None:
        """Keep the sequences `rows`, in this order."""
        self.cache.reorder_cache(rows.long())  # type: ignore[arg-type]
        self.states["last_hidden_state"] = self.states.last_hidden_state[rows]
        if self.mask is not None:
            self.mask = self.mask[rows]

    def kv_bytes(self) -> int:
        """Return the bytes of all cached keys and values, those of the prompts included."""
        both = (self.cache.self_attention_cache, self.cache.cross_attention_cache)
        return sum(map(held_bytes, both))
