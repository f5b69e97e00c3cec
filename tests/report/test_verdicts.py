"""Verdicts on papers' claims: they hold as long as their records say so, and no longer."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_report import run

from effbench.cli.tables import campaigns
from effbench.report.campaign import Campaign
from effbench.report.campaign_file import campaign_in
from effbench.report.campaign_table import rendered
from effbench.report.claims import OPEN
from effbench.report.verdicts import retested
from effbench.results.records import write
from effbench.util.errors import UserError

ROOT = Path(__file__).parents[2]
HEADLINE = {
    *("qdylora", "sorted_lora", "deep_lora", "apt", "lora_drop", "echoatt", "echo_llama"),
    *("ptloss", "dorm", "prboost", "lorc", "dijiang", "any_precision"),
}
"""Systems whose papers this repository is about."""

TABLES = {table.name: table for table in campaigns()}
JUDGED = sorted(name for name, table in TABLES.items() if table.verdict)
TEXT = """# Is one as good as another?
seeds: [0]
paper: [{claim: It is, source: Table 1, sure: read, scale: 7B}]
ceiling: Half.
verdict:
  state: not reproduced
  reason: It is not.
  control: The other.
  rests_on:
    - {row: Other r1, against: One, finding: higher, by: 0.2}
    - {row: Other r2, against: Other r1, finding: lower}
    - {row: Other r2, against: One, finding: lower, metric: weight_bytes}
arms:
  One: [train method=lora]
  Other: [train method=full]
"""


def arms(folder: Path, r1: float = 0.3, weight: float = 2**20) -> None:
    """Write the records of both arms, with the losses of the second one's points."""
    runs = [run("lora", {"": 0.0}), run("full", {"r1": r1, "r2": 0.1}, number=1, weight=weight)]
    for record in runs:
        write(record, folder / "records")
    (folder / "campaigns").mkdir(exist_ok=True)
    keys = {"One": [runs[0].key], "Other": [runs[1].key]}
    (folder / "campaigns" / "ab.json").write_text(json.dumps(keys))


@pytest.fixture
def campaign(tmp_path: Path) -> Campaign:
    """A table of two arms, in whose folder of results the records are."""
    arms(tmp_path)
    (tmp_path / "ab.yaml").write_text(TEXT)
    return campaign_in(tmp_path / "ab.yaml")


def test_pairs_are_held_against_each_other(campaign: Campaign, tmp_path: Path) -> None:
    first, second, third = retested(campaign, tmp_path)
    assert first.holds and first.difference.value == pytest.approx(0.3, abs=0.02)
    assert second.holds and second.difference.value == pytest.approx(-0.2, abs=0.02)
    assert third.holds and third.difference.value == -3 * 2**20, "counted: no test is needed"


@pytest.mark.parametrize(("r1", "weight"), [(0.15, 2**20), (-0.3, 2**20), (0.3, 8 * 2**20)])
def test_other_records_make_it_stale(
    campaign: Campaign, tmp_path: Path, r1: float, weight: float
) -> None:
    """Too small a difference, one of the other sign, and one of what is counted."""
    arms(tmp_path, r1, weight)
    assert not all(pair.holds for pair in retested(campaign, tmp_path))
    assert "Verdict: STALE, was not reproduced." in rendered(campaign, tmp_path)


def test_the_table_says_claim_ceiling_and_verdict(campaign: Campaign, tmp_path: Path) -> None:
    paper, ceiling, verdict, *three = rendered(campaign, tmp_path).splitlines()[-6:]
    assert paper == "Paper: It is (Table 1; read; 7B)"
    assert ceiling == "Ceiling: Half."
    assert verdict.startswith("Verdict: not reproduced. It is not. Control: The other. Rests on: ")
    assert "Other r1 against One: loss on test higher (0.3" in verdict
    assert [line.partition(":")[0] for line in three] == ["Asked", "Found", "Would overturn it"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (", source: Table 1", "", "paper.0.source is missing"),
        ("source: Table 1", "source: ''", "paper.0.source="),
        ("Other r1, against: One", "Othr r1, against: One", "'Othr r1', which is no arm"),
        ("Other r1, against: One", "Other r3, against: One", "no row of the table"),
        ("Other r1, against: One", "Other, against: One", "Points of Other: r1, r2"),
        ("metric: weight_bytes", "metric: weight_byte", "Did you mean 'weight_bytes'"),
        ("not reproduced", "reproducd", "verdict.state='reproducd' is not possible"),
        (TEXT[TEXT.index("  rests_on") : TEXT.index("arms:")], "", "rests on nothing"),
    ],
)
def test_mistakes_are_named(
    campaign: Campaign, tmp_path: Path, old: str, new: str, said: str
) -> None:
    assert old in TEXT
    (tmp_path / "ab.yaml").write_text(TEXT.replace(old, new))
    with pytest.raises(UserError) as caught:
        retested(campaign_in(tmp_path / "ab.yaml"), tmp_path)
    assert said in f"{caught.value} {caught.value.hint}"


def test_a_verdict_without_records_names_the_command(campaign: Campaign, tmp_path: Path) -> None:
    (tmp_path / "campaigns" / "ab.json").unlink()
    with pytest.raises(UserError, match="were not made here") as caught:
        retested(campaign, tmp_path)
    assert caught.value.hint == "Make it: effbench table ab --run"


# -- what is committed -------------------------------------------------------------------------


def test_every_claim_has_a_verdict() -> None:
    assert {*JUDGED} == {name for name, table in TABLES.items() if table.paper} >= HEADLINE


@pytest.mark.parametrize("name", JUDGED)
def test_a_verdict_is_what_its_records_say(name: str) -> None:
    table = TABLES[name]
    stale = [str(pair) for pair in retested(table, ROOT / "results") if not pair.holds]
    assert not stale


@pytest.mark.parametrize("name", JUDGED)
def test_a_verdict_waits_for_runs_as_long_as_there_are_none(name: str) -> None:
    verdict, made = TABLES[name].verdict, TABLES[name].manifest(ROOT / "results").is_file()
    assert verdict
    assert made == (verdict.state != "not run yet" and not verdict.bench)
    bench = re.fullmatch(r"make bench-([a-z-]+)|", verdict.bench)
    assert bench, "a verdict of a benchmark names its command"
    assert not verdict.bench or (ROOT / "scripts" / f"bench_{bench[1]}.py").is_file()
    assert verdict.control or verdict.state in OPEN
