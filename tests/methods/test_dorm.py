"""DORM: which pairs are trained on, two adapters over one base, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import SHAPE, context, tiny_model

from effbench.api.batch import Batch, collate
from effbench.api.examples import Example, Tokens
from effbench.api.footprint import Pass, step_flops, training_of
from effbench.api.method_types import Context
from effbench.api.spec import DatasetSpec
from effbench.methods.chain import shape_of
from effbench.methods.preference import pairs as preparation
from effbench.methods.preference.dorm import DORM
from effbench.methods.preference.reward import HEAD, Reward
from effbench.methods.preference.weighing import KEPT
from effbench.methods.trains import begin_training
from effbench.nn.adapters import twin
from effbench.nn.weighting import bilevel, linear
from effbench.nn.weighting.grouping import Evidence, grouped
from effbench.runner.stages.batching import window
from effbench.util.errors import UserError

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"rank": 4, "groups": "sources", "folds": 3}


def pair(seed: int, **columns: float) -> Example:
    """Return a pair with a prompt of its own and answers of four and six tokens."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, SHAPE.vocab_size, (13,), generator=draw).tolist()
    sides = tuple(Tokens(ids[:3] + rest, 3, len(rest)) for rest in (ids[3:7], ids[7:]))
    return Example(str(seed), (sides[0],), sides, 0, columns)


ROWS = [pair(n, source=float(n % 3)) for n in range(12)]
TRUSTED = [pair(100 + n) for n in range(5)]


def begun(method: DORM, rows: Sequence[Example] = ROWS) -> tuple[Any, Context, list[Example]]:
    """Return a prepared model, its context and the units that it trains on."""
    ctx = context()
    ctx.splits, ctx.total_steps = {"validation": TRUSTED}, 10
    ctx.tokenizer = SimpleNamespace(pad_token_id=0)
    model = tiny_model()
    chosen = [method.unit(e) for e in method.dataset(rows, model, ctx)]
    return begin_training(method, model, ctx), ctx, chosen


def sgd(method: DORM, model: torch.nn.Module, rate: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for group, _ in method.param_groups(model) for p in group], rate)


def whole(rows: list[Example], most: int = 16) -> list[Batch]:
    """Return all rows as one step."""
    return window(rows, range(len(rows)), most, 0, CPU)


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


# -- two adapters ----------------------------------------------------------------------------------


def test_u_and_w_are_two_sets_over_one_base() -> None:
    method = DORM(**SMALL)
    model, _, _ = begun(method)
    first, second = [m.weight for m in method.owners(model)], twin.twin_of(model)
    assert len(first) == len(second) == 2 * 2 * 7 + 1
    assert all(a.equal(b) and a is not b for a, b in zip(first, second, strict=True))
    assert first[-1] is model.get_submodule(HEAD).weight
    trained = [id(p) for group, _ in method.param_groups(model) for p in group]
    assert sorted(trained) == sorted({id(p) for p in [*first, *second]})
    heads = replace(method, head_rate=3.0).param_groups(model)[1]
    assert heads == ([first[-1], second[-1]], 3.0)
    with pytest.raises(KeyError), twin.twin_in_place(model, method.owners(model)):
        assert method.owners(model)[0].weight is second[0]
        raise KeyError
    assert [m.weight for m in method.owners(model)] == first


