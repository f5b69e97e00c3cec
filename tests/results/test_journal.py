"""An interrupted evaluation goes on at the next group; no item is lost or computed twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from effbench.results.journal import Journal
from effbench.util.errors import UserError

ITEMS = ["a", "b", "c", "d", "e"]
GROUPS = [[4, 0], [1, 3], [2]]


def test_results_come_back_in_item_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "x.items", ITEMS)
    for group in journal.pending(GROUPS):
        journal.add({i: i * 0.1 for i in group})
    assert journal.complete
    assert journal.values() == [i * 0.1 for i in range(5)]
    assert Journal(tmp_path / "x.items", ITEMS).values() == journal.values()


def test_only_what_is_not_finished_is_pending(tmp_path: Path) -> None:
    Journal(tmp_path / "x.items", ITEMS).add({4: 1.0, 0: 2.0})
    again = Journal(tmp_path / "x.items", ITEMS)
    assert list(again.pending(GROUPS)) == [[1, 3], [2]]
    assert len(again) == 2 and 4 in again and 1 not in again and not again.complete
    with pytest.raises(KeyError):
        again.values()


def test_a_torn_line_is_dropped_and_the_file_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "x.items"
    journal = Journal(path, ITEMS)
    journal.add({0: 1.0})
    journal.add({1: 2.0})
    path.write_bytes(path.read_bytes()[:-3])
    again = Journal(path, ITEMS)
    assert 0 in again and 1 not in again
    again.add({1: 3.0})
    third = Journal(path, ITEMS)
    assert 0 in third and 1 in third and len(third) == 2


def test_a_damaged_line_takes_what_follows_with_it(tmp_path: Path) -> None:
    path = tmp_path / "x.items"
    journal = Journal(path, ITEMS)
    journal.add({0: 1.0})
    journal.add({1: 2.0})
    head, _, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(head + b"%%%\n" + second)
    assert len(Journal(path, ITEMS)) == 0


def test_other_items_start_anew(tmp_path: Path) -> None:
    Journal(tmp_path / "x.items", ITEMS).add({0: 1.0})
    assert len(Journal(tmp_path / "x.items", ["a", "b"])) == 0


def test_without_a_file_it_stays_in_memory() -> None:
    journal = Journal(None, ITEMS)
    journal.add({0: 1.0})
    assert len(journal) == 1


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError):
        Journal(tmp_path / "file" / "x.items", ITEMS)
