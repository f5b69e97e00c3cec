"""A step of linear attention against softmax over a cache, by length: milliseconds and bytes."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

from effbench.nn.decode.cache import held_bytes
from effbench.nn.linear_attention.attention import Design, LinearAttention

HEAD_DIM = 64
SMOLLM2 = LlamaConfig(
    hidden_size=576,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=HEAD_DIM,
    max_position_embeddings=8192,
)
SMOLLM2._attn_implementation = "sdpa"
STEPS = 50


def inputs(length: int) -> dict[str, Any]:
    """Return hidden states [1, T, 576], with angles that turn nothing."""
    ones = torch.ones(1, length, HEAD_DIM)
    return {
        "hidden_states": torch.randn(1, length, SMOLLM2.hidden_size),
        "position_embeddings": (ones, 0 * ones),
        "attention_mask": None,
    }


def step_ms(attention: torch.nn.Module, cache: DynamicCache) -> float:
    """Return the time of a step, the mean over some."""
    one = inputs(1)
    begun = time.perf_counter()
    for _ in range(STEPS):
        attention(**one, past_key_values=cache)
    return (time.perf_counter() - begun) / STEPS * 1000


def read(attention: torch.nn.Module, length: int) -> DynamicCache:
    """Return a cache with so many tokens in it."""
    cache = DynamicCache()
    attention(**inputs(length), past_key_values=cache)
    return cache


@torch.inference_mode()
def row(pair: Sequence[torch.nn.Module], length: int, rounds: int) -> list[float]:
    """Return median times of both, in turn, and the bytes that each holds after a prompt."""
    times: list[list[float]] = [[], []]
    held = [held_bytes(read(attention, length)) for attention in pair]
    for _ in range(rounds):
        for found, attention in zip(times, pair, strict=True):
            found.append(step_ms(attention, read(attention, length)))
    median: Callable[[list[float]], float] = statistics.median
    return [*map(median, times), *held]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**n for n in range(5, 13)])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.manual_seed(0)
    softmax = LlamaAttention(SMOLLM2, 0).eval()
    linear = LinearAttention(LlamaAttention(SMOLLM2, 0), Design(), torch.Generator()).eval()
    print("One layer of SmolLM2-135M, float32, batch 1; a step, and the cache after a prompt")
    print(f"{'tokens':>8} {'softmax':>10} {'linear':>10} {'cache':>10} {'state':>10}")
    faster: list[int] = []
    for length in args.lengths:
        slow, fast, cache, state = row((softmax, linear), length, args.rounds)
        print(f"{length:>8} {slow:>7.3f} ms {fast:>7.3f} ms {cache:>8.0f} B {state:>8.0f} B")
        faster = [*faster, length] if fast < slow else []
    print(f"faster from {faster[0]} tokens on" if faster else "never faster at these lengths")


if __name__ == "__main__":
    main()
