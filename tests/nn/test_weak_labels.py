"""Rules, their matches and the boosting over them, as functions of tensors."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from effbench.nn.weak_labels import judging, matching, rules, samme, self_training, words
from effbench.nn.weak_labels.pool import HIDDEN, Pool, deal
from effbench.nn.weak_labels.rules import Evidence, Rule
from effbench.nn.weak_labels.schedule import REFRESHES, Schedule
from effbench.util.errors import UserError


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- boosting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("wrong", [1, 3, 6])
def test_after_a_step_the_wrong_ones_have_the_same_mass_whatever_the_error(
    classes: int, wrong: int
) -> None:
    weights = torch.rand(8, generator=draws(), dtype=torch.float64)
    missed = torch.arange(8) < wrong
    vote = samme.vote_of(samme.weighted_error(missed, weights), classes)
    after = samme.reweighted(weights, missed, vote)
    assert float(after.sum()) == pytest.approx(1)
    assert float(after[missed].sum()) == pytest.approx((classes - 1) / classes, rel=1e-6)


@pytest.mark.parametrize("classes", [2, 4])
def test_guessing_has_no_vote_and_moves_nothing(classes: int) -> None:
    vote = samme.vote_of((classes - 1) / classes, classes)
    assert vote == pytest.approx(0, abs=1e-12)
    weights = torch.tensor([0.5, 0.3, 0.2])
    missed = torch.tensor([True, False, True])
    torch.testing.assert_close(samme.reweighted(weights, missed, vote), weights)


def test_a_perfect_classifier_has_a_finite_vote_and_moves_nothing() -> None:
    weights, missed = torch.full((4,), 0.25), torch.zeros(4, dtype=torch.bool)
    vote = samme.vote_of(samme.weighted_error(missed, weights), 3)
    assert 10 < vote < math.inf
    torch.testing.assert_close(samme.reweighted(weights, missed, vote), weights)


def test_the_hardest_are_of_most_weight_then_least_sure_then_first() -> None:
    weights = torch.tensor([0.1, 0.3, 0.3, 0.3, 0.0])
    sure = torch.tensor([0.2, 0.9, 0.5, 0.5, 0.1])
    assert samme.hardest(weights, sure, 4) == [2, 3, 1, 0]


def test_equal_votes_of_best_classes_are_a_majority_vote() -> None:
    each = torch.rand(5, 40, 3, generator=draws()).softmax(-1)
    found = samme.combined(each, torch.full((5,), 0.7), "one_hot").argmax(1)
    counts = torch.nn.functional.one_hot(each.argmax(-1), 3).sum(0)
    clear = (counts == counts.max(1, keepdim=True).values).sum(1) == 1
    assert clear.sum() > 20
    assert found[clear].equal(counts.argmax(1)[clear])


def test_classifiers_without_a_vote_say_nothing_and_the_first_one_where_none_has() -> None:
    each = torch.rand(3, 6, 2, generator=draws()).softmax(-1)
    assert samme.combined(each, torch.tensor([0.0, 2.0, -1.0]), "probability").equal(each[1])
    assert samme.combined(each, torch.tensor([0.5, 2.0, 0.0]), "last").equal(each[1])
    assert samme.combined(each, torch.zeros(3), "probability").equal(each[0])


# -- self-training ---------------------------------------------------------------------------------


def entropy(p: torch.Tensor) -> torch.Tensor:
    return -(p * p.log()).sum(1)


def test_targets_are_distributions_and_sharper_where_classes_are_alike() -> None:
    p = torch.rand(6, 3, generator=draws(), dtype=torch.float64).softmax(1)
    q = self_training.sharpened(p)
    torch.testing.assert_close(q.sum(1), torch.ones(6, dtype=torch.float64))
    even = torch.cat([p, p.roll(1, 1), p.roll(2, 1)])  # every class as often as the others
    assert (entropy(self_training.sharpened(even)) <= entropy(even) + 1e-12).all()
    flat = torch.full((5, 4), 0.25)
    torch.testing.assert_close(self_training.sharpened(flat), flat)


def test_a_frequent_class_is_held_back() -> None:
    p = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.9, 0.1]])
    assert self_training.sharpened(p)[0, 1] > 0.4


def test_the_divergence_is_zero_at_the_target_alone() -> None:
    logits = torch.randn(4, 3, generator=draws())
    q = logits.softmax(1)
    torch.testing.assert_close(self_training.divergence(q, logits), torch.zeros(4))
    assert (self_training.divergence(q, logits + torch.randn(4, 3, generator=draws(1))) > 0).all()


# -- words -----------------------------------------------------------------------------------------


class Tokens:
    """A tokenizer as far as `vocabulary` reads it."""

    pieces = ("Ġfilm", "▁Films", "film", "Ġthe", "Ġok", "Ġgreat", "Ġ!", "", "Ġdull2")

    def __len__(self) -> int:
        return len(self.pieces)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.pieces[i] for i in ids]


def test_words_are_tokens_that_begin_one_long_enough_and_no_stop_word() -> None:
    entries = words.vocabulary(Tokens())
    assert entries == ["film", "films", "", "", "", "great", "", "", ""]
    assert words.expected([2, 1, 0, 5, 3], entries, 5) == ["films", "great"]
    assert words.expected([2, 1, 0, 5, 3], entries, 1) == ["films"]


def test_words_of_a_text_come_once_in_its_order() -> None:
    assert words.text_words("The FILM was charming, a charmed film of films; 2nd") == [
        "film",
        "charming",
    ]


# -- matching --------------------------------------------------------------------------------------


def pool_of(count: int = 12, classes: int = 2) -> Pool:
    """Return rows whose words are those of their class and one that all have; half are labelled."""
    features = torch.randn(count, 8, generator=draws()) + 50  # far from the origin, as states are
    labels = torch.arange(count) % classes
    own = [[f"word{chr(97 + int(c))}", "common"] for c in labels]
    texts = [f"text {i}" for i in range(count)]
    labels[count // 2 :] = HIDDEN
    half = list(range(count // 2))
    return Pool(features, texts, own, labels, half[::2], half[1::2], ["no", "yes"])


def test_an_anchor_matches_its_own_rule_and_coverage_falls_with_sigma() -> None:
    pool = pool_of()
    matcher = matching.Matcher(pool, 0.5)
    mine = [
        Rule((word,), 0, text)
        for text, own in zip(pool.texts, pool.words, strict=True)
        for word in own
    ]
    scores = matcher.scores(mine)
    assert [float(scores[i // 2, i]) for i in range(24)] == pytest.approx([1.0] * 24)
    fired = [int((scores >= sigma).sum()) for sigma in (*matching.THRESHOLDS, 1.01)]
    assert fired == sorted(fired, reverse=True)
    assert fired[0] > fired[-2] > fired[-1] == 0


def test_a_rule_never_fires_without_its_word_however_alike_texts_are() -> None:
    scores = matching.Matcher(pool_of(), 1.0).scores([Rule(("worda",), 0, "text 0")])[:, 0]
    assert scores[1::2].eq(-math.inf).all() and scores[::2].isfinite().all()


def test_states_are_centred_before_they_are_compared() -> None:
    scores = matching.Matcher(pool_of(), 1.0).scores([Rule(("common",), 0, "text 0")])[1:, 0]
    assert scores.min() < 0 < scores.max()
    pool = pool_of()
    away = pool.features - pool.features[pool.unlabelled].mean(0)
    cosines = torch.nn.functional.cosine_similarity(away, away[:1])[1:]
    torch.testing.assert_close(scores, cosines, atol=1e-5, rtol=1e-4)


def test_a_rule_without_an_anchor_goes_by_its_words() -> None:
    scores = matching.Matcher(pool_of(), 0.5).scores([Rule(("worda", "nowhere"), 0)])[:, 0]
    assert scores[::2].tolist() == [0.75] * 6


def test_several_rules_give_the_class_of_the_largest_sum_and_none_for_a_tie() -> None:
    scores = torch.tensor([[0.9, 0.5, 0.5], [0.4, 0.4, 0.2], [0.1, 0.1, 0.1], [0.6, 0.6, 0.1]])
    found = matching.weak_labels(scores, [0.4, 0.4, 0.4], [1, 0, 0], 3)
    assert found.tolist() == [0, HIDDEN, HIDDEN, HIDDEN]
    assert matching.weak_labels(torch.zeros(3, 0), [], [], 2).tolist() == [HIDDEN] * 3


def test_another_order_of_classes_is_the_same_labels_in_it() -> None:
    scores = torch.rand(50, 6, generator=draws())
    labels, order = [0, 1, 2, 0, 1, 2], [2, 0, 1]
    first = matching.weak_labels(scores, [0.5] * 6, labels, 3)
    second = matching.weak_labels(scores, [0.5] * 6, [order[c] for c in labels], 3)
    assert [order[c] if c >= 0 else HIDDEN for c in first.tolist()] == second.tolist()


def test_sigma_is_the_smallest_that_is_precise_enough() -> None:
    scores, truth = torch.tensor([[0.2], [0.4], [0.6], [0.8]]), torch.tensor([0, 0, 1, 1])
    assert matching.tuned(scores, [1], truth, 0.5) == 0.0
    assert matching.tuned(scores, [1], truth, 0.6) == pytest.approx(0.25)
    assert matching.tuned(scores, [1], truth, 0.8) == pytest.approx(0.45)
    assert matching.tuned(scores, [2], truth, 0.8) == 1.0


def test_the_halves_of_the_labelled_rows_are_disjoint_and_follow_from_the_seed() -> None:
    one = deal(100, 0.2, 5, True, seed=3)
    assert one == deal(100, 0.2, 5, True, seed=3) != deal(100, 0.2, 5, True, seed=4)
    assert len(one.weighed) == 10 and len(one.learnt) == 15
    assert not set(one.weighed) & set(one.learnt)
    assert len(deal(100, 0.2, 0, False, seed=3).learnt) == 20
    assert set(one.weighed) < set(deal(100, 0.2, 5, False, seed=3).learnt)


# -- judges ----------------------------------------------------------------------------------------

GOOD = Rule(("fine",), 1, "a", round=1, evidence=Evidence(3, 0.8, 0.01))


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({}, True),
        ({"precision": 0.79}, False),
        ({"matches": 2}, False),
        ({"coverage": 0.0009}, False),
    ],
)
def test_the_oracle_wants_precision_matches_and_coverage(change: dict, kept: bool) -> None:
    rule = replace(GOOD, evidence=replace(GOOD.evidence, **change))
    [judged] = judging.Judge("oracle").decide([rule])
    assert judged.accepted is kept and judged.by == "oracle"


def test_a_noisy_judge_errs_as_often_as_it_says_by_rule_and_not_by_order() -> None:
    many = [replace(GOOD, words=(f"w{i}",)) for i in range(1000)]
    judge = judging.Judge("noisy", noise=0.2)
    found = {r.id: r.accepted for r in judge.decide(many)}
    assert 150 < sum(not kept for kept in found.values()) < 250
    assert {r.id: r.accepted for r in judge.decide(many[::-1])} == found
    assert all(r.accepted for r in judging.Judge("noisy", noise=0.0).decide(many))


def test_recorded_decisions_go_by_what_a_rule_says(tmp_path: Path) -> None:
    path = tmp_path / "rules.jsonl"
    other = replace(GOOD, words=("poor",))
    rules.write(path, [replace(other, accepted=False, by="person"), replace(GOOD, accepted=True)])
    judge = judging.Judge("recorded", path=path)
    assert [(r.accepted, r.by) for r in judge.decide([GOOD, other])] == [
        (True, "recorded"),
        (False, "person"),
    ]


def test_undecided_rules_are_put_into_the_file_and_nothing_there_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "rules.jsonl"
    judge = judging.Judge("recorded", path=path)
    with pytest.raises(UserError, match="1 rules of round 1 wait") as error:
        judge.decide([GOOD])
    assert f"effbench judge {path}" in error.value.hint
    rules.write(path, [replace(r, accepted=True) for r in rules.read(path)])
    later = replace(GOOD, words=("poor",), round=2)
    for _ in range(2):
        with pytest.raises(UserError, match="round 2"):
            judge.decide([GOOD, later])
        assert [(r.words, r.accepted) for r in rules.read(path)] == [
            (("fine",), True),
            (("poor",), None),
        ]


# -- the file --------------------------------------------------------------------------------------


def test_a_rule_comes_back_from_its_line_and_little_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "rules.jsonl"
    full = replace(GOOD, accepted=True, by="é", sigma=0.35, answer="yes")
    rules.write(path, [full])
    assert rules.read(path) == [full]
    assert rules.read(tmp_path / "none.jsonl") == []
    path.write_text('{"words": ["Dull"], "class": 0}\n\n')
    assert rules.read(path) == [Rule(("dull",), 0)]


def test_an_edited_rule_is_another_one() -> None:
    line = GOOD.line().replace("fine", "dull")
    assert GOOD.id in line
    assert rules.parse(line).id != GOOD.id == rules.parse(GOOD.line()).id
    assert replace(GOOD, sigma=0.9, accepted=True, round=4).id == GOOD.id


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"class": 1}',
        '{"words": ["a"]}',
        '{"words": "a", "class": 1}',
        '{"words": [], "class": 1}',
        '{"words": ["a"], "class": 1, "colour": 2}',
    ],
)
def test_a_line_that_is_no_rule_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rules.jsonl"
    path.write_text(f"{GOOD.line()}\n{line}\n")
    with pytest.raises(UserError, match="line 2 is no rule"):
        rules.read(path)


# -- steps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "members"), [(60, 6), (7, 3), (4, 2), (1, 6), (4, 6), (12, 1)])
def test_each_step_is_of_one_classifier_and_the_first_of_the_first(
    steps: int, members: int
) -> None:
    schedule = Schedule(steps, members, 0.2)
    found = [schedule.member(step) for step in range(steps)]
    assert found == sorted(found) and found[0] == 0 and max(found) < members
    for step, member in enumerate(found):
        assert schedule.start(member) <= step < schedule.start(member + 1)
    assert schedule.start(members) == steps


def test_a_span_ends_with_self_training_whose_targets_are_made_anew() -> None:
    schedule = Schedule(200, 2, 0.25)
    alone = [step for step in range(200) if schedule.alone(step)]
    assert alone == [*range(75, 100), *range(175, 200)]
    assert [s for s in range(100) if schedule.refreshes(s)] == [75, 80, 85, 90, 95]
    assert len([s for s in range(200) if schedule.refreshes(s)]) == 2 * REFRESHES
    assert not any(Schedule(200, 2, 0.0).alone(step) for step in range(200))