@pytest.mark.parametrize("penalty", [0.0, 3.0])
@pytest.mark.parametrize("most", [2, 16])
def test_one_step_is_that_of_the_equations(penalty: float, most: int) -> None:
    """u on the weighted loss, w on validation and alpha times it, p on their difference."""
    method = DORM(**SMALL, penalty=penalty, hold=0.0, dropout=0.3)
    model, ctx, rows = begun(method)
    start = weights_of(model)
    shares = ctx.evolution.mixture.shares
    state = ctx.generator.get_state()
    drawn = preparation.drawn_like(
        whole(rows), [method.unit(e) for e in TRUSTED], 0, SimpleNamespace(**vars(ctx))
    )
    ctx.generator.set_state(state)

    with twin.without_dropout(model):
        losses, _ = method.validation(model, collate(rows, 0))
        groups = torch.tensor([int(e.columns["group"]) for e in rows])
        means = torch.stack([losses[groups == g].mean() for g in range(3)])
        trained, judged = (shares.float() * means).sum(), method.validation(model, drawn[0])[0]
        first = [m.weight for m in method.owners(model)]
        below = torch.autograd.grad(trained, first, retain_graph=True)
        objective = (judged.mean() + penalty * trained) / (1 + penalty)
        above = torch.autograd.grad(objective, first)

    found = method.update(model, sgd(method, model), whole(rows, most), ctx)
    assert found.item() == pytest.approx(trained.item(), rel=1e-5)
    places = [next(n for n, p in model.named_parameters() if p is w) for w in first]
    for weight, name, grad in zip(first, places, above, strict=True):
        torch.testing.assert_close(weight.detach(), start[name] - 0.1 * grad, atol=1e-6, rtol=1e-4)
    for weight, name, grad in zip(twin.twin_of(model), places, below, strict=True):
        torch.testing.assert_close(weight.detach(), start[name] - 0.1 * grad, atol=1e-6, rtol=1e-4)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert len(frozen) > 10
    assert all(model.get_parameter(n).equal(start[n]) for n in frozen)
    assert ctx.evolution.mixture.shares.equal(shares)  # both sets were alike in this step
    with twin.without_dropout(model), torch.no_grad():
        upper, _ = method.validation(model, collate(rows, 0))
        with twin.twin_in_place(model, method.owners(model)):
            lower, _ = method.validation(model, collate(rows, 0))
    method.update(model, sgd(method, model), whole(rows, most), ctx)
    mixture = ctx.evolution.mixture
    apart = torch.stack([(upper - lower)[groups == g].mean() for g in range(3)])
    means = mixture.losses[0] - mixture.losses[1]
    torch.testing.assert_close(means.float(), 0.1 * apart, atol=1e-6, rtol=1e-3)
    assert mixture.shares.equal(shares) == (penalty == 0)


def test_weights_stay_while_they_are_held() -> None:
    method = DORM(**SMALL, hold=0.5, weight_rate=1.0)
    model, ctx, rows = begun(method)
    found = []
    for step in range(7):
        ctx.step = step
        found.append(ctx.evolution.mixture.shares)
        method.update(model, sgd(method, model), whole(rows), ctx)
    assert all(shares.equal(found[0]) for shares in found[:6])
    assert not found[6].equal(found[0])


def test_a_mean_with_importance_is_the_loss_over_groups() -> None:
    _, ctx, rows = begun(DORM(**SMALL), [*ROWS, *(pair(50 + n, source=1.0) for n in range(6))])
    own = ctx.evolution
    weights = own.importance(collate(rows, 0))
    losses = torch.rand(len(rows))
    groups = own.groups.of
    means = [losses[groups == g].mean() for g in range(3)]
    expected = sum(s * m for s, m in zip(own.mixture.shares.tolist(), means, strict=True))
    assert (weights * losses).mean().item() == pytest.approx(float(expected), rel=1e-5)


OUTER: dict[str, Any] = {
    "rate": 0.3,
    "optimizer": "adam",
    "tau": 2.0,
    "floor": 0.1,
    "entropy": 0.2,
    "smoothing": 0.5,
}
SCHEDULE: dict[str, Any] = {"penalty": 3.0, "growth": 2.0, "rounds": 4, "hold": 0.25}


def test_settings_reach_the_search(judged: list[Example], monkeypatch: pytest.MonkeyPatch) -> None:
    named = {
        {"rate": "weight_rate", "optimizer": "weight_optimizer"}.get(n, n): v
        for n, v in OUTER.items()
    }
    seen: list[Any] = []
    monkeypatch.setattr(bilevel, "search", lambda *given: seen.extend(given))
    ctx = context()
    ctx.splits = {"validation": judged[:4]}
    settings: Any = {**named, **SCHEDULE, "search": "heads", "search_steps": 7}
    DORM(rank=4, proxies=2, uncertainty=2.0, disagreement=0.5, **settings).dataset(
        judged[:60], tiny_model(), ctx
    )
    _, groups, _, mixture, schedule, steps, _ = seen
    assert mixture.outer == bilevel.Outer(**OUTER)
    assert (schedule, steps) == (bilevel.Schedule(**SCHEDULE), 7)
    first = ctx.state[KEPT]
    evidence = Evidence(*first["evidence"])
    assert {float(d) for d in evidence.disagreement} == {0.0, 0.5, 1.0}, "of two proxies"
    score = 2 * evidence.uncertainty - evidence.disagreement / 2
    share = torch.zeros(len(mixture.logits)).double().index_add(0, groups, score.softmax(0))
    torch.testing.assert_close((mixture.logits / 2).softmax(0), share)
    torch.testing.assert_close(mixture.shares, 0.9 * share + 0.1 / len(share))


