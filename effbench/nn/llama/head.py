"""Output heads that compute logits and nothing else."""

from __future__ import annotations

from typing import Any

from effbench.nn.model_kinds.base import CAUSAL, kind_of

IGNORED = -100
"""Label of a position that does not count."""


PLAIN_HEADS = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "gpt_neox", "olmo2"}
)
"""Model types whose logits are the head applied to the last hidden states, and nothing more."""


def has_plain_head(model: Any) -> bool:
    """Whether a model's logits are its head applied to the last hidden states of all positions."""
    return model.config.model_type in PLAIN_HEADS and kind_of(model).name == CAUSAL
