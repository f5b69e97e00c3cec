"""Conversations: which tokens count, whatever form a row has and whatever its template marks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import BYTES_SHAPE

from effbench.api.account import Reading
from effbench.api.batch import collate
from effbench.api.examples import IGNORED, Tokens
from effbench.api.spec import DatasetSpec
from effbench.data.conversations import MARKED
from effbench.data.dataset import Data, render
from effbench.data.kinds import base
from effbench.data.render import Text
from effbench.data.tokens import TEMPLATES, chat_prompt, template_text, with_template
from effbench.evaluators.windows import cut
from effbench.models.random import byte_tokenizer
from effbench.util.errors import UserError

SPEC = DatasetSpec("mine", "file", "chat", chat=True)
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4."},
]
SHAREGPT = {
    "system": "Be brief.",
    "conversations": [
        {"from": "human", "value": "Hi."},
        {"from": "gpt", "value": "Hello."},
        {"from": "human", "value": "2 + 2?"},
        {"from": "gpt", "value": "4."},
    ],
}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The template of Qwen2, without its own system prompt."""
UNMARKED = re.sub(r"\{% (end)?generation %\}", "", TEMPLATES["zephyr"])
FORGETFUL = CHATML.replace(
    "m['content'] +", "(m['content'] if loop.last or m['role'] != 'assistant' else '...') +"
)
WITHOUT_SYSTEM = CHATML.replace(
    "{{ '<|im_start|>'",
    "{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<|im_start|>'",
)
DEAF = "{% for m in messages if m['role'] != 'system' %}" + CHATML.partition("%}")[2]


def tokenizer(template: str) -> Any:
    made = byte_tokenizer(BYTES_SHAPE)
    made.chat_template = template
    return made


def text_of(row: dict[str, Any], **changes: Any) -> Text:
    [text] = render([row], replace(SPEC, **changes), "train")
    return text


def tokens_of(template: str, row: dict[str, Any], **changes: Any) -> tuple[Tokens, Any]:
    spec, made = replace(SPEC, **changes), tokenizer(template)
    [example] = base.find("chat").examples([text_of(row, **changes)], spec, made)
    return example.sequences[0], made


def scored(tokens: Tokens, made: Any) -> list[str]:
    """Return the runs of tokens that have a label, decoded."""
    runs, before = [list[int]()], False
    for label in tokens.labels():
        if label != IGNORED:
            runs = runs if before else [*runs, []]
            runs[-1].append(label)
        before = label != IGNORED
    return [made.decode(run) for run in runs if run]


@pytest.mark.parametrize("row", [{"messages": MESSAGES}, SHAREGPT], ids=["messages", "sharegpt"])
@pytest.mark.parametrize(
    "template, answers",
    [
        (CHATML, ["Hello.<|im_end|>", "4.<|im_end|>"]),
        (UNMARKED, ["Hello.<eos>", "4.<eos>"]),
        (TEMPLATES["zephyr"], ["Hello.<eos>", "4.<eos>"]),
    ],
    ids=["chatml", "unmarked", "marked"],
)
def test_only_the_assistant_has_a_loss(row: Any, template: str, answers: list[str]) -> None:
    tokens, made = tokens_of(template, row)
    assert scored(tokens, made) == answers
    assert tokens.loss_tokens == sum(label != IGNORED for label in tokens.labels())
    assert tokens.answer_bytes == sum(len(a.replace("<eos>", "").encode()) for a in answers)
    assert made.decode(tokens.ids).startswith(("<|im_start|>system\nBe brief.", "<|system|>\nBe "))
    [last], _ = [scored(tokens_of(template, row, turns="last")[0], made)], None
    assert last == answers[-1:]


def test_marks_of_a_template_and_its_prefixes_agree() -> None:
    assert MARKED.search(TEMPLATES["zephyr"])
    assert not MARKED.search(UNMARKED)
    marked, _ = tokens_of(TEMPLATES["zephyr"], {"messages": MESSAGES})
    assert marked == tokens_of(UNMARKED, {"messages": MESSAGES})[0]


def test_both_forms_are_one_row_and_others_are_not() -> None:
    assert text_of({"messages": MESSAGES}).id == text_of(SHAREGPT).id
    assert text_of({"messages": MESSAGES[1:]}).id != text_of(SHAREGPT).id
    kind, place = base.find("chat"), {"messages": MESSAGES[1:3]}
    named = text_of({"said": MESSAGES}, columns={"messages": "said"})
    assert named.id == text_of(SHAREGPT).id
    assert kind.talks and text_of(place).answer == "Hello."


