"""The header of a GGUF file: its metadata and the names of its tensors, read without the weights.

The `gguf` package builds an array for every token of the vocabulary, which takes seconds; a shape
needs a dozen numbers.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from effbench.util.errors import UserError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
FORMATS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""Format characters of the scalar types, by their number in the file."""
TEXT, ARRAY = 8, 9


class Array(NamedTuple):
    """A list in the metadata, of which only the length is kept."""

    length: int


FAMILIES = {"gemma3": "gemma3_text", "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}
"""Architectures that transformers calls otherwise."""


@dataclass(frozen=True)
class Header:
    """What stands before the weights."""

    fields: dict[str, Any]
    tensors: tuple[str, ...]


def read_header(path: Path) -> Header:
    """Return the header of a GGUF file.

    Raises:
        UserError: When there is no such file, or when it is truncated or not GGUF.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise ValueError("it does not begin like a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Cursor(data, len(MAGIC)).header()
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.", "Correct model.path.") from None
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise UserError(
            f"{path} cannot be read as GGUF: {error}.",
            "The file is truncated or corrupt; get it anew.",
        ) from None


def config_in(header: Header) -> dict[str, Any]:
    """Return the sizes that a GGUF header states under the names that `config.json` uses."""
    fields = header.fields
    prefix = f"{fields.get('general.architecture')}."
    own = {k.removeprefix(prefix): v for k, v in fields.items() if k.startswith(prefix)}
    tokens = fields.get("tokenizer.ggml.tokens", Array(0))
    config = {
        "hidden_size": own.get("embedding_length"),
        "intermediate_size": own.get("feed_forward_length"),
        "num_hidden_layers": own.get("block_count"),
        "num_attention_heads": own.get("attention.head_count"),
        "num_key_value_heads": own.get("attention.head_count_kv"),
        "head_dim": own.get("attention.key_length"),
        "vocab_size": own.get("vocab_size", tokens.length),
        "max_position_embeddings": own.get("context_length"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "rope_theta": own.get("rope.freq_base"),
        "rms_norm_eps": own.get("attention.layer_norm_rms_epsilon"),
        "num_experts": own.get("expert_count"),
        "num_experts_per_tok": own.get("expert_used_count"),
        "attention_bias": any(name.endswith("attn_q.bias") for name in header.tensors) or None,
        "mlp_bias": any(name.endswith("ffn_up.bias") for name in header.tensors) or None,
    }
    family = str(fields.get("general.architecture", ""))
    if family == "llama" and config["num_experts"]:
        config["num_local_experts"] = config.pop("num_experts")
        family = "mixtral"
    config["model_type"] = FAMILIES.get(family, family)
    return {k: v for k, v in config.items() if v is not None}


@dataclass
class _Cursor:
    data: mmap.mmap
    at: int

    def header(self) -> Header:
        version = self.number("I")
        if version not in VERSIONS:
            raise ValueError(f"version {version} is not known")
        count, pairs = self.number("Q"), self.number("Q")
        fields = {self.text(): self.value(self.number("I")) for _ in range(pairs)}
        tensors = []
        last = 0
        for _ in range(count):
            tensors.append(self.text())
            dimensions = self.number("I")
            self.at += 8 * dimensions + 4
            last = max(last, self.number("Q"))
        if not tensors or self.at + last >= len(self.data):
            raise ValueError("it ends before its last tensor")
        return Header(fields, tuple(tensors))

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return value

    def skip_text(self) -> None:
        length = self.number("Q")
        self.at += length
        if self.at > len(self.data):
            raise ValueError("it ends inside its header")

    def text(self) -> str:
        start = self.at + 8
        self.skip_text()
        return self.data[start : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            return self.number(FORMATS[kind])
        element, length = self.number("I"), self.number("Q")
        if element == TEXT:
            for _ in range(length):
                self.skip_text()
        elif element == ARRAY:
            raise ValueError("it holds lists of lists")
        else:
            self.at += length * struct.calcsize(f"<{FORMATS[element]}")
        return Array(length)
