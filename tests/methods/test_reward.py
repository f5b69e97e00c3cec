from __future__ import annotations

import copy
from dataclasses import replace
from random import Random

import pytest
import torch
from helpers import SHAPE, adamw, base_for, context, counted, prepared, stated, tiny_model

from effbench.api.batch import Batch, collate
from effbench.api.examples import Example, Tokens
from effbench.api.points import UNNAMED
from effbench.api.spec import DatasetSpec
from effbench.methods.base import Method
from effbench.methods.data.prboost import PRBoost
from effbench.methods.preference.dorm import DORM
from effbench.methods.preference.reward import HEAD, Reward
from effbench.nn.losses.preference import bradley_terry
from effbench.runner.stages.batching import window
from effbench.util.errors import UserError

CPU = torch.device("cpu")


def pair_of(seed: int, sizes: tuple[int, ...] = (9, 6), right: int = 0, **columns) -> Example:
    """Return a row with a prompt of three tokens and answers of some sizes."""
    draw = Random(seed)
    prompt = [draw.randrange(3, SHAPE.vocab_size) for _ in range(3)]
    answers = [[draw.randrange(3, SHAPE.vocab_size) for _ in range(n)] for n in sizes]
    choices = tuple(Tokens(prompt + a, 3, len(a)) for a in answers)
    return Example(str(seed), (choices[right],), choices, right, columns)


def pairs(count: int = 4, **columns) -> list[Example]:
    return [Reward().unit(pair_of(i, (3 + 2 * i, 8 - i), i % 2, **columns)) for i in range(count)]


def losses(method: Reward, model: torch.nn.Module, batches: list[Batch]) -> torch.Tensor:
    return torch.stack([method.loss(model, b, context()) for b in batches]).sum()


def one_window(examples: list[Example], most: int = 8) -> list[Batch]:
    return window(examples, range(len(examples)), most, 0, CPU)


# -- the loss --------------------------------------------------------------------------------------


def naive(model: torch.nn.Module, method: Reward, examples: list[Example]) -> torch.Tensor:
    """Return the loss row by row, without padding or batches."""

    def reward(ids: list[int]) -> torch.Tensor:
        states = model.model(input_ids=torch.tensor([ids])).last_hidden_state
        return states[0, -1] @ model.get_submodule(HEAD).weight[0]

    total = torch.zeros((), dtype=torch.float64)
    for e in examples:
        best, *others = (reward(s.ids).double() for s in e.sequences)
        total = total - torch.stack([(best - o).sigmoid().log() for o in others]).mean()
    return total / len(examples)


@pytest.mark.parametrize("trains", ["lora", "full"])
def test_gradients_are_those_of_the_formula_in_float64(trains: str) -> None:
    method = Reward(rank=4, trains=trains)
    model, _ = prepared(method)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    model = model.double()
    examples = [*pairs(4), method.unit(pair_of(9, (5, 4, 7, 2), right=2))]
    exact = copy.deepcopy(model)
    naive(exact, method, examples).backward()
    losses(method, model, one_window(examples, 2)).backward()
    for (name, p), (_, q) in zip(model.named_parameters(), exact.named_parameters(), strict=True):
        if p.requires_grad and q.grad is not None:
            assert p.grad is not None, name
            # The score itself is handed on in float32.
            torch.testing.assert_close(p.grad, q.grad, atol=1e-7, rtol=1e-4, msg=name)


def test_order_of_rows_and_size_of_micro_batches_change_nothing() -> None:
    method = Reward(rank=4)
    model, _ = prepared(method)
    rows = pairs(6)
    expected = losses(method, model, one_window(rows)).item()
    for order in ([5, 4, 3, 2, 1, 0], [2, 0, 5, 1, 4, 3]):
        for most in (1, 2, 6):
            found = losses(method, model, one_window([rows[i] for i in order], most)).item()
            assert found == pytest.approx(expected, rel=1e-6)


def test_a_constant_on_all_rewards_changes_nothing() -> None:
    scores = torch.randn(8, dtype=torch.float64, requires_grad=True)
    sizes = [2, 3, 3]
    first = bradley_terry(scores, sizes)
    torch.testing.assert_close(bradley_terry(scores + 17.5, sizes), first)
    [gradient] = torch.autograd.grad(first.sum(), scores)
    for part in gradient.split(sizes):
        assert part.sum().item() == pytest.approx(0, abs=1e-15)


def test_huge_margins_are_finite() -> None:
    found = bradley_terry(torch.tensor([1e4, -1e4, -1e4, 1e4]), [2, 2])
    assert found.tolist() == [0.0, 2e4]


def test_a_question_counts_once_however_many_wrong_answers_it_has() -> None:
    same = torch.tensor([0.7, 0.1, 0.1, 0.1])
    torch.testing.assert_close(bradley_terry(same, [4]), bradley_terry(same[:2], [2]))


def test_a_weight_counts_a_pair_so_often() -> None:
    method = Reward(rank=4)
    model, _ = prepared(method)
    a, b = pairs(2)
    weighted = [replace(a, columns={"weight": 1.0}), replace(b, columns={"weight": 2.0})]
    expected = losses(method, model, one_window([a, b, b])).item()
    assert losses(method, model, one_window(weighted)).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("most", [1, 2, 3, 8])
def test_both_of_a_pair_are_always_in_one_micro_batch(most: int) -> None:
    for batch in one_window(pairs(7), most):
        assert batch.rows[::2] == batch.rows[1::2]
        assert set(batch.sizes) == {2}
        for row, chosen in zip(batch.rows[::2], batch.input_ids[::2].tolist(), strict=True):
            right = pairs(7)[row].sequences[0].ids
            assert chosen[: len(right)] == right


