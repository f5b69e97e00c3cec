"""What TOVA drops, against its formula token by token in float64."""

from __future__ import annotations

import torch
from evictions import FirstLayer, exact_model, held_columns, top
from helpers import some_ids

from effbench.methods.cache.tova import MultiState
from effbench.nn.decode.staged import WholeSession


def dropped_by(first: FirstLayer, asking: int, held: list[int], count: int) -> list[int]:
    """Return what stays of some tokens when a query has looked at them, all heads together."""
    _, heads, size = first.queries.shape
    group, looked = heads // first.keys.shape[1], torch.zeros(len(held), dtype=torch.float64)
    for h in range(heads):
        products = first.keys[held, h // group] @ first.queries[asking, h]
        looked += (products / size**0.5).softmax(0) / heads
    return [held[j] for j in top(looked, count)]


def test_each_token_drops_what_it_looks_at_least() -> None:
    model, ids, prompt, count = exact_model(), some_ids(1, 34), 14, 9
    first, session = FirstLayer.of(model, ids[0]), WholeSession(model, MultiState(count))
    session.prefill(ids[:, :prompt])
    expected = dropped_by(first, prompt - 1, list(range(prompt)), count)
    assert held_columns(session, first) == [expected, expected]
    for t in range(prompt, 34):
        session.step(ids[:, t : t + 1])
        expected = dropped_by(first, t, [*expected, t], count)
        assert held_columns(session, first) == [expected, expected]
    assert expected != list(range(25, 34))
