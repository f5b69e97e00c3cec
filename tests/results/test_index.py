"""The list of records is kept, and never trusted when a file has changed."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from effbench.results import records
from effbench.results.index import heads, summaries
from effbench.results.lookup import find
from effbench.results.records import SCHEMA, Record, read, write
from effbench.results.store import Store
from effbench.util.errors import UserError
from effbench.util.seals import unsealed

RECORD = Record(SCHEMA, "0" * 16, "a label", "eval", {}, {}, "", "2026-01-01T00:00:00", 1.0, [])
CODE = [Path(__file__)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    for number, started in enumerate(("2026-01-03", "2026-01-01", "2026-01-02")):
        write(replace(RECORD, key=f"{number:016d}", started=started), tmp_path / "records")
    settle(tmp_path / "records")
    return Store(tmp_path)


def settle(folder: Path) -> None:
    """Let the files be old enough to be kept."""
    for path in folder.glob("*.json"):
        os.utime(path, (1e9, 1e9))


def listed(store: Store, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], int]:
    """Return the labels in order, and how many files were parsed."""
    parsed: list[Path] = []

    def counted(path: Path, outcomes: bool = True) -> Record:
        parsed.append(path)
        return read(path, outcomes)

    monkeypatch.setattr(records, "read", counted)
    rows = summaries(store, lambda r: (f"{r.key[-1]} {r.label}",), CODE)
    return [row[0] for row in rows], len(parsed)


def test_each_file_is_parsed_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = ["1 a label", "2 a label", "0 a label"]
    assert listed(store, monkeypatch) == (labels, 3)
    assert listed(store, monkeypatch) == (labels, 0)


def test_what_changed_is_parsed_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    listed(store, monkeypatch)
    write(replace(RECORD, key="0" * 15 + "1", label="b label"), store.records)  # of the same size
    settle(store.records)
    assert listed(store, monkeypatch) == (["1 b label", "2 a label", "0 a label"], 1)
    (store.records / f"{'0' * 15}2.json").unlink()
    assert listed(store, monkeypatch) == (["1 b label", "0 a label"], 0)


def test_a_file_that_is_being_written_is_not_kept(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(replace(RECORD, key="0" * 15 + "3", started="2026-01-04"), store.records)
    assert listed(store, monkeypatch)[1] == 4
    assert listed(store, monkeypatch)[1] == 1


def test_other_code_makes_it_anew(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    listed(store, monkeypatch)
    (tmp_path / "code.py").write_text("another")
    monkeypatch.setattr(f"{__name__}.CODE", [tmp_path / "code.py"])
    assert listed(store, monkeypatch)[1] == 3


@pytest.mark.parametrize("content", ["", "{", "[]", '{"code": 1}', "null"])
def test_a_damaged_index_is_none(
    content: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed(store, monkeypatch)
    store.index.write_text(content)
    assert listed(store, monkeypatch)[1] == 3
    assert json.loads(unsealed(store.index.read_text(), store.index.name))["entries"]


def test_an_index_that_cannot_be_written_is_none(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.runs.write_text("a file stands where the folder should be")
    assert listed(store, monkeypatch) == listed(store, monkeypatch)
    assert listed(store, monkeypatch)[1] == 3


def test_a_damaged_record_is_told_of_every_time(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    (store.records / "ffff.json").write_text("{")
    for _ in range(2):
        with pytest.raises(UserError, match="is not a whole record"):
            listed(store, monkeypatch)


def test_the_latest_is_found_by_the_index_whatever_it_lacks(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With entries that are gone, older than their file, or made by other code of lists."""
    latest = find(store.records, "latest").key
    assert latest == "0" * 16, "by its end, without an index"
    assert not store.index.exists()
    listed(store, monkeypatch)
    assert listed(store, monkeypatch)[1] == 0
    write(replace(RECORD, key="0" * 15 + "1", started="2026-01-04"), store.records)
    assert find(store.records, "latest").key == "0" * 15 + "1"
    (store.records / f"{'0' * 15}1.json").unlink()
    assert find(store.records, "latest").key == "0" * 16
    store.index.write_text("{")
    assert [head.key[-1] for head in heads(store.records, store.index)] == ["2", "0"]
