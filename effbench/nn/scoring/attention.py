"""Attention under any mask, in pieces that stay in a CPU's cache.

torch's fused attention takes half of the time of a small model on a CPU once a mask is given. Plain
products are several times faster there in bfloat16, as long as the scores of a piece fit into the
cache, and heads that share keys need no copies of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface

PIECE = 1 << 20
"""Scores in memory at a time, 4 bytes each."""

NAME = "effbench_pieces"
"""Under which transformers knows it."""


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Return what each query sees, in the form of an attention function of transformers.

    Args:
        module: The attention layer.
        query: [B, H, T, d].
        key: [B, G, S, d]; H is a multiple of G.
        value: [B, G, S, d].
        attention_mask: [B, 1, T, S], added to the scores. A query sees no key behind its own, the
            last T keys being those of the queries.
        scaling: Of the scores; d ** -0.5 when None.

    Returns:
        [B, T, H, d], and no weights.
    """
    rows, heads, width, size = query.shape
    groups, before = key.shape[1], key.shape[2] - width
    scaling = size**-0.5 if scaling is None else scaling
    exact = torch.promote_types(query.dtype, torch.float32)
    out = query.new_empty(rows, width, heads, value.shape[-1])
    step = max(1, PIECE // (heads * key.shape[2]))
    for row in range(rows):
        for start in range(0, width, step):
            end = min(width, start + step)
            seen = before + end
            piece = query[row, :, start:end].reshape(groups, -1, size)
            scores = (piece @ key[row, :, :seen].transpose(-1, -2)).to(exact).mul_(scaling)
            scores = scores.view(heads, end - start, seen)
            scores += attention_mask[row, :, start:end, :seen]
            weights = scores.softmax(-1).to(value.dtype).view(groups, -1, seen)
            mixed = (weights @ value[row, :, :seen]).view(heads, end - start, -1)
            out[row, start:end] = mixed.transpose(0, 1)
    return out, None


@contextmanager
def in_pieces(model: Any, device: torch.device) -> Iterator[None]:
    """Let a model on a CPU attend in pieces, and one on another device as it did."""
    config = model.config
    before = config._attn_implementation
    if device.type == "cpu" and before == "sdpa":
        AttentionInterface.register(NAME, attend)
        config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
