"""Plain text: packed into full blocks to train on, whole documents to evaluate on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from effbench.api.examples import Example, Tokens
from effbench.api.schema import digest
from effbench.api.spec import DatasetSpec
from effbench.data.kinds.base import Kind
from effbench.data.render import Place, Text, content_hash
from effbench.data.tokens import Encoder, prefix_token


class PlainText(Kind):
    """Language modelling, by `dataset.text`."""

    asks: ClassVar[bool] = False
    packs: ClassVar[bool] = True
    templates: ClassVar[tuple[str, ...]] = ("text",)

    def render(self, place: Place, spec: DatasetSpec) -> Text | None:
        """Return a row's text, None where it is empty."""
        body = place.fill(spec.text)
        return Text(content_hash("", body), "", body) if body.strip() else None

    def source(self, place: Place, spec: DatasetSpec) -> tuple[dict[str, str], dict[str, str]]:
        """Return what the template of a text is filled with."""
        return place.values(spec.text), {}

    def examples(self, texts: Sequence[Text], spec: DatasetSpec, tokenizer: Any) -> list[Example]:
        """Join documents with the end-of-text token between them and cut into full blocks."""
        stream: list[int] = []
        encode = Encoder(tokenizer)
        for text in texts:
            stream += encode(text.answer)
            if tokenizer.eos_token_id is not None:
                stream.append(tokenizer.eos_token_id)
        size = min(spec.max_length, len(stream))
        examples = []
        for start in range(0, len(stream) - size + 1, size):
            ids = stream[start : start + size]
            covered = tokenizer.decode(ids[1:], skip_special_tokens=True)
            rest = len(stream) - start - size
            cut = (0, rest if rest < size else 0)
            tokens = Tokens(ids, 0, len(covered.encode()), cut)
            examples.append(Example(digest(ids), (tokens,)))
        return examples

    def documents(self, texts: Sequence[Text], spec: DatasetSpec, tokenizer: Any) -> list[Example]:
        """Keep documents whole, each after a prefix token that its first token is predicted from.

        Raises:
            UserError: When the tokenizer has no token to start with.
        """
        start, encode = prefix_token(tokenizer), Encoder(tokenizer)
        examples = []
        for text in texts:
            ids = [start, *encode(text.answer, special=False)]
            examples.append(Example(text.id, (Tokens(ids, 1, len(text.answer.encode())),)))
        return examples
