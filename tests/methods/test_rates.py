"""Reward models by regression on rated attributes, alone and weighted by DORM."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import SHAPE, context, counted, prepared, stated, tiny_model

from effbench.api.batch import Batch, collate
from effbench.api.examples import Example, Tokens
from effbench.api.spec import DatasetSpec
from effbench.data.kinds.rated import NOT_RATED, column
from effbench.evaluators.best_of_n import BestOfN
from effbench.evaluators.preference import Preference
from effbench.methods.preference import pairs as preparation
from effbench.methods.preference.dorm import DORM
from effbench.methods.preference.reward import HEAD
from effbench.nn.adapters import twin
from effbench.nn.losses import preference
from effbench.runner.stages.batching import window
from effbench.util.errors import UserError

NAMES = ("help", "style", "size")
RATED: dict[str, Any] = {"rank": 4, "objective": "regression", "attributes": NAMES}
ALONE = DORM(**RATED, weigh_by="uniform")


def answers(seed: int, *ratings: Sequence[float], names: Sequence[str] = NAMES) -> Example:
    """Return a row with a prompt of its own and an answer for each list of ratings."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, SHAPE.vocab_size, (24,), generator=draw).tolist()
    sides = []
    for place, values in enumerate(ratings):
        columns = {column(n): float(v) for n, v in zip(names, values, strict=True)}
        sides.append(Tokens(ids[:3] + ids[5 * place + 3 : 6 * place + 7], 3, 4, columns=columns))
    return Example(str(seed), (sides[0],), tuple(sides), columns={"source": float(seed % 3)})


NO = NOT_RATED
ROWS = [
    answers(0, (4, 1, 2)),
    answers(1, (3, NO, 0)),
    answers(2, (NO, NO, 4)),
    answers(3, (4, NO, NO), (1, NO, NO)),
    answers(4, (0, 2, NO)),
    answers(5, (2, 0, 1)),
]
UNITS = [ALONE.unit(e) for e in ROWS]


def whole(rows: Sequence[Example], most: int = 8) -> list[Batch]:
    return window(rows, range(len(rows)), most, 0, torch.device("cpu"))