def test_w_alone_is_left_and_loaded(tmp_path: Path) -> None:
    method = DORM(**SMALL, hold=0.0)
    model, ctx, rows = begun(method)
    notes: list[str] = []
    ctx.note = notes.append
    for ctx.step in range(3):
        method.update(model, sgd(method, model), whole(rows), ctx)
    shares = ctx.evolution.mixture.shares
    model = method.finalize(model, ctx)
    assert not twin.has_twin(model)
    method.save(model, tmp_path)
    lines = [json.loads(x) for x in (tmp_path / "pair_weights.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [e.id for e in ROWS]
    for line in lines:
        place = int(line["source"][-1])
        assert line["group"] == line["source"]
        assert line["weight"] == pytest.approx(3 * float(shares[place]), abs=1e-5)
    assert notes[0].startswith("mean weight of a pair in 3 groups: source ")
    again = method.load(tiny_model(), tmp_path, context())
    assert not twin.has_twin(again)
    batch = collate(rows, 0)
    with torch.no_grad():
        assert method.scores(again.eval(), batch).equal(method.scores(model.eval(), batch))


def test_a_step_costs_three_passes() -> None:
    one = Pass("train", 4, 16, 32)
    plain, three = (
        step_flops(training_of(shape_of(m, SHAPE, phase="train"), "float32"), one)
        for m in (Reward(rank=4), DORM(rank=4))
    )
    assert three == 3 * plain
    before = DORM(rank=4, search="heads")
    assert shape_of(before, SHAPE, phase="train") == shape_of(Reward(rank=4), SHAPE, phase="train")


# -- which pairs are trained on --------------------------------------------------------------------


def chosen(rows: Sequence[Example] = ROWS, **settings: Any) -> list[Example]:
    ctx = context()
    ctx.splits = {"validation": TRUSTED}
    return DORM(**{**SMALL, **settings}).dataset(rows, tiny_model(), ctx)


def test_pairs_alike_are_the_ordinary_reward_trainer() -> None:
    rows = chosen(weigh_by="uniform")
    assert rows == ROWS
    method = DORM(**SMALL, weigh_by="uniform")
    model, ctx, _ = begun(method)
    for column in ({}, {"importance": 1.0}):
        batch = whole([replace(method.unit(e), columns=column) for e in rows])[0]
        expected = Reward.loss(method, model, batch, ctx)
        assert method.loss(model, batch, ctx).equal(expected)
    assert not twin.has_twin(model)


def test_the_same_information_in_other_ways() -> None:
    assert chosen(weigh_by="uniform", learn_from="validation") == TRUSTED
    assert chosen(weigh_by="uniform", learn_from="both") == [*ROWS, *TRUSTED]
    half = chosen(weigh_by="uniform", fraction=0.5)
    assert len(half) == 6
    assert half == [e for e in ROWS if e in half]


def test_sources_alike_have_equal_mass() -> None:
    rows = [*ROWS[:3], *(pair(60 + n, source=0.0) for n in range(9))]
    found = chosen(rows, weigh_by="sources", apply="loss")
    mass = [sum(e.columns["importance"] for e in found if e.columns["source"] == s) for s in (0, 1)]
    assert mass == pytest.approx([4, 4])
    often = chosen(rows, weigh_by="sources")
    assert [sum(e.columns["source"] == s for e in often) for s in (0, 1, 2)] == [4, 4, 4]


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[Example]:
    """Return pairs of three sources; states say their answers are 0, 40 and 90 % swapped."""
    rows = [pair(n, source=float(n % 3)) for n in range(180)]
    draws = torch.Generator().manual_seed(0)

    def states_of(model: Any, examples: Sequence[Example], device: Any) -> torch.Tensor:
        states = torch.randn(len(examples), 8, generator=draws)
        states *= torch.sign(states[:, :1])
        flips = torch.tensor([[0.0, 0.4, 0.9][int(e.columns.get("source", 0))] for e in examples])
        swapped = torch.rand(len(examples), generator=draws) < flips
        return states * (1 - 2 * swapped.float())[:, None]

    monkeypatch.setattr(preparation, "states_of", states_of)
    return rows


def test_heads_find_the_weights_before_training(judged: list[Example]) -> None:
    ctx = context()
    ctx.splits = {"validation": [pair(1000 + n) for n in range(60)]}
    method = DORM(rank=4, search="heads", apply="loss")
    rows = method.dataset(judged, tiny_model(), ctx)
    mass = [
        sum(e.columns["importance"] for e in rows if e.columns["source"] == s) for s in range(3)
    ]
    assert sum(mass) == pytest.approx(180)
    assert mass[0] > 100 > mass[1] > mass[2]
    assert mass[2] < 20
    kept = replace(method, fraction=0.3).dataset(judged, tiny_model(), ctx)
    assert len({e.id for e in kept}) == len(kept) == 54
    assert sum(e.columns["source"] == 0 for e in kept) > 27
    assert set(ctx.state[KEPT]["names"]) >= {"source 0, low uncertainty, agreed"}
    told = dict[str, float]()
    ctx.measured = lambda name, value, unit: told.update({name: value})
    method.finalize(tiny_model(), ctx)
    assert not told, "nobody knows which are swapped"
    known = [replace(e, columns={**e.columns, "flipped": e.columns["source"] == 2}) for e in judged]
    method.dataset(known, tiny_model(), ctx)
    method.finalize(tiny_model(), ctx)
    assert 0.7 < told["weights_auroc"] <= 1


def test_stage_one_alone_and_as_a_filter(judged: list[Example]) -> None:
    for settings in ({"weigh_by": "proxies", "fraction": 0.4}, {"weigh_by": "agreement"}):
        ctx = context()
        rows = DORM(rank=4, **settings).dataset(judged, tiny_model(), ctx)
        of = [sum(e.columns["source"] == s for e in rows) for s in range(3)]
        assert len(rows) < 180 and of[0] > of[2]
    agreed = {id_ for id_, d in zip(*_kept(ctx), strict=True) if d < 0.5}
    assert {e.id for e in rows} == agreed


def _kept(ctx: Context) -> tuple[list[str], list[float]]:
    return ctx.state[KEPT]["ids"], ctx.state[KEPT]["evidence"][1].tolist()


def test_states_are_those_of_each_text_alone() -> None:
    rows = [e.compared() for e in ROWS[:5]]
    rows[2] = replace(rows[2], sequences=(*rows[2].sequences, rows[3].sequences[0]))
    model = tiny_model()
    found = preparation.states_of(model, rows, CPU)
    assert model.training
    model.eval()
    for state, e in zip(found, rows, strict=True):
        best, *others = (
            model.model(input_ids=torch.tensor([s.ids])).last_hidden_state[0, -1]
            for s in e.sequences
        )
        expected = best - torch.stack(others).mean(0)
        torch.testing.assert_close(state, expected.detach(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("weigh_by", ["bilevel", "proxies", "easiest", "uniform"])
def test_answers_are_read_as_often_as_planned(weigh_by: Any) -> None:
    fraction = 1.0 if weigh_by == "bilevel" else 0.5
    method = DORM(**SMALL, weigh_by=weigh_by, fraction=fraction)
    model, ctx, read = tiny_model(), context(), list[int]()
    model.model.register_forward_pre_hook(
        lambda m, a, k: read.append(len(k["input_ids"])), with_kwargs=True
    )
    method.dataset(ROWS, model, ctx)
    assert sum(read) == method.reads_first(len(ROWS))


def test_one_source_has_groups_too() -> None:
    rows = [pair(n) for n in range(9)]
    found = {e.columns["group"] for e in chosen(rows, groups="clusters")}
    assert len(found) >= 3
    assert {e.columns["group"] for e in chosen(rows)} == {0}


def test_the_easiest_are_those_of_the_largest_margins_out_of_fold() -> None:
    rows, model = [pair(n) for n in range(24)], tiny_model()
    found = chosen(rows, weigh_by="easiest", fraction=0.25)
    units = [e.compared() for e in rows]
    states = linear.scaled(preparation.states_of(model, units, CPU))
    margins = preparation.margins_of(states, units, SMALL["folds"], 3, context().seed).mean(1)
    wanted = sorted(margins.argsort(descending=True)[:6].tolist())
    assert [e.id for e in found] == [rows[i].id for i in wanted]


@pytest.mark.parametrize("objective", ["conservative", "unbiased"])
def test_losses_under_swapped_labels_are_those_of_their_papers(objective: Any) -> None:
    margins = torch.tensor([-1.5, 0.0, 0.3, 4.0], dtype=torch.float64)
    scores = torch.stack([margins, torch.zeros_like(margins)], 1).flatten()
    found = DORM(weigh_by="uniform", objective=objective, swapped=0.2).objectives(scores, [2] * 4)
    right, wrong = -margins.sigmoid().log(), -(-margins).sigmoid().log()
    wanted = {
        "conservative": 0.8 * right + 0.2 * wrong,
        "unbiased": (0.8 * right - 0.2 * wrong) / 0.6,
    }
    assert torch.allclose(found, wanted[objective], atol=1e-12)
    # A mean of the unbiased loss over swaps of a fifth is the loss of the true label.
    if objective == "unbiased":
        other = DORM(weigh_by="uniform", objective=objective, swapped=0.2).objectives(
            -scores, [2] * 4
        )
        assert torch.allclose(0.8 * found + 0.2 * other, right, atol=1e-12)


def test_ratings_of_a_pair_are_four_and_one() -> None:
    found = DORM(weigh_by="uniform", objective="ratings").objectives(
        torch.tensor([4.0, 1.0, 2.0, 0.0, 1.0]), [2, 3]
    )
    assert found.tolist() == pytest.approx([0.0, (4 + 1 + 0) / 3])


def test_the_objective_reaches_training_and_not_validation() -> None:
    method = DORM(weigh_by="uniform", objective="conservative", swapped=0.3)
    model, ctx, units = begun(method)
    batch = replace(collate(units[:4], 0), window_examples=4)
    scores = method.scores(model, batch)
    with torch.no_grad():
        assert method.loss(model, batch, ctx) == method.objectives(scores, batch.sizes).sum() / 4
    plain, _ = Reward.validation(method, model, batch)
    assert torch.equal(method.validation(model, batch)[0], plain)
    assert not torch.allclose(plain, method.objectives(scores, batch.sizes))


# -- what is refused -------------------------------------------------------------------------------


def test_fewer_prompts_than_folds_are_refused() -> None:
    same = [replace(e, sequences=ROWS[0].sequences, choices=ROWS[0].choices) for e in ROWS]
    with pytest.raises(UserError, match="12 pairs of 1 prompts cannot be dealt into 3 folds"):
        chosen(same)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "test"}, "split=test cannot judge weights: it is for the last evaluation"),
        ({"split": "train"}, "split=train cannot judge weights: it is trained on"),
        ({"learn_from": "both"}, "learn_from=both is a baseline without weights"),
        ({"fraction": 0.5}, "has only at its end"),
        ({"objective": "conservative"}, "objective=conservative has no twin"),
        ({"weigh_by": "easiest"}, "easiest keeps a share of the pairs, and method.fraction=1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        DORM(**settings)


def test_proxies_against_every_label_are_refused() -> None:
    margins = -torch.ones(4, 3)
    method, groups = DORM(weigh_by="agreement"), grouped(["a"] * 4)
    with pytest.raises(UserError, match="against every label"):
        method.first_weights(Evidence.of(margins), groups)
    margins[0] = 1.0
    assert method.first_weights(Evidence.of(margins), groups).tolist() == [4, 0, 0, 0]


def test_two_adapters_need_adapters() -> None:
    with pytest.raises(UserError, match="needs two adapters"):
        DORM(trains="full").resolve(SHAPE)
    assert DORM(trains="full", search="heads").resolve(SHAPE)


def test_given_weights_are_refused() -> None:
    with pytest.raises(UserError, match="makes weights of its own"):
        DORM().check_dataset(DatasetSpec("d", "file", "preference", columns={"weight": "w"}))


def test_the_validation_split_is_asked_for_where_it_is_used() -> None:
    assert DORM(split="trusted").splits() == ("trusted",)
    assert DORM(weigh_by="proxies").splits() == ()
    assert DORM(weigh_by="uniform", learn_from="both").splits() == ("validation",)
