"""Whatever asks for the folder of results gets the same one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from effbench.api.spec import Job
from effbench.cli import main
from effbench.config.compose import compose
from effbench.results.store import Store, results_dir
from effbench.runner import local, sweep
from effbench.util.errors import RunFailedError, UserError

TINY = ["model=tiny", "dataset=arithmetic"]
KEY = "0123456789abcdef"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder in which everything happens, in its empty folder `here`."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("EFFBENCH_RESULTS", raising=False)
    return tmp_path


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Have a grid run nothing, and return what it would have run."""
    found: list[Job] = []
    monkeypatch.setattr("effbench.runner.grid.work.execute", lambda job, *_: found.append(job))
    return found


@pytest.mark.parametrize(
    "variable, words, place",
    [
        (None, [], "here/results"),
        ("", [], "here/results"),
        ("elsewhere", [], "here/elsewhere"),
        ("~/data", [], "data"),
        ("{home}/data", [], "data"),
        ("~/data", ["run.results=other"], "here/other"),
        ("~/data", ["run.results='o o'"], "here/o o"),
        ("~/data", ["run.results='~/other'"], "other"),
        ("~/data", ['run.results="${oc.env:HOME}/x"'], "x"),
    ],
)
def test_every_way_leads_to_one_folder(
    variable: str | None,
    words: list[str],
    place: str,
    home: Path,
    jobs: list[Job],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if variable is not None:
        monkeypatch.setenv("EFFBENCH_RESULTS", variable.format(home=home))
    right = home / place
    job = compose("eval", [*TINY, *words])
    assert Path(job.runtime.results).resolve() == right
    if not words:
        assert results_dir().resolve() == right
    run = Store(right).run(KEY)
    run.create(job.spec)
    run.finish()
    outcomes = sweep.sweep("eval", ["from=latest", "seed=0,1", *words])
    assert [outcome.error for outcome in outcomes] == ["", ""]
    assert [j.spec.parent for j in jobs] == [KEY, KEY]
    assert {Path(j.runtime.results).resolve() for j in jobs} == {right}
    [sweeps] = home.rglob("sweeps")
    assert sweeps == right / "sweeps"
    assert len([json.loads(p.read_text()) for p in sweeps.rglob("outcome.json")]) == 2


@pytest.mark.parametrize("variable", ["", "elsewhere", "~/data"])
def test_commands_that_read_take_the_same_folder(
    variable: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EFFBENCH_RESULTS", variable)
    asked: list[Any] = []
    monkeypatch.setattr(
        "effbench.results.lookup.find", lambda folder, run: asked.append(folder) or SystemExit()
    )
    CliRunner().invoke(main.app, ["runs", "show", "0123"])
    assert asked == [results_dir() / "records"]


def test_a_grid_in_two_folders_is_refused(home: Path, jobs: list[Job]) -> None:
    with pytest.raises(UserError, match="one folder of results"):
        sweep.sweep("eval", [*TINY, "run.results=a,b"])
    assert not list((home / "here").iterdir())


@pytest.mark.parametrize(
    "word", ["seed=range(1,4)", "train.learning_rate=interval(1e-4,1e-2)", "seed=choice(3,4)"]
)
def test_a_grid_that_a_sweeper_draws_has_the_folder_too(word: str, home: Path) -> None:
    assert sweep._results([*TINY, word, "run.results=mine"], [], []) == home / "here" / "mine"


def test_a_folder_that_cannot_be_written_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's process says it; what is left to clear away then says nothing more."""
    (tmp_path / "file").touch()
    job = compose("eval", ["model=tiny", "dataset=arithmetic", f"run.results={tmp_path / 'file'}"])
    monkeypatch.setattr(local, "_run_process", lambda *_: local.REFUSED)
    with pytest.raises(RunFailedError):
        local.execute(job)
