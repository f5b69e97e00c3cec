"""Tables of records in their forms."""

from __future__ import annotations

import csv
import io
import runpy
from pathlib import Path

import pytest

from effbench.report.table import Table, Value

ROOT = Path(__file__).parents[2]


def test_the_script_of_tables_has_a_row_for_each_record() -> None:
    text = runpy.run_path(str(ROOT / "scripts" / "tables.py"))["runs_text"](ROOT / "results")
    records = list((ROOT / "results" / "records").glob("*.json"))
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert len(rows) == len(records) > 100


FORMULAS = (
    "=cmd|' /C calc'!A0",
    "+1+cmd",
    "-2+3",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n=1",
    " =1",
    "\uff1d1",
)
NUMBERS = ("-1.5", "+2", "-3e-05", "-.5", "1,5", "-")


@pytest.mark.parametrize("text", FORMULAS)
def test_no_cell_of_csv_is_calculated(text: str) -> None:
    cells = [*csv.reader(io.StringIO(Table("", (text,), [(text,)]).csv(), newline=""))]
    assert cells == [["'" + text.replace("\r", " ").replace("\n", " ")]] * 2


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers_of_csv_stay_numbers(text: str) -> None:
    table = Table("", ("text", "number"), [(text, Value(-1.5, "", -2.0, -1.0))])
    [_, row] = csv.reader(io.StringIO(table.csv()))
    assert row == [text, "-1.5", "-2.0", "-1.0"]
