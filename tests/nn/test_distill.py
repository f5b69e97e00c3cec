"""The three distillation terms against float64 written by hand, and what must hold of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import batch_of, tiny_model

from effbench.nn.losses.distill import block_term, logit_terms, three_terms


def inputs_of(batch: Any) -> dict[str, torch.Tensor]:
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}


def golden(
    student: Any, teacher: Any, batch: Any, ends: list[int], forward: bool
) -> tuple[float, float, float]:
    """Return the terms from whole logits in float64, position by position."""
    outputs = [
        m(**inputs_of(batch), output_hidden_states=True)
        for m in (student.double(), teacher.double())
    ]
    blocks = soft = hard = 0.0
    for row, labels in enumerate(batch.labels.tolist()):
        for t, label in enumerate(labels[1:]):
            if label == -100:
                continue
            s, q = (o.logits[row, t].log_softmax(-1) for o in outputs)
            first, second = (q, s) if forward else (s, q)
            soft += float((first.exp() * (first - second)).sum())
            hard -= float(s[int(q.argmax())])
            for end in ends:
                a, b = (o.hidden_states[end + 1][row, t] for o in outputs)
                blocks += float((a - b).square().mean()) / len(ends)
    return blocks, soft, hard


@pytest.mark.parametrize("direction", ["student_teacher", "teacher_student"])
@torch.no_grad()
def test_terms_are_those_of_a_plain_reference(direction: Any) -> None:
    student, teacher, batch = tiny_model(), tiny_model(seed=7), batch_of()
    terms = three_terms(student, teacher, inputs_of(batch), batch.labels, [0], direction)
    found = [float(t) for t in (terms.blocks, terms.soft, terms.hard)]
    expected = golden(student, teacher, batch, [0], direction == "teacher_student")
    assert found == pytest.approx(expected, rel=1e-5)


def test_pieces_and_the_whole_have_one_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, target = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((21, 8), (40, 8), (21, 40))
    )
    gradients = []
    for chunk in (4, 1000):
        states, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        soft, hard = logit_terms(lambda h, w=head: h @ w.T, states, target, chunk=chunk)
        (0.3 * soft + 0.7 * hard).backward()
        gradients.append((soft.detach(), hard.detach(), states.grad, head.grad))
    for pieces, whole in zip(*gradients, strict=True):
        torch.testing.assert_close(pieces, whole)

    states, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    log_s, log_t = (states @ head.T).log_softmax(-1), target.log_softmax(-1)
    soft = (log_s.exp() * (log_s - log_t)).sum()
    hard = torch.nn.functional.cross_entropy(states @ head.T, target.argmax(-1), reduction="sum")
    (0.3 * soft + 0.7 * hard).backward()
    torch.testing.assert_close(gradients[0][2], states.grad)
    torch.testing.assert_close(gradients[0][3], head.grad)


def test_no_more_than_a_chunk_of_the_student_is_kept_for_the_backward_pass() -> None:
    hidden = torch.randn(64, 4, requires_grad=True)
    weight = torch.randn(500, 4, requires_grad=True)
    target, largest = torch.randn(64, 500), 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        if tensor.untyped_storage().data_ptr() != target.untyped_storage().data_ptr():
            largest = max(largest, tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        soft, hard = logit_terms(lambda h: h @ weight.T, hidden, target, chunk=8)
    assert largest <= weight.untyped_storage().nbytes()
    (soft + hard).backward()
    assert weight.grad is not None


def test_equal_models_differ_in_nothing() -> None:
    model, batch = tiny_model(), batch_of()
    terms = three_terms(model, tiny_model(), inputs_of(batch), batch.labels, [0, 1])
    assert float(terms.blocks.detach()) == float(terms.soft.detach()) == 0.0
    with torch.no_grad():
        logits = model(**inputs_of(batch)).logits[:, :-1][batch.labels[:, 1:] != -100]
    own = torch.nn.functional.cross_entropy(logits, logits.argmax(-1), reduction="sum")
    assert float(terms.hard.detach()) == pytest.approx(float(own), rel=1e-6)


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher, batch = tiny_model(), tiny_model(seed=7), batch_of()
    terms = three_terms(student, teacher, inputs_of(batch), batch.labels, [1])
    (terms.blocks + terms.soft + terms.hard).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_without_blocks_their_term_is_zero() -> None:
    assert float(block_term([], torch.ones(1))) == 0.0
