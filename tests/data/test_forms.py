"""Forms of rows that are recognised by their fields, several files, and letters for answers."""

from __future__ import annotations

import json
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import BYTES_SHAPE

from effbench.api.account import Reading
from effbench.api.keys import WHOLE, leave_places_out
from effbench.api.spec import DatasetSpec
from effbench.config.compose import compose
from effbench.config.lineage import dataset_spec
from effbench.data.dataset import read, render, splits
from effbench.data.forms import recognised
from effbench.data.kinds import base
from effbench.models.random import byte_tokenizer
from effbench.util.errors import UserError

AUTO = {"name": "mine", "source": "file", "kind": "auto", "cut": {}}
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def spec_of(path: Path, *rows: dict[str, Any], **more: Any) -> tuple[DatasetSpec, str]:
    values, line = recognised({**AUTO, "files": {"train": write(path, *rows)}, **more})
    return dataset_spec(values), line


LISTED = {"text": ["3", "4"], "label": ["A", "B"]}


@pytest.mark.parametrize(
    "row, kind, prompt, answer",
    [
        ({"prompt": "2 + 2 =", "answer": "4"}, "pairs", "2 + 2 =", " 4"),
        ({"question": "2?", "answer": "4", "id": 1}, "pairs", "Question: 2?\nAnswer:", " 4"),
        ({"prompt": "2 + 2 =", "completion": " 4"}, "pairs", "2 + 2 =", " 4"),
        ({"query": "2 + 2", "response": "4"}, "pairs", "2 + 2\n", "4"),
        ({"messages": TURNS}, "chat", "user: Hi", "Yo"),
        ({"conversations": TURNS, "id": 3}, "chat", "user: Hi", "Yo"),
        ({"chosen": "a b", "rejected": "a c"}, "preference", "a", " b"),
        ({"text": "Once upon"}, "text", "", "Once upon"),
        (
            {"question": "2 + 2?", "choices": ["3", "4"], "answer": 1},
            "choices",
            "Question: 2 + 2?\nAnswer:",
            " 4",
        ),
        (
            {"question": "2 + 2?", "options": ["3", "4"], "label": "B"},
            "choices",
            "Question: 2 + 2?\nAnswer:",
            " 4",
        ),
        (
            {"question": "2 + 2?", "A": "3", "B": "4", "answer": "B"},
            "choices",
            "Question: 2 + 2?\nAnswer:",
            " 4",
        ),
        (
            {"question": "2 + 2?", "choices": LISTED, "answerKey": "B"},
            "choices",
            "Question: 2 + 2?\nAnswer:",
            " 4",
        ),
    ],
)
def test_a_form_is_recognised_and_said(
    tmp_path: Path, row: dict[str, Any], kind: str, prompt: str, answer: str
) -> None:
    spec, line = spec_of(tmp_path / "rows.jsonl", row)
    assert spec.kind == kind
    assert line.startswith("rows.jsonl: ")
    assert f"dataset.kind={kind}" in line
    [text] = render([row], spec, "split")
    assert (text.prompt, text.answer) == (prompt, answer)
    assert base.find(kind)


def test_alpaca_has_its_own_prompt_or_that_of_the_model(tmp_path: Path) -> None:
    row = {"instruction": "Add.", "input": "2 2", "output": "4"}
    spec, _ = spec_of(tmp_path / "rows.jsonl", row)
    [text] = render([row], spec, "split")
    assert spec.kind == "alpaca"
    assert "### Instruction:\nAdd.\n\n### Input:\n2 2\n\n### Response:\n" in text.prompt
    assert text.answer == "4"
    [bare] = render([{"instruction": "Add.", "output": "4"}], spec, "split")
    assert "### Input" not in bare.prompt
    with pytest.raises(UserError, match="need a chat template") as caught:
        list(render([{**row, "history": [["a", "b"]]}], spec, "split"))
    assert "dataset.chat=true" in caught.value.hint
    chat = replace(spec, chat=True, template="zephyr")
    [text] = render([{**row, "system": "S", "history": [["a", "b"]]}], chat, "split")
    tokenizer = byte_tokenizer(BYTES_SHAPE)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}|"
    [example] = base.find("alpaca").examples([text], chat, tokenizer)
    assert tokenizer.decode(example.ids) == "<system>S<user>a<assistant>b<user>Add.\n2 2|4<eos>"
    for broken in ("x", [["a"]], [["a", 3]]):
        with pytest.raises(UserError, match="no list of questions with answers"):
            list(render([{**row, "history": broken}], chat, "split"))


