"""Decoding on the device: the captured step against the model's own forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config
from transformers.models.auto import AutoModelForCausalLM

from effbench.api.session import Session
from effbench.nn.decode.session import CachedSession, greedy
from effbench.nn.decode.static import StaticSession
from effbench.nn.llama.stack import at_layers

pytestmark = pytest.mark.gpu

SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "max_position_embeddings": 1024,
}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama, biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama, wide": LlamaConfig(
        **{**SIZES, "hidden_size": 512, "intermediate_size": 1376, "initializer_range": 0.03}
    ),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES, use_sliding_window=False),
}
TOLERANCES = {torch.float32: 5e-4, torch.bfloat16: 0.1}
"""Largest difference of a logit; the logits' own spread is about 1."""


def model_of(family: str, device: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(FAMILIES[family], attn_implementation="sdpa")
    for p in model.parameters():
        if p.ndim == 1:
            torch.nn.init.normal_(p, 1.0, 0.3)
    return model.to(device, dtype).eval().requires_grad_(False)


def some_ids(rows: int, length: int, device: str) -> torch.Tensor:
    draws = torch.Generator().manual_seed(rows)
    return torch.randint(1, 131, (rows, length), generator=draws).to(device)


def stepped(session: Session, ids: torch.Tensor, prompt: int, **read: Any) -> torch.Tensor:
    """Return the logits after the prompt and after every further token, [T, B, V]."""
    seen = [session.prefill(ids[:, :prompt], **read)]
    seen += [session.step(ids[:, i : i + 1]) for i in range(prompt, ids.shape[1])]
    return torch.stack(seen).float()


def expected_engine(device: str) -> tuple[str, ...]:
    return ("graph",) if device == "cuda" else ("native", "walk")


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_give_what_the_model_gives(
    family: str, dtype: torch.dtype, rows: int, device: str
) -> None:
    model, ids = model_of(family, device, dtype), some_ids(rows, 40, device)
    ours = StaticSession(model)
    ours.reserve(rows, 40, 9)
    assert ours.engine in expected_engine(device)
    seen = [stepped(s, ids, 9) for s in (ours, CachedSession(model))]
    torch.testing.assert_close(*seen, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@pytest.mark.parametrize("rows", [1, 3, 17])
def test_padded_rows_see_nothing_of_their_padding(rows: int, device: str) -> None:
    model, ids = model_of("llama", device, torch.float32), some_ids(rows, 30, device)
    mask = torch.ones(rows, 11, dtype=torch.long, device=device)
    for row in range(rows):
        mask[row, : row % 5] = 0
    both = (StaticSession(model), CachedSession(model))
    seen = [stepped(s, ids, 11, attention_mask=mask) for s in both]
    torch.testing.assert_close(*seen, atol=5e-4, rtol=5e-4)


def test_greedy_tokens_are_those_of_the_model(device: str) -> None:
    model, ids = model_of("llama", device, torch.float32), some_ids(2, 12, device)
    ours, theirs = (greedy(s, ids, 64) for s in (StaticSession(model), CachedSession(model)))
    assert torch.equal(ours, theirs)


def test_a_cache_that_grows_forgets_nothing(device: str) -> None:
    model, ids = model_of("llama", device, torch.float32), some_ids(1, 320, device)
    ours = StaticSession(model)
    seen = [stepped(s, ids, 5) for s in (ours, CachedSession(model))]
    assert ours.capacity >= 320
    torch.testing.assert_close(*seen, atol=5e-4, rtol=5e-4)


def test_reordered_rows_go_on_as_their_own(device: str) -> None:
    model, ids = model_of("llama", device, torch.float32), some_ids(3, 20, device)
    session, rows = StaticSession(model), torch.tensor([2, 0])
    stepped(session, ids[:, :10], 6)
    session.reorder(rows)
    kept = ids[rows.to(device)]
    seen = torch.stack([session.step(kept[:, i : i + 1]) for i in range(10, 20)])
    theirs = stepped(CachedSession(model), kept, 10)[1:]
    torch.testing.assert_close(seen.float(), theirs, atol=5e-4, rtol=5e-4)


def test_fewer_layers_are_captured_too(device: str) -> None:
    model, ids = model_of("llama", device, torch.float32), some_ids(2, 24, device)
    with at_layers(model, [0, 1]):
        seen = [stepped(s, ids, 7) for s in (StaticSession(model), CachedSession(model))]
    torch.testing.assert_close(*seen, atol=5e-4, rtol=5e-4)


def test_two_sessions_of_one_model_do_not_mix(device: str) -> None:
    model, ids = model_of("llama", device, torch.float32), some_ids(2, 24, device)
    a, b = StaticSession(model), StaticSession(model)
    first, second = ids[:1], ids[1:]
    seen_a, seen_b = [a.prefill(first[:, :8])], [b.prefill(second[:, :5])]
    for i in range(12):
        seen_a.append(a.step(first[:, 8 + i : 9 + i]))
        seen_b.append(b.step(second[:, 5 + i : 6 + i]))
    for seen, rows, prompt in ((seen_a, first, 8), (seen_b, second, 5)):
        theirs = stepped(CachedSession(model), rows[:, : prompt + 12], prompt)
        torch.testing.assert_close(torch.stack(seen).float(), theirs, atol=5e-4, rtol=5e-4)
