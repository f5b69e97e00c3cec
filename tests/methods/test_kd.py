import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import (
    SHAPE,
    adamw,
    base_for,
    batch_of,
    begun,
    context,
    counted,
    logits,
    stated,
    tiny_model,
    train,
)

from effbench.methods.distill.kd import Distillation
from effbench.methods.full import Full
from effbench.nn.losses.token import token_kl
from effbench.util.errors import UserError


def student_of(method, teacher_seed=7):
    ctx = context(load_model=lambda name: tiny_model(seed=teacher_seed))
    return begun(method, tiny_model(), ctx), ctx


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def test_the_loss_agrees_with_float64_written_by_hand():
    method = Distillation(teacher="big", temperature=3.0, weight=0.3)
    model, ctx = student_of(method)
    batch = batch_of(window_tokens=100)
    s, t = (logits(m, batch).double().numpy() for m in (model, tiny_model(seed=7)))
    expected = 0.0
    for row, labels in enumerate(batch.labels.tolist()):
        for i, label in enumerate(labels[1:]):
            if label != -100:
                p, q = log_softmax(t[row, i] / 3), log_softmax(s[row, i] / 3)
                expected -= 0.7 * log_softmax(s[row, i])[label]
                expected += 0.3 * 9 * (np.exp(p) * (p - q)).sum()
    assert method.loss(model, batch, ctx).item() == pytest.approx(expected / 100, rel=1e-5)


def test_weight_zero_is_plain_training_bit_for_bit():
    method = Distillation(teacher="big", weight=0.0)
    model, ctx = student_of(method)
    plain = Full().prepare(tiny_model(), context())
    assert train(method, model, ctx, 3) == train(Full(), plain, context(), 3)
    assert all(p.equal(dict(plain.named_parameters())[n]) for n, p in model.named_parameters())


def test_a_teacher_equal_to_the_student_asks_for_nothing():
    method = Distillation(teacher="same", weight=1.0)
    model, ctx = student_of(method, teacher_seed=0)
    loss = method.loss(model, batch_of(), ctx)
    assert loss.item() == 0.0
    loss.backward()
    assert all(p.grad.abs().max() < 1e-6 for p in model.parameters())


def test_divergence_is_forward_and_never_negative():
    teacher, student = (torch.randn(2, 5, 9, generator=torch.manual_seed(i)) for i in (1, 2))
    labels = torch.ones(2, 5, dtype=torch.int64)
    found = token_kl(teacher, student, labels, 1.0)
    p = torch.distributions.Categorical(logits=teacher[:, :-1])
    q = torch.distributions.Categorical(logits=student[:, :-1])
    torch.testing.assert_close(found, torch.distributions.kl_divergence(p, q).flatten())
    assert found.min() > 0
    labels[0] = -100
    assert token_kl(teacher, student, labels, 1.0).shape == (4,)


def test_the_student_moves_towards_the_teacher():
    method = Distillation(teacher="big", weight=1.0)
    model, ctx = student_of(method)
    losses = train(method, model, ctx, 12, adamw(model, lr=3e-3), same_batch=True)
    assert losses[-1] < 0.8 * losses[0]


def test_the_teacher_is_neither_trained_nor_saved_nor_counted(tmp_path):
    method = Distillation(teacher="big")
    model, ctx = student_of(method)
    names = {n for n, _ in tiny_model().named_parameters()}
    assert {n for n, _ in model.named_parameters()} == names
    assert method.trained_tensors(model).keys() == names
    teacher = ctx.aux["teacher"]
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    train(method, model, ctx, 2)
    assert logits(teacher).equal(logits(tiny_model(seed=7)))
    method.save(model, tmp_path)

    def no_teacher(name):
        raise AssertionError("the artefact needs no teacher")

    again = method.load(tiny_model(seed=3), tmp_path, context(load_model=no_teacher))
    assert logits(again).equal(logits(model))


def test_another_vocabulary_is_refused():
    ctx = context(load_model=lambda name: tiny_model(shape=replace(SHAPE, vocab_size=160)))
    with pytest.raises(UserError, match=r"method\.teacher=big has 160 .* 128"):
        begun(Distillation(teacher="big"), tiny_model(), ctx)


def test_a_teacher_has_to_be_named():
    with pytest.raises(UserError, match="kd has no teacher"):
        Distillation().resolve(SHAPE)
    Distillation(teacher="big").resolve(SHAPE)


def test_cost_is_what_is_counted():
    method = Distillation(teacher="big")
    assert method.weights == "float32"
    assert stated(method) == counted(begun(method, base_for(method), context()))


def test_the_teacher_is_gone_before_the_student_is_evaluated(bench, monkeypatch):
    loss, seen, alive = Distillation.loss, [], []

    def watched(self, model, batch, ctx):
        seen.append(weakref.ref(ctx.aux["teacher"]))
        return loss(self, model, batch, ctx)

    monkeypatch.setattr(Distillation, "loss", watched)
    monkeypatch.setattr(
        "effbench.runner.stages.train.evaluate", lambda *_: alive.append(seen[-1]() is not None)
    )
    gc.disable()  # by itself, not when somebody looks for circles
    try:
        bench.run("train", "method=kd", "method.teacher=tiny", "train.max_steps=1", "evaluator=[]")
    finally:
        gc.enable()
    assert alive == [False]
