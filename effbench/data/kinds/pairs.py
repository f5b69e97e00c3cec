"""Prompts with one answer each: the loss is on the answer alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from effbench.api.examples import Example
from effbench.api.spec import DatasetSpec
from effbench.data.kinds.base import Kind
from effbench.data.render import Place, Text, columns_of, content_hash
from effbench.data.tokens import Encoder, answered, chat_prompt, ended


class Pairs(Kind):
    """Prompt and answer, by `dataset.prompt` and `dataset.answer`."""

    templates: ClassVar[tuple[str, ...]] = ("prompt", "answer")

    def render(self, place: Place, spec: DatasetSpec) -> Text | None:
        """Return a row's prompt and answer."""
        prompt, answer = place.fill(spec.prompt), place.answer(spec.answer)
        columns = columns_of(place, spec, self.columns)
        return Text(content_hash(prompt, answer), prompt, answer, columns=columns)

    def source(self, place: Place, spec: DatasetSpec) -> tuple[dict[str, str], dict[str, str]]:
        """Return what the templates of prompt and answer are filled with."""
        return place.values(spec.prompt), place.values(spec.answer)

    def examples(self, texts: Sequence[Text], spec: DatasetSpec, tokenizer: Any) -> list[Example]:
        """Return prompts with the right answer and the end-of-text token, and all answers."""
        encoder, limit = Encoder(tokenizer), spec.max_length
        examples = []
        for text in texts:
            prompt = chat_prompt(text.asked_in_chat(), tokenizer) if spec.chat else text.prompt
            right, *choices = (
                answered(encoder, prompt, answer, limit, special=not spec.chat)
                for answer in (text.answer, *text.choices)
            )
            whole = ended(right, limit, tokenizer)
            examples.append(Example(text.id, (whole,), tuple(choices), text.right, text.columns))
        return examples
