"""Which keys the norm keeps, in one pass as token by token, and layers that keep everything."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from evictions import FirstLayer, exact_model, held_columns, top
from helpers import SHAPE, some_ids

from effbench.api.cost import cache_bytes
from effbench.api.shape import ModelShape
from effbench.methods.cache.knorm import KNorm, SmallKeys
from effbench.methods.evicts import Budget
from effbench.nn.decode.staged import WholeSession
from effbench.util.errors import UserError


@pytest.mark.parametrize("prompt", [1, 11, 30])
def test_the_shortest_keys_stay_wherever_the_prompt_ends(prompt: int) -> None:
    model, ids, count = exact_model(), some_ids(1, 30), 9
    first, session = FirstLayer.of(model, ids[0]), WholeSession(model, SmallKeys(count))
    session.prefill(ids[:, :prompt])
    for t in range(prompt, 30):
        session.step(ids[:, t : t + 1])
    norms = (first.keys**2).sum(2).sqrt()
    assert held_columns(session, first) == [top(-norms[:, g], count) for g in range(2)]


def test_layers_that_are_skipped_keep_everything() -> None:
    model, ids = exact_model(torch.float32), some_ids(1, 20)
    method = KNorm(budget=(6,), skip_layers=(0,)).resolve(SHAPE)
    session = WholeSession(model, method.decoder(Budget(6)).cache)
    session.prefill(ids)
    layers: Any = session.staged.cache.layers
    assert [layer.get_seq_length() for layer in layers] == [20, 6]
    shape = method.shape(ModelShape.of(SHAPE), Budget(6), "use", None)
    assert session.kv_bytes() == cache_bytes(shape, "float32", 20) == 26 * 2 * 2 * 16 * 4


def test_layers_that_cannot_be_skipped_are_refused() -> None:
    with pytest.raises(UserError, match="leaves none of 2 layers"):
        KNorm().resolve(SHAPE)
    with pytest.raises(UserError, match="names layer 7 of 4"):
        KNorm(skip_layers=(7,)).resolve(replace(SHAPE, num_layers=4))
