"""Which row it is does not depend on the words of a template, on a format or on a file."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from effbench.api.spec import DatasetSpec
from effbench.config.compose import compose
from effbench.data.dataset import read, splits
from effbench.data.overlap import Shared, Trained, kept, require_apart
from effbench.testing.bench import Bench
from effbench.util.errors import UserError

QUESTIONS = [f"How many legs do {n} dogs and {n + 1} hens have together?" for n in range(60)]
ROWS = [{"question": q, "answer": str(6 * n + 2)} for n, q in enumerate(QUESTIONS)]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return jsonl(tmp_path / "rows.jsonl", ROWS)


def spec(path: Path, *words: str, prompt: str = "{question}") -> DatasetSpec:
    own = ["model=tiny", "dataset=file", f"dataset.files.all={path}"]
    return compose("eval", [*own, f'dataset.prompt="{prompt}"', *words]).spec.dataset


def questions_by_split(made: DatasetSpec) -> dict[str, set[str]]:
    return {
        name: {next(q for q in QUESTIONS if q in text.prompt) for text in texts}
        for name, texts in splits(made).items()
    }


# -- splits --------------------------------------------------------------------------------------


def test_another_template_deals_the_same_splits_in_the_same_order(file: Path) -> None:
    one = spec(file)
    other = spec(file, prompt="Question: {question} Think first.")
    assert one.known_by == other.known_by == "source"
    assert questions_by_split(one) == questions_by_split(other)
    for name, texts in splits(one).items():
        assert [t.id for t in texts] == [t.id for t in splits(other)[name]]


def test_another_format_deals_the_same_splits(file: Path, tmp_path: Path) -> None:
    with (tmp_path / "rows.csv").open("w", newline="") as out:
        writer = csv.DictWriter(out, ["more", "answer", "question"])
        writer.writeheader()
        writer.writerows({**row, "more": n} for n, row in enumerate(ROWS))
    assert questions_by_split(spec(file)) == questions_by_split(spec(tmp_path / "rows.csv"))


def test_answers_to_one_question_stay_in_one_split(tmp_path: Path) -> None:
    several = [{**row, "answer": f"{row['answer']} or {n}"} for row in ROWS for n in range(4)]
    dealt = questions_by_split(spec(jsonl(tmp_path / "several.jsonl", several)))
    assert sum(map(len, dealt.values())) == len(QUESTIONS) == len(set.union(*dealt.values()))
    assert all(dealt.values())


def test_repeated_rows_are_counted(tmp_path: Path) -> None:
    made = spec(jsonl(tmp_path / "twice.jsonl", [*ROWS, *ROWS[:7]]))
    texts, readings = read(made)
    assert sum(map(len, texts.values())) == len(ROWS)
    assert "67 rows read, of which left out: 7 repeated" in readings["all"].line()


def test_a_dataset_of_ours_is_known_by_its_own_templates() -> None:
    usual = compose("eval", ["model=tiny", "dataset=arithmetic"]).spec.dataset
    words = ['dataset.prompt="Well, {prompt}"', 'dataset.choices=["{choice}!"]']
    other = compose("eval", ["model=tiny", "dataset=arithmetic", *words]).spec.dataset
    assert (usual.known_by, usual.known_as) == ("text", {})
    assert other.known_as == {"choices": [" {choice}"], "prompt": "{prompt}"}
    for name, texts in splits(usual).items():
        again = splits(other)[name]
        assert [t.id for t in texts] == [t.id for t in again]
        assert texts[0].prompt != again[0].prompt


def test_a_setting_that_changes_no_text_leaves_what_rows_are_known_by() -> None:
    words = ["model=tiny", "dataset=arithmetic", "dataset.chat=true", "dataset.text=x"]
    assert compose("eval", words).spec.dataset.known_as == {}


# -- what was trained on ---------------------------------------------------------------------------


def seen(made: DatasetSpec, split: str = "train") -> Trained:
    trained = Trained()
    trained.add(json.loads(json.dumps(kept(splits(made)[split]))))
    return trained


def whole(path: Path, *words: str, prompt: str = "{question}") -> DatasetSpec:
    return replace(spec(path, *words, prompt=prompt), cut={}, limit={})


def texts(made: DatasetSpec) -> list[Any]:
    return splits(made)["all"]


def test_rows_are_found_again_in_another_template_file_and_format(
    file: Path, tmp_path: Path
) -> None:
    renamed = [{"q": f" {r['question']}\n", "a": r["answer"] + " legs on the whole"} for r in ROWS]
    longer = [{**r, "answer": r["answer"] + " legs on the whole"} for r in ROWS]
    trained = seen(whole(jsonl(tmp_path / "longer.jsonl", longer)), "all")
    other = whole(
        jsonl(tmp_path / "renamed.jsonl", renamed[:9]), 'dataset.answer="{a}"', prompt="Now: {q}"
    )
    assert trained.shared(texts(other)) == Shared(9, 0)


def test_a_question_of_a_text_that_was_trained_on_is_found(file: Path) -> None:
    text = whole(file, "dataset.kind=text", 'dataset.text="{question} {answer}"')
    assert seen(text, "all").shared(texts(whole(file))) == Shared(len(ROWS), 0)


def test_a_prompt_with_another_answer_is_told_apart(file: Path, tmp_path: Path) -> None:
    other = [{**row, "answer": "none"} for row in ROWS[:5]]
    shared = seen(whole(file), "all").shared(texts(whole(jsonl(tmp_path / "o.jsonl", other))))
    assert shared == Shared(0, 5)


def test_short_values_are_the_same_in_the_same_field_alone(tmp_path: Path) -> None:
    trained = seen(
        whole(jsonl(tmp_path / "a.jsonl", [{"a": 1, "b": 2, "answer": 3}]), prompt="{a} - {b}"),
        "all",
    )
    other = jsonl(tmp_path / "b.jsonl", [{"a": 2, "b": 1, "answer": 3}])
    assert trained.shared(texts(whole(other, prompt="{a} - {b}"))) == Shared(0, 0)


def choices(path: Path, field: str = "question") -> DatasetSpec:
    words = ["dataset.kind=choices", "dataset.choices_field=options", "dataset.label=label"]
    return whole(path, *words, 'dataset.choices=[" {choice}"]', prompt=f"{{{field}}}")


OPTIONS = [
    {"asked": q, "options": ["none", r["answer"]], "label": 1}
    for q, r in zip(QUESTIONS, ROWS, strict=True)
]


def test_question_and_right_answer_are_found_in_other_fields_and_among_wrong_answers(
    file: Path, tmp_path: Path
) -> None:
    pairs = seen(whole(file), "all")
    renamed = jsonl(tmp_path / "q.jsonl", [{"q": r["question"], "a": r["answer"]} for r in ROWS])
    again = whole(renamed, 'dataset.answer="{a}"', prompt="{q}")
    assert pairs.shared(texts(again)) == Shared(60, 0), "short answers, in a field of another name"
    several = choices(jsonl(tmp_path / "c.jsonl", OPTIONS), "asked")
    assert pairs.shared(texts(several)) == Shared(60, 0), "the right one is all that was trained on"
    assert seen(several, "all").shared(texts(whole(file))) == Shared(60, 0)
    wrong = jsonl(tmp_path / "w.jsonl", [{**row, "label": 0} for row in OPTIONS[:9]])
    assert pairs.shared(texts(choices(wrong, "asked"))) == Shared(0, 9), "another answer is right"


def test_a_question_with_other_wrong_answers_is_another_row(tmp_path: Path) -> None:
    trained = seen(choices(jsonl(tmp_path / "c.jsonl", OPTIONS), "asked"), "all")
    other = [{**row, "options": ["all", row["options"][1]]} for row in OPTIONS[:9]]
    asked = texts(choices(jsonl(tmp_path / "o.jsonl", other), "asked"))
    assert trained.shared(asked) == Shared(0, 9)
    older = Trained()
    values = kept(texts(choices(tmp_path / "c.jsonl", "asked")))
    older.add({key: values[key] for key in ("ids", "values")})
    assert older.shared(asked) == Shared(0, 9), "runs that did not say which rows have choices"


def test_short_questions_are_found_whatever_their_field_is(tmp_path: Path) -> None:
    sums = [{"question": f"{n}+{n}=", "answer": 2 * n} for n in range(9)]
    trained = seen(whole(jsonl(tmp_path / "a.jsonl", sums)), "all")
    renamed = [{"q": f" {n}+{n}=", "a": 2 * n + (n > 4)} for n in range(9)]
    asked = whole(jsonl(tmp_path / "b.jsonl", renamed), 'dataset.answer="{a}"', prompt="Now: {q}")
    assert trained.shared(texts(asked)) == Shared(5, 4)


def test_rows_that_share_an_answer_alone_are_not_found(file: Path, tmp_path: Path) -> None:
    others = [{"q": f"How many eggs are in {n} boxes of six?", "a": 6 * n + 2} for n in range(60)]
    asked = whole(jsonl(tmp_path / "o.jsonl", others), 'dataset.answer="{a}"', prompt="{q}")
    assert seen(whole(file), "all").shared(texts(asked)) == Shared(0, 0)


def test_runs_that_kept_names_of_rows_alone_are_still_known(file: Path) -> None:
    old = replace(whole(file), known_by="text")
    trained = Trained()
    trained.add([text.id for text in texts(old)][:4])
    assert trained.shared(texts(old)) == Shared(4, 0)
    assert trained.shared(texts(whole(file))) == Shared(4, 0), "whatever they are known by now"


def test_an_evaluation_of_rows_that_were_trained_on_is_refused_over_templates_and_files(
    bench: Bench, file: Path, tmp_path: Path
) -> None:
    words = ["train.max_steps=1", "evaluator=[]", "hardware.device=cpu", "hardware.dtype=float32"]
    mine = ["dataset=file", f"dataset.files.train={file}", "dataset.cut={}"]
    held_out = jsonl(tmp_path / "held_out.jsonl", [{"question": "What?", "answer": "That."}])
    mine += [f"dataset.files.test={held_out}", 'dataset.prompt="{question}"']
    first = bench.run("train", "method=lora", *mine, *words).key
    other = jsonl(tmp_path / "other.jsonl", [{"asked": r["question"], "said": "?"} for r in ROWS])
    same = ["dataset=file", f"dataset.files.test={file}", "dataset.cut={}", *words[2:]]
    with pytest.raises(UserError, match="60 items of split 'test' were training data"):
        bench.run("eval", f"from={first}", *same, 'dataset.prompt="Again: {question}"')
    fresh = [*same[:1], f"dataset.files.test={other}", *same[2:], 'dataset.prompt="{asked}"']
    record = bench.run("eval", f"from={first}", *fresh, 'dataset.answer=" {said}"')
    assert record.data["splits"]["test"]["asked_before"] == 60


def test_a_training_is_not_evaluated_on_what_it_trains_on(bench: Bench, tmp_path: Path) -> None:
    rows = [
        {"one": a, "two": b, "answer": 3} for a, b in zip(QUESTIONS, QUESTIONS[9:], strict=False)
    ]
    swapped = [{"one": row["two"], "two": row["one"], "answer": 3} for row in rows[:4]]
    paths = (jsonl(tmp_path / "train.jsonl", rows), jsonl(tmp_path / "test.jsonl", swapped))
    words = [f"dataset.files.train={paths[0]}", f"dataset.files.test={paths[1]}", "dataset=file"]
    words += ["dataset.cut={}", 'dataset.prompt="{one} {two}"', "evaluator=perplexity"]
    with pytest.raises(UserError, match="4 items of split 'test' stand in split 'train' too"):
        bench.run("train", "method=lora", "train.max_steps=1", *words)


def test_rows_that_differ_in_white_space_are_the_same_row(tmp_path: Path) -> None:
    twins = [{"question": f"{r['question']} \n", "answer": f" {r['answer']}"} for r in ROWS]
    made = spec(jsonl(tmp_path / "twins.jsonl", [*ROWS, *twins]))
    dealt, readings = read(made)
    assert readings["all"].repeated == sum(map(len, dealt.values())) == len(ROWS)
    assert dealt == splits(spec(jsonl(tmp_path / "once.jsonl", ROWS))), "and no other row moves"
    answered = [{**twin, "answer": n} for n, twin in enumerate(twins)]
    several = questions_by_split(spec(jsonl(tmp_path / "several.jsonl", [*ROWS, *answered])))
    assert sum(map(len, several.values())) == len(QUESTIONS), "twins stay in one split"
    files = [
        f"dataset.files.{n}={jsonl(tmp_path / f'{n}.jsonl', rows)}"
        for n, rows in {"train": ROWS, "test": twins[:7]}.items()
    ]
    words = ["model=tiny", "dataset=file", "dataset.cut={}", 'dataset.prompt="{question}"', *files]
    with pytest.raises(UserError, match="7 rows stand both in split 'train' and in split 'test'"):
        splits(compose("eval", words).spec.dataset)


def test_tokens_of_another_template_are_not_taken_from_the_cache(file: Path) -> None:
    from effbench.data.dataset import Data
    from effbench.models.load import load_tokenizer

    tokenizer = load_tokenizer(compose("eval", ["model=tiny", "dataset=arithmetic"]).spec.model)
    one, other = (
        Data(spec(file, prompt=prompt), tokenizer).examples("test")
        for prompt in ("{question}", "Say: {question}")
    )
    assert [e.id for e in one] == [e.id for e in other]
    assert all(a.ids != b.ids for a, b in zip(one, other, strict=True))


# -- splits that training is judged by -----------------------------------------------------------


def test_a_split_that_judges_may_ask_nothing_that_is_trained_on(file: Path) -> None:
    rows = splits(spec(file))
    require_apart(rows["train"], rows["validation"], "validation")
    reworded = splits(spec(file, prompt="Q: {question} A:"))["train"][:1]
    answered = [replace(t, answer="no", id="other", rendered="") for t in reworded]
    for shared in (reworded, answered):
        with pytest.raises(UserError, match="1 prompts of split 'validation'"):
            require_apart(rows["train"], [*rows["validation"], *shared], "validation")


def test_a_training_is_not_evaluated_on_what_judges_it(bench: Bench) -> None:
    words = ["method=dorm", "evaluator=preference", "evaluator.preference.split=validation"]
    with pytest.raises(UserError, match="learns from split 'validation', on which it is evaluated"):
        bench.run("train", *words)