# -- the score -------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("more", [1, 7])
def test_padding_does_not_matter_on_either_side(side: str, more: int) -> None:
    method = Reward(rank=4)
    model, _ = prepared(method)
    batch = collate(pairs(3), 0)
    alone = torch.cat([method.scores(model, collate([e], 0)) for e in pairs(3)])
    torch.testing.assert_close(method.scores(model, batch), alone, atol=1e-5, rtol=1e-5)
    rows = [ids[mask == 1] for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
    width = batch.input_ids.shape[1] + more
    ids, mask = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(2))
    for place, row in enumerate(rows):
        where = slice(len(row)) if side == "right" else slice(width - len(row), width)
        ids[place, where], mask[place, where] = row, 1
    padded = replace(batch, input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(method.scores(model, padded), alone, atol=1e-5, rtol=1e-5)


def test_a_pad_token_inside_is_a_token() -> None:
    method = Reward(rank=4)
    model, _ = prepared(method)
    with_zero = Example("z", (Tokens([5, 6, 0], 1, 2), Tokens([5, 6, 9, 9], 1, 3)))
    scores = method.scores(model, collate([with_zero], 0))
    states = model.model(input_ids=torch.tensor([[5, 6, 0]])).last_hidden_state
    expected = model.get_submodule(HEAD)(states[0, -1]).item()
    assert scores[0].item() == pytest.approx(expected, abs=1e-5)


def test_the_head_follows_the_seed_and_the_width() -> None:
    heads = [prepared(Reward(rank=4), seed)[0].get_submodule(HEAD).weight for seed in (0, 0, 1)]
    assert heads[0].equal(heads[1])
    assert not heads[0].equal(heads[2])
    assert heads[0].std().item() == pytest.approx((SHAPE.hidden_size + 1) ** -0.5, rel=0.3)


# -- learning --------------------------------------------------------------------------------------


def ruled(seed: int) -> Example:
    """Return a pair of which the answer with more tokens below 60 is preferred."""
    draw = Random(seed)
    low, high = ([draw.randrange(*r) for _ in range(5)] for r in ((3, 60), (60, 128)))
    mixed = [*low[:4], *high[:1]], [*low[:1], *high[:4]]
    return Example(str(seed), (), tuple(Tokens([1, 2, *draw.sample(m, 5)], 2, 5) for m in mixed))


@pytest.mark.parametrize("trains", ["lora", "full"])
def test_it_learns_a_rule(trains: str) -> None:
    method = Reward(rank=4, trains=trains)
    model, ctx = prepared(method)
    train = [ruled(i).compared() for i in range(360)]
    held_out = collate([ruled(1000 + i).compared() for i in range(60)], 0)

    def accuracy() -> float:
        with torch.no_grad():
            scores = method.scores(model, held_out).view(-1, 2)
        return float((scores[:, 0] > scores[:, 1]).double().mean())

    assert 0.2 < accuracy() < 0.8
    optimizer = adamw(model, lr=1e-2 if trains == "lora" else 5e-3)
    for step in range(45):
        rows = [(8 * step + i) % len(train) for i in range(8)]
        method.update(model, optimizer, window(train, rows, 4, 0, CPU), ctx)
    assert accuracy() > 0.95


def test_the_language_model_stays_where_only_adapters_learn() -> None:
    model, _ = prepared(Reward(rank=4))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert f"{HEAD}.weight" in trained
    assert all("lora_" in n for n in trained - {f"{HEAD}.weight"})
    everything, _ = prepared(Reward(trains="full"))
    assert all(p.requires_grad for p in everything.parameters())


def test_the_head_has_a_rate_of_its_own() -> None:
    method = Reward(rank=4, head_rate=10.0)
    model, _ = prepared(method)
    (rest, one), (head, ten) = method.param_groups(model)
    assert (one, ten, len(head)) == (1.0, 10.0, 1)
    assert len(rest) + 1 == len([p for p in model.parameters() if p.requires_grad])


# -- what is refused, and the account --------------------------------------------------------------


def test_a_dataset_of_right_answers_alone_is_refused() -> None:
    for kind in ("choices", "preference"):
        Reward().check_dataset(DatasetSpec("d", "file", kind))
    for kind in ("pairs", "text"):
        with pytest.raises(UserError, match="'d' is of kind"):
            Reward().check_dataset(DatasetSpec("d", "file", kind))


def test_ranks_are_cut_where_there_are_adapters() -> None:
    with pytest.raises(UserError, match="eval_ranks cuts adapters"):
        Reward(trains="full", eval_ranks=(2,)).resolve(SHAPE)


@pytest.mark.parametrize("trains", ["lora", "full"])
def test_it_costs_what_is_counted(trains: str) -> None:
    method = Reward(rank=4, trains=trains)
    model, _ = prepared(method)
    assert stated(method) == counted(model)


def test_the_base_is_held_as_it_learns() -> None:
    assert Reward().weights == "compute"
    assert Reward(trains="full").weights == "float32"
    assert base_for(Reward()).dtype == tiny_model().dtype


@pytest.mark.parametrize("method", [Reward(), DORM(), PRBoost()], ids=lambda m: m.name)
def test_a_model_that_answers_with_something_beside_it_has_no_plain_form(method: Method) -> None:
    with pytest.raises(UserError, match=f"{method.name} answers with .* cannot hold") as error:
        method.as_plain(tiny_model(), UNNAMED)
    assert error.value.hint
