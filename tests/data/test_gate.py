"""One gate from rows to tokens: what is no text is named, what is lost is counted."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import BYTES_SHAPE

from effbench.api.account import lines
from effbench.api.plugins import make_evaluator, make_method
from effbench.api.spec import DatasetSpec
from effbench.data.dataset import Data, render
from effbench.data.readers import read_rows
from effbench.data.render import Text
from effbench.data.tokens import Encoder, answered, moved
from effbench.models.random import byte_tokenizer
from effbench.results.records import read
from effbench.testing.bench import Bench
from effbench.util.errors import UserError

PAIRS = DatasetSpec("mine", "file", "pairs")
CHOICES = replace(PAIRS, kind="choices", choices=["{choice}"], choices_field="options")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("effbench.data.assets.cache_dir", lambda: tmp_path / "cache")


@pytest.fixture
def tokenizer() -> Any:
    return byte_tokenizer(BYTES_SHAPE)


def opening(**around: str) -> Any:
    """Return a byte tokenizer that puts special tokens around every text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer(BYTES_SHAPE)
    names = [f"<{n}>" for n in around.values()]
    before, after = (f"<{around[k]}>" if k in around else "" for k in ("before", "after"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=" ".join(p for p in (before, "$A", after) if p),
        special_tokens=[(n, tokenizer.convert_tokens_to_ids(n)) for n in names],
    )
    return tokenizer


def file_of(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> DatasetSpec:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return replace(PAIRS, **{"files": {"test": str(path)}, **changes})


def texts(rows: list[dict[str, Any]], spec: DatasetSpec = PAIRS) -> list[Text]:
    return list(render(rows, spec, "all"))


# -- rows to text ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, math.nan])
@pytest.mark.parametrize("field", ["prompt", "answer"])
def test_a_missing_value_never_becomes_a_word(field: str, value: Any) -> None:
    rows = [{"prompt": "a", "answer": "b"}, {"prompt": "a", "answer": "c", field: value}]
    with pytest.raises(UserError, match=f"row 2 of split 'all' .* field '{field}' has no value"):
        texts(rows)
    assert [t.answer for t in texts(rows, replace(PAIRS, missing="skip"))] == [" b"]


def test_a_missing_value_may_stand_for_an_empty_text() -> None:
    rows = [{"prompt": None, "answer": "b"}]
    spec = replace(PAIRS, prompt="Q: {prompt}!", missing="empty")
    assert [t.prompt for t in texts(rows, spec)] == ["Q: !"]
    with pytest.raises(UserError, match=r"the answer ' {answer}' is empty"):
        texts([{"prompt": "a", "answer": None}], replace(PAIRS, missing="empty"))


@pytest.mark.parametrize("answer", ["", "  ", "\n"])
def test_an_answer_of_nothing_is_refused(answer: str) -> None:
    with pytest.raises(UserError, match=r"row 1 .*is empty") as caught:
        texts([{"prompt": "a", "answer": answer}])
    assert "dataset.missing=skip" in caught.value.hint


@pytest.mark.parametrize("value", [["a", "b"], {"a": 1}, b"x"])
def test_what_is_no_text_is_refused(value: Any) -> None:
    with pytest.raises(UserError, match=r"row 1 .* the field 'prompt' is .*, which is no text"):
        texts([{"prompt": value, "answer": "b"}])


@pytest.mark.parametrize("text", ["1e999", "Infinity", "-Infinity"])
def test_a_number_beyond_all_bounds_is_no_text(text: str) -> None:
    with pytest.raises(UserError, match=r"row 1 .* the field 'answer' is -?inf"):
        texts([{"prompt": "a", "answer": json.loads(text)}])


def test_parts_of_a_field_are_named_in_brackets() -> None:
    row = {"doc": {"q": "Q", "list": ["x", "y"]}, "answer": 4}
    [text] = texts([row], replace(PAIRS, prompt="{doc[q]} {doc[list][1]}"))
    assert (text.prompt, text.answer) == ("Q y", " 4")
    for template in ("{answer.real}", "{doc.q}", "{doc[x]}", "{doc[list][2]}", "{doc[q][text]}"):
        with pytest.raises(UserError, match="row 1 of split 'all' of dataset 'mine' has no field"):
            texts([row], replace(PAIRS, prompt=template))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"options": "48"}, "'options' is '48', which is no list"),
        ({"options": ["4", ""]}, "the answer '{choice}' is empty"),
        ({"options": ["4", None]}, "the field 'choice' has no value"),
        ({"label": 0.9}, "label 0.9 is no index"),
        ({"label": math.inf}, "label inf is no index"),
        ({"label": None}, "the field 'label' has no value"),
    ],
)
def test_choices_are_a_list_and_a_label_is_whole(row: dict[str, Any], message: str) -> None:
    whole = {"prompt": "a", "options": ["4", "8"], "label": 1, **row}
    with pytest.raises(UserError, match=f"row 1 .*{message}"):
        texts([whole], CHOICES)


