from __future__ import annotations

import json
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from helpers import (
    SHAPE,
    base_for,
    batch_of,
    begun,
    context,
    counted,
    example_of,
    stated,
    tiny_model,
    train,
)

from effbench.api.batch import Batch, collate
from effbench.api.examples import Example, Tokens
from effbench.api.schema import build
from effbench.api.spec import DatasetSpec
from effbench.methods.distill.kd import Distillation
from effbench.methods.distill.ptloss import PTLoss
from effbench.nn.losses import fitting
from effbench.nn.losses.fitting import Fit, Fitting
from effbench.nn.losses.perturbed import groups_of, perturbed_kl
from effbench.nn.losses.recalibration import Recalibration
from effbench.nn.losses.teaching import Teaching
from effbench.runner.stages.batching import window
from effbench.util.errors import UserError

CLASSES = ((7, 8), (9,), (10, 11, 12))
EPS = ((0.5, -0.2), (0.1, 0.3), (-0.4, 0.2))


def question(seed: int, answers: tuple[tuple[int, ...], ...] = CLASSES, **columns: Any) -> Example:
    """Return a question whose answers are the classes."""
    draw = Random(seed)
    prompt = [draw.randrange(20, SHAPE.vocab_size) for _ in range(3)]
    choices = tuple(Tokens([*prompt, *a], 3, len(a)) for a in answers)
    right = seed % len(answers)
    return Example(str(seed), (choices[right],), choices, right, columns)


def questions(count: int = 12, **columns: Any) -> list[Example]:
    return [question(seed, **columns) for seed in range(count)]


def started(method: PTLoss, rows: list[Example], begin: bool = True) -> tuple[Any, Any, list[Any]]:
    """Return the model, a context and the rows as the training loop would have them."""
    ctx, model = context(), tiny_model()
    chosen = method.dataset(rows, model, ctx)
    model = begun(method, model, ctx)
    if begin:
        ctx.evolution.begin([])
    return model, ctx, [method.unit(e) for e in chosen]


def one_window(rows: list[Example], most: int = 8) -> list[Batch]:
    return window(rows, range(len(rows)), most, 0, torch.device("cpu"))


def classes(**settings: Any) -> PTLoss:
    return PTLoss(
        teacher="big", over="answers", **{"groups": "class", "orders": 1, "draws": 2, **settings}
    )


def log_likelihoods(model: Any, row: Example) -> torch.Tensor:
    """Return the distribution over a question's answers, [C], sequence by sequence."""
    scores = []
    for choice in row.choices:
        logits = model(input_ids=torch.tensor([choice.ids])).logits[0].double().log_softmax(-1)
        ends = range(choice.prompt_length, len(choice.ids))
        scores.append(sum(logits[t - 1, choice.ids[t]] for t in ends))
    return torch.stack(scores).log_softmax(-1)


# -- the loss --------------------------------------------------------------------------------------


