"""Items that changed sides between two runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from test_report import run

from effbench.cli.gate import flips_of
from effbench.results.records import Outcomes, Record, write
from effbench.stats import mcnemar_exact
from effbench.util.errors import UserError

FIRST, SECOND = [1.0, 1.0, 1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0, 1.0, 0.0]


def answered(number: int, values: list[float], ids: str = "aa") -> Record:
    kept = Outcomes("generation", "exact_match", "", "test", ids, values)
    return replace(run("none", {"": 0.0}, number=number), outcomes=[kept])


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for number, values in enumerate((FIRST, SECOND)):
        write(answered(number, values), tmp_path / "records")
    write(answered(2, SECOND, "bb"), tmp_path / "records")
    return tmp_path


def test_both_ways_are_counted_and_tested(results: Path) -> None:
    said = flips_of(["0000", "0001"], results, 0)
    p = mcnemar_exact(FIRST, SECOND)
    assert said == (
        "exact_match on test: 2 of 6 items are right in 0000 alone, 1 in 0001 alone, "
        f"p = {p:.3f} (McNemar, exact)"
    )


def test_what_changes_sides_by_two_metrics_alike_is_said_once(results: Path) -> None:
    for number, values in enumerate((FIRST, SECOND)):
        record = answered(number, values)
        [own] = record.outcomes
        other = [1.0, 0.0, 0.0, 0.0, 0.0, 1.0 - number]
        more = [replace(own, metric="top"), replace(own, metric="other", values=other)]
        write(replace(record, outcomes=[own, *more]), results / "records")
    blocks = flips_of(["0000", "0001"], results, 0).split("\n\n")
    assert [block.split(" on ")[0] for block in blocks] == ["exact_match, top", "other"]


def test_items_are_named_and_how_to_get_their_texts(results: Path) -> None:
    lines = flips_of(["0000", "0001"], results, 1).splitlines()
    assert lines[1:5] == ["right in 0000 alone:", "  item 1", "right in 0001 alone:", "  item 4"]
    assert "effbench eval from=00000000 evaluator=generation" in lines[5]


def test_texts_are_those_of_the_run_folder(results: Path) -> None:
    folder = results / "runs" / "0001".ljust(16, "0") / "evaluations"
    folder.mkdir(parents=True)
    rows = [{"id": f"q{i}", "prompt": f"{i} + 1 =\n", "text": str(i)} for i in range(6)]
    (folder / "generation.test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    said = flips_of(["0000", "0001"], results, 5).splitlines()
    assert said[2:4] == ["  item 1, q0: 0 + 1 =", "    0001: 0"]
    assert len(said) == 3 + 2 * 3, "three items, two lines each"


def test_answers_that_were_picked_are_those_of_the_metric(tmp_path: Path) -> None:
    for number, values in enumerate(((FIRST, SECOND), (SECOND, FIRST))):
        pairs = zip(("acc", "acc_norm"), values, strict=True)
        kept = [Outcomes("choices", name, "", "test", "aa", own) for name, own in pairs]
        write(replace(run("none", {"": 0.0}, number=number), outcomes=kept), tmp_path / "records")
    folder = tmp_path / "runs" / "0001".ljust(16, "0") / "evaluations"
    folder.mkdir(parents=True)
    long = "An example that stands before. " * 9
    rows = [
        {"id": f"q{i}", "prompt": f"{long}{i} is", "text": "odd", "text_norm": "even"}
        for i in range(6)
    ]
    (folder / "choices.test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    said = flips_of(["0000", "0001"], tmp_path, 1).splitlines()
    assert [line for line in said if "0001: " in line] == ["    0001: odd"] * 2 + [
        "    0001: even"
    ] * 2
    assert "before. 0 is" in said[2] and said[2].startswith("  item 1, q0: …")


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        (["0000"], "between two runs"),
        (["0000", "0002"], "share no items that are right or wrong"),
    ],
)
def test_what_cannot_be_held_against_each_other_is_refused(
    results: Path, runs: list[str], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        flips_of(runs, results, 1)


def test_items_of_a_task_are_no_rows_of_the_dataset(tmp_path: Path) -> None:
    for number, values in enumerate((FIRST, SECOND)):
        kept = Outcomes("choices", "acc", "", "validation", "aa", values, task="piqa")
        made = replace(run("none", {"": 0.0}, number=number), outcomes=[kept])
        write(made, tmp_path / "records")
    told = flips_of(["0000", "0001"], tmp_path, 1).splitlines()[-1]
    assert told == "No texts were kept; items are the rows of the task piqa, in order."


def test_rows_of_a_dataset_are_those_of_the_split_of_the_items(tmp_path: Path) -> None:
    for number, values in enumerate((FIRST, SECOND)):
        kept = Outcomes("choices", "acc", "", "validation", "aa", values)
        made = replace(run("none", {"": 0.0}, number=number), outcomes=[kept])
        data = {"name": "file", "files": {"all": "my rows.jsonl"}}
        write(replace(made, spec={**made.spec, "dataset": data}), tmp_path / "records")
    told = flips_of(["0000", "0001"], tmp_path, 1).splitlines()[-1]
    words = "dataset file 'dataset.files.all=my rows.jsonl' --split validation --rows 3"
    assert told.endswith(f"effbench show {words}")
