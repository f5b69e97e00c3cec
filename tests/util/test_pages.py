from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from effbench.util import pages


def huge_bytes() -> int:
    found = re.search(r"AnonHugePages:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    return 1024 * int(found[1]) if found else 0


def test_what_is_read_again_lies_on_huge_pages_and_keeps_its_content() -> None:
    held = torch.arange(4 * pages.HUGE, dtype=torch.uint8)
    before, address, size = held.clone(), held.data_ptr(), huge_bytes()
    made = pages.use_huge_pages([held, held[: pages.HUGE]])
    assert held.equal(before)
    assert held.data_ptr() == address
    if not made:
        pytest.skip("this kernel makes no huge pages")
    assert made <= 5
    assert huge_bytes() >= min(size + pages.HUGE, made * pages.HUGE)


def test_a_page_is_made_where_it_is_filled_and_not_where_little_of_it_is_used() -> None:
    class Piece(NamedTuple):
        begin: int
        nbytes: int

        def data_ptr(self) -> int:
            return self.begin

    quarter = pages.HUGE // 4
    scattered = [Piece(n * pages.HUGE, quarter) for n in range(5)]
    assert pages._filled(scattered) == []
    beside = [Piece(quarter * n, quarter) for n in (8, 9, 10, 12, 13)]
    assert pages._filled([*beside, beside[0], *beside[3:]]) == [2 * pages.HUGE]


def test_what_would_take_long_is_left_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    held = torch.ones(4 * pages.HUGE, dtype=torch.uint8)
    monkeypatch.setattr(pages, "MOST", held.nbytes - 1)
    assert pages.use_huge_pages([held]) == 0


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pages, "MAPS", tmp_path / "none")
    assert pages.use_huge_pages([torch.zeros(2 * pages.HUGE, dtype=torch.uint8)]) == 0
