"""Texts to examples of tokens, kept in a cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from effbench.api.schema import digest
from effbench.api.spec import DatasetSpec
from effbench.data.render import Text
from effbench.util.errors import UserError
from effbench.util.files import write_atomic

IGNORED = -100


@dataclass(frozen=True)
class Choice:
    """One possible answer as tokens."""

    ids: list[int]
    """Prompt and answer."""
    prompt_length: int
    """Tokens of the prompt."""
    answer_bytes: int
    """UTF-8 bytes of the answer."""


@dataclass(frozen=True)
class Example:
    """One tokenised row."""

    id: str
    """Content hash, 16 hexadecimal digits."""
    ids: list[int]
    """Tokens of the whole sequence."""
    prompt_length: int
    """Leading tokens without a loss; 0 for plain text."""
    answer_bytes: int
    """UTF-8 bytes that the loss covers."""
    choices: list[Choice] | None = None
    """All answers (kind `choices`)."""
    right: int = 0
    """Index of the right answer."""

    def labels(self) -> list[int]:
        """Return the labels, not shifted, -100 on the prompt."""
        return [IGNORED] * self.prompt_length + self.ids[self.prompt_length :]


def tokenise(
    texts: Sequence[Text], spec: DatasetSpec, tokenizer: Any, whole: bool = False
) -> list[Example]:
    """Return texts as examples; done once per content and tokenizer, then read from the cache.

    Args:
        texts: The rows of a split.
        spec: Says what kind of rows they are and how they are cut.
        tokenizer: Makes the tokens.
        whole: Whether rows of kind `text` stay whole documents rather than being packed.
    """
    whole = whole and spec.kind == "text"
    key = digest(
        {
            "texts": [[t.id, t.right] for t in texts],
            "form": [spec.kind, spec.max_length, spec.chat],
            "tokenizer": [tokenizer_hash(tokenizer), tokenizer.eos_token_id],
            "version": 2,
            **({"documents": [prefix_token(tokenizer)]} if whole else {}),
        },
        32,
    )
    from effbench.data.assets import cache_dir

    path = cache_dir() / "tokens" / f"{key}.json"
    if path.is_file():
        with suppress(ValueError):  # a damaged file is made again
            return [_example(e) for e in json.loads(path.read_text())]
    make = _whole if whole else _packed if spec.kind == "text" else _paired
    examples = make(texts, spec, tokenizer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps([_plain(e) for e in examples]))
    return examples


def _plain(example: Example) -> dict[str, Any]:
    return {**vars(example), "choices": example.choices and [vars(c) for c in example.choices]}


def _example(values: dict[str, Any]) -> Example:
    choices = values["choices"]
    return Example(**{**values, "choices": choices and [Choice(**c) for c in choices]})


def tokenizer_hash(tokenizer: Any) -> str:
    """Return a hash of everything in a tokenizer that can change its output."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    body = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    template = str(getattr(tokenizer, "chat_template", ""))
    return hashlib.sha256((body + template).encode()).hexdigest()[:16]


def _paired(texts: Sequence[Text], spec: DatasetSpec, tokenizer: Any) -> list[Example]:
    examples = []
    for text in texts:
        prompt = chat_prompt(text.prompt, tokenizer) if spec.chat else text.prompt
        special = not spec.chat
        right = _choice(prompt, text.answer, spec.max_length, tokenizer, special)
        ending = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        choices = [
            _choice(prompt, answer, spec.max_length, tokenizer, special) for answer in text.choices
        ]
        examples.append(
            Example(
                text.id,
                [*right.ids, *ending][: spec.max_length],
                right.prompt_length,
                right.answer_bytes,
                choices or None,
                text.right,
            )
        )
    return examples


def chat_prompt(prompt: str, tokenizer: Any) -> str:
    """Return a prompt as the user's turn in the model's chat template, ready for an answer.

    Raises:
        UserError: When the model has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "The model has no chat template.",
            "Set dataset.chat=false, or chat=false of the evaluator.",
        )
    rendered: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    return rendered


def _choice(prompt: str, answer: str, limit: int, tokenizer: Any, special: bool) -> Choice:
    """Tokenise prompt and answer together; when too long, the prompt loses its start."""
    start: list[int] = tokenizer(prompt, add_special_tokens=special)["input_ids"]
    whole: list[int] = tokenizer(prompt + answer, add_special_tokens=special)["input_ids"]
    if whole[: len(start)] != start:
        whole = start + tokenizer(answer, add_special_tokens=False)["input_ids"]
    answer_length = len(whole) - len(start)
    keep = max(1, limit - answer_length - 1)
    if len(start) > keep:
        whole = whole[len(start) - keep :]
    return Choice(whole[:limit], min(len(start), keep), len(answer.encode()))


def _packed(texts: Sequence[Text], spec: DatasetSpec, tokenizer: Any) -> list[Example]:
    """Join documents with the end-of-text token between them and cut into full blocks."""
    stream: list[int] = []
    for text in texts:
        stream += tokenizer(text.answer)["input_ids"]
        if tokenizer.eos_token_id is not None:
            stream.append(tokenizer.eos_token_id)
    size = min(spec.max_length, len(stream))
    examples = []
    for start in range(0, len(stream) - size + 1, size):
        ids = stream[start : start + size]
        covered = tokenizer.decode(ids[1:], skip_special_tokens=True)
        examples.append(Example(digest(ids), ids, 0, len(covered.encode())))
    return examples


def _whole(texts: Sequence[Text], spec: DatasetSpec, tokenizer: Any) -> list[Example]:
    """Keep documents whole, each after a prefix token from which its first token is predicted."""
    start = prefix_token(tokenizer)
    examples = []
    for text in texts:
        ids = tokenizer(text.answer, add_special_tokens=False)["input_ids"]
        examples.append(Example(text.id, [start, *ids], 1, len(text.answer.encode())))
    return examples


def prefix_token(tokenizer: Any) -> int:
    """Return the token that stands before a document: beginning of text, else end of text.

    Raises:
        UserError: When the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise UserError(
        "The model's tokenizer has neither a beginning-of-text nor an end-of-text token, so the "
        "first token of a document has nothing to be predicted from.",
        "Give its tokenizer_config.json a bos_token.",
    )