@pytest.mark.parametrize(
    "row", [{"a": "1", "b": "2"}, {"question": "x"}, {"text": "x", "label": 1}, {"query": 1}]
)
def test_what_could_mean_several_things_is_not_guessed(tmp_path: Path, row: Any) -> None:
    with pytest.raises(UserError, match="no form that is known") as caught:
        spec_of(tmp_path / "rows.jsonl", row)
    assert all(repr(name) in caught.value.message for name in row)
    assert f"dataset.{'prompt' if len(row) > 1 else 'text'}=" in caught.value.hint


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (["bad", "fine", "bad", "fine"], True),
        (["bad", "fine", "so so", "good"], False),  # as many as there are rows
        (["bad", "bad", "bad", "bad"], False),
        ([2, 1, 1, 2], True),
        ([True, False, False, True], True),
        (["bad", "", "bad", "fine"], False),
    ],
)
def test_texts_with_a_column_of_few_names_may_be_classes(
    tmp_path: Path, labels: list[Any], told: bool
) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"review": f"It was {n}.", "mood": label} for n, label in enumerate(labels)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"files": {"all": str(path)}}
    with pytest.raises(UserError, match="no form that is known") as caught:
        recognised({**AUTO, **files})
    assert ("dataset.kind=choices" in caught.value.hint) == told
    if told:
        words = re.findall(r"(dataset\.kind=choices.*\]');", caught.value.hint)
        given = [word.split("=", 1) for word in shlex.split(words[0])]
        said = {name.removeprefix("dataset."): yaml.safe_load(value) for name, value in given}
        [(_, texts)] = splits(dataset_spec({**AUTO, **files, **said})).items()
        assert sorted(t.answer for t in texts) == sorted(f" {label}".lower() for label in labels)
        assert {t.choices for t in texts} == {tuple(sorted({t.answer for t in texts}))}


def test_half_of_a_pair_is_a_pair_with_a_mistake(tmp_path: Path) -> None:
    row = {"prompt": "a", "anwser": "b"}
    spec, line = spec_of(tmp_path / "rows.jsonl", row)
    assert (spec.kind, line) == ("pairs", "")
    with pytest.raises(UserError, match="no field 'answer'") as caught:
        list(render([row], spec, "train"))
    assert "'anwser'" in caught.value.hint


def test_templates_say_the_kind_and_a_given_kind_stays(tmp_path: Path) -> None:
    path, row = tmp_path / "rows.jsonl", {"prompt": "a", "answer": "b", "text": "c"}
    for words, kind in (
        ({}, "pairs"),
        ({"prompt": "{text}"}, "pairs"),
        ({"text": "{text}!"}, "text"),
        ({"choices": ["{text}"]}, "choices"),
        ({"kind": "text"}, "text"),
        ({"columns": {"messages": "a.b"}}, "chat"),
        ({"columns": {"chosen": "text"}, "prompt": "{text}"}, "preference"),
        ({"columns": {"chosen": "text"}, "answer": "{text}"}, "pairs"),
    ):
        assert spec_of(path, row, **words)[0].kind == kind
    asked = ["model=tiny", "dataset=file", f"dataset.files.train={path}"]
    keys = {
        compose("train", [*asked, *more, "evaluator=[]"]).spec.key
        for more in ([], ["dataset.kind=pairs"])
    }
    assert len(keys) == 1, "what is recognised is what could have been given"


