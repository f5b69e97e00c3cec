from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import BYTES_SHAPE

from effbench.api.examples import Example
from effbench.api.spec import DatasetSpec
from effbench.config.compose import compose
from effbench.data import readers
from effbench.data.dataset import Data, read, render, split_names, splits
from effbench.data.kinds import pairs as pairs_kind
from effbench.data.kinds import text as text_kind
from effbench.data.render import Place, Text
from effbench.data.tokenise import tokenise
from effbench.data.tokens import prefix_token
from effbench.models.random import byte_tokenizer
from effbench.util.errors import UserError

CUT = {"train": 0.6, "validation": 0.1, "test": 0.3}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(BYTES_SHAPE)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("effbench.data.assets.cache_dir", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "tokens"


def rows(count: int, start: int = 0) -> list[dict]:
    return [{"prompt": f"What is {i}?", "answer": f"{i} it is"} for i in range(start, count)]


def pairs(tmp_path: Path, data: list[dict], **changes) -> DatasetSpec:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in data))
    spec = DatasetSpec("mine", "file", "pairs", files={"all": str(path)}, cut=CUT)
    return replace(spec, **changes)


def texts(spec: DatasetSpec) -> dict[str, list[str]]:
    return {name: [t.id for t in part] for name, part in splits(spec).items()}


# -- splits ----------------------------------------------------------------------------------------


def test_splits_are_disjoint_whole_and_of_the_stated_shares(tmp_path: Path) -> None:
    parts = texts(pairs(tmp_path, rows(2000)))
    ids = [i for part in parts.values() for i in part]
    assert len(ids) == len(set(ids)) == 2000
    for name, share in CUT.items():
        assert len(parts[name]) / 2000 == pytest.approx(share, abs=0.04)
        assert parts[name] == sorted(parts[name])


def test_a_row_keeps_its_split_whatever_stands_beside_it(tmp_path: Path) -> None:
    few = texts(pairs(tmp_path, rows(100)))
    many = texts(pairs(tmp_path, [*rows(900, 100), *reversed(rows(100))]))
    for name in CUT:
        assert set(few[name]) <= set(many[name])


def test_a_row_stands_where_it_has_always_stood(tmp_path: Path) -> None:
    spec = pairs(tmp_path, rows(12))
    found = {t.answer.split()[0]: name for name, part in splits(spec).items() for t in part}
    validation = {n for n, name in found.items() if name == "validation"}
    test = {n for n, name in found.items() if name == "test"}
    assert (validation, test) == ({"5", "9"}, {"1", "10", "11", "4", "8"}), (
        "records of earlier runs saw other rows"
    )
    turned = dict(reversed(CUT.items()))
    assert texts(replace(spec, cut=turned)) == texts(spec), "the order of the shares is no matter"


def test_a_row_that_is_there_twice_counts_once(tmp_path: Path) -> None:
    assert texts(pairs(tmp_path, rows(50) + rows(50))) == texts(pairs(tmp_path, rows(50)))


def test_shares_need_not_add_up_but_may_not_exceed_one(tmp_path: Path) -> None:
    part = texts(pairs(tmp_path, rows(500), cut={"train": 0.5}))
    assert set(part) == {"train"}
    assert 200 < len(part["train"]) < 300
    with pytest.raises(UserError, match="more than 1"):
        splits(pairs(tmp_path, rows(5), cut={"train": 0.9, "test": 0.2}))


def test_a_limit_takes_the_first_rows_in_the_order_of_their_hashes(tmp_path: Path) -> None:
    whole = texts(pairs(tmp_path, rows(200)))
    some = texts(pairs(tmp_path, rows(200), limit={"train": 7}))
    assert some == {**whole, "train": whole["train"][:7]}


def test_a_seed_draws_training_rows_where_it_is_asked_to(tmp_path: Path) -> None:
    plain = pairs(tmp_path, rows(200), limit={"train": 7, "test": 5})
    spec = replace(plain, drawn=True)
    first, other = ([t.id for t in read(spec, seed)[0]["train"]] for seed in (0, 1))
    assert len(first) == len(other) == 7 and not {*first} == {*other} != {*texts(plain)["train"]}
    assert first == sorted(first) and first == texts(spec)["train"]
    assert texts(spec)["test"] == texts(plain)["test"], "what is measured on is the same"
    fewer = replace(spec, limit={"train": 3})
    assert {*texts(fewer)["train"]} < {*first}, "fewer rows are some of them"
    with pytest.raises(UserError, match="all of them are taken"):
        compose("train", ["model=tiny", "dataset=arithmetic", "dataset.drawn=true"])


