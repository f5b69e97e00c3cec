"""Preference pairs: a prompt, the answer that was chosen and the one that was rejected.

The usual layouts are read as they are: `prompt`, `chosen` and `rejected`, each a text or a list of
messages (TRL, LLaMA-Factory); `chosen` and `rejected` alone, whole conversations or transcripts
("Human: ... Assistant: ...", Anthropic's HH-RLHF) whose common start is the prompt. Fields of other
names are given by `dataset.columns`, and `dataset.prompt` is the template of a prompt that is a
text. An answer follows its prompt without anything between them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

from effbench.api.examples import Example
from effbench.api.spec import DatasetSpec
from effbench.data.kinds.base import Kind
from effbench.data.render import MissingError, Place, Text, Turn, clean, columns_of, content_hash
from effbench.data.tokens import Encoder, chat_prompt, ended, fitted, joined, moved
from effbench.util.errors import UserError

SPEAKERS = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
LABELS = {"user": "\n\nHuman:", "assistant": "\n\nAssistant:"}
"""What a transcript puts before each turn."""


class Preference(Kind):
    """Prompt, chosen and rejected answer; to a method of one answer it is pairs of the chosen."""

    choices: ClassVar[bool] = True
    templates: ClassVar[tuple[str, ...]] = ("prompt", "chat")
    columns: ClassVar[tuple[str, ...]] = ("prompt", "chosen", "rejected")

    def render(self, place: Place, spec: DatasetSpec) -> Text | None:
        """Return a row's prompt and both answers, the chosen one first.

        Raises:
            UserError: For answers that are missing, empty, the same, or not to one prompt.
        """
        prompt, *answers = _parts(place, spec)
        for name, answer in zip(("chosen", "rejected"), answers, strict=True):
            place.require(answer, name)
        chosen, rejected = (a.strip() for a in answers) if spec.chat else answers
        if chosen.strip() == rejected.strip():
            raise MissingError(
                f"{place.where}: the chosen and the rejected answer are the same.",
                "Mend the row, or leave such rows out: dataset.missing=skip",
            )
        return Text(
            content_hash(prompt, chosen, rejected),
            prompt,
            chosen,
            (chosen, rejected),
            turns=_turns(prompt) if spec.chat else (),
            columns=columns_of(place, spec, self.columns),
        )

    def source(self, place: Place, spec: DatasetSpec) -> tuple[dict[str, str], dict[str, str]]:
        """Return prompt, chosen and rejected answer, which no template has to spell."""
        prompt, chosen, rejected = _parts(place, spec)
        return {"prompt": prompt}, {"chosen": chosen, "rejected": rejected}

    def examples(self, texts: Sequence[Text], spec: DatasetSpec, tokenizer: Any) -> list[Example]:
        """Return both answers after one and the same prompt, each with the end-of-text token."""
        encoder, limit, special = Encoder(tokenizer), spec.max_length, not spec.chat
        examples = []
        for text in texts:
            prompt = chat_prompt(text.turns, tokenizer) if spec.chat else text.prompt
            bare = moved(prompt, "")[0] if special else prompt
            answers = [prompt[len(bare) :] + answer for answer in text.choices]
            pairs = [encoder.pair(bare, answer, special) for answer in answers]
            opening = encoder.opening if special else 0
            context, lost = fitted(pairs[0][0], [rest for _, rest in pairs], limit, opening)
            sides = []
            for answer, (_, rest) in zip(answers, pairs, strict=True):
                size = encoder.left_of(answer, rest, limit - len(context))
                sides.append(ended(joined(context, lost, rest, limit, size), limit, tokenizer))
            examples.append(Example(text.id, (sides[0],), tuple(sides), 0, text.columns))
        return examples


# -- layouts -------------------------------------------------------------------------------------


def _parts(place: Place, spec: DatasetSpec) -> tuple[str, str, str]:
    """Return prompt, chosen and rejected answer as texts."""
    names = {name: spec.columns.get(name, name) for name in Preference.columns}
    chosen, rejected = (
        place.field(names[side], f"dataset.columns.{side}") for side in ("chosen", "rejected")
    )
    explicit = "prompt" in spec.columns or "prompt" in place.row or spec.prompt != "{prompt}"
    if not explicit:
        return _split(place, _text(place, chosen, "chosen"), _text(place, rejected, "rejected"))
    listed = names["prompt"].split(".")[0] in place.row and place.field(names["prompt"])
    if isinstance(listed, list):
        prompt = _text(place, listed, "prompt") + LABELS["assistant"]
    else:
        prompt = place.fill(
            "{" + names["prompt"] + "}" if "prompt" in spec.columns else spec.prompt
        )
    return prompt, _answer(place, chosen, "chosen"), _answer(place, rejected, "rejected")


def _text(place: Place, value: Any, name: str) -> str:
    """Return a text, or a conversation as a transcript."""
    if isinstance(value, str):
        return clean(value)
    return "".join(
        what if who == "system" else f"{LABELS[who]} {what}"
        for who, what in _said(place, value, name)
    )


def _answer(place: Place, value: Any, name: str) -> str:
    """Return an answer: a text, one message, or a list of one."""
    if isinstance(value, str):
        return clean(value)
    said = _said(place, value, name)
    if len(said) != 1 or said[0][0] != "assistant":
        raise UserError(f"{place.where}: {name!r} is not one message of the assistant.")
    return " " + said[0][1]


def _said(place: Place, value: Any, name: str) -> list[Turn]:
    """Return who says what, from messages in one of the two usual forms."""
    found = []
    for message in (
        [value] if isinstance(value, dict) else value if isinstance(value, list) else [None]
    ):
        keys = message if isinstance(message, dict) else {}
        who, what = keys.get("role", keys.get("from")), keys.get("content", keys.get("value"))
        if who not in SPEAKERS or not isinstance(what, str):
            raise UserError(
                f"{place.where}: {name!r} is neither a text nor a list of messages.",
                "A message has a role (system, user or assistant) and a content that is text.",
            )
        found.append((SPEAKERS[who], clean(what)))
    return found


def _split(place: Place, chosen: str, rejected: str) -> tuple[str, str, str]:
    """Return the common start of two transcripts, and how each goes on from there."""
    both = enumerate(zip(chosen, rejected, strict=False))
    end = next((i for i, (a, b) in both if a != b), min(len(chosen), len(rejected)))
    common = chosen[:end]
    label = LABELS["assistant"]
    if label in common:
        start = common.rindex(label) + len(label)
    elif label in chosen or label in rejected:
        raise UserError(
            f"{place.where}: the chosen and the rejected answer are not to the same prompt.",
            "Mend or remove the row.",
        )
    else:  # between two words
        start = len(common) - len(re.search(r"\s?\S*$", common)[0])  # type: ignore[index]
    return common[:start], chosen[start:], rejected[start:]


def _turns(prompt: str) -> tuple[Turn, ...]:
    """Return a transcript as turns; a text without any is what the user says."""
    pieces = re.split(r"\n\n(Human|Assistant):", prompt)
    turns = [("system", pieces[0].strip())] if pieces[0].strip() else []
    if len(pieces) == 1:
        return (("user", prompt),)
    for who, what in zip(pieces[1::2], pieces[2::2], strict=True):
        if what.strip():
            turns.append((SPEAKERS[who.lower()], what.strip()))
    return tuple(turns)
