from dataclasses import replace

import pytest
import torch
from helpers import SHAPE, context, counted, example_of, prepared, stated, tiny_model

from effbench.api.batch import collate
from effbench.api.schema import build
from effbench.methods.base import Method
from effbench.methods.data.subset import Subset
from effbench.nn.losses.token import token_nll
from effbench.util.errors import UserError

ROWS = [example_of(seed, length=8 + 5 * (seed % 3)) for seed in range(10)]


def select(seed=0, rows=ROWS, model=None, ctx=None, **settings):
    method = Subset(rank=4, **settings)
    kept = method.dataset(rows, model or tiny_model(), ctx or context(seed))
    return [next(i for i, row in enumerate(rows) if row is one) for one in kept]


def losses_of(model):
    model.eval()
    found = []
    for row in ROWS:
        batch = collate([row], 0)
        nll = token_nll(Method().logits(model, batch), batch.labels)
        found.append((nll.sum() / batch.loss_tokens).item())
    return found


@pytest.mark.parametrize("by", ["random", "lowest_loss", "highest_loss"])
def test_all_of_the_data_is_the_data(by):
    assert select(fraction=1.0, by=by) == list(range(10))


def test_random_rows_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = select(fraction=0.4)
    torch.manual_seed(2)
    assert select(fraction=0.4) == first == sorted(set(first))
    assert len(first) == 4
    assert select(seed=1, fraction=0.4) != first


@pytest.mark.parametrize(("by", "sign"), [("lowest_loss", 1), ("highest_loss", -1)])
def test_rows_are_chosen_by_the_models_loss(by, sign):
    losses = losses_of(tiny_model())
    best = sorted(range(10), key=lambda i: sign * losses[i])[:3]
    assert select(fraction=0.3, by=by) == sorted(best)


def test_another_model_can_be_the_judge():
    asked = []

    def load(name):
        asked.append(name)
        return tiny_model(seed=5)

    losses = losses_of(tiny_model(seed=5))
    best = sorted(range(10), key=lambda i: losses[i])[:3]
    settings = {"fraction": 0.3, "by": "lowest_loss", "reference": "other"}
    assert select(ctx=context(load_model=load), **settings) == sorted(best)
    assert asked == ["other"]
    assert sorted(best) != select(fraction=0.3, by="lowest_loss")


@pytest.mark.parametrize("by", ["lowest_loss", "highest_loss"])
def test_ties_go_to_the_lower_index(by):
    same = [replace(ROWS[0]) for _ in range(6)]
    assert select(rows=same, fraction=0.5, by=by) == [0, 1, 2]


@pytest.mark.parametrize("by", ["lowest_loss", "highest_loss"])
def test_rows_without_loss_tokens_come_last(by):
    [tokens] = ROWS[0].sequences
    empty = replace(ROWS[0], sequences=(replace(tokens, prompt_length=len(tokens.ids)),))
    assert select(rows=[empty, *ROWS[1:3], replace(empty)], fraction=0.5, by=by) == [1, 2]


def test_at_least_one_row_is_kept():
    assert len(select(fraction=0.001)) == 1


def test_the_same_model_makes_the_same_choice():
    # The loop asks again when it resumes, with the untrained base.
    settings = {"fraction": 0.3, "by": "lowest_loss"}
    assert select(**settings) == select(**settings)
    assert select(model=tiny_model(seed=3), **settings) != select(**settings)


def test_a_judge_of_another_vocabulary_is_refused():
    ctx = context(load_model=lambda name: tiny_model(shape=replace(SHAPE, vocab_size=160)))
    with pytest.raises(UserError, match=r"method\.reference=other has 160 .* 128"):
        select(ctx=ctx, by="lowest_loss", reference="other")


@pytest.mark.parametrize("training", [True, False])
def test_judging_leaves_the_model_as_it_was(training):
    model = tiny_model().train(training)
    before = [p.detach().clone() for p in model.parameters()]
    Subset().mean_losses(model, ROWS, context())
    assert model.training == training
    assert all(
        p.equal(b) and p.grad is None for p, b in zip(model.parameters(), before, strict=True)
    )


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5])
def test_an_impossible_fraction_is_refused(fraction):
    with pytest.raises(UserError, match=r"method\.fraction"):
        build(Subset, {"fraction": fraction}, "method")


def test_it_trains_and_costs_as_lora_does():
    model, _ = prepared(Subset(rank=4))
    assert stated(Subset(rank=4)) == counted(model)
    Subset(rank=4).resolve(SHAPE)