def test_files_with_names_of_splits_are_not_cut(tmp_path: Path) -> None:
    spec = pairs(tmp_path, rows(20))
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "x", "answer": "y"}) + "\n")
    named = replace(spec, files={"train": spec.files["all"], "test": str(other)})
    assert {n: len(p) for n, p in splits(named).items()} == {"train": 20, "test": 1}
    assert split_names(named) == ["train", "test"]
    with pytest.raises(UserError, match="'all', which is cut, beside others"):
        splits(replace(spec, files={**spec.files, "test": str(other)}))


@pytest.mark.parametrize("first, second", [("train", "test"), ("validation", "test")])
def test_rows_in_two_splits_are_refused(tmp_path: Path, first: str, second: str) -> None:
    path = pairs(tmp_path, rows(9)).files["all"]
    spec = DatasetSpec("mine", "file", "pairs", files={first: path, second: path})
    with pytest.raises(UserError, match=f"9 rows stand both in split '{first}'"):
        splits(spec)
    assert len(splits(replace(spec, allow_overlap=True))) == 2


def test_the_generator_is_the_same_every_time() -> None:
    spec = DatasetSpec("a", "generator", "pairs", id="arithmetic", answer="{label}", cut=CUT)
    assert texts(spec) == texts(spec)
    with pytest.raises(UserError, match="no generator 'arithmetics'") as caught:
        splits(replace(spec, id="arithmetics"))
    assert "'arithmetic'" in caught.value.hint


def test_a_split_without_rows_or_name_is_refused(tmp_path: Path, tokenizer) -> None:
    data = Data(pairs(tmp_path, rows(1)), tokenizer)
    empty = next(n for n in CUT if not data.texts[n])
    with pytest.raises(UserError, match=f"Split '{empty}' of dataset 'mine' has no rows\\."):
        data.examples(empty)
    data.readings["all"].read, data.readings["all"].repeated = 5, 4
    with pytest.raises(UserError, match=r"no rows \(all: 5 rows read, .*: 4 repeated\)\."):
        data.examples(empty)
    with pytest.raises(UserError, match="no split 'tset'") as caught:
        data.examples("tset")
    assert "'test'" in caught.value.hint


# -- files -----------------------------------------------------------------------------------------


def write(path: Path, data: list[dict]) -> None:
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, data[0])
            writer.writeheader()
            writer.writerows(data)
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(data), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(data), encoding="utf-8")
    else:
        path.write_text("\n".join(json.dumps(r) for r in data), encoding="utf-8")


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    data = [{"prompt": 'a, "b"\nc\u2028', "answer": "ü"}, {"prompt": "d", "answer": "e"}]
    write(tmp_path / f"rows.{ending}", data)
    assert readers.read_rows(tmp_path / f"rows.{ending}") == data


def test_a_text_file_gives_paragraphs(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\n\nthree\n")
    assert readers.read_rows(tmp_path / "a.txt") == [{"text": "one\ntwo"}, {"text": "three"}]


# -- templates -------------------------------------------------------------------------------------


def rendered(row: dict, **changes) -> Text:
    spec = replace(DatasetSpec("q", "generator", "choices", prompt="{q}"), **changes)
    return next(render([row], spec, "train"))


def test_choices_with_a_field_each_or_in_a_list() -> None:
    row = {"q": "Q", "a": "x", "b": "y", "label": "1", "all": {"text": ["x", "y"]}}
    one = rendered(row, choices=[" {a}", " {b}"])
    two = rendered(row, choices=[" {choice}"], choices_field="all.text")
    assert one == two == Text(one.id, "Q", " y", (" x", " y"), 1)


def test_a_label_may_be_a_name() -> None:
    row = {"q": "Q", "key": "C", "c": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}}
    fields = {"choices": ["{choice}"], "choices_field": "c.text", "label": "key"}
    assert rendered(row, **fields, label_names="c.label").answer == "z"
    with pytest.raises(UserError, match=r"label 'D' is not among \['A', 'B', 'C'\]"):
        rendered({**row, "key": "D"}, **fields, label_names="c.label")
    row["key"] = "third"
    with pytest.raises(UserError, match="label 'third' is no index") as caught:
        rendered(row, **fields)
    assert "dataset.label_names" in caught.value.hint


