"""What every cache policy holds to: rows decode as alone, and what is taken back was never read."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from helpers import decoded, some_ids, tiny_model

from effbench.methods.cache.streaming import SinkWindow
from effbench.nn.decode.latent_cache import LatentCache, LatentValues, hold
from effbench.nn.decode.latent_plan import Plan, Ranks
from effbench.nn.decode.policy import CachePolicy
from effbench.nn.decode.quantised_cache import QuantisedCache
from effbench.nn.decode.staged import StagedDecoder, WholeSession
from effbench.nn.llama.factorised import bases
from effbench.testing.kinds import others_slow

POLICIES = [
    SinkWindow(4, 8),
    SinkWindow(0, 7),
    SinkWindow(1, 1),
    SinkWindow(3, 2),
    QuantisedCache(4, 4, 6),
    QuantisedCache(2, 3, 1),
    LatentCache("few"),
    LatentValues("values"),
    LatentCache("few", QuantisedCache(4, 4, 6)),
    LatentValues("values", QuantisedCache(2, 2, 3)),
]
"""All of them leave something out or change it within a few tokens."""
PLAN = Plan(32, {"few": Ranks([32, 20], [8, 28]), "values": Ranks([32, 32], [12, 16])})
"""Ranks of the caches of coordinates; with 28, values are made for a long prompt."""
EXACT = {"atol": 1e-9, "rtol": 1e-9}


def model_of(policy: CachePolicy) -> Any:
    """Return a model to which the policy applies."""
    model = tiny_model(dtype=torch.float64).eval().requires_grad_(False)
    if isinstance(policy, LatentCache):
        hold(model, PLAN, [bases(layer.self_attn) for layer in model.model.layers])
    return model


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize(
    "lengths",
    others_slow([*product([5, 9, 21, 30], [0, 11])], [(5, 11), (9, 0), (21, 11), (30, 0)]),
)
def test_padded_rows_decode_as_alone_and_are_reordered(
    policy: CachePolicy, lengths: tuple[int, int]
) -> None:
    """Reordered rows are the short ones: the longest, which holds the most, is dropped."""
    prompt, steps = lengths
    model, ids, end = model_of(policy), some_ids(3, prompt + steps + 8), prompt + steps
    pads = [3, 0, prompt - 1]
    mask = torch.tensor([[0] * p + [1] * (prompt - p) for p in pads])
    session = WholeSession(model, policy)
    found = decoded(session, ids[:, :end], prompt, mask)
    alone = [WholeSession(model, policy) for _ in pads]
    for row, start in enumerate(pads):
        expected = decoded(alone[row], ids[row : row + 1, start:end], prompt - start)
        torch.testing.assert_close(found[row], expected[0], **EXACT)
    rows = torch.tensor([2, 0, 2])
    session.reorder(rows)
    for t in range(end, end + 8):
        expected = torch.cat([s.step(ids[r : r + 1, t : t + 1]) for r, s in enumerate(alone)])
        torch.testing.assert_close(session.step(ids[rows, t : t + 1]), expected[rows], **EXACT)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_what_is_taken_back_was_never_read(policy: CachePolicy, padded: bool) -> None:
    model, ids = model_of(policy), some_ids(2, 30)
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[0, :3] = 1 - int(padded)
    whole = decoded(WholeSession(model, policy), ids, 5, mask)
    staged = StagedDecoder(model, [model.config.num_hidden_layers], policy, undo=4)
    staged.read(ids[:, :5], mask)
    staged.run(0)
    for t in range(5, 30):
        staged.read(some_ids(2, 1 + t % 4, seed=t))
        staged.run(0)
        staged.crop(t)
        staged.read(ids[:, t : t + 1])
        found = staged.logits(0, staged.run(0))[:, -1]
        torch.testing.assert_close(found, whole[:, t - 4], **EXACT)
    if not isinstance(policy, LatentCache):  # which forgets nothing
        with pytest.raises(ValueError, match="only the last 4 tokens"):
            staged.crop(12)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_what_queries_saw_is_freed_before_the_next_layer(policy: CachePolicy) -> None:
    """A view may hold more than its entry keeps, as long as the entry has it."""
    session, found = WholeSession(model_of(policy), policy), list[bool]()
    layers: Any = session.staged.cache.layers

    def look(*_: Any) -> None:
        found.append(layers[0].view is None and layers[0].is_initialized)

    hook = session.staged.decoder.layers[1].register_forward_pre_hook(look)
    decoded(session, some_ids(2, 30), 20)
    hook.remove()
    assert found == [True] * 11
