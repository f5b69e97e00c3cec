"""Which run, and which of its points, others are held against."""

from __future__ import annotations

from pathlib import Path

import pytest
from report.test_page import payload
from report.test_report import run
from typer.testing import CliRunner

from effbench.cli.main import app
from effbench.report.comparison.reference import reference_of, said_of
from effbench.report.page.write import write_report
from effbench.results.records import write
from effbench.util.errors import UserError


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A family of ranks, and another run on the same items."""
    for record in (
        run("lora", {"r1": 0.1, "r2": 0.05}, number=1),
        run("full", {"": 0.3}, number=2),
    ):
        write(record, tmp_path / "records")
    return tmp_path


def test_without_a_point_the_first_is_taken_and_said(results: Path) -> None:
    first = reference_of("0001", results / "records")
    assert said_of("0001", first) == [
        "Held against lora r1, the first of its 2 operating points; name another as 00010000@r2."
    ]
    assert said_of("0001@r1", first) == []
    assert said_of("0002", reference_of("0002", results / "records")) == []


def test_the_report_is_held_against_the_point_that_is_named(results: Path) -> None:
    out = results / "report.html"
    for ref, other in (("0001@r2", "r1"), ("0001@r1", "r2")):
        write_report(results, [], ref, out)
        [forest] = payload(out.read_text())[0]["forest"]
        assert forest["against"] == f"lora {ref[-2:]}"
        assert [row[0] for row in forest["rows"]] == [f"lora {other}", "full"]
        assert "Held against" not in out.read_text()
    assert write_report(results, ["0001@r2", "0002"], "", out) == 2


def test_compare_holds_against_the_point_that_is_named(results: Path) -> None:
    words = ["compare", "0001@r2", "0002", "--format", "csv", "--results", str(results)]
    said = CliRunner().invoke(app, words, catch_exceptions=False)
    assert ",lora r2," in said.stdout and ",lora r1," not in said.stdout


@pytest.mark.parametrize(
    ("ref", "words", "said"),
    [
        ("0001@r3", [], "0001@r3 has no operating point 'r3'"),
        ("0002@r1", [], "0002@r1 has no operating point 'r1'"),
        ("0001@r2", ["--same-points"], "names a point, and --same-points another"),
        ("0001@r2", ["--select", "loss@validation"], "names a point, and --select another"),
    ],
)
def test_a_point_that_cannot_be_is_named(
    results: Path, ref: str, words: list[str], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        CliRunner().invoke(
            app, ["compare", ref, "0001", *words, "--results", str(results)], catch_exceptions=False
        )