@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_must_be_one_of_the_answers(label: int) -> None:
    with pytest.raises(UserError, match=f"label {label} is not one of 2 answers"):
        rendered({"q": "Q", "a": "x", "b": "y", "label": label}, choices=["{a}", "{b}"])


def test_a_broken_template_or_a_missing_field_is_named() -> None:
    with pytest.raises(UserError, match="row 1 of split 'train' of dataset 'q' has no field 'x'"):
        rendered({"q": "Q", "label": 0}, choices=["{x}"])
    with pytest.raises(UserError, match="is no template"):
        rendered({"q": "Q", "label": 0}, choices=["{"])
    with pytest.raises(UserError, match="no field 'lable'"):
        rendered({"q": "Q", "label": 0}, choices=["a"], label="lable")


# -- tokens ----------------------------------------------------------------------------------------


def test_only_the_answer_has_a_loss(tmp_path: Path, tokenizer) -> None:
    spec = pairs(tmp_path, rows(30))
    data = Data(spec, tokenizer)
    for text, example in zip(data.texts["train"], data.examples("train"), strict=True):
        assert example.id == text.id
        assert tokenizer.decode(example.ids[: example.prompt_length]) == text.prompt
        counted = [i for i in example.labels() if i != -100]
        assert counted[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(counted[:-1]) == text.answer
        assert example.answer_bytes == len(text.answer.encode())


def test_a_long_prompt_loses_its_start_and_the_answer_stays(tmp_path: Path, tokenizer) -> None:
    row = {"prompt": "abcdefghij" * 20, "answer": "kept"}
    spec = pairs(tmp_path, [row], cut={"train": 1.0}, max_length=24)
    [example] = Data(spec, tokenizer).examples("train")
    assert len(example.ids) == 24
    answer = tokenizer.decode(example.ids[example.prompt_length : -1])
    assert answer == " kept"
    prompt = tokenizer.decode(example.ids[: example.prompt_length])
    assert row["prompt"].endswith(prompt)
    assert len(prompt) == 24 - len(" kept") - 1


def test_every_choice_ends_with_its_own_answer(tokenizer) -> None:
    spec = DatasetSpec(
        "a",
        "generator",
        "choices",
        id="arithmetic",
        choices=[" {choice}"],
        choices_field="options",
        cut={"test": 0.02},
        max_length=40,
    )
    data = Data(spec, tokenizer)
    for text, example in zip(data.texts["test"], data.examples("test"), strict=True):
        tails = [tokenizer.decode(c.ids[c.prompt_length :]) for c in example.choices]
        assert tails == list(text.choices)
        assert example.right == text.right
        assert [c.answer_bytes for c in example.choices] == [len(t) for t in tails]


def test_packed_text_is_the_stream_cut_into_blocks(tmp_path: Path, tokenizer) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(f"Paragraph number {i} of é text." for i in range(40)))
    spec = DatasetSpec("t", "file", "text", files={"train": str(path)}, max_length=50)
    data = Data(spec, tokenizer)
    stream: list[int] = []
    for text in data.texts["train"]:
        stream += [*tokenizer(text.answer)["input_ids"], tokenizer.eos_token_id]
    examples = data.examples("train")
    blocks = [i for e in examples for i in e.ids]
    assert blocks == stream[: len(blocks)]
    assert len(stream) - len(blocks) < 50
    assert {len(e.ids) for e in examples} == {50}
    assert {e.prompt_length for e in examples} == {0}
    assert len({e.id for e in examples}) == len(examples)


def test_a_text_shorter_than_a_block_is_one_block(tmp_path: Path, tokenizer) -> None:
    spec = DatasetSpec("t", "file", "text", max_length=50)
    [example] = tokenise([Text("1", "", "short")], spec, tokenizer)
    assert tokenizer.decode(example.ids[:-1]) == "short"


