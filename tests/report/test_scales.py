"""Cells of a table at other scales: planned until they have run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from test_report import run
from typer.testing import CliRunner

from effbench.cli.main import app
from effbench.cli.plan_table import planned
from effbench.cli.tables import campaign_named, campaigns
from effbench.report.campaign_file import campaign_in
from effbench.report.campaign_table import rendered
from effbench.results.records import write
from effbench.util.errors import UserError

TEXT = """# Is one as good as another?
seeds: [0, 1]
words: {how: method=lora}
arms: {One: ["train {how}"], Other: [train method=full]}
scales:
  paper:
    experiment: qdylora_paper
    arms: {Large: ["train {how}", eval method.rank=2], Larger: [train method=full]}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with cells at two scales."""
    path = tmp_path / "ab.yaml"
    path.write_text(TEXT)
    return path


def test_cells_of_a_scale_are_a_campaign_of_their_own(path: Path) -> None:
    own, large = campaign_in(path), campaign_in(path).at("paper")
    assert own.at("") is own.at("offline") is own
    assert large.arms == {
        "Large": ["train method=lora", "eval method.rank=2"],
        "Larger": ["train method=full"],
    }
    assert (large.seeds, large.experiment, large.scale) == ([0], "qdylora_paper", "paper")
    assert own.manifest(path) != large.manifest(path), "records of two scales are never mixed"
    assert large.command == "effbench table ab --scale paper --run"


def test_cells_of_a_scale_start_and_are_tuned_as_those_of_the_table(path: Path) -> None:
    """Unless they say so themselves."""
    grid = "tune: {over: {train.learning_rate: [%s]}}"
    path.write_text(f"start: mini\n{grid % '1e-3, 1e-2'}\n{TEXT}")
    own, large = campaign_in(path), campaign_in(path).at("paper")
    assert (large.start, large.tune) == (own.start, own.tune) == ("mini", large.tune) != ("", None)
    lines = planned(replace(large, arms={"Large": large.arms["Large"]})).splitlines()
    assert lines[-3:-1] == [
        "Not in it: the run of experiment=mini, which all go on from.",
        "Not in it: tuning, at least 2 trials of each arm that trains.",
    ]
    path.write_text(f"{path.read_text()}    start: ''\n    {grid % '1e-5, 1e-4'}\n")
    large = campaign_in(path).at("paper")
    assert large.start == "" and large.tune
    assert large.tune.over == {"train.learning_rate": [1e-5, 1e-4]}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("  paper:", "  papr:", "'mechanism', 'offline', 'gpu' or 'paper'"),
        ("seeds:", "scale: offlin\nseeds:", "scale='offlin' is not possible"),
        ("    experiment: qdylora_paper\n", "", "paper.experiment is missing"),
        ('Large: ["train {how}"', 'Large: ["train {who}"', "does not have: 'who'"),
    ],
)
def test_mistakes_are_named(path: Path, old: str, new: str, said: str) -> None:
    assert old in TEXT
    path.write_text(TEXT.replace(old, new))
    with pytest.raises(UserError) as caught:
        campaign_in(path)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("scale", "said"), [("gpu", "It has: offline, paper."), ("papr", "Did you mean 'paper'?")]
)
def test_a_scale_without_cells_is_refused(path: Path, scale: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        campaign_named(str(path), scale)
    assert caught.value.hint == said


def test_what_has_run_is_shown(path: Path, tmp_path: Path) -> None:
    large = campaign_named(str(path), "paper")
    runs = [run("lora", {"": 0.0}), run("full", {"": 0.3}, number=1)]
    for record in runs:
        write(record, tmp_path / "records")
    (tmp_path / "campaigns").mkdir()
    keys = {"Large": [runs[0].key], "Larger": [runs[1].key]}
    large.manifest(tmp_path).write_text(json.dumps(keys))
    assert "Higher: Larger." in rendered(large, tmp_path)


def test_what_has_not_run_is_planned(tmp_path: Path) -> None:
    words = ["table", "qdylora", "--scale", "paper", "--results", str(tmp_path)]
    text = CliRunner().invoke(app, words).stdout
    head, _, *cells = text.split("\n\n")[1].splitlines()
    assert head.split() == ["cell", "memory", "FLOPs", "least", "hours", "machine", "fits"]
    assert [cell.split()[0] for cell in cells] == ["QLoRA", "QDyLoRA"]
    assert all("3.37e+18" in cell and "V100" in cell for cell in cells)
    assert text.splitlines()[-1] == "Run it: effbench table qdylora --scale paper --run"


@pytest.mark.slow
def test_all_cells_of_papers_can_be_planned() -> None:
    large = [c.at("paper") for c in campaigns() if "paper" in c.scales]
    assert len(large) >= 7
    for campaign in large:
        assert "least hours" in planned(campaign)
