"""Every evaluator, stopped after any group of items, goes on there and ends in the same result."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from conftest import Bench

from effbench.api import registry
from effbench.results.journal import Journal

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


class Watch:
    """Counts the items that journals are given, and stops the process after some groups."""

    def __init__(self, patch: pytest.MonkeyPatch, stop_after: int | None) -> None:
        self.items: Counter[tuple[str, int]] = Counter()
        self.groups = 0
        add = Journal.add

        def watched(journal: Journal, group: Mapping[int, Any]) -> None:
            add(journal, group)
            self.items.update((str(journal._path), index) for index in group)
            self.groups += 1
            if self.groups == stop_after:
                raise KeyboardInterrupt

        patch.setattr(Journal, "add", watched)


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