@pytest.mark.parametrize("system", [math.nan, None, "", "absent"])
def test_a_system_prompt_that_is_none_is_no_word(system: Any) -> None:
    given = {} if system == "absent" else {"system": system}
    row = {"instruction": "Add.", "output": "4", **given}
    [text] = render([row], DatasetSpec("mine", "file", "alpaca", chat=True), "split")
    assert text.turns == (("user", "Add."),)


def test_a_system_prompt_that_is_no_text_is_named() -> None:
    row = {"instruction": "Add.", "output": "4", "system": ["Be brief"]}
    with pytest.raises(UserError, match=r"field 'system' is .*which is no text"):
        list(render([row], DatasetSpec("mine", "file", "alpaca", chat=True), "split"))


# -- letters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["B", "b", "(B)", "B.", " B) ", 1, "1"])
def test_a_letter_names_an_answer(label: Any) -> None:
    spec = DatasetSpec("mine", "file", "choices", choices=["x", "y"])
    [text] = render([{"prompt": "p", "label": label}], spec, "split")
    assert (text.right, text.answer) == (1, "y")


@pytest.mark.parametrize(
    ("label", "right"), [("happy", 0), (" sad", 1), ("n", 2), ("a", 3), ("B", 1), ("1", 1), (2, 2)]
)
def test_an_answer_names_itself(label: Any, right: int) -> None:
    spec = DatasetSpec("mine", "file", "choices", choices=[" happy", " sad", " n", " a", " 1"])
    [text] = render([{"prompt": "p", "label": label}], spec, "split")
    assert text.right == right


@pytest.mark.parametrize("label", ["C", "Z", "(D)"])
def test_a_letter_beyond_the_answers_is_refused(label: str) -> None:
    spec = DatasetSpec("mine", "file", "choices", choices=["x", "y"])
    with pytest.raises(UserError, match="is not one of 2 answers"):
        list(render([{"prompt": "p", "label": label}], spec, "split"))


@pytest.mark.parametrize(
    ("choices", "labels", "right"),
    [
        ([" 1", " 2", " 3"], ["1", 2, 3.0], [0, 1, 2]),
        ([" true", " false"], [True, False, "True", 0], [0, 1, 0, 0]),
        ([" Yes", " No"], [True, False, "no"], [0, 1, 1]),
        ([" no", " yes"], [True, 0], [1, 0]),
        ([" B", " A"], ["A", "b"], [1, 0]),
        ([" True", " Neither", " False"], [0, 2, "False"], [0, 2, 2]),
        ([" 0", " 1"], [0, "1", True], [0, 1, 1]),
    ],
)
def test_labels_that_are_named_like_places_are_names(
    tmp_path: Path, choices: list[str], labels: list[Any], right: list[int]
) -> None:
    rows = [{"prompt": f"p{n}", "label": label} for n, label in enumerate(labels)]
    spec, _ = spec_of(tmp_path / "a.jsonl", *rows, choices=choices)
    assert [text.right for text in render(rows, spec, "split")] == right


@pytest.mark.parametrize(("choices", "label"), [([" 1", " 2"], 0), ([" B", " A"], "C")])
def test_a_label_that_no_name_is_like_is_refused(
    tmp_path: Path, choices: list[str], label: Any
) -> None:
    """It was the place of another answer; `dataset.labels=places` has it so again."""
    row = {"prompt": "p", "label": label}
    spec, _ = spec_of(tmp_path / "a.jsonl", row, choices=choices)
    with pytest.raises(UserError, match="is none of the answers: "):
        list(render([row], spec, "split"))
    places, _ = spec_of(tmp_path / "a.jsonl", row, choices=choices, labels="places")
    assert (spec.labels, places.labels) == ("names", "places")


# -- names of fields -------------------------------------------------------------------------------


