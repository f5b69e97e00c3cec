"""Output heads that compute logits and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def rows_together(model: Any) -> Iterator[None]:
    """Have a model's head read rows that lie together in memory.

    The last position of each of several sequences is a view with gaps. For those PyTorch makes
    a product for each sequence, and on a CPU in bfloat16 a copy of the head's weight for each too.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(_together)
    try:
        yield
    finally:
        hook.remove()


def _together(head: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    hidden, *others = inputs
    return (hidden.contiguous(), *others)
