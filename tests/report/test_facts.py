"""What a comparison must know of other runs is found without reading all of them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from report.test_report import run

from effbench.report import facts as kept
from effbench.report.comparison.budgets import Tried
from effbench.report.facts import facts, told_of
from effbench.results.records import Record, read, read_all, write
from effbench.results.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A base and what was trained from it: four ranks, the last with three seeds; other methods."""
    base = run("full", {}, number=1)
    tried = [run("lora", {}, number=60 + r, settings={"rank": r}) for r in (2, 4, 8, 16)]
    seeds = [run("lora", {}, number=80 + s, settings={"rank": 16}, seed=s) for s in (1, 2)]
    others = [run("full", {}, number=200 + n, settings={"n": n}) for n in range(20)]
    for record in (base, *(replace(r, parent=base.key) for r in (*tried, *seeds)), *others):
        write(record, tmp_path / "records")
        os.utime(tmp_path / "records" / f"{record.key}.json", (1e9, 1e9))
    return Store(tmp_path)


def key(number: int) -> str:
    return f"{number:04x}".ljust(16, "0")


def told(store: Store, number: int, tunings: list[set[str]]) -> tuple[Record, list[Record]]:
    record = read(store.records / f"{key(number)}.json")
    return record, told_of([record], store, tunings)


@pytest.mark.parametrize("tunings", [[], [{key(62), key(64)}], [{key(76)}]])
@pytest.mark.parametrize("number", [62, 68, 81])
def test_what_is_told_counts_as_all_records_do(
    store: Store, number: int, tunings: list[set[str]]
) -> None:
    record, known = told(store, number, tunings)
    everything = read_all(store.records, outcomes=False)
    assert Tried(known, tunings).of(record) == Tried(everything, tunings).of(record)
    assert key(1) in {r.key for r in known}, "what it went on from"


def test_one_record_of_each_setting_is_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    facts(store)
    opened: list[str] = []

    def noted(path: Path, outcomes: bool) -> Record:
        opened.append(path.stem)
        return read(path, outcomes)

    monkeypatch.setattr(kept, "read", noted)
    told(store, 62, [])
    assert len(opened) == 3, "the other three ranks, and of the seeds one"


def test_a_declared_grid_is_known_whole_whatever_it_varied(store: Store) -> None:
    """A grid over methods too, of which a run is a part by another seed of it."""
    grid = {key(81), key(200), key(201), "f" * 16}
    record, known = told(store, 76, [grid])
    assert grid - {r.key for r in known} == {"f" * 16}, "which has no record"
    assert Tried(known, [grid]).of(record) == 3
