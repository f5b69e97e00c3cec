"""Tables of campaigns, from records alone."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from campaigns import two_arms
from test_report import run
from typer.testing import CliRunner

from effbench.cli.main import app
from effbench.cli.tables import campaign_named
from effbench.report.campaign import Campaign
from effbench.report.campaign_file import campaign_in
from effbench.report.campaign_table import rendered, with_lines
from effbench.report.campaign_written import write_tables
from effbench.report.table import Table, Value, as_latex
from effbench.results.records import write
from effbench.util.errors import UserError

ROOT = Path(__file__).parents[2]
TEXT = """# Is one as good as another?
seeds: [0]
words: {how: method=lora}
paper: [{claim: It is, source: Table 1, sure: recalled}]
overturn: A larger model.
arms:
  The one: ["train {how}"]
  The_other: [train method=full]
"""


@pytest.fixture
def campaign(tmp_path: Path) -> Campaign:
    """A campaign of two runs, in whose folder of results the records are."""
    return two_arms(tmp_path, TEXT)


def test_it_ends_with_three_sentences(campaign: Campaign, tmp_path: Path) -> None:
    *_, paper, asked, found, overturn = rendered(campaign, tmp_path).splitlines()
    assert paper == "Paper: It is (Table 1; recalled)"
    assert asked == "Asked: Is one as good as another?"
    assert found == "Found: loss on test (nats/token), against The one. Higher: The_other."
    assert "(120 items)" in overturn and overturn.endswith("A larger model.")


def test_the_finding_is_that_of_the_test(campaign: Campaign, tmp_path: Path) -> None:
    """Another outcome gives another sentence, since none is written by hand."""
    write(run("full", {"": 0.0}, number=1), tmp_path / "records")
    said = rendered(campaign, tmp_path)
    assert "Cannot be told apart: The_other." in said
    assert "may still differ by up to" in said


def test_two_versions_in_one_table_are_named(campaign: Campaign, tmp_path: Path) -> None:
    record = run("full", {"": 0.3}, number=1)
    newer = {**record.spec, "versions": {"train": 2}}
    write(replace(record, spec=newer), tmp_path / "records")
    said = "Rows come from different versions of train: 1 (The one); 2 (The_other)."
    assert said in rendered(campaign, tmp_path).splitlines()


def test_the_short_form_has_one_metric_in_six_columns(campaign: Campaign, tmp_path: Path) -> None:
    head = rendered(campaign, tmp_path, "csv").splitlines()[0]
    value = "loss on test (nats/token)"
    assert head == f"arm,seeds,{value},{value}_low,{value}_high,difference," + (
        "difference_low,difference_high,p,finding"
    )
    full = rendered(campaign, tmp_path, full=True)
    assert "peak_bytes" in full and "What was held equal" in full
    assert "peak_bytes" not in rendered(campaign, tmp_path)


def test_latex_prints_what_the_cells_say(campaign: Campaign, tmp_path: Path) -> None:
    text = rendered(campaign, tmp_path, "latex")
    assert r"The\_other & 1 &" in text and r"\textless{}0.001" in text
    rules = re.findall(r"\\(?:top|mid|bottom)rule", text)
    assert rules == [r"\toprule", r"\midrule", r"\bottomrule"]
    assert all(line.startswith("%") for line in text.splitlines() if "Asked" in line)


def test_a_hostile_label_is_text_in_one_line_of_every_form() -> None:
    hostile = "<img src=x onerror=alert(1)> | \\x [b] $\n| y |\n</td>"
    table = Table("", ("row", "value"), [(hostile, 1.5), ("plain", 2)])
    assert len(table.text().splitlines()) == len(table.markdown().splitlines()) == 4
    assert "<" not in table.markdown() and " | y" not in table.markdown().replace("\\|", "")
    assert "<img" not in table.html()
    with_rule = with_lines([table], [], "latex")
    assert with_rule.count("\\\\\n") == 3 and "<" not in with_rule


@pytest.mark.parametrize("width", [50, 80])
def test_rows_fit_a_terminal_with_every_word_and_number_whole(width: int) -> None:
    """Texts go on below themselves, then intervals below their numbers."""
    number = Value(-0.000218, "", -0.000242, -0.000194)
    name = "a method [whose name takes more than half of it]"
    table = Table("", ("arm", "difference", "finding"), [(name, number, "cannot be told apart")])
    lines = table.text(width).splitlines()
    assert max(map(len, lines)) <= width < max(map(len, table.text().splitlines()))
    said = " ".join(lines).split()
    assert {*str(number).split(), *name.split(), "told", "difference"} <= {*said}


def test_every_character_of_latex_is_escaped() -> None:
    assert as_latex(r"50 % of a_b & c#d $1 {x} ~ ^ \ [1]") == (
        r"50 \% of a\_b \& c\#d \$1 \{x\} \textasciitilde{} \textasciicircum{} "
        r"\textbackslash{} {[}1{]}"
    )
    assert as_latex("-0.5 [-1, gpt-2 top-1") == r"$-$0.5 {[}$-$1, gpt-2 top-1"
    rows = Table("", ("a",), [("[1, 2]",)]).latex()
    assert "\\\\\n[" not in rows, "a bracket would be an option of the line break"


def test_a_missing_record_names_the_command(campaign: Campaign, tmp_path: Path) -> None:
    gone = tmp_path / "records" / f"{'0001'.ljust(16, '0')}.json"
    gone.unlink()
    with pytest.raises(UserError, match="0001000000000000 of The_other is not") as caught:
        rendered(campaign, tmp_path)
    assert caught.value.hint == "Make it: effbench table ab --run"
    (tmp_path / "campaigns" / "ab.json").unlink()
    with pytest.raises(UserError, match="The runs of ab were not made here"):
        rendered(campaign, tmp_path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("seed: [0]", "Did you mean 'seeds'"),
        ("paper: [{claim: a, source: b, sure: maybe}]", "sure"),
        ("arms: {a: 3}", "Write it so in ab.yaml: arms.a: [3]"),
        ("arms: {a: ['train {who}']}", "does not have: 'who'"),
        ("metrics: [los]", "no test of los"),
        ("arms: [", "cannot be read as YAML: line"),
    ],
)
def test_mistakes_are_named(campaign: Campaign, tmp_path: Path, line: str, said: str) -> None:
    key = line.partition(":")[0]
    kept = [part for part in re.split(r"\n(?=\w)", TEXT) if part.partition(":")[0] != key]
    (tmp_path / "ab.yaml").write_text("\n".join([*kept, line]))
    with pytest.raises(UserError) as caught:
        rendered(campaign_in(tmp_path / "ab.yaml"), tmp_path)
    assert said in str(caught.value)


def test_names_are_suggested() -> None:
    with pytest.raises(UserError, match="Did you mean 'qdylora'"):
        campaign_named("qdylorra")


# -- what is committed -------------------------------------------------------------------------


def test_the_page_shows_what_the_command_prints() -> None:
    text = (ROOT / "docs" / "campaigns.md").read_text()
    [block] = re.findall(r"<!-- output of the command -->\n```console\n(.*?)```", text, re.S)
    command, _, shown = block.partition("\n")
    words = [*command.split()[2:], "--results", str(ROOT / "results")]
    assert CliRunner().invoke(app, words).stdout == shown


def test_a_committed_table_is_what_its_records_give(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("effbench.report.campaign_written.comparison_plot", lambda *_: tmp_path)
    for part in ("records", "campaigns"):
        (tmp_path / part).symlink_to(ROOT / "results" / part)
    for path in write_tables(campaign_named("lora_drop_tuning"), tmp_path)[:2]:
        assert path.read_text() == (ROOT / "results" / "tables" / path.name).read_text()
