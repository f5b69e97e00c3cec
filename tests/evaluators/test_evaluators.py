"""Evaluators against naive loops, and evaluation as a stage that resumes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from subjects import subject_of

from effbench.api.batch import by_length
from effbench.api.points import UNNAMED
from effbench.data.dataset import Data
from effbench.evaluators.base import Evaluator, Result
from effbench.evaluators.choices import Choices
from effbench.evaluators.perplexity import Perplexity
from effbench.evaluators.subject import Subject
from effbench.methods.none import Unchanged
from effbench.nn.decode.session import CachedSession, greedy
from effbench.results.records import Metric
from effbench.runner import evaluation
from effbench.runner.open import open_model
from effbench.runner.run import open_run
from effbench.testing.bench import Bench
from effbench.util.errors import UserError

HARDWARE = ["hardware.device=cpu", "hardware.dtype=float32", "hardware.threads=1"]
DATA = ["dataset=arithmetic", "+dataset.limit.train=16", "+dataset.limit.test=12"]
FEW = ["model.shape.max_positions=96", "dataset.max_length=64"]
SMALL = ["train.max_steps=2", "train.batch_size=2"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def subject(bench: Bench) -> Subject:
    """The tiny model, its weights made large enough for answers to differ."""
    job = bench.job("eval", *DATA, *HARDWARE)
    folder = bench.folder(job)
    folder.create(job.spec)
    work = open_run(job, folder, bench.store)
    model = open_model(work).model
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5 if p.ndim > 1 else 1)
    data = Data(job.spec.dataset, work.tokenizer)
    return Subject(model, Unchanged(), UNNAMED, data, torch.device("cpu"), 0, 0)


def metrics(result: Result) -> dict[str, Metric]:
    return {m.name: m for m in result.metrics}


@torch.no_grad()
def log_likelihood(model: torch.nn.Module, ids: list[int], start: int) -> float:
    """Sum the log-probabilities of ids[start:] in float64, one sequence at a time, unpadded."""
    logits = model(torch.tensor([ids])).logits[0].double()
    log_p = F.log_softmax(logits, dim=-1)
    return sum(float(log_p[t - 1, ids[t]]) for t in range(max(1, start), len(ids)))


def test_choices_are_those_of_a_naive_loop(subject: Subject) -> None:
    result = Choices(batch_tokens=150).run(subject)
    found = metrics(result)
    model = subject.model.double()
    right: dict[str, list[float]] = {"accuracy": [], "accuracy_norm": []}
    for example in subject.data.examples("test"):
        scores = [log_likelihood(model, c.ids, c.prompt_length) for c in example.choices or []]
        normed = [s / c.answer_bytes for s, c in zip(scores, example.choices or [], strict=True)]
        assert len(scores) == 4
        right["accuracy"].append(float(scores.index(max(scores)) == example.right))
        right["accuracy_norm"].append(float(normed.index(max(normed)) == example.right))
    for outcomes in result.outcomes:
        assert outcomes.values == right[outcomes.metric]
        mean = sum(outcomes.values) / len(outcomes.values)
        assert found[outcomes.metric].value == pytest.approx(mean)
    assert {o.metric for o in result.outcomes} == set(right)
    assert len({tuple(v) for v in right.values()}) == 2, "the two scores should be told apart"


def test_an_answer_cut_within_its_first_letter_is_scored(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "p", "label": 0}))
    words = ["dataset=file", f"dataset.files.test={path}", "dataset.max_length=3"]
    subject = subject_of(bench, *words, 'dataset.choices=["\U0001f99c", "b"]', "evaluator=choices")
    assert {m.name for m in Choices().run(subject).metrics} >= {"accuracy", "accuracy_norm"}


def test_the_batch_size_does_not_matter(subject: Subject) -> None:
    results = [Choices(batch_tokens=n).run(subject) for n in (1, 77, 4096)]
    for other in results[1:]:
        for one, two in zip(results[0].metrics, other.metrics, strict=True):
            assert two.value == pytest.approx(one.value, rel=1e-5)
        for a, b in zip(results[0].outcomes, other.outcomes, strict=True):
            assert b.values == pytest.approx(a.values, rel=1e-4)


def test_groups_fit_and_hold_every_position() -> None:
    lengths = [5, 90, 3, 40, 40, 8, 1]
    groups = list(by_length(lengths, 100))
    assert sorted(i for g in groups for i in g) == list(range(7))
    assert all(len(g) == 1 or len(g) * max(lengths[i] for i in g) <= 100 for g in groups)
    assert list(by_length([], 10)) == []


def test_choices_need_choices(bench: Bench) -> None:
    with pytest.raises(UserError, match="needs a dataset with choices"):
        bench.job("eval", "evaluator=choices", "dataset=gsm8k-test")


@torch.no_grad()
def test_a_padded_batch_decodes_as_each_prompt_alone(subject: Subject) -> None:
    short, long = torch.arange(20, 26)[None], torch.arange(30, 40)[None]
    ids = torch.zeros(2, 10, dtype=torch.long)
    ids[0, 4:], ids[1] = short, long
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    both = CachedSession(subject.model)
    alone = [CachedSession(subject.model) for _ in range(2)]
    logits = both.prefill(ids, mask)
    expected = torch.cat([s.prefill(p) for s, p in zip(alone, (short, long), strict=True)])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    for token in range(5):
        logits = both.step(torch.full((2, 1), 50 + token))
        expected = torch.cat([s.step(torch.full((1, 1), 50 + token)) for s in alone])
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    both.reorder(torch.tensor([1, 1]))
    logits = both.step(torch.full((2, 1), 9))
    torch.testing.assert_close(logits[:1], logits[1:])
    torch.testing.assert_close(
        logits[:1], alone[1].step(torch.full((1, 1), 9)), atol=1e-4, rtol=1e-4
    )


@torch.no_grad()
def test_greedy_is_the_argmax_of_full_passes(subject: Subject) -> None:
    ids = torch.randint(500, (2, 9), generator=torch.Generator().manual_seed(1))
    found = greedy(CachedSession(subject.model), ids, 6)
    for _ in range(6):
        ids = torch.cat([ids, subject.model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert found.equal(ids[:, 9:])


# -- the stage ---------------------------------------------------------------------------------


def test_finished_evaluations_are_not_done_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["method=dylora", "method.rank=4", *DATA, *SMALL, *HARDWARE]
    words += ["evaluator=[perplexity,choices]"]
    done: Counter[tuple[str, str]] = Counter()
    stop = [True]

    def watched(kind: type[Evaluator]) -> Any:
        run = kind.run

        def counted(self: Evaluator, subject: Subject) -> Result:
            if stop and len(done) == 3:
                stop.clear()
                raise KeyboardInterrupt
            done[kind.__name__, subject.point.name] += 1
            return run(self, subject)

        return counted

    for kind in (Perplexity, Choices):
        monkeypatch.setattr(kind, "run", watched(kind))
    with pytest.raises(KeyboardInterrupt):
        bench.run("train", *words)
    with monkeypatch.context() as patch:
        patch.setattr(
            "effbench.runner.stages.train.build_trainer", None
        )  # nothing is trained again
        record = bench.run("train", *words)
    assert set(done.values()) == {1} and len(done) == 6
    other = Bench(bench.root / "other").run("train", *words)
    values = [{(m.name, m.point): m.value for m in r.metrics if m.split} for r in (record, other)]
    assert values[0] == values[1] and len(values[0]) == 3 * 6
    assert record.outcomes == other.outcomes
    names = [(m.name, m.point, m.split, m.phase) for m in record.metrics]
    assert sorted(names) == sorted((m.name, m.point, m.split, m.phase) for m in other.metrics)


def test_trained_items_are_refused(bench: Bench) -> None:
    made = bench.run("train", "method=lora", *DATA, *SMALL, *HARDWARE)
    on_train = [f"from={made.key}", *DATA, *HARDWARE, "evaluator.perplexity.split=train"]
    with pytest.raises(UserError, match="16 items of split 'train' were training data") as error:
        bench.run("eval", *on_train)
    assert "dataset.allow_overlap=true" in error.value.hint
    assert bench.run("eval", *on_train, "dataset.allow_overlap=true").metrics


def test_trained_items_are_refused_after_two_runs_and_in_other_files(
    bench: Bench, tmp_path: Path
) -> None:
    rows = [f'{{"prompt": "What is {i}?", "answer": "{i * i}"}}' for i in range(8)]
    files = {"train": rows[:4], "test": rows[4:6], "again": rows[3:5]}
    for name, lines in files.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))

    def data(test: str) -> list[str]:
        return [
            "dataset=file",
            "dataset.kind=pairs",
            f"+dataset.files.train={tmp_path}/train.jsonl" if test == "test" else "seed=1",
            f"+dataset.files.test={tmp_path}/{test}.jsonl",
            "dataset.cut={}",
        ]

    first = bench.run("train", "method=full", *data("test"), *SMALL, *HARDWARE)
    second = bench.run(
        "train", "method=lora", f"from={first.key}", *data("test"), *SMALL, *HARDWARE
    )
    with pytest.raises(UserError, match="1 items of split 'test' were training data"):
        bench.run("eval", f"from={second.key}", *data("again"), *HARDWARE)


def test_a_later_evaluation_sees_the_same_items(bench: Bench) -> None:
    made = bench.run("train", "method=lora", *DATA, *SMALL, *HARDWARE)
    again = bench.run("eval", f"from={made.key}", *HARDWARE)
    assert [o.ids for o in again.outcomes] == [o.ids for o in made.outcomes]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["evaluator=generation", "evaluator.generation.max_new_tokens=500"],
            r"arithmetic: a prompt of \d+ tokens .* 512 positions",
        ),
        (
            ["evaluator=generation", "evaluator.generation.pattern='(#+)'"],
            "matches nothing in the answer",
        ),
        (
            ["evaluator=long_context", "evaluator.long_context.lengths=[512]"],
            r"Split 'test' has \d+ tokens",
        ),
        (
            ["evaluator=long_context", "evaluator.long_context.lengths=[65]"],
            "Task needle does not fit",
        ),
        (
            ["evaluator=trust", "evaluator.trust.dimensions=[ethics]", *FEW],
            "the model has 96 positions",
        ),
    ],
)
def test_what_rows_leave_no_room_for_is_refused_before_loading(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.setattr("effbench.runner.open.load_start", None)
    with pytest.raises(UserError, match=message):
        bench.run("train", "method=lora", *DATA, *SMALL, *HARDWARE, *words)


def test_no_evaluator_is_no_work(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_run_one", None)
    record = bench.run("eval", "evaluator=[]", *DATA, *HARDWARE)
    assert not record.outcomes
