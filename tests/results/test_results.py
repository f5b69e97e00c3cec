"""The records that come with the repository can be listed and compared in a fresh clone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from effbench.api.keys import earlier_keys, versions_of
from effbench.api.schema import build
from effbench.api.spec import Spec
from effbench.cli.tables import campaign_named, campaigns
from effbench.config.compose import compose
from effbench.report.comparison.compare import compare
from effbench.results.lookup import find
from effbench.results.migrations import present_spec
from effbench.results.records import read_all
from effbench.results.store import MARKER, Store
from effbench.runner.campaign import done

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "results" / "records"
GPU_PAGE = (ROOT / "docs" / "gpu.md").read_text()
DEMO = ("39c18473706785f1", "0e7476789214e33f", "8148650c7705b238")
MANIFESTS = sorted((ROOT / "results" / "campaigns").glob("*.json"))
CAMPAIGNS = [campaign.name for campaign in campaigns()]


def test_the_records_of_the_demo_can_be_compared():
    found = compare([find(RECORDS, key) for key in DEMO])
    loss = next(m for m in found.metrics if m.kind.metric == "loss")
    assert [row.point for row in loss.rows] == ["", "r1", "r2", "r4", "r8", "r16", ""]
    assert all(row.difference is not None for row in loss.rows[1:])


def test_the_records_of_the_demo_come_from_the_present_versions() -> None:
    for key in DEMO:
        spec = build(Spec, present_spec(find(RECORDS, key).spec), "spec")
        assert spec.versions == versions_of(spec), "give `make demo` again and put it in the README"


def test_the_committed_records_come_from_committed_code():
    """Or docs/gpu.md says so: the time of a lent device is gone when one commits."""
    for record in read_all(RECORDS, outcomes=False):
        assert record.environment["commit"], record.key
        said = record.environment.get("gpus") and f"`{record.key[:8]}`" in GPU_PAGE
        assert said or record.environment["dirty"] is False, record.key


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_campaign_has_all_its_records(path: Path) -> None:
    campaign = campaign_named(path.stem)
    noted = json.loads(path.read_text())
    assert list(noted) == list(campaign.arms)
    assert all((RECORDS / f"{key}.json").is_file() for keys in noted.values() for key in keys)


def begun(experiment: str, results: Path) -> list[str]:
    """Return words that go on from a run of an experiment, which is there without its weights."""
    spec = compose(None, [f"experiment={experiment}"]).spec
    run = Store(results).run(spec.key)
    run.create(spec)
    (run.path / MARKER).write_text("1\n")
    return [f"from={spec.key}", f"run.results={results}"]


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_the_commands_of_a_campaign_have_the_keys_of_its_records(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, with which they were made, where the experiment leaves the dtype open."""
    monkeypatch.chdir(ROOT)
    campaign = campaign_named(name)
    path = ROOT / "results" / "campaigns" / f"{name}.json"
    said = yaml.safe_load(
        (ROOT / "conf" / "experiment" / f"{campaign.experiment}.yaml").read_text()
    )
    dtype = said.get("hardware", {}).get("dtype", "bfloat16")
    noted = json.loads(path.read_text()) if path.is_file() else {}
    start = begun(campaign.start, tmp_path) if campaign.start else []
    arms = campaign.tuned_arms(ROOT / "results") if noted else campaign.arms
    for arm, (first, *later) in arms.items():
        stage, *words = first.split()
        settings = [f"experiment={campaign.experiment}", "hardware=cpu", f"hardware.dtype={dtype}"]
        words += [] if stage == "eval" else [f"seed={campaign.seeds[0]}"]
        spec = compose(stage, [*settings, *start, *words]).spec
        if not later and arm in noted:
            assert done(spec, ROOT / "results", True, print) == noted[arm][0], arm
            assert noted[arm][0] in (spec.key, *earlier_keys(spec)), arm
