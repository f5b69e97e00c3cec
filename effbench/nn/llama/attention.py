"""Modules of a block that lacks heads, attention or an MLP."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM

from effbench.nn.llama.parts import Attention, attention_of
from effbench.nn.llama.stack import require_no_states
from effbench.util.errors import UserError


def require_llama(model: nn.Module) -> None:
    """Refuse a model whose blocks are not Llama's own.

    Raises:
        UserError: When slicing would not know all that depends on a size.
    """
    if not isinstance(model, LlamaForCausalLM):
        raise UserError(
            f"{type(model).__name__} cannot be sliced: its blocks are not Llama's.",
            "Choose a model of the Llama family.",
        )
    require_no_states(model)
    if getattr(model.config, "layer_sources", None):
        raise UserError(
            "Some layers of this model take states from others, so their heads cannot go alone.",
            "Prune the model first, and share afterwards.",
        )


class SlicedAttention(LlamaAttention):
    """Llama's attention with head counts of its own, whatever the model's config says.

    Args:
        whole: What its projections and settings are taken from.
        place: Its index among the layers that attend, which is that of its cache.
    """

    def __init__(self, whole: LlamaAttention, place: int) -> None:
        nn.Module.__init__(self)
        self.config, self.head_dim, self.scaling = whole.config, whole.head_dim, whole.scaling
        self.attention_dropout, self.is_causal = whole.attention_dropout, whole.is_causal
        self.q_proj, self.k_proj = whole.q_proj, whole.k_proj
        self.v_proj, self.o_proj = whole.v_proj, whole.o_proj
        self.layer_idx = place
        self.num_key_value_groups = self.q_proj.out_features // self.k_proj.out_features

    def decode_part(self, norm: Any) -> Attention:
        """Return its modules."""
        return attention_of(self, norm)

    def why_not_stepped(self) -> str:
        """Return nothing: it is Llama's attention in all but its sizes."""
        return ""


class Nothing(nn.Module):
    """Stands for a part of a block that was pruned away altogether."""

    def decode_part(self, norm: Any) -> None:
        """Return nothing: a step passes it over."""

    def why_not_stepped(self) -> str:
        """Return nothing: there is nothing to step through."""
        return ""


class NoAttention(Nothing):
    """Stands for attention without heads: it adds nothing and caches nothing."""

    decode_part = Nothing.decode_part  # of this forward too

    def forward(self, hidden_states: torch.Tensor, **context: Any) -> tuple[torch.Tensor, None]:
        """Return zeros like [B, T, d], and no attention weights."""
        return torch.zeros_like(hidden_states), None


class NoMLP(Nothing):
    """Stands for an MLP without neurons."""

    decode_part = Nothing.decode_part

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return zeros like [B, T, d]."""
        return torch.zeros_like(hidden_states)
