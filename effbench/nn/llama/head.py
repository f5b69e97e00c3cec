"""Output heads that compute logits and nothing else."""

from __future__ import annotations

IGNORED = -100
"""Label of a position that does not count."""


PLAIN_HEADS = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "gpt_neox", "olmo2"}
)
"""Model types whose logits are the head applied to the last hidden states, and nothing more."""
