"""What SnapKV keeps of a prompt, against its formula token by token in float64."""

from __future__ import annotations

import pytest
import torch
from evictions import FirstLayer, exact_model, held_columns, top
from helpers import SHAPE, some_ids

from effbench.methods.cache.snapkv import ObservedCache, SnapKV
from effbench.nn.decode.staged import WholeSession
from effbench.util.errors import UserError


def expected(first: FirstLayer, window: int, kernel: int, count: int) -> list[list[int]]:
    length, heads = first.queries.shape[:2]
    groups, before = first.keys.shape[1], length - window
    looked = torch.stack([first.weights(t) for t in range(before, length)]).mean(0)
    found = []
    for g in range(groups):
        each = range(g * heads // groups, (g + 1) * heads // groups)
        scores = torch.zeros(before, dtype=torch.float64)
        for j in range(before):
            near = [i for i in range(j - kernel // 2, j + kernel // 2 + 1) if 0 <= i < before]
            scores[j] = sum(float(looked[h, i]) for h in each for i in near) / kernel / len(each)
        found.append([*top(scores, count - window), *range(before, length)])
    return found


@pytest.mark.parametrize(("window", "kernel", "count"), [(4, 5, 12), (1, 1, 9), (7, 3, 7)])
def test_it_keeps_what_the_window_looks_at(window: int, kernel: int, count: int) -> None:
    model, ids = exact_model(), some_ids(1, 26)
    session = WholeSession(model, ObservedCache(count, window=window, kernel=kernel))
    session.prefill(ids)
    first = FirstLayer.of(model, ids[0])
    held = held_columns(session, first)
    assert held == expected(first, window, kernel, count)
    assert count == window or held[0] != held[1]  # heads choose for themselves


def test_a_kernel_without_a_middle_is_refused() -> None:
    with pytest.raises(UserError, match="kernel=4 has no middle") as error:
        SnapKV(kernel=4).resolve(SHAPE)
    assert error.value.hint == "Set method.kernel=5."