def test_what_follows_the_last_answer_is_left_out() -> None:
    row = {"messages": [*MESSAGES, {"role": "user", "content": "Thanks."}]}
    assert text_of(row) == text_of({"messages": MESSAGES})
    greeted = {"messages": [{"role": "assistant", "content": "Yes?"}, *MESSAGES[1:]]}
    tokens, made = tokens_of(CHATML, greeted)
    assert scored(tokens, made)[0] == "Hello.<|im_end|>", "nothing was said before the first"


@pytest.mark.parametrize("limit", [60, 130, 150, 190, 500])
def test_a_long_conversation_loses_its_end_but_not_its_first_answer(limit: int) -> None:
    whole, made = tokens_of(CHATML, {"messages": MESSAGES}, max_length=500)
    tokens, _ = tokens_of(CHATML, {"messages": MESSAGES}, max_length=limit)
    assert len(tokens.ids) <= limit
    assert scored(tokens, made)[0] == "Hello.<|im_end|>"
    assert len(tokens.ids) + sum(tokens.cut) == len(whole.ids)
    assert tokens.loss_tokens == sum(label != IGNORED for label in tokens.labels())


def test_a_window_in_which_nobody_answers_is_left_out() -> None:
    tokens, made = tokens_of(CHATML, {"messages": MESSAGES}, max_length=500)
    [example] = base.find("chat").examples([text_of({"messages": MESSAGES})], SPEC, made)
    windows = cut([example], 20, 10)
    kept = sum(label != IGNORED for w in windows for label in w.sequence(example)[1])
    assert kept == tokens.loss_tokens
    assert all(set(w.sequence(example)[1]) != {IGNORED} for w in windows)
    assert collate([example], 0).loss_tokens == tokens.loss_tokens


