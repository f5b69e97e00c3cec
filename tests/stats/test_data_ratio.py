"""The script that takes a data ratio from the records of a campaign."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import data_ratio

SIZES = (40, 200, 1000)
SHARES = {"Ours": 0.8, "Ours, 40 pairs": 0.6, "Ours, 200 pairs": 0.7, "Theirs": 0.7}


class Records:
    """A campaign whose arms are right on a share of their rows that its name says."""

    metrics = ("pair_accuracy",)
    arms = (*SHARES, "Theirs too, 40 pairs")

    def records(self, results: Path, arms: list[str]) -> dict[str, list[Any]]:
        found = {}
        for arm in arms:
            right = round(100 * SHARES[arm])
            outcome = SimpleNamespace(
                metric="pair_accuracy", values=[1.0] * right + [0.0] * (100 - right)
            )
            rows = {"splits": {"train": {"rows": SIZES[-1]}}}
            found[arm] = [SimpleNamespace(seeds=[n], outcomes=[outcome], data=rows) for n in (0, 1)]
        return found


def test_sizes_are_read_from_the_names_of_arms_and_the_ratio_from_outcomes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(data_ratio, "campaign_named", lambda name: Records())
    monkeypatch.setattr(sys, "argv", ["data_ratio.py", "mine", "Ours", "Theirs"])
    data_ratio.main()
    shown = capsys.readouterr().out
    assert "| Ours | 0.600 | 0.700 | 0.800 |" in shown
    assert "| Theirs |  |  | 0.700 |" in shown
    assert "| Theirs | 5.0 [" in shown
