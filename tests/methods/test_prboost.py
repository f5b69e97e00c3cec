"""PRBoost on a tiny model whose texts say their class in a word of their own."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from helpers import SHAPE, adamw, context, tiny_model

from effbench.api.batch import collate
from effbench.api.examples import Example, Tokens
from effbench.api.spec import DatasetSpec
from effbench.config.compose import compose
from effbench.methods.chain import resolved
from effbench.methods.data.classifiers import heads_of
from effbench.methods.data.prboost import RULES, PRBoost
from effbench.methods.trains import begin_training
from effbench.models.random import random_of
from effbench.models.survey import empty_model, survey
from effbench.nn.model_kinds.base import find as find_kind
from effbench.nn.weak_labels import boosting, matching, rules
from effbench.nn.weak_labels.judging import Judge
from effbench.nn.weak_labels.pool import HIDDEN, Pool
from effbench.nn.weak_labels.reading import MaskReader, Reader
from effbench.nn.weak_labels.words import vocabulary
from effbench.runner.stages.batching import rows_of_step, window
from effbench.testing.bench import Bench
from effbench.util.errors import UserError

CPU = torch.device("cpu")
SIGNS = (30, 31)
"""A token for each class, which most of its texts have."""
STEPS = 12


class Words:
    """A tokenizer whose every token is a word of its own."""

    def __len__(self) -> int:
        return SHAPE.vocab_size

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return ["Ġ" + "".join(chr(97 + int(d)) for d in f"{i:03}") + "ox" for i in ids]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.convert_ids_to_tokens(ids)).replace("Ġ", " ")

    def batch_decode(self, rows: Sequence[Sequence[int]], skip_special_tokens: bool) -> list[str]:
        return [self.decode(row) for row in rows]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [3 + ord(letter) % 20 for letter in text][:6]


class Closing(Words):
    """The same with a token before and after each text, and one that is a mask."""

    mask_token, mask_token_id = "\x00", 3

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = [3 if letter == "\x00" else 4 + ord(letter) % 20 for letter in text][:8]
        return [1, *ids, 2] if add_special_tokens else ids

    def decode(self, ids: Sequence[int]) -> str:
        return super().decode([i for i in ids if i > 2])


BERT = {
    "model_type": "bert",
    "vocab_size": SHAPE.vocab_size,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
NAMED = [Words().decode([sign]).strip() for sign in SIGNS]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFBENCH_CACHE", str(tmp_path / "cache"))


def row_of(seed: int, right: int | None = None, swapped: bool = False) -> Example:
    draw = Random(seed)
    place = draw.randrange(2)
    prompt = [draw.randrange(40, SHAPE.vocab_size) for _ in range(draw.randrange(5, 9))]
    prompt[draw.randrange(len(prompt))] = SIGNS[place if draw.random() < 0.9 else 1 - place]
    place = place if right is None else right
    answers = ([8], [9])[:: -1 if swapped else 1]
    place = 1 - place if swapped else place
    choices = tuple(Tokens(prompt + a, len(prompt), 1) for a in answers)
    return Example(str(seed), (choices[place],), choices, place)


ROWS = [row_of(seed) for seed in range(60)]


def method_of(**settings: Any) -> PRBoost:
    chosen: dict[str, Any] = {"labelled": 0.4, "rounds": 2, "source": "text", "min_matches": 2}
    return PRBoost(**{**chosen, "self_training": 0.25, **settings}).sealed()


def begun(
    method: PRBoost, rows: Sequence[Example] = ROWS, seed: int = 0
) -> tuple[Any, Any, list[Example]]:
    """Return the model with the method in it, the context, and the rows to train on."""
    ctx = context(seed)
    ctx.tokenizer, ctx.total_steps = Words(), STEPS
    model = tiny_model().eval()
    dealt = method.dataset(rows, model, ctx)
    return begin_training(method, model, ctx), ctx, dealt


def trained(
    method: PRBoost, rows: Sequence[Example] = ROWS, seed: int = 0, until: int = STEPS
) -> tuple[Any, Any, list[Example]]:
    """Return the same after a training."""
    model, ctx, dealt = begun(method, rows, seed)
    optimizer = adamw(model, lr=0.05)
    for step in range(until):
        ctx.step = step
        ctx.evolution.before_step()
        chosen = rows_of_step(len(dealt), seed, step, 32)
        method.update(model, optimizer, window(dealt, chosen, 8, 0, CPU), ctx)
    return method.finalize(model, ctx), ctx, dealt


def made(model: Any, method: PRBoost, folder: Path) -> dict[str, bytes]:
    """Return the files of the artefact."""
    folder.mkdir()
    method.save(model, folder)
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# -- labels ----------------------------------------------------------------------------------------


def test_no_hidden_label_changes_a_byte(tmp_path: Path) -> None:
    method = method_of()
    model, ctx, dealt = trained(method)
    hidden = Pool(**ctx.state["pool"]).unlabelled.nonzero()[:, 0].tolist()
    assert len(hidden) == 36
    lies = [row_of(i, 1 - row.right) if i in hidden else row for i, row in enumerate(ROWS)]
    other, _, again = trained(method, lies)
    assert again == dealt
    assert made(model, method, tmp_path / "a") == made(other, method, tmp_path / "b")
    seen = next(i for i in range(60) if i not in hidden)
    lies[seen] = row_of(seen, 1 - ROWS[seen].right)
    assert made(trained(method, lies)[0], method, tmp_path / "c") != made(
        model, method, tmp_path / "d"
    )


def test_texts_are_read_as_often_as_planned() -> None:
    model, ctx, method = tiny_model().eval(), context(), method_of()
    ctx.tokenizer, read = Words(), []
    model.model.register_forward_pre_hook(
        lambda m, a, k: read.append(len(k["input_ids"])), with_kwargs=True
    )
    method.dataset(ROWS, model, ctx)
    assert sum(read) == method.reads_first(len(ROWS)) == 61


def test_rows_to_train_on_have_no_answer_and_no_label() -> None:
    _, _, dealt = begun(method_of())
    for place, (row, stand_in) in enumerate(zip(ROWS, dealt, strict=True)):
        assert stand_in.columns == {"place": place} and not stand_in.choices
        assert stand_in.sequences[0].ids == row.ids[:1] * 2
        assert method_of().unit(stand_in) is stand_in


def test_boosting_weighs_rows_that_no_classifier_learns_from() -> None:
    _, ctx, _ = trained(method_of(judge="all", sigma=0.0))
    evolution, pool = ctx.evolution, Pool(**ctx.state["pool"])
    assert len(pool.weighed) == len(pool.learnt) == 12
    assert evolution.metrics()["coverage"] > 0.5
    assert evolution.targets[pool.weighed].eq(HIDDEN).all()
    assert evolution.targets[pool.learnt].equal(pool.labels[pool.learnt])
    assert not (set(pool.weighed) & set(evolution._unmatched.nonzero()[:, 0].tolist()))


def test_without_rounds_all_labelled_rows_are_learnt_from() -> None:
    model, ctx, _ = trained(method_of(rounds=0, bought=3))
    pool = Pool(**ctx.state["pool"])
    assert not pool.weighed and len(pool.learnt) == 27
    assert heads_of(model).votes.tolist() == [1.0]
    assert ctx.evolution.costs()["labelled_rows"] == (27, "rows")
    assert ctx.evolution.costs()["judgements"] == (0, "decisions")


# -- rules -----------------------------------------------------------------------------------------


def test_rules_of_the_words_that_tell_classes_apart_are_found_and_used() -> None:
    model, ctx, _ = trained(method_of())
    kept = {(r.words[0], r.label) for r in rules.accepted(ctx.evolution.judged)}
    assert kept >= {(word, label) for label, word in enumerate(NAMED)}
    pool = Pool(**ctx.state["pool"])
    targets, hidden = ctx.evolution.targets, pool.unlabelled
    truth = torch.tensor([row.right for row in ROWS])
    labelled = hidden & (targets != HIDDEN)
    assert labelled.sum() > 18
    assert (targets == truth)[labelled].float().mean() > 0.75
    assert ctx.evolution.costs()["judgements"] == (len(ctx.evolution.judged), "decisions")
    assert ctx.evolution.metrics()["coverage"] == pytest.approx(float(labelled.sum() / 36))
    assert heads_of(model).rules == ctx.evolution.judged


def test_evidence_and_sigma_are_of_the_rows_that_are_learnt_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(matching, "tuned", lambda *given: seen.append(given) or 0.35)
    _, ctx, _ = trained(method_of())
    own = ctx.evolution
    first = [r for r in own.judged if r.round == 1]
    scores, learnt = own.matcher.scores(first), own.pool.learnt
    right = own.pool.labels[learnt][:, None] == torch.tensor([r.label for r in first])
    fires = scores >= 0
    for j, rule in enumerate(first):
        assert rule.evidence.matches == int(fires[learnt, j].sum())
        hit = right[fires[learnt, j], j].float()
        assert rule.evidence.precision == pytest.approx(float(hit.mean()) if len(hit) else 0)
        share = fires[own.pool.unlabelled, j].float().mean()
        assert rule.evidence.coverage == pytest.approx(float(share))
    kept = [j for j, r in enumerate(first) if r.accepted]
    given, labels, truth, floor = seen[0]
    assert given.equal(scores[learnt][:, kept]) and labels == [first[j].label for j in kept]
    assert truth.equal(own.pool.labels[learnt]) and floor == 0.8
    assert [r.sigma for r in first] == [0.35 if r.accepted else 0.0 for r in first]


def test_settings_reach_the_boosting() -> None:
    judge: Any = {"min_precision": 0.7, "min_matches": 5, "min_coverage": 0.02, "noise": 0.3}
    given: Any = {"anchors": 4, "words": 3, "pick": "random", "beta": 0.25, "sigma": 0.6}
    more: Any = {"self_training": 0.125, "patience": 2}
    method = method_of(judge="noisy", label_model="generative", **judge, **given, **more)
    expected = boosting.Settings(
        **given,
        **more,
        template="",
        floor=0.7,
        judge=Judge("noisy", **judge, seed=8),
        given=[],
        combined_by="generative",
    )
    assert method._search(8) == expected
    asking = replace(method, source="prompt", template="This is")._search(8)
    assert asking == replace(expected, template="This is")


def test_votes_are_counted_as_asked() -> None:
    model, _, _ = begun(method_of())
    heads, batch = heads_of(model), collate([ROWS[0].compared()], 0)
    with torch.no_grad():
        heads.votes.copy_(torch.tensor([1.0, 3.0, 0.5]))
        for place, head in enumerate(heads.heads):
            head.bias.copy_(torch.tensor([0.0, (2.0, -0.4, -0.2)[place]]))
    each = torch.stack([head.bias.detach() for head in heads.heads]).softmax(1)
    shares = heads.votes / 4.5
    expected = {
        "probability": shares @ each,
        "one_hot": torch.stack([shares[1:].sum(), shares[0]]),
        "last": each[2],
    }
    for vote, own in expected.items():
        found = method_of(vote=vote).scores(model, batch).exp()
        torch.testing.assert_close(found.sort().values, own.sort().values)


def test_a_judge_who_accepts_nothing_leaves_the_first_classifier() -> None:
    model, ctx, _ = trained(method_of(judge="none"))
    heads = heads_of(model)
    assert not any(r.accepted for r in ctx.evolution.judged)
    assert not heads.votes[1:].any() and not heads.heads[1].weight.any()
    states = torch.randn(9, SHAPE.hidden_size)
    alone = heads.heads[0](heads.standardised(states)).softmax(1)
    torch.testing.assert_close(heads.probabilities(states, "probability"), alone)
    _, ctx, _ = trained(method_of(judge="none", rounds=4))
    assert {r.round for r in ctx.evolution.judged} == {1, 2}, "two rounds in vain are the last"


def test_a_classifier_worse_than_guessing_has_no_vote_and_moves_no_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, ctx, _ = begun(method_of())
    own = ctx.evolution
    own.before_step()
    before, labels = own.weights.clone(), own.pool.labels
    for right, voted in ((0, False), (len(own.pool.weighed) // 2 + 1, True)):
        places = labels.clone()
        wrong = own.pool.weighed[right:]
        places[wrong] = 1 - places[wrong]
        monkeypatch.setattr(own, "_logits", lambda rows, y=places: torch.eye(2)[y[rows]])
        own._end_round()
        assert bool(heads_of(model).votes[0] > 0) == voted
        assert own.weights.equal(before) != voted
    assert (heads_of(model).votes >= 0).all()


def test_decisions_of_an_oracle_replayed_give_the_same_to_the_bit(tmp_path: Path) -> None:
    model, _, _ = trained(method_of())
    first = made(model, method_of(), tmp_path / "a")
    path = str(tmp_path / "a" / RULES)
    replay = method_of(judge="recorded", files={"decisions": path})
    again = made(trained(replay)[0], replay, tmp_path / "b")
    assert again == first and b'"accepted": true' in first[RULES]


def test_an_edited_file_labels_anew_and_no_text_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, _ = trained(method_of())
    made(model, method_of(), tmp_path / "a")
    kept = [r for r in rules.accepted(rules.read(tmp_path / "a" / RULES)) if r.words[0] in NAMED]
    monkeypatch.setattr(Reader, "read", lambda *_: pytest.fail("a text was read again"))
    found = []
    for number, some in enumerate((kept, kept[1:])):
        path = tmp_path / f"{number}.jsonl"
        rules.write(path, some)
        _, ctx, _ = trained(method_of(rounds=0, files={"rules": str(path)}))
        found.append(ctx.evolution.metrics()["coverage"])
        assert ctx.evolution.costs()["judgements"] == (0, "decisions")
        assert ctx.evolution.costs()["kept_rules"] == (len(some), "rules")
    assert found[0] > found[1]


def test_another_order_of_the_classes_permutes_everything() -> None:
    first, ctx, _ = trained(method_of())
    second, other, _ = trained(method_of(), [row_of(seed, swapped=True) for seed in range(60)])
    for one, two in zip(heads_of(first).heads, heads_of(second).heads, strict=True):
        torch.testing.assert_close(one.weight.flip(0), two.weight, atol=1e-5, rtol=1e-4)
    said = [[(r.words, r.label, r.accepted) for r in c.evolution.judged] for c in (ctx, other)]
    assert said[1] == [(w, 1 - label, accepted) for w, label, accepted in said[0]]


def test_each_round_asks_something_new_as_long_as_a_row_has_it() -> None:
    _, ctx, _ = trained(method_of(anchors=1, words=2, judge="all", rounds=5))
    judged = ctx.evolution.judged
    assert {rule.round for rule in judged} == {1, 2, 3, 4, 5}
    assert len({(rule.words, rule.label) for rule in judged}) == len(judged) <= 10


def test_random_rows_are_other_rows_and_follow_from_the_seed() -> None:
    anchors = [
        [r.anchor for r in trained(method_of(pick=pick, anchors=3))[1].evolution.judged]
        for pick in ("boosting", "random", "random")
    ]
    assert anchors[0] != anchors[1] == anchors[2]


def test_the_largest_seed_draws_rows_too() -> None:
    method = method_of(pick="random", anchors=3)
    assert trained(method, seed=2**63 - 1)[1].evolution.judged


def test_boosting_picks_from_the_cluster_that_was_missed() -> None:
    draws = torch.Generator().manual_seed(0)
    centres = torch.tensor([[4.0, 0.0], [-4.0, 0.0], [-8.0, 8.0]])  # the third is of class 0
    cluster = torch.arange(60) % 3
    features = centres[cluster] + 0.3 * torch.randn(60, 2, generator=draws)
    labels = torch.tensor([0, 1, 0])[cluster]
    learnt = [i for i in range(30) if cluster[i] != 2]
    texts = [f"t{i}" for i in range(60)]
    pool = Pool(features, texts, [["w"]] * 60, labels, list(range(30, 60)), learnt, ["a", "b"])
    ctx = context()
    ctx.total_steps = 2
    heads = PRBoost(rounds=1).prepare(tiny_model(), context())
    heads_of(heads).__init__(2, 2, 2)
    settings = boosting.Settings(10, 1, "boosting", "", 0.5, None, 0.8, 0.0, Judge("all"))
    evolution = boosting.Boosting(settings, pool, heads_of(heads), ctx)
    evolution.before_step()
    with torch.no_grad():
        heads_of(heads).heads[0].weight[:, 0] = torch.tensor([5.0, -5.0])
    ctx.step = 1
    evolution.before_step()
    assert cluster[evolution._picked(1, set())].tolist() == [2] * 10


# -- reading ---------------------------------------------------------------------------------------


def test_words_are_those_that_the_text_makes_likelier_than_no_text_does() -> None:
    reader = Reader(tiny_model().eval(), Words(), "it is", 5)
    own, neutral = torch.zeros(SHAPE.vocab_size), torch.zeros(1, SHAPE.vocab_size)
    own[50:60] = 5.0
    own[51] = neutral[0, 51] = 9.0
    reader.neutral = neutral.log_softmax(1)
    found = reader._expected(own)
    assert len(found) == 5 and "afbox" not in found  # 051, which the template alone expects
    assert set(found) <= {f"af{chr(97 + i)}ox" for i in range(10)}


def test_reading_is_the_same_whatever_stands_in_the_batch_and_leaves_the_model_alone() -> None:
    model = tiny_model()
    reader = Reader(model, Words(), "it is", 5)
    prompts = [row.ids[: row.prompt_length] for row in ROWS[:6]]
    together, alone = reader.read(prompts), [reader.read([p]) for p in prompts]
    assert model.training
    torch.testing.assert_close(together.features, torch.cat([a.features for a in alone]))
    assert together.words == [a.words[0] for a in alone]
    states = model.eval().model(input_ids=torch.tensor(prompts[:1])).last_hidden_state
    torch.testing.assert_close(together.features[0], states[0].mean(0))


def test_a_long_text_loses_its_end_and_never_the_template() -> None:
    model = tiny_model().eval()
    model.config.max_position_embeddings = 10
    reader = Reader(model, Words(), "it is", 5)
    long, cut = reader.read([list(range(40, 60))]), reader.read([[*range(40, 45)]])
    assert len(reader.tail) == 5
    assert long.features.equal(cut.features) and long.words == cut.words


# -- scores ----------------------------------------------------------------------------------------


def test_scores_are_of_the_prompt_alone_whatever_the_answers_and_the_padding() -> None:
    method = method_of()
    model, ctx, _ = trained(method)
    batch = collate([row.compared() for row in ROWS[:8]], 0)
    found = method.scores(model, batch).view(8, 2)
    states = Pool(**ctx.state["pool"]).features[:8]
    expected = heads_of(model).probabilities(states, "probability").log()
    for row, one, two in zip(ROWS[:8], found, expected, strict=True):
        torch.testing.assert_close(one, two[[row.right, 1 - row.right]], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(8))


def test_validation_is_the_likelihood_of_the_class() -> None:
    method = method_of()
    model, _, _ = trained(method)
    units = [method.unit(row) for row in ROWS[:8]]
    losses, count = method.validation(model, collate(units, 0))
    scores = method.scores(model, collate([row.compared() for row in ROWS[:8]], 0))
    torch.testing.assert_close(losses, -scores[::2], atol=1e-4, rtol=1e-4)
    assert count == 8


def test_a_state_goes_on_to_the_same_end(tmp_path: Path) -> None:
    _, ctx, _ = trained(method_of(), until=7)
    state = ctx.evolution.state_dict()
    torch.save(state, tmp_path / "state")
    _, other, _ = begun(method_of())
    other.evolution.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    again = other.evolution.state_dict()
    for name, value in state.items():
        assert torch.equal(value, again[name]) if torch.is_tensor(value) else value == again[name]


def test_a_label_model_labels_the_rows_that_rules_fire_on() -> None:
    settings: dict[str, Any] = {"judge": "all", "sigma": 0.5}
    _, ctx, _ = trained(method_of(**settings))
    _, other, _ = trained(method_of(label_model="generative", **settings))
    votes, own = ctx.evolution, other.evolution
    fires = (own.matcher.scores(rules.accepted(own.judged)) >= 0.5).any(1)
    fires[own.pool.weighed] = False
    fires[own.pool.learnt] = True
    assert torch.equal(own.targets != HIDDEN, fires), "a tie of posteriors is rare"
    assert own.targets[own.pool.learnt].equal(own.pool.labels[own.pool.learnt])
    assert set((votes.targets != HIDDEN).nonzero()[:, 0].tolist()) <= set(
        (own.targets != HIDDEN).nonzero()[:, 0].tolist()
    )


@pytest.mark.parametrize("judge", ["oracle", "all"])
def test_no_more_rules_are_asked_about_once_the_ensemble_stalls(judge: Any) -> None:
    """With patience, what follows a round without a gain has no candidates; without, it has."""
    settings: dict[str, Any] = {"rounds": 4, "judge": judge}
    through = trained(method_of(**settings))[1].evolution
    found = through.accuracies
    gains = [place for place in range(1, len(found)) if found[place] > max(found[:place])]
    stalled = next(p for p in range(1, len(found)) if p not in gains)
    stopped = trained(method_of(patience=1, **settings))[1].evolution
    assert stopped.accuracies[: stalled + 1] == found[: stalled + 1]
    assert {r.round for r in stopped.judged} == {
        r.round for r in through.judged if r.round <= stalled
    }
    assert trained(method_of(patience=9, **settings))[1].evolution.accuracies == found


def test_accuracies_are_of_the_ensemble_on_rows_that_nothing_learns_from() -> None:
    model, ctx, _ = trained(method_of())
    own, heads = ctx.evolution, heads_of(model)
    rows = own.pool.weighed
    right = (
        heads.probabilities(own.features[rows], "probability").argmax(1) == own.pool.labels[rows]
    )
    assert own.accuracies[-1] == pytest.approx(float(right.double().mean()))


# -- encoders --------------------------------------------------------------------------------------


@cache
def encoder(kind: str) -> Any:
    model = random_of({**BERT, "num_labels": 2}, find_kind(kind), 0)
    for parameter in model.parameters():  # so that a token more is felt at all
        parameter.data.mul_(10 if parameter.ndim > 1 else 1)
    return model


def encoded(kind: str, method: PRBoost, speaker: Any = None) -> tuple[PRBoost, Pool, list[int]]:
    """Return the method as it is resolved, what was read, and the size of every batch read."""
    model, read = deepcopy(encoder(kind)), list[int]()
    for each in filter(None, (model, speaker)):
        each.base_model.register_forward_pre_hook(
            lambda m, a, k: read.append(len(k["input_ids"] if "input_ids" in k else a[0])),
            with_kwargs=True,
        )
    rows = [find_kind(kind).example(row, [2], 2) for row in ROWS]
    ctx = context(load_model=lambda name: speaker)
    ctx.tokenizer, ctx.load_tokenizer = Closing(), lambda name: Words()
    method = resolved(method, survey(empty_model({**BERT, "num_labels": 2}, kind)))
    method.dataset(rows, model, ctx)
    pool = Pool(**ctx.state["pool"])
    alone = model.base_model(torch.tensor([rows[0].ids[: rows[0].prompt_length]]))
    torch.testing.assert_close(pool.features[0], alone.last_hidden_state[0].mean(0))
    assert pool.answers == [Words().decode([i]).strip() for i in (8, 9)]
    return method, pool, read[:-1]


def test_an_encoder_has_the_states_and_another_model_says_the_words() -> None:
    speaker = tiny_model().eval()
    method, pool, read = encoded("classifier", method_of(source="prompt", speaker="x"), speaker)
    texts = [Words().encode(text) for text in pool.texts]
    assert pool.words == Reader(speaker, Words(), method.template, 10).read(texts).words
    assert any(pool.words) and method.consults() == ("x",) == method.others()
    assert sum(read) == method.reads_first(60) == 122


def test_an_encoder_with_a_masked_head_is_asked_at_the_mask_token() -> None:
    template = "so [MASK] it"
    method, pool, read = encoded("masked", method_of(source="prompt", template=template))
    assert method.speaker == "start" and method.consults() == ()
    assert sum(read) == method.reads_first(60) == 122
    model, tokenizer = encoder("masked"), Closing()
    reader = MaskReader(model, tokenizer, template, 5)
    text = tokenizer.encode(pool.texts[0])
    tail = tokenizer.encode("so \x00 it", add_special_tokens=False)
    row = torch.tensor([[*text[:-1], *tail, 2]])
    place = row[0].tolist().index(tokenizer.mask_token_id)
    _, logits = reader._pass([reader.opened(text)])
    torch.testing.assert_close(logits[0], model(row).logits[0, place])
    together = reader.read([reader.opened(tokenizer.encode(t)) for t in pool.texts[:4]])
    assert together.words == [words[:5] for words in pool.words[:4]] and any(together.words)
    for wrong, said in (("[MASK] [MASK]", "more than once"), ("", "")):
        if said:
            with pytest.raises(UserError, match=said):
                MaskReader(model, tokenizer, wrong, 5)
    assert MaskReader(model, tokenizer, "", 5).tail[-1] == 2
    with pytest.raises(UserError, match="goes on from its end"):
        Reader(tiny_model(), Words(), template, 5)


def test_words_of_wordpiece_are_its_tokens_without_a_mark() -> None:
    class Pieces(list[str]):
        def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
            return [self[i] for i in ids]

    assert vocabulary(Pieces(["[PAD]", "film", "##film", "Great"])) == ["", "film", "", "great"]


def test_an_encoder_without_words_is_told_what_to_do_before_anything_is_loaded() -> None:
    words = ["method=prboost", "method.classes=3", "dataset=noisy-classes"]
    words += ["model=tiny-encoder", "model.classes=3"]
    with pytest.raises(UserError, match="asks a model for words") as caught:
        compose("train", words)
    assert "method.speaker=" in caught.value.hint and "method.source=text" in caught.value.hint
    with pytest.raises(UserError, match="is to say words, and it is an encoder with a classif"):
        compose("train", [*words, "method.speaker=tiny-encoder"])
    spec = compose("train", [*words, "method.speaker=tiny"]).spec
    assert [other.name for other in spec.others] == ["tiny"]
    assert [each.name for each in spec.evaluators] == ["preference"], "not its untrained head"
    for own in (["method.source=text"], ["method.rounds=0"]):
        assert not compose("train", [*words, "method.speaker=tiny", *own]).spec.others
        compose("train", [*words, *own])


# -- what cannot be --------------------------------------------------------------------------------


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"2 answers, but method\.classes=3"):
        begun(method_of(classes=3))
    with pytest.raises(UserError, match="all of one class"):
        begun(method_of(), [row_of(seed, 1) for seed in range(60)])
    with pytest.raises(UserError, match="kind 'pairs'"):
        PRBoost().check_dataset(DatasetSpec("mine", "file", "pairs"))
    weighted = DatasetSpec("mine", "file", "choices", columns={"weight": "trust"})
    with pytest.raises(UserError, match=r"dataset\.columns\.weight=trust"):
        PRBoost().check_dataset(weighted)
    with pytest.raises(UserError, match=r"files\.rule is no file"):
        PRBoost(files={"rule": "x"})
    with pytest.raises(UserError, match="reads decisions from a file"):
        PRBoost(judge="recorded")
    with pytest.raises(UserError, match="is not a file"):
        PRBoost(files={"rules": str(tmp_path / "none")}).sealed()
    model, _ = trained(method_of())[:2]
    three = replace(ROWS[0], choices=(*ROWS[0].choices, ROWS[0].choices[0])).compared()
    with pytest.raises(UserError, match="more answers than the 2 classes"):
        method_of().scores(model, collate([three], 0))


def test_a_rule_of_no_class_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rules.jsonl"
    path.write_text('{"words": ["a"], "class": 2, "accepted": true}\n')
    with pytest.raises(UserError, match="class 2"):
        begun(method_of(files={"rules": str(path)}))


def test_what_files_say_is_in_the_key_and_where_they_lie_is_not(tmp_path: Path) -> None:
    words = ["method=prboost", "model=tiny", "dataset=arithmetic", "method.judge=recorded"]

    def key(name: str, text: str | None) -> str:
        path = tmp_path / f"{name}.jsonl"
        if text is not None:
            path.write_text(text)
        return compose("train", [*words, f"+method.files.decisions={path}"]).spec.key

    line = '{"words": ["a"], "class": 1}\n'
    assert key("a", line) == key("b", line) != key("c", "") != key("d", None)


def test_files_that_changed_since_the_command_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rules.jsonl"
    path.write_text('{"words": ["a"], "class": 1}\n')
    method = method_of(files={"rules": str(path)})
    path.write_text('{"words": ["b"], "class": 1}\n')
    with pytest.raises(UserError, match="changed"):
        begun(method)


def test_a_run_counts_judgements_and_is_evaluated_by_its_own_score(bench: Bench) -> None:
    words = ["method.classes=4", "method.labelled=0.5", "method.source=text", "method.judge=all"]
    record = bench.run(
        "train", "method=prboost", *words, "+dataset.limit.train=16", "evaluator=[preference]"
    )
    found = {m.name: m.value for m in record.metrics}
    assert found["judgements"] > 0 and found["labelled_rows"] == 8
    assert 0 <= found["top_accuracy"] <= found["pair_accuracy"] <= 1


def test_a_run_on_an_encoder_has_a_speaker_that_is_planned_and_then_gone(bench: Bench) -> None:
    words = ["method.classes=3", "method.labelled=0.5", "method.judge=all", "method.speaker=tiny"]
    words += ["model=tiny-encoder", "model.classes=3", "dataset=noisy-classes"]
    words += ["+dataset.limit.train=16", "+dataset.limit.test=8", "evaluator=[preference]"]
    record = bench.run("train", "method=prboost", *words)
    found = {m.name: m.value for m in record.metrics}
    assert found["labelled_rows"] == 8 and 0 <= found["top_accuracy"] <= 1
    phases = record.plan["phases"]
    assert phases["select"]["memory"]["other models"] > 0
    assert "other models" not in phases["train"]["memory"]
    assert found["trainable_params"] == found["trainable_bytes"] / 4 == 6 * 65 * 3
