"""Every evaluator, stopped after any group of items, goes on there and ends in the same result."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import Watch

from effbench.api import registry
from effbench.testing.bench import Bench

WORDS = [
    "hardware.device=cpu",
    "hardware.dtype=float32",
    "hardware.threads=1",
    "dataset=arithmetic",
    "+dataset.limit.test=12",
]


def words_of(name: str) -> list[str]:
    settings = {"batch_tokens": 60, **registry.find("evaluators", name).trial}
    known = registry.find("evaluators", name).__dataclass_fields__
    return [
        *WORDS,
        f"evaluator={name}",
        *(f"evaluator.{name}.{k}={json.dumps(v)}" for k, v in settings.items() if k in known),
    ]


def itemwise() -> list[str]:
    return [n for n in registry.names("evaluators") if registry.find("evaluators", n).itemwise]


@pytest.mark.parametrize("stop_after", [1, 2])
@pytest.mark.parametrize("name", itemwise())
def test_no_item_is_lost_or_done_twice(
    name: str, stop_after: int, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    words = words_of(name)
    whole = Bench(bench.root / "whole").run("eval", *words)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        first = Watch(patch, stop_after)
        bench.run("eval", *words)
    with monkeypatch.context() as patch:
        second = Watch(patch, None)
        record = bench.run("eval", *words)
    assert first.groups == stop_after and second.groups > 0
    assert set((first.items + second.items).values()) == {1}
    assert record.outcomes == whole.outcomes
    assert [m for m in record.metrics if m.split or m.task] == [
        m for m in whole.metrics if m.split or m.task
    ]
