"""Steps of a model with blocks that keep a state: products by the C++ kernel, the rest by theirs.

What a block does between its projections is its own (`effbench.nn.llama.parts.Mixes`); blocks that
attend do so to a growing cache. Prompts go through the modules, and so do steps of padded rows
where a block attends, which has to leave the padding out.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from effbench.nn.decode.between import Between, States
from effbench.nn.decode.native_step import product, readable
from effbench.nn.decode.session import CachedSession


class MixingSession(CachedSession):
    """Decodes one prompt batch; each block mixes or attends between two calls of the kernel.

    Args:
        model: Laid out as Llama is.
        between: Of it, mixers and all.
    """

    def __init__(self, model: torch.nn.Module, between: Between) -> None:
        super().__init__(model)
        self.whole: Any = model
        self.between = between
        self.attentions = [block.attention for block in between.engine.blocks]
        self.attends = any(own is not None and own.mixer is None for own in self.attentions)
        """Whether some block does."""

    def reserve(self, batch: int, length: int, prompt: int = 0) -> None:
        """Move the weights to huge pages, where the system has them, before any clock runs."""
        self.between.reserve()

    @torch.inference_mode()
    def step(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Read one token per sequence, [B, 1]; return logits [B, V]."""
        padded = self.mask is not None and not bool(self.mask.all())
        inner = self.whole.model
        hidden = inner.embed_tokens(input_ids)
        if not self.between.takes(hidden) or (padded and self.attends):
            return super().step(input_ids)
        if self.mask is not None:
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
            positions = self.mask.sum(1, keepdim=True) - 1
        else:
            positions = torch.full_like(input_ids, self.cache.get_seq_length())
        angles = inner.rotary_emb(hidden, position_ids=positions)

        def mix(index: int, reads: torch.Tensor, states: States) -> torch.Tensor:
            return self._mixed(index, reads, states, positions)

        hidden = self.between.through(hidden, angles, range(len(self.attentions)), mix)
        return self.between.logits(hidden[:, -1], inner.norm, self.whole.lm_head)

    def _mixed(
        self, index: int, reads: torch.Tensor, states: States, positions: torch.Tensor
    ) -> torch.Tensor:
        """Return what a block's output projection reads, [B, 1, H D]."""
        own = self.attentions[index]
        assert own is not None
        if own.mixer is not None:
            return own.mixer.mixed(own.norm(reads), states, positions, self.cache, self._product)
        query, (keys, values) = states[0], self.cache.update(*states[1:], index)
        config = self.whole.config
        attend: Any = ALL_ATTENTION_FUNCTIONS.get_interface(
            config._attn_implementation, eager_attention_forward
        )
        module = self.whole.model.layers[index].self_attn
        context = {"dropout": 0.0, "scaling": own.scaling}
        mixed: torch.Tensor = attend(module, query, keys, values, None, **context)[0]
        return mixed.flatten(2)

    def _product(self, linear: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        """Return what a linear makes of x [..., K], by the kernel where it reads it."""
        if linear.bias is not None or not readable(linear, x.dtype):
            found: torch.Tensor = linear(x)
            return found
        rows = product(self.between.kernel.kernels, linear, x.reshape(-1, x.shape[-1]))
        return rows.view(*x.shape[:-1], -1)