@pytest.mark.parametrize("label", [1, 1.0, "1", True])
def test_a_whole_label_may_be_written_in_many_ways(label: Any) -> None:
    [text] = texts([{"prompt": "a", "options": ["4", "8"], "label": label}], CHOICES)
    assert text.answer == "8"


def test_half_a_surrogate_pair_is_the_sign_of_what_cannot_be_shown() -> None:
    row = json.loads('{"prompt": "a\\ud83d", "answer": "\\ud83d\\ude00"}')
    [text] = texts([row])
    assert (text.prompt, text.answer) == ("a\ufffd", " \U0001f600")


# -- text to tokens --------------------------------------------------------------------------------


def test_blanks_at_the_end_of_a_prompt_belong_to_the_answer(tokenizer: Any) -> None:
    assert moved("a: \t", "4") == ("a:", " \t4")
    assert moved("a\n", "4") == ("a\n", "4")
    one = answered(Encoder(tokenizer), "a: ", "4", 20)
    assert one == answered(Encoder(tokenizer), "a:", " 4", 20)


def test_a_tokenizer_that_closes_texts_closes_no_prompt() -> None:
    tokenizer = opening(before="bos", after="eos")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert tokenizer("ab")["input_ids"][-1] == eos, "it does close"
    plain = tokenizer("ab", add_special_tokens=False)["input_ids"]
    encoder = Encoder(tokenizer)
    assert (encoder.opening, encoder.closing) == (1, 1)
    assert encoder("ab") == encoder.context("ab") == [bos, *plain]
    tokens = answered(encoder, "a", "b", 20)
    assert tokens.ids == [bos, *plain]


def test_a_long_prompt_keeps_what_stands_before_every_text() -> None:
    tokenizer = opening(before="bos")
    tokens = answered(Encoder(tokenizer), "0123456789", "ab", 8)
    assert tokens.ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(tokens.ids[1:]) == "6789ab"
    assert (tokens.prompt_length, tokens.cut) == (5, (6, 0))


@pytest.mark.parametrize("prompt", ["", "  "])
def test_no_prompt_is_empty(prompt: str, tokenizer: Any) -> None:
    tokens = answered(Encoder(tokenizer), prompt, "ab", 20)
    assert tokens.ids[: tokens.prompt_length] == [tokenizer.bos_token_id]
    assert tokenizer.decode(tokens.ids[1:]) == prompt + "ab"


# -- the account -----------------------------------------------------------------------------------


def test_bytes_of_a_cut_answer_are_those_that_are_scored(tmp_path: Path, tokenizer: Any) -> None:
    spec = file_of(tmp_path, [{"prompt": "Count", "answer": "one two " * 9}], max_length=20)
    [example] = Data(spec, tokenizer).examples("test")
    assert example.answer_bytes == example.loss_tokens == 19
    spec = file_of(tmp_path, [{"prompt": "C", "answer": "ééééééééé"}], max_length=5)
    [example] = Data(spec, tokenizer).examples("test")
    assert (example.loss_tokens, example.answer_bytes) == (4, 3), "half a letter has no bytes"


def test_all_that_is_left_out_or_cut_is_counted(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"prompt": "short", "answer": "yes"},
        {"prompt": "short", "answer": "yes"},
        {"prompt": "x" * 30, "answer": "no"},
        {"prompt": "y", "answer": "z" * 40},
        {"prompt": "y", "answer": None},
    ]
    data = Data(file_of(tmp_path, rows, max_length=24, missing="skip"), tokenizer)
    reading = data.readings["test"]
    assert (reading.read, reading.missing, reading.repeated, reading.empty) == (5, 1, 1, 0)
    account = data.account("test", whole=True)
    assert account.rows == 3
    assert (account.prompts_cut, account.answers_cut) == (1, 1)
    # The prompt of 30 keeps 20 of 24 beside " no" and the end; one of "y" and 23 of 41.
    assert account.cut_tokens == 10 + (1 + 41 - 24)
    assert account.tokens == (5 + 4 + 1) + 24 + 24
    assert account.scored_tokens == (4 + 1) + (3 + 1) + 23
    assert account.scored_bytes == 4 + 3 + 23
    assert account.bytes == 9 + 33 + 42


