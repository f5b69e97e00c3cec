"""Which entries are expected to be looked at, against the formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from evictions import FirstLayer, exact_model, held_columns, top, turn
from helpers import some_ids

from effbench.methods.cache.expected_attention import ExpectedCache
from effbench.nn.decode.staged import WholeSession
from effbench.util.errors import UserError


def expected(
    first: FirstLayer, config: Any, cache: ExpectedCache, covariance: bool
) -> list[list[int]]:
    """Return what stays; the mean turn is a matrix, made of the turned unit vectors."""
    length, heads, size = first.projected.shape
    unit = torch.eye(size, dtype=torch.float64)
    ahead = range(length, length + cache.future)
    matrix = torch.stack([turn(unit, t, config).T for t in ahead]).mean(0)
    groups, n = first.keys.shape[1], cache.sinks
    found = []
    for g in range(groups):
        keys, each = first.keys[n:, g], range(g * heads // groups, (g + 1) * heads // groups)
        weights = torch.zeros(length - n, dtype=torch.float64)
        for h in each:
            queries = first.projected[n:, h]
            mean = matrix @ queries.mean(0)
            spread = matrix @ torch.cov(queries.T, correction=0) @ matrix.T
            z = keys @ mean / size**0.5
            if covariance:
                z = z + torch.stack([k @ spread @ k for k in keys]) / (2 * size)
            weights += z.softmax(0) / len(each)
        scores = (weights + cache.epsilon) * first.values[n:, g].norm(dim=1)
        found.append([*range(n), *(n + j for j in top(scores, cache.budget - n))])
    return found


@pytest.mark.parametrize("covariance", [True, False])
@pytest.mark.parametrize(("sinks", "epsilon"), [(4, 0.0), (0, 0.05)])
def test_it_keeps_what_is_expected_to_be_looked_at(
    sinks: int, epsilon: float, covariance: bool
) -> None:
    model, ids = exact_model(), some_ids(1, 30)
    for weight in (x.self_attn.q_proj.weight for x in model.model.layers):
        weight.mul_(3)  # so that queries spread
    cache = ExpectedCache(11, sinks=sinks, future=25, covariance=covariance, epsilon=epsilon)
    session, first = WholeSession(model, cache), FirstLayer.of(model, ids[0])
    session.prefill(ids)
    held = held_columns(session, first)
    assert held == expected(first, model.config, cache, covariance)
    if sinks:
        assert held != expected(first, model.config, cache, not covariance)


def test_padding_on_the_left_changes_no_score() -> None:
    """Places are counted from a row's first token, those to come too."""
    draws = torch.Generator().manual_seed(3)
    query, keys, values = (
        torch.randn(1, heads, 20, 16, generator=draws, dtype=torch.float64) for heads in (4, 2, 2)
    )
    score = ExpectedCache(8, sinks=3, future=7).score(exact_model())
    alone = score(query[:, :, 5:], keys[:, :, 5:], values[:, :, 5:], None)
    found = score(query, keys, values, torch.tensor([5]))[:, :, 5:]
    torch.testing.assert_close(found, alone, atol=1e-9, rtol=1e-6)


def test_turns_that_depend_on_the_length_are_refused() -> None:
    model = exact_model()
    model.model.rotary_emb.rope_type = "dynamic"
    with pytest.raises(UserError, match="kind 'dynamic' depend on the length"):
        WholeSession(model, ExpectedCache(8))
