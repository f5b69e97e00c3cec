"""Conversations: the loss is on the turns of the assistant alone.

A row has `messages` (`role`, `content`) or `conversations` (`from`, `value`), perhaps with a
`system` prompt and `tools`. They always go through the model's chat template. Which tokens are the
assistant's says the template itself, where it marks them with `{% generation %}`; elsewhere they
are what a conversation up to an answer has more than one up to its question.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar

from effbench.api.examples import Example
from effbench.api.spec import DatasetSpec
from effbench.data.conversations import talked
from effbench.data.kinds.base import Kind
from effbench.data.messages import conversation_of
from effbench.data.render import Conversation, Place, Text, columns_of, content_hash


class Chat(Kind):
    """Conversations of any length, by `dataset.turns`, `dataset.system` and `dataset.tools`."""

    talks: ClassVar[bool] = True
    templates: ClassVar[tuple[str, ...]] = ("system", "tools")
    columns: ClassVar[tuple[str, ...]] = ("messages", "system", "tools")

    def render(self, place: Place, spec: DatasetSpec) -> Text | None:
        """Return a row's conversation; its answer is the last turn of the assistant."""
        talk = conversation_of(place, spec)
        *before, last = talk.messages
        return Text(
            content_hash(*map(_shown, talk.messages), *map(_json, talk.tools)),
            "\n".join(f"{m['role']}: {_shown(m)}" for m in before),
            _shown(last),
            conversation=talk,
            columns=columns_of(place, spec, self.columns),
        )

    def source(self, place: Place, spec: DatasetSpec) -> tuple[dict[str, str], dict[str, str]]:
        """Return what others say, and what the assistant does, by place and role."""
        asked, answered = dict[str, str](), dict[str, str]()
        for number, message in enumerate(conversation_of(place, spec).messages):
            part = answered if message["role"] == "assistant" else asked
            part[f"{number} {message['role']}"] = _shown(message)
        return asked, answered

    def examples(self, texts: Sequence[Text], spec: DatasetSpec, tokenizer: Any) -> list[Example]:
        """Return whole conversations; too long ones lose their end, but not their first answer."""
        last = spec.turns == "last"
        return [
            Example(t.id, (talked(_of(t), tokenizer, spec.max_length, last),), columns=t.columns)
            for t in texts
        ]


def _of(text: Text) -> Conversation:
    assert text.conversation is not None
    return text.conversation


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _shown(message: Any) -> str:
    """Return what a message says, calls of tools included."""
    calls = message.get("tool_calls")
    return message["content"] + (_json(calls) if calls else "")
