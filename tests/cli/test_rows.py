"""Rows of a dataset as a model sees them: their text, their tokens, and which of them count."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from effbench.api.examples import Example, Turns
from effbench.cli.rows import BRACKETS, COUNTS, shown
from effbench.models.random import byte_tokenizer
from effbench.testing.models import tiny_shape

SAID = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yo\nyo"},
    {"role": "user", "content": "So?"},
    {"role": "assistant", "content": "No"},
]


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": SAID}) + "\n")
    return ["dataset.files.train=chat.jsonl", "dataset.template=zephyr", "model=tiny"]


def test_rows_are_shown_with_what_counts_in_brackets(cli: Any, words: list[str]) -> None:
    status, out, said = cli("show", "dataset", "file", *words, "--rows", "2")
    assert status == 0
    assert "conversations (messages), so dataset.kind=chat" in said
    assert re.search(r"^row 1 of train, \w{16}: \d+ tokens, 9 of them count$", out, re.M)
    assert "  | <|user|>\n  | Hi<eos>\n  | <|assistant|>\n  | [Yo]\n  | [yo<eos>]\n" in out
    assert "  | [No<eos>]\n  # " in out
    assert "row 2" not in out


def test_a_dry_run_of_a_training_shows_the_first(cli: Any, words: list[str]) -> None:
    words = ["dataset=file", *words, "evaluator=[]"]
    status, out, _ = cli("train", *words, "--dry-run")
    assert status == 0
    assert "  | [No<eos>]\n" in out
    assert "the first row" not in cli("eval", *words, "--dry-run")[1]


def test_a_dry_run_of_a_training_reads_every_row(cli: Any, words: list[str]) -> None:
    told = [{"role": "system", "content": "Be kind."}, *SAID]
    rows = [SAID, told, [*SAID, {"role": "user", "content": "Why?"}, SAID[3]]]
    lines = [json.dumps({"messages": row}) + "\n" for row in rows]
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('No system') }}"
    )
    Path("plain.jinja").write_text(template + "{% endif %}{{ m.role + m.content }}{% endfor %}")
    train, test = ["train", "dataset=file", *words, "--dry-run"], "dataset.files.test=test.jsonl"
    Path("test.jsonl").write_text(lines[0])
    Path("chat.jsonl").write_text("".join(lines[:2]))
    status, out, said = cli(*train, "dataset.template=plain.jinja", "evaluator=[]")
    assert status == 2 and "No system" in said and "dataset.system=user" in said
    assert "the first row" in out
    Path("chat.jsonl").write_text(lines[2])
    status, _, said = cli(*train, test)
    assert status == 2 and "1 items of split 'test' stand in split 'train' too" in said
    assert not Path("results").exists()


def test_a_dry_run_of_an_evaluation_reads_the_rows_that_it_asks(cli: Any) -> None:
    rows = [{"instruction": "Say a.", "output": "a"}, {"instruction": "Say b."}]
    Path("own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["dataset=file", "dataset.files.test=own.jsonl", "model=tiny"]
    status, _, said = cli("eval", *words, "--dry-run")
    assert status == 2 and "own.jsonl" in said and "row 2" in said


def test_a_task_that_is_asked_in_the_place_of_own_rows_is_named(cli: Any) -> None:
    row = {"prompt": "Say a.", "chosen": "a", "rejected": "b"}
    Path("own.jsonl").write_text(json.dumps(row) + "\n")
    words = ["eval", "dataset=file", "dataset.files.test=own.jsonl", "model=tiny", "--dry-run"]
    told = "Evaluator generation asks gsm8k_cot, no rows of own.jsonl"
    assert told in " ".join(cli(*words, "evaluator=generation")[2].split())
    assert "Evaluator generation asks" not in cli(*words, "evaluator=preference")[2]


@pytest.mark.parametrize("width", [30, 60, 400])
def test_colours_close_at_each_line_and_hide_no_token(width: int) -> None:
    ids = list(range(40, 90))
    tokens = Turns(ids, 5, 0, silent=((20, 30),))
    tokenizer = byte_tokenizer(tiny_shape())
    example = Example("x", (tokens,))
    plain, coloured = (
        shown("row", example, tokenizer, marks, width) for marks in (BRACKETS, COUNTS)
    )
    for line in coloured.splitlines():
        assert line.count(COUNTS[0]) == line.count(COUNTS[1])
        bare = line.replace(COUNTS[0], "").replace(COUNTS[1], "")
        assert len(bare) <= width or not line.startswith("  #")
    numbers = " ".join(line[4:] for line in coloured.splitlines() if line.startswith("  # "))
    counted = re.findall(r"\033\[1;32m([\d ]*)\033\[0m", numbers)
    assert " ".join(counted).split() == [str(i) for i in (*ids[5:20], *ids[30:])]
    assert re.findall(r"\d+", " ".join(p[4:] for p in plain.splitlines() if p[:4] == "  # ")) == [
        str(i) for i in ids
    ]


def test_rows_are_those_of_the_split_that_is_named(cli: Any) -> None:
    words = ["show", "dataset", "arithmetic", "model=tiny", "--rows", "1"]
    status, out, _ = cli(*words, "--split", "test")
    assert status == 0 and out.startswith("row 1 of test, ")
    assert cli(*words)[1].startswith("row 1 of train, ")
    status, _, said = cli(*words, "--split", "tset")
    assert status == 2 and "no split 'tset'" in said and "'test'" in said


@pytest.mark.parametrize(
    "words",
    [
        ["method", "lora", "--rows", "1"],
        ["dataset", "file", "a=1"],
        ["dataset", "arithmetic", "--split", "test"],
    ],
)
def test_only_datasets_have_rows(cli: Any, words: list[str]) -> None:
    status, _, said = cli("show", *words)
    assert status == 2
    assert "KEY=VALUE --rows 3" in said
