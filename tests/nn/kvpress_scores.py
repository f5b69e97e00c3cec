"""Scores of kvpress for drawn keys and values, printed as `tests/golden/kvpress.json` has them.

kvpress 0.5.5 wants a transformers below 5.3, so it runs in an environment of its own:

    python -m venv side && side/bin/pip install torch kvpress==0.5.5
    PYTHONPATH=tests/nn side/bin/python tests/nn/kvpress_scores.py > tests/golden/kvpress.json
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

PRESSES: dict[str, tuple[str, dict[str, Any]]] = {
    "snapkv": ("SnapKVPress", {"window_size": 8, "kernel_size": 5}),
    "snapkv of few": ("SnapKVPress", {"window_size": 3, "kernel_size": 7}),
    "expected_attention": (
        "ExpectedAttentionPress",
        {"n_sink": 4, "n_future_positions": 16, "use_covariance": True, "epsilon": 0.02},
    ),
    "expected_attention without covariance": (
        "ExpectedAttentionPress",
        {"n_sink": 2, "n_future_positions": 5, "use_covariance": False, "epsilon": 0.0},
    ),
    "knorm": ("KnormPress", {}),
    "tova": ("TOVAPress", {}),
}
"""What is asked: a class of kvpress and its settings."""


class Drawn(NamedTuple):
    """An attention and what has come in, 24 tokens of two sequences."""

    attention: Any
    hidden: torch.Tensor
    angles: tuple[torch.Tensor, torch.Tensor]
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


def drawn() -> Drawn:
    """Return the same on every machine: four query heads, two of keys, 16 wide, in float64."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    attention: Any = LlamaAttention(LlamaConfig(**sizes), 0).double().requires_grad_(False)
    attention.rotary_emb = LlamaRotaryEmbedding(attention.config)
    draws = torch.Generator().manual_seed(0)
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
        weight = torch.randn(linear.weight.shape, generator=draws, dtype=torch.float64)
        linear.weight.copy_(weight / 4)
    hidden = torch.randn(2, 24, 64, generator=draws, dtype=torch.float64) + 0.5
    angles = attention.rotary_emb(hidden, torch.arange(24)[None])
    heads = (
        linear(hidden).unflatten(2, (-1, 16)).transpose(1, 2)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k, v = heads
    q, k = apply_rotary_pos_emb(q, k, *angles)
    return Drawn(attention, hidden, angles, q, k, v)


def main() -> None:
    import kvpress  # type: ignore[import-not-found]

    of, found = drawn(), {}
    for name, (kind, settings) in PRESSES.items():
        press = getattr(kvpress, kind)(**settings)
        given = {"position_embeddings": of.angles}
        scores = press.score(of.attention, of.hidden, of.keys, of.values, None, given)
        found[name] = [[[float(f"{x:.7g}") for x in row] for row in own] for own in scores.tolist()]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