# -- system prompts and tools ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "template, message",
    [(WITHOUT_SYSTEM, "System role not supported"), (DEAF, "no place for a system prompt")],
)
def test_a_template_without_a_system_role_says_what_to_do(template: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        tokens_of(template, {"messages": MESSAGES})
    assert "dataset.system=user" in caught.value.hint
    tokens, made = tokens_of(template, {"messages": MESSAGES}, system="user")
    assert "user\nBe brief.\n\nHi." in made.decode(tokens.ids)
    tokens, made = tokens_of(template, {"messages": MESSAGES}, system="none")
    assert "Be brief." not in made.decode(tokens.ids)


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
WITH_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML.replace(
    "m['content'] +", "m['content'] + (m['tool_calls'] | tojson if m['tool_calls'] else '') +"
)
CALLED = {
    "tools": json.dumps(TOOLS),
    "conversations": [
        {"from": "human", "value": "2 + 2?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2, "b": 2}}'},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "It is 4."},
    ],
}


def test_tools_are_told_and_their_calls_are_learnt() -> None:
    tokens, made = tokens_of(WITH_TOOLS, CALLED, max_length=500)
    assert made.decode(tokens.ids).startswith(json.dumps(TOOLS))
    call, answer = scored(tokens, made)
    assert '"name": "add"' in call
    assert answer == "It is 4.<|im_end|>"
    with pytest.raises(UserError, match="no place for tools") as caught:
        tokens_of(CHATML, CALLED)
    assert "dataset.tools=false" in caught.value.hint


CALLS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "a tool's": lambda f: {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": f}],
    },
    "bare": lambda f: {"role": "assistant", "content": "", "tool_calls": [f]},
    "a function's": lambda f: {"role": "assistant", "content": None, "function_call": f},
    "ShareGPT's": lambda f: {"from": "function_call", "value": json.dumps(f)},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("said", ['{"a": 2, "b": 2}', {"a": 2, "b": 2}])
def test_arguments_of_calls_are_told_as_a_mapping(said: Any, call: str) -> None:
    row = {"messages": [MESSAGES[1], CALLS[call]({"name": "add", "arguments": said})]}
    tokens, made = tokens_of(WITH_TOOLS, row, max_length=500)
    assert '"arguments": {"a": 2, "b": 2}' in scored(tokens, made)[0]


def test_a_template_that_rewrites_earlier_turns_says_what_to_do() -> None:
    with pytest.raises(UserError, match="in another way when others follow") as caught:
        tokens_of(FORGETFUL, {"messages": MESSAGES})
    assert "dataset.turns=last" in caught.value.hint
    tokens, made = tokens_of(FORGETFUL, {"messages": MESSAGES}, turns="last")
    assert scored(tokens, made) == ["4.<|im_end|>"]


# -- what is no conversation -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, message, hint",
    [
        ({"messages": []}, "the conversation is empty", "dataset.missing=skip"),
        ({"messages": MESSAGES[:2]}, "the assistant says nothing", "dataset.missing=skip"),
        ({"text": "x"}, "neither 'messages' nor 'conversations'", "dataset.columns.messages"),
        ({"messages": "Hi"}, "'messages' is no JSON", "Mend"),
        ({"messages": {"a": 1}}, "no list of messages", "role"),
        ({"messages": [{"content": "x"}]}, "message 1 does not say who speaks", "role and content"),
        ({"messages": [{"role": "usr", "content": "x"}]}, "by 'usr', which is no", "'user'"),
        ({"messages": [{"role": "user", "content": 5}]}, "message 1: 'content' is no text", "mend"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "'content' is no text",
            "text",
        ),
        ({"messages": MESSAGES, "tools": "{"}, "'tools' is no JSON", "Mend"),
        ({"messages": MESSAGES, "tools": 3}, "no list of tools", "dataset.tools=false"),
        (
            {"messages": [{"role": "user", "content": None}, MESSAGES[2]]},
            "message 1: the field 'content' has no value",
            "dataset.missing",
        ),
        (
            {"messages": [MESSAGES[1], {"role": "assistant", "tool_calls": "f"}]},
            "message 2: 'tool_calls' is no list of calls",
            "Mend",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"arguments": "{"}]}]},
            "message 1: 'arguments' is no JSON",
            "Mend",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"arguments": "[1]"}]}]},
            "message 1: 'arguments' of a call are no mapping",
            "name",
        ),
        (
            {"conversations": [{"from": "function_call", "value": "[]"}]},
            "no call of a function",
            "arguments",
        ),
    ],
)
def test_what_is_no_conversation_is_named(row: Any, message: str, hint: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        text_of(row)
    assert "row 1 of split 'train' of dataset 'mine'" in caught.value.message
    assert hint in caught.value.hint


def test_rows_without_an_answer_can_be_left_out() -> None:
    rows, reading = [{"messages": []}, {"messages": MESSAGES}, SHAREGPT], Reading()
    kept = list(render(rows, replace(SPEC, missing="skip"), "split", reading))
    assert (len(kept), reading.missing) == (2, 1)


# -- templates of one's own ------------------------------------------------------------------------


def test_a_template_is_the_models_a_name_or_a_file(tmp_path: Path) -> None:
    made = byte_tokenizer(BYTES_SHAPE)
    with pytest.raises(UserError, match="no chat template") as caught:
        base.find("chat").examples([text_of({"messages": MESSAGES})], SPEC, made)
    assert "dataset.template=zephyr" in caught.value.hint
    named = with_template(made, "zephyr")
    assert chat_prompt("Hi", named) == "<|user|>\nHi<eos>\n<|assistant|>\n"
    assert made.chat_template is None, "the model's own tokenizer stays as it is"
    file = tmp_path / "mine.jinja"
    file.write_text(CHATML)
    assert template_text(str(file)) == CHATML == template_text(CHATML)
    file.write_text("nothing")
    with pytest.raises(UserError, match="holds no chat template"):
        template_text(str(file))
    with pytest.raises(UserError, match="zephir is no file") as caught:
        template_text("zephir")
    assert "zephyr" in caught.value.hint


def test_chats_go_through_the_gate_and_are_counted(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("effbench.data.assets.cache_dir", lambda: tmp_path / "cache")
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": MESSAGES}) + "\n")
    spec = replace(SPEC, files={"train": str(file)})
    for _ in range(2):  # the second time from the cache
        data = Data(spec, tokenizer(CHATML))
        account = data.account("train", whole=True)
        assert account.scored_tokens == len("Hello.<|im_end|>4.<|im_end|>")
        assert account.scored_bytes == account.scored_tokens
    other = Data(replace(spec, turns="last"), tokenizer(CHATML)).account("train", whole=True)
    assert other.scored_tokens == len("4.<|im_end|>"), "which answers count is in the cache's key"