def test_documents_are_whole_and_start_with_a_prefix(tmp_path: Path, tokenizer) -> None:
    path = tmp_path / "a.txt"
    texts = ["short", "Paragraph é " + "of text " * 20]
    path.write_text("\n\n".join(texts))
    spec = DatasetSpec("t", "file", "text", files={"test": str(path)}, max_length=50)
    data = Data(spec, tokenizer)
    documents = data.documents("test")
    assert [e.id for e in documents] == data.ids("test")
    for example, text in zip(documents, data.texts["test"], strict=True):
        assert example.ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(example.ids[1:]) == text.answer
        assert example.prompt_length == 1
        assert example.answer_bytes == len(text.answer.encode())
    assert max(len(e.ids) for e in documents) > 50
    assert data.documents("test") == documents, "the cache"
    assert {len(e.ids) for e in data.examples("test")} == {50}


def test_documents_start_with_the_end_token_where_there_is_no_other(tokenizer) -> None:
    tokenizer = byte_tokenizer(BYTES_SHAPE)
    tokenizer.bos_token = None
    assert prefix_token(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="neither a beginning-of-text nor an end-of-text token"):
        prefix_token(tokenizer)


def test_rows_that_are_no_texts_are_the_same_in_evaluation(tokenizer) -> None:
    spec = DatasetSpec("q", "generator", "pairs", max_length=16)
    rows = [Text("1", "a", " b")]
    assert tokenise(rows, spec, tokenizer, whole=True) == tokenise(rows, spec, tokenizer)


# -- the cache -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pairs", "choices", "text"])
def test_the_cache_gives_back_what_was_made(tokenizer, cache: Path, kind, monkeypatch) -> None:
    spec = DatasetSpec("q", "generator", kind, max_length=16)
    made = [Text("1", "a", " b", (" b", " c"), 0), Text("2", "d", " ef", (" x", " ef"), 1)]
    if kind != "choices":
        made = [replace(t, choices=(), right=0) for t in made]
    first = tokenise(made, spec, tokenizer)
    for made_by in (pairs_kind.Pairs, text_kind.PlainText):
        monkeypatch.setattr(made_by, "examples", lambda *_: pytest.fail("made again"))
    assert tokenise(made, spec, tokenizer) == first
    assert all(isinstance(e, Example) for e in first)
    assert len(list(cache.iterdir())) == 1


def test_what_changes_the_tokens_is_in_the_key_of_the_cache(tokenizer, cache: Path) -> None:
    spec = DatasetSpec("q", "generator", "choices", max_length=16)
    text = Text("1", "a", " b", (" b", " c"), 0)
    tokenise([text], spec, tokenizer)
    corrected = replace(text, answer=" c", right=1)
    assert tokenise([corrected], spec, tokenizer)[0].right == 1, "a label that was put right"
    tokenise([text], replace(spec, max_length=8), tokenizer)
    tokenise([text, replace(text, id="2")], spec, tokenizer)
    other = byte_tokenizer(BYTES_SHAPE)
    other.add_tokens(["ab"])
    tokenise([text], spec, other)
    ending = byte_tokenizer(BYTES_SHAPE)
    ending.eos_token = ending.pad_token
    assert tokenise([text], spec, ending)[0].ids[-1] == ending.pad_token_id
    assert len(list(cache.iterdir())) == 6


def test_a_damaged_cache_is_made_again(tokenizer, cache: Path) -> None:
    spec = DatasetSpec("q", "generator", "pairs", max_length=16)
    first = tokenise([Text("1", "a", " b")], spec, tokenizer)
    [file] = cache.iterdir()
    file.write_text(file.read_text()[:-9])
    assert tokenise([Text("1", "a", " b")], spec, tokenizer) == first


def test_rows_are_made_once_and_are_the_same_list_each_time(tmp_path: Path, tokenizer) -> None:
    data = Data(pairs(tmp_path, rows(40)), tokenizer)
    assert data.examples("train") is data.examples("train")
    assert data.documents("train") is data.examples("train"), "the same rows but for texts"
    assert data.examples("test") is not data.examples("train")
    text = replace(data.spec, kind="text", text="{prompt}")
    data = Data(text, tokenizer)
    assert data.documents("train") is data.documents("train")
    assert data.documents("train") != data.examples("train")


@pytest.mark.parametrize(
    "template", ["", "as {{it}} is", "{a} {n}", "{l[1]}{d[k]} {f}", "{n:>5}", "{a!r}", "{n:{w}}"]
)
def test_a_template_gives_what_pythons_own_gives(template: str) -> None:
    row = {"a": "x y", "n": 3, "l": ["p", "q"], "d": {"k": "v"}, "f": 0.1, "w": 4}
    assert Place(row, "here").fill(template) == template.format(**row)