def test_over_answers_it_is_that_of_the_classes() -> None:
    method = classes(eps=EPS)
    model, ctx, rows = started(method, questions(5))
    found = sum(method.loss(model, batch, ctx) for batch in one_window(rows, most=2))
    log_t, log_s = (
        torch.stack([log_likelihoods(m, row) for row in rows]) for m in (tiny_model(7), model)
    )
    eps = torch.tensor(EPS, dtype=torch.float64)
    expected = perturbed_kl(log_t, log_s, eps, groups_of(log_t, "class")).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_without_coefficients_it_is_kd_bit_for_bit() -> None:
    results = []
    for method in (
        Distillation(teacher="big", weight=1.0, temperature=2.0),
        PTLoss(teacher="big", fit="none", temperature=2.0),
        PTLoss(teacher="big", eps=((0.0, 0.0),), temperature=2.0),
    ):
        ctx = context()
        model = begun(method, tiny_model(), ctx)
        losses = train(method, model, ctx, 2)
        results.append((losses, [p.detach().clone() for p in model.parameters()]))
    (losses, weights), *others = results
    for found, others_weights in others:
        assert found == pytest.approx(losses, rel=1e-6)
        for a, b in zip(others_weights, weights, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    assert others[0][0] == others[1][0]
    assert all(map(torch.equal, others[0][1], others[1][1]))


def test_labels_that_are_not_known_do_not_reach_the_loss() -> None:
    rows = questions(12)
    other = [replace(r, right=(r.right + 1) % 3) for r in rows]
    for method, same in (
        (classes(eps=EPS), True),
        (classes(eps=EPS, beta=1.0, labels=4), False),
    ):
        losses = []
        for some in (rows, other):
            model, ctx, made = started(method, some)
            losses.append([method.loss(model, b, ctx).item() for b in one_window(made, 1)])
        equal = [a == b for a, b in zip(*losses, strict=True)]
        assert equal.count(False) == (0 if same else 4)


def test_padding_and_micro_batches_change_nothing() -> None:
    method = classes(eps=EPS)
    model, ctx, rows = started(method, [question(0), question(1), question(2)])
    whole, single = (
        sum(method.loss(model, b, ctx).item() for b in one_window(rows, most)) for most in (8, 1)
    )
    assert whole == pytest.approx(single, rel=1e-5)
    tokens = PTLoss(teacher="big", eps=((0.3, -0.2),))
    ctx = context()
    model, batch = begun(tokens, tiny_model(), ctx), batch_of()
    before = tokens.loss(model, batch, ctx)
    batch.input_ids[batch.attention_mask == 0] = 5
    assert tokens.loss(model, batch, ctx).equal(before)


@pytest.mark.parametrize("over", ["answers", "tokens"])
def test_weights_of_rows_count(over: str) -> None:
    rows = questions(4)
    method = PTLoss(teacher="big", over=over, eps=((0.3, -0.2),))
    model, ctx, _ = started(method, rows)

    def loss(weights: list[float]) -> float:
        weighted = [replace(r, columns={"weight": w}) for r, w in zip(rows, weights, strict=True)]
        units = [method.unit(r) for r in weighted]
        return sum(method.loss(model, b, ctx).item() for b in one_window(units))

    assert loss([2.0] * 4) == pytest.approx(loss([1.0] * 4), rel=1e-5)
    assert loss([1.0, 0.0, 0.0, 0.0]) == pytest.approx(
        sum(method.loss(model, b, ctx).item() for b in one_window([method.unit(rows[0])])), rel=1e-5
    )


def test_validation_is_cross_entropy_to_the_right_answer() -> None:
    method, model = classes(eps=EPS), tiny_model()
    rows = questions(3)
    losses, count = method.validation(model, collate([method.unit(r) for r in rows], 0))
    expected = torch.stack([-log_likelihoods(model, r)[r.right] for r in rows])
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    assert count == 3


@pytest.mark.parametrize("divergence", ["reverse_kl", "focal"])
@pytest.mark.parametrize("over", ["answers", "tokens"])
def test_baselines_train(divergence: Any, over: str) -> None:
    method = PTLoss(teacher="big", over=over, fit="none", divergence=divergence, smoothing=0.1)
    model, ctx, rows = started(method.resolve(SHAPE), questions(4))
    loss = sum(method.loss(model, b, ctx) for b in one_window(rows))
    loss.backward()
    assert loss > 0 and model.lm_head.weight.grad.abs().max() > 0


def test_settings_are_those_of_the_loss() -> None:
    given: Any = {"groups": "rank", "divergence": "focal", "gamma": 0.5, "temperature": 3.0}
    given |= {"beta": 0.25, "smoothing": 0.125, "to_proxy": True}
    method = PTLoss(teacher="big", eps=EPS, sharpen=2.0, bias=(0.5,), **given)
    assert method.teaching == Teaching(**given, spoiled=Recalibration(2.0, (0.5,)))


# -- what is fitted --------------------------------------------------------------------------------


def test_the_model_that_training_starts_from_can_teach() -> None:
    """Of itself there is nothing to learn; of itself made too sure there is, and it stays."""
    losses = []
    for sharpen in (1.0, 1.8):
        method = classes(fit="none", groups="all", sharpen=sharpen)
        method = replace(method, teacher="start").resolve(SHAPE)
        model, ctx, rows = started(method, questions(6))
        before = {n: p.clone() for n, p in model.named_parameters()}
        batch = one_window(rows)[0]
        losses.append(method.loss(model, batch, ctx).item())
        method.update(model, torch.optim.SGD(model.parameters(), 0.1), one_window(rows), ctx)
        teacher = dict(ctx.aux["teacher"].named_parameters())
        assert all(torch.equal(teacher[n], p) for n, p in before.items())
        assert not any(p.requires_grad for p in teacher.values())
    assert losses[0] == pytest.approx(0, abs=1e-6)
    assert losses[1] > 1e-4
    assert method.holds() == ("",), "a copy of what it starts from, for plans"


def test_the_teacher_is_read_on_labelled_rows_alone_and_once() -> None:
    read = []

    def load(name: str) -> Any:
        teacher = tiny_model(7)
        teacher.model.register_forward_pre_hook(
            lambda m, a, k: read.append(k["input_ids"].tolist()), with_kwargs=True
        )
        return teacher

    method, ctx = classes(labels=10, fit="temperature"), context(load_model=load)
    rows = questions(12)
    method.dataset(rows, tiny_model(), ctx)
    labelled = list(ctx.state["labelled"])
    begun(method, tiny_model(), ctx)
    assert ctx.state == {}
    ctx.evolution.begin([])
    wanted = {str(c.ids[:3]) for row in labelled for c in row.choices}
    assert len(read) == 10 and {str(ids[0][:3]) for ids in read} == wanted
    fit = ctx.evolution.fit
    assert (fit.labels, fit.teacher_passes) == (10, 30)
    assert len({row.id for row in labelled}) == 10


def test_a_search_draws_by_the_seed_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    found = Fit(((0.5,),) * 3)
    monkeypatch.setattr(fitting, "fit", lambda *given: seen.append(given) or found)
    _, ctx, _ = started(classes(), questions(), begin=False)
    ctx.seed = 5
    ctx.evolution.begin([])
    [(data, *how)] = seen
    assert how == ["eps", "class", Fit(((0.0,),) * 3), 2, 5, 36]
    assert len(data.labels) == 12 and ctx.evolution.fit == found


@pytest.mark.parametrize("fit", ["eps", "temperature", "vector"])
def test_a_resumed_run_goes_on_with_what_was_fitted(fit: Any) -> None:
    method = classes(labels=12, fit=fit)
    _, ctx, _ = started(method, questions(12), begin=False)
    noted: list[str] = []
    ctx.evolution.note = noted.append
    ctx.evolution.begin([])
    found = ctx.evolution.fit
    assert found.labels == 12
    [note] = noted
    assert "12 labels, 36 sequences read by the teacher" in note
    assert ctx.evolution.costs() == {
        "fitted_labels": (12, "labels"),
        "fit_passes": (36, "sequences"),
    }
    _, again, _ = started(method, questions(12), begin=False)
    assert again.evolution.fit != found and not again.evolution.costs()
    again.evolution.load_state_dict(ctx.evolution.state_dict())
    assert again.evolution.fit == found


def test_the_search_of_tokens_looks_at_as_many_of_each_row() -> None:
    method = PTLoss(teacher="big", labels=10, search_tokens=25, draws=4)
    ctx = context()
    rows = [example_of(seed, length=6 + seed) for seed in range(12)]
    method.dataset(rows, tiny_model(), ctx)
    known = ctx.state["labelled"]
    begun(method, tiny_model(), ctx)
    data = method.known(known, ctx)
    assert data.rows.bincount().tolist() == [3] * 10
    assert data.log_t.shape == (30, 65) and data.counts[-1] == SHAPE.vocab_size - 64
    expected = (
        (tiny_model(7)(input_ids=torch.tensor([known[0].ids])).logits[0]).double().softmax(-1)
    )
    right = known[0].ids[3]  # the first that a position predicts
    p = data.log_t[0].exp()[data.labels[0]]
    if data.labels[0] < 64:
        assert float(p) == pytest.approx(float(expected[2, right]), rel=1e-5)
    ctx.evolution.begin([])
    assert ctx.evolution.fit.labels == 30


def test_labels_of_another_split_are_of_rows_that_nothing_trains_on() -> None:
    method, ctx = classes(label_split="validation", labels=10, beta=1.0), context()
    assert method.splits() == ("validation",) and classes().splits() == ()
    ctx.splits = {"validation": [question(100 + i) for i in range(12)]}
    chosen = method.dataset(questions(5), tiny_model(), ctx)
    assert {row.columns["label"] for row in chosen} == {-1}
    assert {row.id for row in ctx.state["labelled"]} < {r.id for r in ctx.splits["validation"]}


def test_what_was_fitted_is_saved_with_the_weights(tmp_path: Any) -> None:
    method = classes(labels=12)
    model, ctx, _ = started(method, questions(12))
    ctx.evolution = Fitting(Fit(EPS, labels=12, facts={"gain": 0.1}))
    method.save(method.finalize(model, ctx), tmp_path)
    found = json.loads((tmp_path / "perturbation.json").read_text())
    assert found["eps"] == [list(row) for row in EPS] and found["facts"] == {"gain": 0.1}
    method.load(tiny_model(3), tmp_path, context())


def test_a_search_may_say_that_nothing_is_gained() -> None:
    """A search whose best is the teacher trains with plain KL."""
    method = classes(groups="all", labels=12)
    _, ctx, _ = started(method, questions(12))
    fit = ctx.evolution.fit
    assert (fit.facts["gain"] > fit.facts["error"]) == any(map(any, fit.eps))


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": ""}, "ptloss has no teacher"),
        ({"groups": "class"}, "groups=class is for few classes"),
        ({"fit": "vector"}, "fit=vector is for few classes"),
        ({"to_proxy": True}, "to_proxy=true is for few classes"),
        ({"bias": (1.0,)}, "bias is for few classes"),
        ({"divergence": "focal"}, "focal has no coefficients"),
        ({"temperature": 2.0}, "at method.temperature=1"),
        ({"smoothing": 0.1}, "at method.temperature=1"),
        ({"eps": ((0.0, -1.0),)}, "several minima"),
        ({"eps": ((0.1,), (0.1,))}, "2 lists for 1 groups"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        PTLoss(**{"teacher": "big", **settings}).resolve(SHAPE)
    assert error.value.hint


def test_impossible_values_are_refused() -> None:
    for key, value in (("orders", 0), ("labels", 0), ("gamma", -1.0), ("smoothing", 2.0)):
        with pytest.raises(UserError, match=rf"method\.{key}"):
            build(PTLoss, {key: value}, "method")


def test_rows_that_do_not_suit_are_refused() -> None:
    with pytest.raises(UserError, match=r"over=answers needs questions"):
        classes().check_dataset(DatasetSpec("d", source="file", kind="pairs"))
    PTLoss(teacher="big").check_dataset(DatasetSpec("d", source="file", kind="pairs"))
    with pytest.raises(UserError, match="9 labelled rows are too few"):
        started(classes(), questions(9))
    other = question(12, ((7, 8), (9,), (10, 11, 13)))
    with pytest.raises(UserError, match="Not all questions have the same answers"):
        started(classes(), [*questions(12), other])
    with pytest.raises(UserError, match="2 lists for 3 groups"):
        started(classes(eps=EPS[:2]), questions(12))
    with pytest.raises(UserError, match="2 numbers for 3 classes"):
        started(classes(bias=(1.0, 0.0)), questions(12))
    started(classes(groups="all"), [*questions(12), other])


# -- cost ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("over", ["answers", "tokens"])
def test_cost_is_what_is_counted(over: str) -> None:
    method = PTLoss(teacher="big", over=over, draws=1)
    assert method.weights == "float32"
    assert stated(method) == counted(begun(method, base_for(method), context()))
