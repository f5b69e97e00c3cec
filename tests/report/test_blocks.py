"""Rows of the report are packed in blocks, kept, and made anew where a record changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from report.test_page import cells, named, payload
from report.test_report import run

from effbench.report.page import blocks
from effbench.report.page.blocks import blocks_of
from effbench.report.page.render import page, page_of
from effbench.report.page.write import write_report
from effbench.results.records import Metric, Record, read, write
from effbench.results.store import Store

RUNS = 14


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Runs of which one has a metric that no other has, and one a value that is not finite."""
    monkeypatch.setattr(blocks, "FEWEST", 1)
    monkeypatch.setattr(blocks, "MORE", 2)
    for record in records():
        write(record, tmp_path / "records")
    settle(tmp_path / "records")
    return Store(tmp_path)


def records() -> list[Record]:
    """Return the runs, latest first."""
    odd = {3: [Metric("kl", 0.1, "nats/token")], 5: [Metric("loss", float("inf"), "nats/token")]}
    there = range(RUNS)[::-1]
    return [named(n, started=day(n), **({"metrics": odd[n]} if n in odd else {})) for n in there]


def day(number: int) -> str:
    return f"2026-01-{number + 1:02d}T00:00:00"


def settle(folder: Path) -> None:
    """Let the files be old enough to be kept."""
    for path in folder.glob("*.json"):
        os.utime(path, (1e9, 1e9))


def read_by(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the runs that are read to pack what is not packed yet."""
    found: list[str] = []

    def counted(path: Path, outcomes: bool = True) -> Record:
        found.append(path.stem)
        return read(path, outcomes)

    monkeypatch.setattr(blocks, "read", counted)
    blocks_of(store)
    return found


def test_blocks_say_what_one_says(store: Store) -> None:
    keys, found = blocks_of(store)
    assert len(found) > 2 and keys == [record.key for record in records()]
    text, whole = page_of(found, records()), page(records())
    assert [c["name"] for c in payload(text)[0]["columns"]] == [
        c["name"] for c in payload(whole)[0]["columns"]
    ]
    for column in payload(whole)[0]["columns"]:
        assert cells(text, column["name"]) == cells(whole, column["name"]), column["name"]


def test_only_the_block_of_a_new_run_is_packed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(read_by(store, monkeypatch)) == RUNS
    assert read_by(store, monkeypatch) == []
    write(named(20, started=day(5)[:-8] + "12:00:00"), store.records)
    settle(store.records)
    again = read_by(store, monkeypatch)
    assert f"{20:016x}" in again and len(again) < RUNS / 2
    assert read_by(store, monkeypatch) == []


def test_what_changed_is_packed_again_and_what_is_damaged_is_made_anew(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_by(store, monkeypatch)
    write(named(4, started=day(4), label="other"), store.records)
    settle(store.records)
    assert 0 < len(read_by(store, monkeypatch)) < RUNS / 2
    assert "other" in cells(page_of(blocks_of(store)[1], []), "label")
    store.rows.write_text(store.rows.read_text().replace("loss", "lost"))
    assert len(read_by(store, monkeypatch)) == RUNS


def test_runs_without_an_item_of_the_reference_are_not_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    near = [run("lora", {"": 0.1}, number=1), run("full", {"": 0.2}, number=2)]
    for record in (*near, named(30, outcomes=[])):
        write(record, tmp_path / "records")
    parsed: list[str] = []

    def counted(path: Path, outcomes: bool = True) -> Record:
        parsed.extend([path.stem] * outcomes)
        return read(path, outcomes)

    monkeypatch.setattr("effbench.report.page.write.read", counted)
    out = tmp_path / "report.html"
    assert write_report(tmp_path, [], near[0].key, out) == 3
    assert parsed == [near[1].key]
    assert "as no items are the same: 1 run." in out.read_text()
    [forest] = payload(out.read_text())[0]["forest"]
    assert [row[-1] for row in forest["rows"]] == [near[1].key]