def test_a_field_may_be_called_anything(tmp_path: Path) -> None:
    row = {"Q1: why?": "a", "so!": "b", "n[0]": "c", "x.y": 2, "d": {"e": ["f"]}}
    templates = {"prompt": "{Q1: why?}{so!}{{n[0]}}", "answer": "{n[0]} {d[e][0]}"}
    spec, _ = spec_of(tmp_path / "a.jsonl", row, **templates, columns={"weight": "x.y"})
    [text] = render([row], spec, "split")
    assert (text.prompt, text.answer, text.columns) == ("ab{n[0]}", "c f", {"weight": 2.0})
    assert text.sources == ({"Q1: why?": "a", "so!": "b"}, {"d[e][0]": "f", "n[0]": "c"})


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ({"id": 1, "d": {"q": "a b", "l": [{"t": "c"}]}}, ["{d[q]}", '=" {d[l][0][t]}"']),
        ({"d": {"q": "a b"}}, ['dataset.text="{d[q]}"\'']),
        ({"": "0", 'the "q"': "a", "it's": "b"}, ['{the \\"q\\"}', "{it'\"'\"'s}"]),
    ],
)
def test_an_unknown_form_is_answered_with_words_that_work(
    tmp_path: Path, row: Any, hint: list[str]
) -> None:
    path = write(tmp_path / "a.jsonl", row)
    with pytest.raises(UserError, match="no form that is known") as caught:
        recognised({**AUTO, "files": {"train": path}})
    assert all(part in caught.value.hint for part in hint), caught.value.hint
    typed = [
        w for w in shlex.split(caught.value.hint.replace(";", " ")) if w.startswith("dataset.")
    ]
    typed = [word for word in typed if "{" in word]
    job = compose("train", ["model=tiny", "dataset=file", f"dataset.files.all={path}", *typed])
    assert job.spec.dataset.kind == ("pairs" if len(typed) > 1 else "text")
    assert next(render([row], job.spec.dataset, "split"))


def test_a_number_that_is_missing_is_no_empty_text(tmp_path: Path) -> None:
    row = {"prompt": "p", "answer": "a", "weight": None}
    spec, _ = spec_of(tmp_path / "a.jsonl", row, columns={"weight": "weight"}, missing="empty")
    with pytest.raises(UserError, match="'weight' has no value") as caught:
        list(render([row], spec, "split"))
    assert caught.value.hint.endswith("leave such rows out: dataset.missing=skip")


def test_a_split_that_no_file_is_of_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "p", "answer": "a"})
    with pytest.raises(UserError, match="has no split 'test'") as caught:
        compose("train", ["model=tiny", "dataset=file", f"dataset.files.train={path}"])
    assert "dataset.files.test=FILE" in caught.value.hint


def test_a_field_inside_another_is_written_with_brackets(tmp_path: Path) -> None:
    row = {"d": {"q": "a b"}}
    spec, _ = spec_of(tmp_path / "a.jsonl", row, kind="text", text="{d.q}")
    with pytest.raises(UserError, match=r"no field 'd\.q'") as caught:
        list(render([row], spec, "split"))
    assert "{d[q]}" in caught.value.hint


# -- several files ---------------------------------------------------------------------------------


def several(tmp_path: Path, *counts: int, **more: Any) -> DatasetSpec:
    files = [
        write(
            tmp_path / f"{name}.jsonl",
            *({"prompt": f"{name} {i}", "answer": f"{i}"} for i in range(count)),
        )
        for name, count in zip("abc", counts, strict=False)
    ]
    return DatasetSpec("mine", "file", "pairs", files={"train": files}, **more)


def names(spec: DatasetSpec) -> str:
    return "".join(sorted(text.prompt[0] for text in read(spec)[0]["train"]))


def test_several_files_are_one_split(tmp_path: Path) -> None:
    assert names(several(tmp_path, 3, 5)) == "aaabbbbb"
    twice = several(tmp_path, 3)
    both = replace(twice, files={"train": [*twice.files["train"]] * 2})
    texts, readings = read(both)
    assert (len(texts["train"]), readings["train"].repeated) == (3, 3)


