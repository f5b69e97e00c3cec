"""A spec in a file, or that of an earlier run, is what a command starts from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from results.test_records import record

from effbench.api.schema import plain
from effbench.api.spec import Job
from effbench.config.compose import compose
from effbench.config.start import Start
from effbench.results.records import write
from effbench.util.errors import UserError

WORDS = [
    "model=tiny",
    "model.weights_seed=3",
    "method=dylora",
    "method.rank=8",
    "dataset=file",
    "dataset.max_length=128",
    r'dataset.prompt="Q: {prompt}\\n\n"',
    "evaluator=[perplexity,speed]",
    "evaluator.perplexity.window=64",
    "train.epochs=2",
    "train.learning_rate=0.01",
    "hardware=cpu",
    "hardware.dtype=float32",
    "seed=5",
]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    return compose("train", [*WORDS, "dataset.files.all=rows.jsonl"])


@pytest.fixture
def file(job: Job) -> str:
    Path("my.yaml").write_text(json.dumps(plain(job.spec)))
    return "my.yaml"


def test_what_is_printed_gives_the_same_run(job: Job, file: str) -> None:
    assert compose("train", [file]).spec == job.spec
    Path(file).write_text(yaml.safe_dump(plain(job.spec)))
    assert compose("train", [file]).spec.key == job.spec.key


@pytest.mark.parametrize(
    "words, changed",
    [
        (["seed=6"], {"seed": 6}),
        (["method.rank=4"], {"method.settings.rank": 4}),
        (["train.max_steps=7"], {"train.max_steps": 7, "train.epochs": 0.0}),
        (["train.epochs=1"], {"train.epochs": 1.0}),
        (["evaluator.perplexity.window=32"], {"evaluators.0.settings.window": 32}),
        (["dataset.limit.train=9"], {"dataset.limit.train": 9}),
        (["model.weights_seed=4"], {"model.weights_seed": 4}),
        ([r'dataset.answer="\n{answer}"'], {"dataset.answer": "\n{answer}"}),
    ],
)
def test_words_win_over_the_file(job: Job, file: str, words: list[str], changed: Any) -> None:
    before, after = flat(plain(job.spec)), flat(plain(compose("train", [file, *words]).spec))
    assert {k: v for k, v in after.items() if before.get(k) != v} == changed


def flat(value: Any, place: str = "") -> dict[str, Any]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found: dict[str, Any] = {}
    for key, inner in items:
        name = f"{place}{key}"
        deep = isinstance(inner, dict | list) and inner
        found |= flat(inner, f"{name}.") if deep else {name: inner}
    return {k: v for k, v in found.items() if v not in ({}, [])}


def test_another_method_or_dataset_takes_its_own_settings(job: Job, file: str) -> None:
    other = compose("train", [file, "method=lora", "dataset=arithmetic", "evaluator=[]"]).spec
    assert other.method == compose("train", ["model=tiny", "method=lora"]).spec.method
    assert (other.dataset.name, other.evaluators) == ("arithmetic", [])
    assert (other.model, other.train) == (job.spec.model, job.spec.train)


def test_a_hand_written_file_may_leave_things_out(job: Job) -> None:
    Path("short.yaml").write_text(
        "method: {name: lora, rank: 4}\nmodel: tiny\ndataset: {name: arithmetic, max_length: 32}\n"
        "evaluator: [perplexity]\ntrain: {epochs: 0.5}\nhardware: cpu\n"
    )
    words = ["method=lora", "method.rank=4", "model=tiny", "dataset=arithmetic", "hardware=cpu"]
    typed = ["dataset.max_length=32", "train.epochs=0.5"]
    assert compose("train", ["short.yaml"]).spec == compose("train", [*words, *typed]).spec


def test_an_earlier_run_is_started_from(job: Job) -> None:
    write(record(key="ab12000000000000", spec=plain(job.spec)), Path("results/records"))
    assert compose("train", [], like="ab12").spec == job.spec
    assert compose("train", ["seed=6"], like="ab12").spec.seed == 6
    with pytest.raises(UserError, match="no record 'cd34'"):
        compose("train", [], like="cd34")


@pytest.mark.parametrize(
    "text, words, message, hint",
    [
        (None, [], "my.yaml is not there", "Correct the path"),
        ("[1, 2]", [], "holds no keys", "runs show RUN --spec"),
        ("a: [", [], "cannot be read as YAML", "Mend it"),
        ("modle: tiny", [], "unknown key 'modle'", "'model'"),
        ("model: tniy", [], "no model called 'tniy'", "'tiny'"),
        ("model: {path: x}", [], "model.name is missing", "effbench list models"),
        ("method: {rank: 3}", [], "one of its methods has no name", "name: NAME"),
        ("evaluators: [null]", [], "one of its evaluators has no name", "name: NAME"),
        ("method: qdlora", [], "no method called 'qdlora'", "'qdylora'"),
        ("method: {name: lora, rnak: 3}", [], "'method.rnak'", "'rank'"),
        ("train: 5", [], "train must hold keys", "train: {KEY: VALUE}"),
        ("train: {epochs: 1, max_steps: 12}", [], "max_steps and epochs", "Give one"),
        ("stage: eval", [], "for another command than train", "effbench eval"),
        ("seed: 1", ["experiment=qdylora"], "both say what to run", "Leave one"),
        ("seed: 1", ["other.yaml"], "starts from one file", "Give one"),
        ("dataset: {name: new, source: file, kind: text}", [], "names no file", "files.all=PATH"),
    ],
)
def test_what_is_no_spec_says_what_to_do(
    tmp_path: Path, monkeypatch: Any, text: str | None, words: Any, message: str, hint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("my.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        compose("train", ["my.yaml", *words])
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_an_evaluation_of_a_run_is_started_from(bench: Any) -> None:
    made = bench.run("train", "method=lora", "train.max_steps=1", "evaluator=[]")
    words = [f"from={made.key}", "method.eval_ranks=[1]", f"run.results={bench.root}"]
    job = compose("eval", words)
    Path(bench.root / "eval.yaml").write_text(json.dumps(plain(job.spec)))
    again = compose("eval", [str(bench.root / "eval.yaml"), f"run.results={bench.root}"])
    assert again.spec == job.spec


@pytest.mark.parametrize(
    ("method", "chosen"),
    [("none", set()), ("depths", {"method"}), ("dylora", {"method.eval_ranks"})],
)
def test_what_goes_on_from_a_run_has_what_reads_it(method: str, chosen: set[str]) -> None:
    """One that makes nothing is chosen whole, of another one what evaluation may change."""
    start = Start("a file", {"from": "0123", "method": {"name": method}, "seed": 1})
    assert start.chosen(set()) == {"from"} | chosen
