from __future__ import annotations

from dataclasses import replace
from math import exp, log
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from subjects import by_name, subject_of

from effbench.api.batch import Batch
from effbench.api.points import UNNAMED, Point
from effbench.evaluators.preference import Preference
from effbench.evaluators.subject import Subject
from effbench.methods.none import Unchanged
from effbench.nn.scoring.prefix_tree import Request
from effbench.testing.bench import Bench
from effbench.util.errors import UserError


class Judge(Unchanged):
    """Scores sequences by a function of their tokens."""

    rule: Any = None

    def scores(self, model: torch.nn.Module, batch: Batch, point: Point = UNNAMED) -> torch.Tensor:
        rows = zip(batch.input_ids.tolist(), batch.attention_mask.tolist(), strict=True)
        return torch.tensor([type(self).rule(ids[: sum(mask)]) for ids, mask in rows])


def judged_by(subject: Subject, rule: Any) -> Subject:
    return replace(subject, method=type("Judging", (Judge,), {"rule": staticmethod(rule)})())


@pytest.fixture
def subject(bench: Bench) -> Subject:
    return subject_of(bench, "dataset.limit.test=60")


def test_a_random_score_is_right_half_of_the_time(subject: Subject) -> None:
    subject = judged_by(subject, lambda ids: Random(str(ids)).random())
    found = by_name(Preference().run(subject))["pair_accuracy"]
    assert found.low is not None and found.high is not None
    assert found.low < 0.5 < found.high
    assert found.n == 60


def test_a_tie_is_half(subject: Subject) -> None:
    result = Preference().run(judged_by(subject, lambda ids: 1.0))
    assert by_name(result)["pair_accuracy"].value == 0.5
    assert by_name(result)["top_accuracy"].value == 0
    assert by_name(result)["score_margin"].value == 0
    assert by_name(result)["answer_loss"].value == pytest.approx(log(4))
    assert set(result.outcomes[0].values) == {0.5}


def test_who_knows_the_answer_is_always_right(subject: Subject) -> None:
    examples = subject.data.examples("test")
    right = {tuple(e.choices[e.right].ids) for e in examples}
    best = judged_by(subject, lambda ids: float(tuple(ids) in right))
    worst = judged_by(subject, lambda ids: -float(tuple(ids) in right))
    assert by_name(Preference().run(best))["pair_accuracy"].value == 1
    assert by_name(Preference().run(best))["top_accuracy"].value == 1
    assert by_name(Preference().run(best))["score_margin"].value == 1
    assert by_name(Preference().run(worst))["pair_accuracy"].value == 0
    assert by_name(Preference().run(best))["answer_loss"].value == pytest.approx(
        log(1 + 3 * exp(-1))
    )
    sure = judged_by(subject, lambda ids: -1e4 * float(tuple(ids) in right))
    assert by_name(Preference().run(sure))["answer_loss"].value == pytest.approx(1e4 + log(3))


@pytest.mark.parametrize("batch_tokens", [1, 300, 4000])
def test_a_language_model_scores_by_likelihood(subject: Subject, batch_tokens: int) -> None:
    result = Preference(batch_tokens=batch_tokens).run(subject)
    examples = subject.data.examples("test")
    expected = []
    for e in examples:
        asked = [Request(c.ids[: c.prompt_length], c.ids[c.prompt_length :]) for c in e.choices]
        scores = [s.loglikelihood for s in subject.score(asked, e.id)]
        right = scores.pop(e.right)
        expected.append(sum(right > s for s in scores) / len(scores))
    assert result.outcomes[0].values == pytest.approx(expected)
    assert by_name(result)["pair_accuracy"].value == pytest.approx(sum(expected) / len(expected))


def test_two_models_are_compared_pair_by_pair(subject: Subject) -> None:
    one = Preference().run(subject).outcomes[0]
    two = Preference().run(judged_by(subject, lambda ids: float(len(ids)))).outcomes[0]
    assert one.ids == two.ids, "compare pairs what has the same items"
    assert len(one.values) == len(two.values) == 60


def test_what_is_foreseen_is_what_runs(bench: Bench, subject: Subject) -> None:
    seen = []

    class Watched(Unchanged):
        def scores(
            self, model: torch.nn.Module, batch: Batch, point: Point = UNNAMED
        ) -> torch.Tensor:
            seen.append((*batch.input_ids.shape, batch.loss_tokens))
            return super().scores(model, batch)

    Preference(batch_tokens=500).run(replace(subject, method=Watched()))
    spec = bench.job("eval").spec
    passes = Preference(batch_tokens=500).passes(spec, subject.data)
    assert [(p.rows, p.tokens, p.counted) for p in passes] == seen


def test_pairs_without_a_worse_answer_are_refused(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    words = ["dataset=file", f"dataset.files.all={tmp_path / 'a.jsonl'}", "evaluator=preference"]
    with pytest.raises(UserError, match=r"compares answers; dataset 'a\.jsonl' is of kind 'pairs'"):
        bench.job("eval", *words)


def test_a_score_that_is_no_number_is_named(subject: Subject) -> None:
    with pytest.raises(UserError):
        Preference().run(judged_by(subject, lambda ids: float("nan")))