@pytest.mark.parametrize(
    "shares, found", [([0.5, 0.5], "a" * 4 + "b" * 4), ([0.2, 0.8], "a" * 3 + "b" * 12)]
)
def test_shares_are_those_of_the_rows(tmp_path: Path, shares: Any, found: str) -> None:
    spec = several(tmp_path, 4, 12, mix={"train": shares})
    assert names(spec) == found
    texts, readings = read(spec)
    assert readings["train"].unmixed == 16 - len(found)
    assert "beyond the share of their file" in readings["train"].line()
    assert readings["train"].kept()["unmixed"] == 16 - len(found)
    assert "unmixed" not in Reading().kept(), "records of others stay as they are"
    assert texts == read(spec)[0]


@pytest.mark.parametrize(
    "mix, message, hint",
    [
        ({"train": [0.5, 0.6]}, "add up to 1.1", "add up to 1"),
        ({"train": [1.5, -0.5]}, "no shares of a whole", "above 0"),
        ({"train": [1.0, 0.0]}, "no shares of a whole", "above 0"),
        ({"train": [1.0]}, "has 1 shares for 2 files", "dataset.files.train="),
        ({"test": [1.0]}, "has 1 shares for no files", "dataset.files.test="),
    ],
)
def test_shares_that_cannot_be_are_refused(
    tmp_path: Path, mix: Any, message: str, hint: str
) -> None:
    spec = several(tmp_path, 2, 2)
    with pytest.raises(UserError, match=message) as caught:
        dataset_spec({**AUTO, "kind": "pairs", "files": spec.files, "mix": mix})
    assert hint in caught.value.hint


def test_a_file_that_is_not_there_is_named_among_several(tmp_path: Path) -> None:
    files = [*several(tmp_path, 1).files["train"], str(tmp_path / "no.jsonl")]
    with pytest.raises(UserError, match=r"dataset.files.train.1=.*no.jsonl is not a file"):
        dataset_spec({**AUTO, "files": {"train": files}, "kind": "pairs"})
    with pytest.raises(UserError, match="names no file"):
        dataset_spec({**AUTO, "files": {"train": []}, "kind": "pairs"})
    path = Path(write(tmp_path / "broken.jsonl", {"prompt": "a"}))
    spec = DatasetSpec("mine", "file", "pairs", files={"train": [files[0], str(path)]})
    with pytest.raises(
        UserError, match=r"row 1 of split 'train' of dataset 'mine' \(.*broken.jsonl\)"
    ):
        read(spec)


def test_a_config_may_say_which_files_it_is_of(tmp_path: Path) -> None:
    """Then it composes where they are not, to the same key; other files are refused."""
    path = Path(several(tmp_path, 1).files["train"][0])
    config = {**AUTO, "kind": "pairs", "files": {"train": str(path)}}
    meant = dataset_spec(config, True)
    config["fingerprint"] = meant.fingerprint
    assert dataset_spec(config, True) == meant
    text = path.read_text()
    path.unlink()
    assert dataset_spec(config, True) == meant
    for asked in (lambda: read(meant), lambda: dataset_spec(config)):
        with pytest.raises(UserError, match="is not a file"):
            asked()
    path.write_text(text + text)
    with pytest.raises(UserError, match="are others than those") as caught:
        dataset_spec(config, True)
    assert "dataset.fingerprint=''" in caught.value.hint


def test_where_several_files_lie_is_not_in_the_key() -> None:
    part = {"files": {"all": ["/x/a.jsonl", "b.txt.gz"]}, "fingerprint": "0" * WHOLE}
    leave_places_out(part)
    assert part["files"] == {"all": [".jsonl", ".txt.gz"]}


def test_several_files_are_words_of_a_command(tmp_path: Path) -> None:
    files = several(tmp_path, 8, 8).files["train"]
    words = ["model=tiny", "dataset=file", f"dataset.files.all=[{','.join(files)}]"]
    job = compose("train", [*words, "dataset.mix.all=[0.25,0.75]"])
    assert job.spec.dataset.mix == {"all": [0.25, 0.75]}
    assert job.notes and "a.jsonl" in job.notes[0]
