"""Conversations in their usual forms: who says what, with a system prompt and tools.

OpenAI's `messages` have `role` and `content`, ShareGPT's `conversations` have `from` and `value`;
both are read under either name. What is said to or by a tool is kept as chat templates take it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from effbench.api.spec import DatasetSpec
from effbench.data.render import Conversation, Message, MissingError, Place, clean, is_missing
from effbench.util.errors import UserError, did_you_mean

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
}
"""What the one who speaks is called in data, and in chat templates."""
FIELDS = ("messages", "conversations")
"""Where a row has its conversation, unless `dataset.columns.messages` says so."""
KEPT = ("name", "tool_calls", "tool_call_id", "reasoning_content")
"""What a message may have beside its text."""


def conversation_of(place: Place, spec: DatasetSpec) -> Conversation:
    """Return the conversation of a row, up to the last turn of the assistant.

    Raises:
        MissingError: When it is empty, or the assistant says nothing in it.
        UserError: When it is none, somebody unknown speaks, or a message is no text.
    """
    name = _field(place, spec)
    listed = place.field(name, "dataset.columns.messages")
    if isinstance(listed, str):
        listed = _parsed(place, listed, name)
    if not isinstance(listed, list):
        raise UserError(
            f"{place.where}: {name!r} is no list of messages.",
            'A conversation is a list such as [{"role": "user", "content": "Hi"}, ...].',
        )
    if not listed:
        raise _nothing(place, "the conversation is empty")
    messages = [_message(place, one, number) for number, one in enumerate(listed, 1)]
    system = spec.columns.get("system", "system")
    if place.row.get(system) and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _said(place, place.row[system], system)})
    answers = [n for n, m in enumerate(messages) if m["role"] == "assistant" and _speaks(m)]
    if not answers:
        raise _nothing(place, "the assistant says nothing in the conversation")
    messages = _with_system(messages[: answers[-1] + 1], spec.system)
    return Conversation(tuple(messages), _tools(place, spec) if spec.tools else ())


def _field(place: Place, spec: DatasetSpec) -> str:
    if "messages" in spec.columns:
        return spec.columns["messages"]
    found = [name for name in FIELDS if name in place.row]
    if not found:
        raise UserError(
            f"{place.where} has neither 'messages' nor 'conversations'.",
            "Name the field with the conversation: dataset.columns.messages=FIELD",
        )
    return found[0]


def _nothing(place: Place, what: str) -> MissingError:
    return MissingError(
        f"{place.where}: {what}.",
        "Mend the row, or leave such rows out: dataset.missing=skip",
    )


def _message(place: Place, value: Any, number: int) -> Message:
    """Return one message as chat templates take it."""
    keys = value if isinstance(value, Mapping) else {}
    who = keys.get("role", keys.get("from"))
    if who is None:
        raise UserError(
            f"{place.where}: message {number} does not say who speaks.",
            "A message has role and content, or from and value.",
        )
    if who not in ROLES:
        raise UserError(
            f"{place.where}: message {number} is by {who!r}, which is no known role.",
            did_you_mean(str(who), ROLES),
        )
    kept = {key: keys[key] for key in KEPT if keys.get(key)}
    said = keys.get("content", keys.get("value"))
    where = replace(place, where=f"{place.where}, message {number}")
    called = keys.get("function_call")  # what OpenAI's interface had before calls of tools
    if isinstance(called, Mapping) and "tool_calls" not in kept:
        kept["tool_calls"] = [{"type": "function", "function": called}]
    calls = kept.get("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise UserError(f"{where.where}: 'tool_calls' is no list of calls.", "Mend the row.")
    if calls:
        kept["tool_calls"] = [_with_arguments(where, call) for call in calls]
    if who == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": [_call(where, said)]}
    if is_missing(said) and not kept.get("tool_calls"):
        said = where.without("content")
    return {"role": ROLES[who], "content": _said(where, said, "content"), **kept}


def _said(place: Place, value: Any, name: str) -> str:
    """Return a text, or the texts of a list of parts."""
    if isinstance(value, str):
        return clean(value)
    if value is None:
        return ""
    parts = [
        part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        for part in (value if isinstance(value, list) else [None])
    ]
    if not all(isinstance(part, str) for part in parts):
        raise UserError(
            f"{place.where}: {name!r} is no text.", "Only what is text can be learnt: mend the row."
        )
    return clean("".join(part for part in parts if part))


def _call(place: Place, said: Any) -> dict[str, Any]:
    """Return ShareGPT's call of a function as chat templates take it."""
    call = _parsed(place, said, "value") if isinstance(said, str) else said
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise UserError(
            f"{place.where} is no call of a function.",
            'Write it as {"name": "...", "arguments": {...}}.',
        )
    called = {"type": "function", "function": {"arguments": {}, **call}}
    return _with_arguments(place, called)


def _with_arguments(place: Place, call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call whose arguments are a mapping, as chat templates take them.

    OpenAI's interface has them as a text of JSON, which a template's `tojson` would quote again.
    """
    function = call.get("function", call)  # a call that is not within a function stays so
    said = function.get("arguments") if isinstance(function, Mapping) else None
    if not isinstance(said, str):
        return dict(call)
    parsed = _parsed(place, said, "arguments") if said.strip() else {}
    if not isinstance(parsed, dict):
        raise UserError(
            f"{place.where}: 'arguments' of a call are no mapping.",
            'Write them as {"name": value}, or as a text of it.',
        )
    made = {**function, "arguments": parsed}
    return {**call, "function": made} if "function" in call else made


def _parsed(place: Place, text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise UserError(f"{place.where}: {name!r} is no JSON.", "Mend the row.") from None


def _speaks(message: Message) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls"))


def _tools(place: Place, spec: DatasetSpec) -> tuple[dict[str, Any], ...]:
    """Return the tools that a row offers."""
    name = spec.columns.get("tools", "tools")
    value = place.row.get(name) or []
    if isinstance(value, str):
        value = _parsed(place, value, name)
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise UserError(
            f"{place.where}: {name!r} is no list of tools.",
            "Mend the row, or leave tools out: dataset.tools=false",
        )
    return tuple(value)


def _with_system(messages: list[Message], system: str) -> list[Message]:
    """Return messages with their system prompt where `DatasetSpec.system` says it goes."""
    if system == "own" or messages[0]["role"] != "system":
        return messages
    first, *rest = messages
    if system == "user":
        for place, message in enumerate(rest):
            if message["role"] == "user":
                joined = f"{first['content']}\n\n{message['content']}"
                return [*rest[:place], {**message, "content": joined}, *rest[place + 1 :]]
    return rest
