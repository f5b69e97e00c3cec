"""Preference pairs: every usual layout gives the same pair, and what is no pair is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import BYTES_SHAPE

from effbench.api.spec import DatasetSpec
from effbench.data.dataset import render
from effbench.data.kinds import base
from effbench.data.render import Text
from effbench.data.tokenise import tokenise
from effbench.models.random import byte_tokenizer
from effbench.util.errors import UserError

SPEC = DatasetSpec("mine", "file", "preference", max_length=200)
ASKED = "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: Red or blue?\n\nAssistant:"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def said(*turns: str) -> list[dict[str, str]]:
    roles = ("user", "assistant") * 3
    return [{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)]


def shared(*turns: str) -> list[dict[str, str]]:
    return [
        {"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]}
        for m in said(*turns)
    ]


ROWS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": ASKED, "chosen": " Blue.", "rejected": " Black."},
    "transcripts": {"chosen": ASKED + " Blue.", "rejected": ASKED + " Black."},
    "messages": {
        "prompt": said("Hi.", "Hello.", "Red or blue?"),
        "chosen": [{"role": "assistant", "content": "Blue."}],
        "rejected": [{"role": "assistant", "content": "Black."}],
    },
    "one message": {
        "conversations": shared("Hi.", "Hello.", "Red or blue?"),
        "chosen": {"from": "gpt", "value": "Blue."},
        "rejected": {"from": "gpt", "value": "Black."},
    },
    "conversations": {
        "chosen": said("Hi.", "Hello.", "Red or blue?", "Blue."),
        "rejected": said("Hi.", "Hello.", "Red or blue?", "Black."),
    },
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("effbench.data.assets.cache_dir", lambda: tmp_path / "cache")


@pytest.fixture
def tokenizer() -> Any:
    return byte_tokenizer(BYTES_SHAPE)


def rendered(row: dict[str, Any], **changes: Any) -> Text:
    columns = {"prompt": "conversations"} if "conversations" in row else {}
    spec = replace(SPEC, **{"columns": columns, **changes})
    [text] = render([row], spec, "train")
    return text


def test_kinds_are_the_files_of_their_folder() -> None:
    assert base.names() == ("alpaca", "chat", "choices", "pairs", "preference", "rated", "text")
    with pytest.raises(UserError, match="kind=preferences is not a kind") as caught:
        base.find("preferences")
    assert "'preference'" in caught.value.hint


@pytest.mark.parametrize("layout", ROWS)
def test_every_layout_gives_the_same_pair(layout: str) -> None:
    text = rendered(ROWS[layout])
    assert (text.prompt, text.choices, text.answer) == (ASKED, (" Blue.", " Black."), " Blue.")
    assert text.right == 0
    assert text.id == rendered(ROWS["texts"]).id


@pytest.mark.parametrize("layout", ROWS)
def test_a_chat_template_gets_the_turns(layout: str, tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    text = rendered(ROWS[layout], chat=True)
    assert text.turns == (("user", "Hi."), ("assistant", "Hello."), ("user", "Red or blue?"))
    [example] = tokenise([text], replace(SPEC, chat=True), tokenizer)
    chosen, rejected = (tokenizer.decode(c.ids) for c in example.choices)
    start = "<user>Hi.<assistant>Hello.<user>Red or blue?<assistant>"
    assert (chosen, rejected) == (start + "Blue.<eos>", start + "Black.<eos>")


def test_plain_texts_without_a_prompt_share_whole_words() -> None:
    text = rendered({"chosen": "The sky is blue.", "rejected": "The sky is black."})
    assert (text.prompt, *text.choices) == ("The sky is", " blue.", " black.")


def test_a_prompt_has_a_template_and_fields_have_names() -> None:
    row = {"question": "2 + 2?", "good": "4", "bad": "5"}
    columns = {"chosen": "good", "rejected": "bad"}
    text = rendered(row, columns=columns, prompt="Q: {question}\nA: ")
    assert (text.prompt, *text.choices) == ("Q: 2 + 2?\nA: ", "4", "5")


def test_a_number_in_a_column_goes_along(tokenizer: Any) -> None:
    row = {**ROWS["texts"], "margin": "0.25"}
    text = rendered(row, columns={"weight": "margin"})
    [example] = tokenise([text], SPEC, tokenizer)
    assert example.columns == {"weight": 0.25}
    [again] = tokenise([text], SPEC, tokenizer)
    assert again == example, "the cache"
    with pytest.raises(UserError, match=r"row 1 .*'margin' is 'much', no number"):
        rendered({**row, "margin": "much"}, columns={"weight": "margin"})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "has no field 'rejected'"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "'rejected' has no value"),
        ({"prompt": "a", "chosen": " ", "rejected": "c"}, "the answer 'chosen' is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": "b "}, "are the same"),
        ({"prompt": "a", "chosen": 4, "rejected": "c"}, "'chosen' is neither a text nor"),
        ({"prompt": "a", "chosen": said("b"), "rejected": "c"}, "not one message of the assistant"),
        ({"chosen": said("a", "b"), "rejected": said("c", "d")}, "not to the same prompt"),
        ({"chosen": [{"role": "cat", "content": "m"}], "rejected": "c"}, "'chosen' is neither"),
    ],
)
def test_what_is_no_pair_is_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"row 1 of split 'train' of dataset 'mine'.*{message}"):
        rendered(row)


def test_rows_without_a_preference_can_be_left_out() -> None:
    same = {"prompt": "a", "chosen": "b", "rejected": "b"}
    rows = [same, ROWS["texts"], {"prompt": "a", "chosen": "b", "rejected": None}]
    assert len(list(render(rows, replace(SPEC, missing="skip"), "train"))) == 1


@pytest.mark.parametrize("limit", [2, 9, 20, 30, 31, 80])
def test_both_sides_keep_the_same_prompt_when_cut(limit: int, tokenizer: Any) -> None:
    text = Text("1", "0123456789" * 3, " short", (" short", " rather longer answer"))
    [example] = tokenise([text], replace(SPEC, max_length=limit), tokenizer)
    chosen, rejected = example.choices
    prompts = [c.ids[: c.prompt_length] for c in (chosen, rejected)]
    assert prompts[0] == prompts[1] != []
    assert text.prompt.endswith(tokenizer.decode(prompts[0]))
    assert all(1 < len(c.ids) <= limit for c in (chosen, rejected))
    assert all(len(c.ids) > c.prompt_length for c in (chosen, rejected))
    lost = len(text.prompt) - len(prompts[0])
    assert {c.cut[0] for c in (chosen, rejected)} == {lost}
    for side, answer in zip((chosen, rejected), text.choices, strict=True):
        whole = limit >= len(prompts[0]) + len(answer)
        assert side.answer_bytes == (len(answer) if whole else limit - len(prompts[0]))
        assert (side.cut[1] > 0) == (not whole)


def test_a_method_of_one_answer_gets_the_chosen_one(tokenizer: Any) -> None:
    [example] = tokenise([rendered(ROWS["texts"])], SPEC, tokenizer)
    [only] = example.sequences
    assert tokenizer.decode(only.ids[only.prompt_length :]) == " Blue.<eos>"
    assert only == example.choices[0]
