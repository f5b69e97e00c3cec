from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_script_of_tables_has_a_row_for_each_record() -> None:
    text = runpy.run_path(str(ROOT / "scripts" / "tables.py"))["runs_text"](ROOT / "results")
    records = list((ROOT / "results" / "records").glob("*.json"))
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert len(rows) == len(records) > 100