def loss(method: DORM, model: torch.nn.Module, rows: Sequence[Example], most: int = 8) -> Any:
    found = [method.loss(model, batch, context()) for batch in whole(rows, most)]
    return torch.stack(found).sum()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def naive(model: torch.nn.Module, names: Sequence[str]) -> torch.Tensor:
    """Return least squares over the rated entries, row by row in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for row in UNITS:
        errors = []
        for answer in row.sequences:
            state = model.model(input_ids=torch.tensor([answer.ids])).last_hidden_state[0, -1]
            for place, name in enumerate(names):
                if (rating := answer.columns[column(name)]) != NOT_RATED:
                    errors.append((state @ model.get_submodule(HEAD).weight[place] - rating) ** 2)
        total = total + sum(errors) / len(errors)
    return total / len(UNITS)


@pytest.mark.parametrize("most", [1, 8])
def test_loss_and_gradient_are_those_of_least_squares_in_float64(most: int) -> None:
    model = prepared(ALONE)[0].double()
    exact = copy.deepcopy(model)
    wanted = naive(exact, NAMES)
    wanted.backward()
    found = loss(ALONE, model, UNITS, most)
    found.backward()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    own = gradients(model)
    for name, gradient in gradients(exact).items():
        torch.testing.assert_close(own[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_what_is_not_rated_changes_nothing() -> None:
    outputs = torch.randn(4, 3, requires_grad=True)
    ratings = torch.tensor([[1, NO, 2], [NO, NO, 0], [4, 3, NO], [1, NO, NO]])
    first = preference.regressed(outputs, ratings, [1, 1, 2])
    first.sum().backward()
    assert outputs.grad is not None
    assert outputs.grad[ratings == NO].eq(0).all() and outputs.grad[ratings != NO].ne(0).all()
    other = torch.where(ratings == NO, outputs.detach() * 1e30, outputs.detach())
    assert preference.regressed(other, ratings, [1, 1, 2]).equal(first)
    more = [torch.cat([x, x[:, :1]], 1) for x in (outputs, torch.full_like(ratings, NO))]
    more[1][:, :3] = ratings
    assert preference.regressed(more[0], more[1], [1, 1, 2]).equal(first)


def test_pairs_in_one_attribute_are_the_objective_of_ratings_bit_for_bit() -> None:
    rows = [answers(n, (4,), (1,), names=["help"]) for n in range(4)]
    ends = []
    for settings in ({"objective": "ratings"}, {**RATED, "attributes": ("help",)}):
        method = DORM(**{"rank": 4, "weigh_by": "uniform", **settings})
        model, ctx = prepared(method)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        units = [method.unit(e) for e in rows]
        losses = [method.update(model, optimizer, whole(units, 2), ctx) for _ in range(3)]
        scores = method.scores(model, collate(units, 0))
        ends.append([*losses, scores, *(p for p in model.parameters() if p.requires_grad)])
    assert all(a.equal(b) for a, b in zip(*ends, strict=True))


def test_attributes_in_another_order_are_the_head_in_another_order() -> None:
    order = [2, 0, 1]
    other = replace(ALONE, attributes=tuple(NAMES[i] for i in order))
    model, twisted = prepared(ALONE)[0], prepared(other)[0]
    with torch.no_grad():
        twisted.get_submodule(HEAD).weight.copy_(model.get_submodule(HEAD).weight[order])
    one, two = loss(ALONE, model, UNITS), loss(other, twisted, UNITS)
    one.backward(), two.backward()
    assert two.item() == pytest.approx(one.item(), rel=1e-6)
    head, moved = (m.get_submodule(HEAD).weight.grad for m in (model, twisted))
    torch.testing.assert_close(moved, head[order], atol=1e-6, rtol=1e-5)


def test_the_reward_is_linear_in_the_combination_and_a_mean_without_one() -> None:
    model, _ = prepared(ALONE)
    batch = collate(UNITS, 0)

    def scores(*weights: float) -> torch.Tensor:
        return replace(ALONE, combination=weights).scores(model, batch)

    outputs = ALONE.read(model, batch)
    assert outputs.dtype == torch.float32
    assert outputs.shape == (7, 3)
    torch.testing.assert_close(scores(), outputs.mean(1))
    assert scores(0, 1, 0).equal(outputs[:, 1])
    torch.testing.assert_close(scores(1, -2, 0.5), scores(1, 0, 0.5) - 2 * scores(0, 1, 0))


def test_padding_does_not_matter_on_either_side() -> None:
    model, _ = prepared(ALONE)
    batch = collate(UNITS, 0)
    wanted, _ = ALONE.validation(model, batch)
    rows = [ids[mask == 1] for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
    ids, mask = (torch.zeros(len(rows), 20, dtype=torch.int64) for _ in range(2))
    for place, row in enumerate(rows):
        ids[place, -len(row) :], mask[place, -len(row) :] = row, 1
    left = replace(batch, input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(ALONE.validation(model, left)[0], wanted, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("trains", ["lora", "full"])
def test_the_head_is_counted_with_an_output_for_each_attribute(trains: Any) -> None:
    method = replace(ALONE, trains=trains)
    assert stated(method) == counted(prepared(method)[0])
    one = stated(replace(method, attributes=NAMES[:1]))
    assert stated(method)["params"] - one["params"] == 2 * SHAPE.hidden_size


# -- weighted --------------------------------------------------------------------------------------


def test_two_adapters_learn_ratings_and_w_alone_is_loaded(tmp_path: Path) -> None:
    """u follows the weighted training rows, w alpha times those and the trusted ones."""
    method = DORM(**RATED, groups="sources", folds=3, hold=0.0, penalty=3.0)
    ctx = context()
    ctx.splits, ctx.total_steps = {"validation": [answers(9, (1, 3, NO))]}, 2
    ctx.tokenizer = SimpleNamespace(pad_token_id=0)
    rows = [method.unit(e) for e in method.dataset(ROWS, tiny_model(), ctx)]
    model = method.prepare(tiny_model(), ctx)
    ctx.evolution = method.evolution(model, ctx)
    head = model.get_submodule(HEAD).weight
    shares, start = ctx.evolution.mixture.shares.float(), head.detach().clone()
    losses, _ = method.validation(model, collate(rows, 0))
    groups = torch.tensor([int(e.columns["group"]) for e in rows])
    trained = sum(s * losses[groups == g].mean() for g, s in enumerate(shares))
    judged, _ = method.validation(model, collate([method.unit(ctx.splits["validation"][0])], 0))
    [below] = torch.autograd.grad(trained, head, retain_graph=True)
    [above] = torch.autograd.grad((judged.mean() + 3 * trained) / 4, head)
    groups_of = method.param_groups(model)
    optimizer = torch.optim.SGD([p for group, _ in groups_of for p in group], 0.1)
    method.update(model, optimizer, whole(rows, 4), ctx)
    torch.testing.assert_close(head.detach(), start - 0.1 * above, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        twin.twin_of(model)[-1].detach(), start - 0.1 * below, atol=1e-5, rtol=1e-4
    )
    batch = collate(rows, 0)
    model = method.finalize(model, ctx).eval()
    method.save(model, tmp_path)
    assert (tmp_path / "pair_weights.jsonl").read_text().count("\n") == len(ROWS)
    again = method.load(tiny_model(), tmp_path, context()).eval()
    with torch.no_grad():
        assert method.scores(again, batch).equal(method.scores(model, batch))


def test_agreement_is_that_of_standardised_ratings_and_predictions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[torch.Tensor, torch.Tensor]] = []
    said = torch.tensor([[0.5, -1], [2, 0], [3, 3], [1, -0.5], [-2, 1.5], [0.1, 0.2], [-1, 1]])

    def out_of_fold(states: Any, dealt: Any, *rest: Any) -> torch.Tensor:
        asked.append((dealt, rest[-1]))
        return said * len(asked)

    monkeypatch.setattr(preparation.linear, "out_of_fold", out_of_fold)
    found = preparation.agreement_of(torch.randn(7, 5), UNITS, NAMES, 3, 2, 0)
    both, size = torch.zeros(6, 2), torch.zeros(6, 1)
    row_of = [0, 1, 2, 3, 3, 4, 5]
    prompts = [tuple(e.ids[: e.prompt_length]) for e in UNITS]
    folds = preparation.linear.folds_of(prompts, 3, torch.Generator().manual_seed(0))
    for place, name in enumerate(NAMES):
        values = torch.tensor([s.columns[column(name)] for e in UNITS for s in e.sequences])
        rated = values[values != NO]
        units = (values - rated.mean()) / rated.std(unbiased=False)
        assert asked[place][1].isnan().equal(values == NO)
        assert asked[place][0].equal(folds[row_of])
        for k, row in enumerate(row_of):
            if values[k] != NO:
                both[row] += units[k] * said[k] * (place + 1)
                size[row] += units[k].abs()
    torch.testing.assert_close(found, both / size)


def test_answers_rated_upside_down_weigh_less(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = torch.Generator().manual_seed(0)
    states = torch.randn(120, 8, generator=draws)
    true = (states[:, 0] * 2 + 2).clamp(0, 4).round()
    wrong = torch.rand(120, generator=draws) < 0.25
    given = torch.where(wrong, 4 - true, true).tolist()
    rows = [answers(n, (value,), names=["help"]) for n, value in enumerate(given)]
    rows = [
        replace(e, columns={"flipped": w})
        for e, w in zip(rows, wrong.float().tolist(), strict=True)
    ]
    monkeypatch.setattr(preparation, "answers_of", lambda *_: states)
    method = DORM(rank=4, objective="regression", attributes=("help",), weigh_by="proxies")
    ctx, told = context(), dict[str, float]()
    ctx.measured = lambda name, value, unit: told.update({name: value})
    assert method.reads_first(len(rows)) == len(rows)
    method.dataset(rows, tiny_model(), ctx)
    method.finalize(tiny_model(), ctx)
    assert told["weights_auroc"] > 0.75
    kept = replace(method, weigh_by="easiest", fraction=0.5).dataset(rows, tiny_model(), ctx)
    assert sum(e.columns["flipped"] for e in kept) < 5 < wrong.sum()


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attributes": ()}, "objective=regression reads the ratings of method.attributes"),
        ({"objective": "ratings"}, "objective=ratings reads no ratings of method.attributes"),
        ({"attributes": ("help", "help")}, "names one twice"),
        ({"combination": (1.0, 2.0)}, "combination has 2 weights for 3 attributes"),
        ({"combination": (0.0, 0.0, 0.0)}, "a reward of 0"),
        ({"search": "heads"}, "search=heads searches over pairs"),
        ({"fraction": 0.5}, "has only at its end"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        DORM(**{**RATED, **settings})
    assert error.value.hint
    assert "heads" not in error.value.hint


def test_rows_that_are_not_rated_so_are_refused() -> None:
    rated = DatasetSpec("d", "file", "rated", attributes=["size", "help", "style"])
    ALONE.check_dataset(rated)
    assert not BestOfN().remark(rated), "it asks these very rows"
    with pytest.raises(UserError, match="'d' are rated in others") as error:
        ALONE.check_dataset(replace(rated, attributes=["help", "stile", "size"]))
    assert "'method.attributes=[help,stile,size]'" in error.value.hint
    with pytest.raises(UserError, match="is of kind 'preference'"):
        ALONE.check_dataset(replace(rated, kind="preference"))
    with pytest.raises(UserError, match="is of kind 'rated'") as error:
        DORM().check_dataset(rated)
    assert "objective=regression 'method.attributes=[size,help,style]'" in error.value.hint


def test_the_evaluator_compares_the_pairs_among_rated_answers() -> None:
    data = SimpleNamespace(examples=lambda _: ROWS, spec=SimpleNamespace(called="d"))
    evaluator = Preference()
    evaluator.check_data(data, None)  # type: ignore[arg-type]
    [only] = evaluator.passes(None, data)  # type: ignore[arg-type]
    assert only.rows == 2
    data.examples = lambda _: ROWS[:3]
    with pytest.raises(UserError, match="no row of split 'test' of dataset 'd' has two"):
        evaluator.check_data(data, None)  # type: ignore[arg-type]
