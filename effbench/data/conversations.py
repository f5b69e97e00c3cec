"""Conversations to tokens: which of them are the assistant's, and what is cut."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import groupby, pairwise
from typing import Any

from effbench.api.examples import Turns
from effbench.data.render import Conversation, Message
from effbench.data.tokens import WITHOUT_SYSTEM, fitted, in_template, template_of
from effbench.util.errors import UserError

MARKED = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
"""How a chat template begins what the assistant says."""
Span = tuple[int, int]
"""First place, and the one after the last."""


def talked(conversation: Conversation, tokenizer: Any, limit: int, last: bool = False) -> Turns:
    """Return a conversation as tokens, with a loss on what the assistant says.

    What follows its last answer is left out. When all is longer than `limit`, the end is lost; when
    not even the first answer fits, the start is lost too.

    Args:
        conversation: Up to an answer of the assistant.
        tokenizer: Of the model, with a chat template.
        limit: Most tokens.
        last: Whether only the last answer has a loss.

    Raises:
        UserError: When the template leaves something out, or does not tell who says what.
    """
    ids, spans = marked(conversation, tokenizer, last)
    ids, (first, end) = ids[: spans[-1][1]], spans[0]
    lost = 0
    if end > limit:
        context, lost = fitted(ids[:first], [ids[first:end]], limit)
        ids = [*context, *ids[first:]]
    kept = [(a - lost, min(b - lost, limit)) for a, b in spans if a - lost < limit]
    gaps = tuple((b, a) for (_, b), (a, _) in pairwise(kept))
    said = (tokenizer.decode(ids[a:b], skip_special_tokens=True) for a, b in kept)
    size = sum(len(text.rstrip("\ufffd").encode()) for text in said)
    ids, over = ids[: kept[-1][1]], len(ids) - kept[-1][1]
    return Turns(ids, kept[0][0], size, (lost, over), silent=gaps)


def marked(
    conversation: Conversation, tokenizer: Any, last: bool = False
) -> tuple[list[int], list[Span]]:
    """Return the tokens of a conversation, and the spans of them that have a loss.

    Raises:
        UserError: As `talked`.
    """
    if not template_of(tokenizer, conversation):
        raise UserError(
            "The model has no chat template, which conversations need.",
            "Give one: dataset.template=zephyr, or a FILE with one.",
        )
    _refuse_tools(conversation, tokenizer)
    text = in_template(conversation, tokenizer)
    _refuse_left_out(conversation.messages, text)
    if MARKED.search(template_of(tokenizer, conversation)):
        found = in_template(conversation, tokenizer, masks=True)
        ids, spans = list(found["input_ids"]), _runs(found["assistant_masks"])
    else:
        parts = _parts(conversation, text, tokenizer, last)
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, places = list(found["input_ids"]), found["offset_mapping"]
        spans = _runs([any(a <= at[0] < b for a, b in parts) for at in places])
    if not spans:
        raise UserError(
            "The model's chat template gives no token to what the assistant says.",
            "Mend its {% generation %} marks, or take another: dataset.template=FILE",
        )
    return ids, spans[-1:] if last else spans


def _runs(mask: Sequence[Any]) -> list[Span]:
    """Return where a mask is set."""
    spans, place = [], 0
    for value, members in groupby(map(bool, mask)):
        size = len(list(members))
        if value:
            spans.append((place, place + size))
        place += size
    return spans


def _parts(conversation: Conversation, whole: str, tokenizer: Any, last: bool) -> list[Span]:
    """Return where in a conversation in its template the assistant speaks.

    An answer that nothing was said before is not learnt.
    """
    messages = conversation.messages
    answers = [n for n, m in enumerate(messages) if n and m["role"] == "assistant"]

    def rendered(count: int, asks: bool = False) -> str:
        part = Conversation(messages[:count], conversation.tools)
        text: str = in_template(part, tokenizer, asks=asks)
        return text

    return [_part(whole, number, rendered) for number in (answers[-1:] if last else answers)]


def _part(whole: str, number: int, rendered: Callable[..., str]) -> Span:
    """Return where an answer stands: between the prompt for it and the text that ends with it."""
    before, after = rendered(number, asks=True), rendered(number + 1)
    if not (whole.startswith(before) and whole.startswith(after)):
        raise UserError(
            "The model's chat template writes a turn in another way when others follow it, so what "
            "the assistant says cannot be told apart.",
            "Learn the last answer alone (dataset.turns=last), or mark answers in it with "
            "{% generation %}: dataset.template=FILE",
        )
    return len(before), len(before) + len(after[len(before) :].rstrip())


def _refuse_left_out(messages: Sequence[Message], whole: str) -> None:
    for message in messages:
        left_out = message["content"].strip() not in whole
        if left_out and message["role"] == "system":
            raise UserError(
                "The model's chat template has no place for a system prompt.", WITHOUT_SYSTEM
            )
        if left_out and message["role"] == "user":
            raise UserError(
                "The model's chat template leaves out what the user says.",
                "Take another: dataset.template=FILE",
            )


def _refuse_tools(conversation: Conversation, tokenizer: Any) -> None:
    if conversation.tools and "tools" not in template_of(tokenizer, conversation):
        raise UserError(
            "The model's chat template has no place for tools.",
            "Leave them out: dataset.tools=false",
        )
