"""What a user brings along, small: a folder with a model that chats, and a file of chats."""

from __future__ import annotations

import json
from pathlib import Path

from effbench.models.random import BYTE_VOCABULARY, byte_tokenizer
from effbench.testing.models import tiny_shape

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The chat template of Qwen2, without its own system prompt and without marks."""


def write_model(folder: Path | str) -> None:
    """Write a tiny Qwen2 with random weights, its tokenizer and chat template, as others save it.

    Args:
        folder: New or empty.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = byte_tokenizer(tiny_shape())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = CHATML
    config = Qwen2Config(
        vocab_size=BYTE_VOCABULARY + 12,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_chats(file: Path | str, count: int = 60) -> None:
    """Write conversations of two questions each, as `messages` in JSON lines."""
    rows = []
    for a in range(count):
        b = 7 * a % 10
        said = (
            ("system", "You add up."),
            ("user", f"What is {a} plus {b}?"),
            ("assistant", f"{a + b}."),
            ("user", "And one more?"),
            ("assistant", f"{a + b + 1}."),
        )
        rows.append({"messages": [{"role": who, "content": what} for who, what in said]})
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
