"""Best of n: who knows the right answer finds it where it was drawn; one pick is the policy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from subjects import by_name, subject_of

from effbench.api.batch import Batch
from effbench.api.points import UNNAMED, Point
from effbench.evaluators.best_of_n import BestOfN
from effbench.evaluators.subject import Subject
from effbench.methods.none import Unchanged
from effbench.testing.bench import Bench
from effbench.util.errors import UserError

SMALL: dict[str, Any] = {"max_new_tokens": 3, "limit": 6}


class Judge(Unchanged):
    """Scores sequences by a function of their tokens."""

    rule: Any = None

    def scores(self, model: torch.nn.Module, batch: Batch, point: Point = UNNAMED) -> torch.Tensor:
        rows = zip(batch.input_ids.tolist(), batch.attention_mask.tolist(), strict=True)
        return torch.tensor([type(self).rule(ids[: sum(mask)]) for ids, mask in rows])


@pytest.fixture
def subject(bench: Bench) -> Subject:
    return subject_of(bench, "dataset=arithmetic", "+dataset.limit.test=6")


def judged(subject: Subject, rule: Any) -> tuple[dict[str, float], list[list[float]]]:
    """Return the metrics of four draws, and the scores of each pick by size."""
    own = replace(subject, method=type("Judging", (Judge,), {"rule": staticmethod(rule)})())
    result = BestOfN(n=4, **SMALL).run(own)
    picks = [o.values for o in result.outcomes if o.metric.startswith("score_")]
    return {name: m.value for name, m in by_name(result).items()}, picks


def test_a_larger_choice_never_scores_less_and_is_of_the_same_draws(subject: Subject) -> None:
    seen: set[tuple[int, ...]] = set()

    def rule(ids: list[int]) -> float:
        seen.add(tuple(ids))
        return float(hash(tuple(ids)) % 1000)

    found, picks = judged(subject, rule)
    assert [len(row) for row in picks] == [6, 6, 6]
    assert all(a <= b <= c for a, b, c in zip(*picks, strict=True))
    assert picks[0] != picks[2]
    assert {"exact_match_best_of_1", "exact_match_best_of_2", "score_best_of_4"} <= set(found)
    assert 6 < len(seen) <= 24, "draws differ"
    assert judged(subject, rule)[1] == picks, "the same seed"


def test_what_is_scored_is_the_prompt_and_the_answer(subject: Subject) -> None:
    prompts = {tuple(e.ids[: e.prompt_length]) for e in subject.data.examples("test")}
    lengths = {len(p) for p in prompts}

    def rule(ids: list[int]) -> float:
        assert any(tuple(ids[:n]) in prompts and n < len(ids) <= n + 4 for n in lengths)
        return 0.0

    judged(subject, rule)


def test_who_knows_the_answer_is_right_wherever_it_was_drawn(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy is made to write the right answer in its third draw alone."""
    rows = subject.data.rows("test")
    answer = BestOfN._answers

    def drawn(self: BestOfN, writer: Subject, questions: Any) -> Any:
        found = answer(self, writer, questions)
        if writer.seed % 100_003 != 2:
            return found
        ids = [writer.data.tokenizer.encode(row.answer) for row in rows]
        return [replace(f, text=r.answer, ids=i) for f, r, i in zip(found, rows, ids, strict=True)]

    monkeypatch.setattr(BestOfN, "_answers", drawn)
    right = {tuple(e.choices[e.right].ids) for e in subject.data.examples("test")}
    found, _ = judged(subject, lambda ids: float(any(tuple(ids[: len(r)]) == r for r in right)))
    assert found["exact_match_best_of_2"] == found["exact_match_best_of_1"] == 0
    assert found["exact_match_best_of_4"] == 1
    wrong, _ = judged(subject, lambda ids: -float(any(tuple(ids[: len(r)]) == r for r in right)))
    assert wrong["exact_match_best_of_4"] == 0


def test_the_base_writes_whatever_the_model_became(subject: Subject) -> None:
    """Weights that were changed change the scores alone, and another policy other answers."""

    def written(own: Subject, evaluator: BestOfN) -> set[tuple[int, ...]]:
        seen: set[tuple[int, ...]] = set()
        rule = staticmethod(lambda ids: float(seen.add(tuple(ids)) or 0))
        evaluator.run(replace(own, method=type("Judging", (Judge,), {"rule": rule})()))
        return seen

    before = written(subject, BestOfN(n=2, **SMALL))
    with torch.no_grad():
        for parameter in subject.model.parameters():
            parameter.zero_()
    assert written(subject, BestOfN(n=2, **SMALL)) == before
    assert written(subject, BestOfN(n=2, policy="tiny", **SMALL)) != before


def test_sizes_are_powers_of_two_up_to_n() -> None:
    assert BestOfN(n=2).sizes == [1, 2]
    assert BestOfN(n=6).sizes == [1, 2, 4, 6]
    assert BestOfN(n=8).sizes == [1, 2, 4, 8]


@pytest.mark.parametrize("temperature", [0.0, None])
def test_without_sampling_there_is_nothing_to_choose_from(temperature: float | None) -> None:
    with pytest.raises(UserError, match="writes the same answer n times"):
        BestOfN(temperature=temperature)
