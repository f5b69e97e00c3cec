"""Rated answers: what is a rating and what is none, pairs among them, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import BYTES_SHAPE

from effbench.api.account import Reading
from effbench.api.examples import Example
from effbench.api.spec import DatasetSpec
from effbench.data.dataset import read, render
from effbench.data.forms import recognised
from effbench.data.generators import base, noisy_pairs
from effbench.data.kinds import base as kinds
from effbench.data.kinds.rated import NOT_RATED
from effbench.data.render import MissingError, Text
from effbench.models.random import byte_tokenizer
from effbench.util.errors import UserError

SPEC = DatasetSpec("mine", "file", "rated", attributes=["help", "style"], max_length=64)
ROW: dict[str, Any] = {"prompt": "Hi", "answer": "Hello.", "help": 3, "style": 0.5}
PAIR = {"prompt": "Hi", "chosen": " Hello.", "rejected": " Go."}


def rendered(row: dict[str, Any], **changes: Any) -> Text:
    [text] = render([row], replace(SPEC, **changes), "train")
    return text


def example(row: dict[str, Any], **changes: Any) -> Example:
    spec = replace(SPEC, **changes)
    [found] = kinds.find("rated").examples(
        [rendered(row, **changes)], spec, byte_tokenizer(BYTES_SHAPE)
    )
    return found


@pytest.mark.parametrize("value", [None, math.nan, "", " ", -100, -100.0, "-100", ...])
def test_what_is_no_rating(value: Any) -> None:
    row = {k: v for k, v in ROW.items() if k != "style"}
    row |= {} if value is ... else {"style": value}
    found = example(row)
    assert found.sequences[0].columns == {"rating help": 3.0, "rating style": NOT_RATED}
    with pytest.raises(MissingError, match="has no rating of style"):
        rendered(row, attributes=["style"])


def test_a_rated_answer_is_a_pair_of_prompt_and_answer_with_numbers() -> None:
    row = {"prompt": "Hi", "answer": "Hello.", "labels": {"q": "2"}, "style": 4, "s": 7}
    columns = {"help": "labels.q", "source": "s"}
    found = example(row, columns=columns)
    plain = DatasetSpec("mine", "file", "pairs", columns={"source": "s"}, max_length=64)
    [text] = render([row], plain, "train")
    [one] = kinds.find("pairs").examples([text], plain, byte_tokenizer(BYTES_SHAPE))
    assert (found.id, found.columns, found.ids) == (one.id, {"source": 7.0}, one.ids)
    assert found.choices == found.sequences == found.compared().choices
    assert found.sequences[0].columns == {"rating help": 2.0, "rating style": 4.0}


def test_a_pair_is_what_preference_reads_rated_four_and_one_in_the_first_attribute() -> None:
    found, plain = example(PAIR), replace(SPEC, kind="preference")
    [text] = render([PAIR], plain, "train")
    [two] = kinds.find("preference").examples([text], plain, byte_tokenizer(BYTES_SHAPE))
    assert found.id == two.id
    assert [c.ids for c in found.choices] == [c.ids for c in two.choices]
    assert [c.columns for c in found.choices] == [
        {"rating help": 4.0, "rating style": NOT_RATED},
        {"rating help": 1.0, "rating style": NOT_RATED},
    ]
    assert [sorted(c.columns) for c in found.compared().sequences] == [
        sorted(["choice", *c.columns]) for c in example(ROW).sequences * 2
    ]


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        (ROW, {"attributes": []}, "dataset.attributes names none"),
        (ROW, {"attributes": ["help", "help"]}, "names one twice"),
        ({**ROW, "help": "good"}, {}, "'help' is 'good', no number"),
        ({**ROW, "help": math.inf}, {}, "'help' is inf, no number"),
        ({**ROW, "help": [1]}, {}, r"'help' is \[1\], no number"),
        (ROW, {"attributes": ["helps"]}, "row 1 of split 'train' .* has no rating of helps"),
        (ROW, {"answer": "{reply}"}, "no field 'reply'"),
    ],
)
def test_what_cannot_be_read_is_named(row: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        rendered(row, **changes)
    if "helps" in message:
        assert "Did you mean 'help'?" in error.value.hint


def test_rows_without_a_rating_are_left_out_and_counted_where_that_is_asked_for() -> None:
    reading = Reading()
    rows = [ROW, {**ROW, "help": None, "style": None}, PAIR]
    assert len(list(render(rows, replace(SPEC, missing="skip"), "train", reading))) == 2
    assert (reading.read, reading.missing) == (3, 1)


def test_an_attribute_that_no_training_row_has_is_refused(tmp_path: Path) -> None:
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "test")}
    (tmp_path / "train.jsonl").write_text(json.dumps({**ROW, "style": None}) + "\n")
    (tmp_path / "test.jsonl").write_text(json.dumps({**PAIR, "prompt": "Yes"}) + "\n")
    found, _ = read(replace(SPEC, files=files, attributes=["help"]))
    assert len(found["train"]) == len(found["test"]) == 1
    with pytest.raises(UserError, match="'style', and no training row has a rating of it"):
        read(replace(SPEC, files=files))


def test_attributes_make_rows_of_ones_own_files_rated(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    values = {"source": "file", "kind": "auto", "files": {"all": str(path)}, "attributes": ["help"]}
    for row in ({"prompt": "Hi", "response": "Hello.", "help": 3}, PAIR):
        path.write_text(json.dumps(row) + "\n")
        found, line = recognised(values)
        assert found["kind"] == "rated" and "dataset.kind=rated" in line
        path.unlink()


def test_generated_ratings_are_wrong_where_they_say_so() -> None:
    def part(name: str) -> list[dict[str, Any]]:
        return list(base.find("noisy_ratings").rows(name, 0))

    worth = noisy_pairs.worths(0)
    for name, least, most in (("clean", 0, 0.08), ("flips90", 0.6, 0.9), ("trusted", 0, 0)):
        rows = part(name)
        assert least <= sum(row["flipped"] for row in rows) / len(rows) <= most
        for row in rows:
            assert row["size"] in (None, len(row["answer"]) // 2 - 2)
        assert sum(row["size"] is None for row in rows) == pytest.approx(len(rows) / 3, abs=2)
        right = [row for row in rows if not row["flipped"] and row["worth"] != 2]
        ranked = sorted(right, key=lambda row: noisy_pairs.mean_worth(row["answer"], worth))
        assert [row["worth"] for row in ranked] == sorted(row["worth"] for row in right)
    assert part("held_out") == list(base.find("noisy_pairs").rows("held_out", 0))
    mixed = part("noisy")
    assert (len(mixed), sum("chosen" in row for row in mixed)) == (3500, 500)
    assert mixed == part("noisy") != list(base.find("noisy_ratings").rows("noisy", 1))