def test_the_end_of_packed_text_that_fills_no_block_is_counted(
    tmp_path: Path, tokenizer: Any
) -> None:
    rows = [{"text": "a" * 33}, {"text": " "}, {"text": "b" * 10}]
    data = Data(file_of(tmp_path, rows, kind="text", max_length=20), tokenizer)
    assert data.readings["test"].empty == 1
    packed, whole = data.account("test", whole=False), data.account("test", whole=True)
    assert (packed.tokens, packed.cut_tokens) == (40, 33 + 10 + 2 - 40)
    assert (whole.tokens, whole.scored_tokens, whole.cut_tokens) == (45, 43, 0)
    assert whole.bytes == whole.scored_bytes == 43


def test_the_record_keeps_the_account_and_says_it(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from effbench.report.terminal import print_record

    rows = [{"prompt": f"{i}" * 40, "answer": "yes"} for i in range(9)] * 2
    spec = file_of(tmp_path, rows)
    words = ["dataset=file", f"dataset.files.test={spec.files['test']}", "dataset.cut={}"]
    record = bench.run("eval", *words, "dataset.max_length=24", "evaluator=perplexity")
    assert record.data["sources"] == {
        "test": {"read": 18, "empty": 0, "missing": 0, "repeated": 9},
    }
    assert record.data["splits"]["test"]["prompts_cut"] == 9
    loss_tokens = next(m.value for m in record.metrics if m.name == "loss_tokens")
    assert record.data["splits"]["test"]["scored_tokens"] == loss_tokens
    assert read(bench.store.records / f"{record.key}.json") == record
    first, second = lines(record.data)
    assert first == "test: 18 rows read, of which left out: 9 repeated"
    assert second.startswith("test: 9 rows, 216 tokens, 45 of them scored, in 36 bytes; in 9 a ")
    print_record(record)
    assert f"Data, {second}" in capsys.readouterr().out


# -- files -----------------------------------------------------------------------------------------


MARK = b"\xef\xbb\xbf"
ROW = {"prompt": "a", "answer": "b"}
LINE = json.dumps(ROW).encode() + b"\n"


def packed(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", MARK + LINE),
        ("a.json", MARK + b"[" + LINE + b"]"),
        ("a.csv", MARK + b"prompt,answer\na,b\n"),
        ("a.tsv", MARK + b"prompt\tanswer\na\tb\n"),
        ("a.ndjson", LINE),
        ("a.jsonl", LINE.replace(b"\n", b"\r\n")),
        ("a.jsonl.gz", packed(LINE)),
        ("a.jsonl.gz", LINE),
        ("a.csv.gz", packed(b"prompt,answer\na,b\n")),
        ("a.gz", packed(LINE)),
    ],
)
def test_the_same_row_in_many_files(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    assert read_rows(tmp_path / name) == [ROW]


@pytest.mark.parametrize("name", ["a.JSONL", "a.Csv", "a.JSONL.GZ"])
def test_an_ending_may_be_in_capitals(tmp_path: Path, name: str) -> None:
    data = b"prompt,answer\na,b\n" if "Csv" in name else LINE
    (tmp_path / name).write_bytes(packed(data) if name.endswith("GZ") else data)
    assert len(read_rows(tmp_path / name)) == 1


def test_json_lines_may_be_named_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(LINE * 3)
    assert read_rows(tmp_path / "a.json") == [ROW] * 3
    (tmp_path / "a.json").write_bytes(LINE * 2 + b"{\n")
    with pytest.raises(UserError, match=r"a\.json, line 3"):
        read_rows(tmp_path / "a.json")


def test_fields_of_a_csv_are_as_long_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,answer\n" + "x" * 140_000 + ",b\n")
    assert len(read_rows(tmp_path / "a.csv")[0]["prompt"]) == 140_000


def test_nothing_is_quoted_in_tsv(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('prompt\tanswer\n"so it\tyes\nfine"\tno\n')
    assert [r["prompt"] for r in read_rows(tmp_path / "a.tsv")] == ['"so it', 'fine"']


def test_documents_of_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(MARK + b"one\r\ntwo\r\n\r\nthree\r\n")
    found = {
        way: [r["text"] for r in read_rows(path, way)] for way in ("paragraph", "line", "file")
    }
    assert found == {
        "paragraph": ["one\ntwo", "three"],
        "line": ["one", "two", "three"],
        "file": ["one\ntwo\n\nthree"],
    }


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl.gz", packed(LINE * 99)[:-20], "cannot be unpacked"),
        ("a.jsonl.gz", packed(LINE * 99)[:20] + b"x" * 30, "cannot be unpacked"),
        ("a.jsonl", LINE + b'{"a": ' + b"9" * 5000 + b"}", "a.jsonl, line 2"),
        ("a.json", b'[{"a": ' + b"9" * 5000 + b"}]", "a.json: "),
        ("a.json", b"[" * 100_000, "nested too deeply|a.json: "),
        ("a.csv", b"prompt,answer\na,b\nc\x00\rd,e\n", "a.csv, line 3"),
        ("a.xml.gz", packed(LINE), "no known kind"),
        ("a.jsonl", b"\xff\xfe{", "is not UTF-8"),
        ("a.csv", "prompt,a\ncafé,b\n".encode("latin-1"), "is not UTF-8"),
        ("a.csv", b"prompt;answer\na;b\n", "seem to stand between ';'"),
        ("a.csv", b"PK\x03\x04rows", "is a workbook or an archive"),
        ("a.jsonl", LINE + b'{"a": 1, "b": {"c": 2, "c": 3}}', "line 2: the key 'c' stands there"),
        ("a.json", b'[{"a": 1, "a": 1}]', "a.json: the key 'a' stands there twice"),
        ("a.csv", b"a,b,a\n1,2,3\n", "a.csv, line 1: the column 'a' stands there twice"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_rows(tmp_path / name)


def test_a_mark_of_the_byte_order_says_that_a_file_is_utf_16(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("prompt,answer\r\nä,b\r\n".encode("utf-16"))
    assert read_rows(tmp_path / "a.csv") == [{"prompt": "ä", "answer": "b"}]


# -- the words of a command ------------------------------------------------------------------------


def test_a_line_end_is_the_same_from_a_command_and_a_file(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINE)
    words = ["dataset=file", f"dataset.files.all={tmp_path / 'a.jsonl'}"]
    typed = bench.job("eval", *words, r'dataset.prompt="Q: {prompt}\nA:"', r'dataset.answer="\\n"')
    assert typed.spec.dataset.prompt == "Q: {prompt}\nA:"
    assert typed.spec.dataset.answer == "\\n", "two backslashes stand for one"
    listed = bench.job("eval", "dataset=arithmetic", r'dataset.choices=["\n{choice}"]')
    assert listed.spec.dataset.choices == ["\n{choice}"]
    own = ["evaluator=generation", "evaluator.generation.tasks=[]"]
    asked = bench.job("eval", *words, *own, r'evaluator.generation.pattern="\n(\d)"')
    assert make_evaluator(asked.spec.evaluators[0]).pattern == r"\n(\d)", "no text but a pattern"
    asked = bench.job("eval", *words, *own, r'evaluator.generation.until=["\n"]')
    assert make_evaluator(asked.spec.evaluators[0]).until == ("\n",)
    asked = bench.job("eval", *words, "evaluator=best_of_n", r'evaluator.best_of_n.until=["\n"]')
    assert make_evaluator(asked.spec.evaluators[0]).until == ("\n",), "what others inherit too"
    rules = ["method=prboost", "dataset=noisy-classes", r'method.template="\nIt is"']
    assert make_method(bench.job("train", *rules).spec.method).template == "\nIt is"
    words[1] = r"dataset.files.all=C:\new\table.jsonl"
    with pytest.raises(UserError, match=r"C:\\new\\table.jsonl"):
        bench.job("eval", *words)


def test_a_dry_run_shows_the_first_row(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINE)
    words = ["model=tiny", "dataset=file", "dataset.files.test=a.jsonl"]
    status, out, _ = cli("eval", *words, r'dataset.prompt="Q: {prompt}\nA:"', "--dry-run")
    assert status == 0
    assert r"First row  'Q: a\nA:' -> ' b'" in out
