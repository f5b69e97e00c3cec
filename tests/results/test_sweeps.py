"""Grids on the disk, and what `effbench sweep` says of them."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from effbench.report.grid import duration, overview, seconds_left
from effbench.results.store import Store
from effbench.results.sweeps import Cell, Grid, declare, find_grid, last_event, read_grid
from effbench.util.errors import UserError

KEYS = [f"{n:016x}" for n in range(6)]


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """Return the folder of a grid of six runs, one that cannot be composed among them."""
    folder = tmp_path / "results" / "sweeps" / "2026-01-02_03-04-05-678901"
    folder.mkdir(parents=True)
    cells = [Cell(n, ["model=tiny", f"seed={n}"], key, kind="k") for n, key in enumerate(KEYS[:5])]
    cells.append(Cell(5, ["model=tiny", "seed=x"], error="seed=x is not possible.\nGive a number."))
    declare(folder, Grid("rates", "effbench train -m sweep=rates", 2, cells))
    store = Store(tmp_path / "results")
    for key in KEYS[:3]:
        store.run(key).path.mkdir(parents=True)
    (store.run(KEYS[0]).path / "FINISHED").touch()
    (store.run(KEYS[2]).path / "checkpoint.pt").touch()
    for number, error, seconds in ((0, "", 8.0), (3, "No room.\nMake some.", 1.0)):
        (folder / str(number)).mkdir()
        outcome = {"overrides": [], "key": KEYS[number], "error": error, "seconds": seconds}
        (folder / str(number) / "outcome.json").write_text(json.dumps(outcome))
    return folder


def test_a_grid_elsewhere_is_known_from_its_folder_and_its_runs(grid: Path) -> None:
    store = Store(grid.parents[1])
    log = store.run(KEYS[1]).path / "events.jsonl"
    log.write_text('{"event": "plan"}\n{"event": "step", "step": 3, "loss": 2.123456}\n{"even')
    with store.run(KEYS[1]).locked():
        found = read_grid(grid)
    states = [cell.state for cell in found.cells]
    assert states == ["done", "running", "interrupted", "failed", "waiting", "failed"]
    assert (found.name, found.jobs) == ("rates", 2)
    lines = "\n".join(overview(found.cells, found.jobs, 120))
    assert "6 runs: 1 done, 1 waiting, 1 running, 2 failed, 1 interrupted" in lines
    assert "step 3 loss 2.1235" in lines
    assert f"{KEYS[3]}  seed=3: No room." in lines
    assert "seed=x is not possible." in lines and "Give a number" not in lines


def test_a_run_that_was_mended_since_is_done(grid: Path) -> None:
    folder = Store(grid.parents[1]).run(KEYS[3]).path
    folder.mkdir()
    (folder / "FINISHED").touch()
    cell = read_grid(grid).cells[3]
    assert (cell.state, cell.error) == ("done", "")


def test_a_grid_is_found_by_its_name_or_its_time(grid: Path) -> None:
    results = grid.parents[1]
    for ref in ("latest", "rates", "2026-01-02"):
        assert find_grid(results, ref) == grid
    newer = grid.with_name("2027-01-01_00-00-00-000000")
    newer.mkdir()
    assert find_grid(results, "latest") == newer
    assert read_grid(newer).cells == []
    with pytest.raises(UserError, match="Did you mean 'rates'"):
        find_grid(results, "rats")
    with pytest.raises(UserError, match="There is no grid in"):
        find_grid(results / "sweeps", "latest")


def test_a_damaged_declaration_is_named(grid: Path) -> None:
    (grid / "grid.json").write_text("{")
    with pytest.raises(UserError, match=r"grid\.json cannot be read"):
        read_grid(grid)


def test_a_grid_without_a_declaration_has_the_runs_that_ended(grid: Path) -> None:
    (grid / "grid.json").unlink()
    assert [cell.key for cell in read_grid(grid).cells] == [KEYS[0], KEYS[3]]


def test_sweep_status_and_list(grid: Path, cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFBENCH_RESULTS", str(grid.parents[1]))
    status, out, _ = cli("sweep", "status", "rates")
    assert status == 0
    assert out.startswith(f"{grid.name}  effbench train -m sweep=rates\n6 runs: 1 done")
    status, out, _ = cli("sweep", "list")
    assert status == 0 and out.startswith(f"{grid.name}  rates  6 runs: 1 done")
    status, _, said = cli("sweep", "status", "rtaes")
    assert status == 2 and "Did you mean 'rates'" in said


def test_the_last_event_in_a_few_words(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    assert last_event(log) == ""
    log.write_text('{"event": "phase", "name": "load", "seconds": 1.5}\n')
    assert last_event(log) == "phase load"


def test_the_time_left_is_that_of_others_of_the_kind_or_of_the_plan() -> None:
    done = [Cell(n, [], kind="a", work=10.0, state="done", seconds=s) for n, s in enumerate((4, 6))]
    before = Cell(2, [], kind="a", work=10.0, state="done")
    like, unlike = Cell(3, [], kind="a", work=10.0), Cell(4, [], kind="b", work=40.0)
    running = Cell(5, [], kind="a", state="running", begun=time.time() - 2)
    failed = Cell(6, [], kind="a", state="failed", seconds=9.0)
    assert seconds_left([*done, before, like], 1) == 5
    assert seconds_left([*done, unlike], 1) == 20
    assert seconds_left([*done, running, failed], 1) == pytest.approx(3, abs=0.1)
    assert seconds_left([*done, like, like, unlike], 2) == 15
    assert seconds_left([before, like], 1) == 0, "nothing is known"
    assert duration(3725) == "1:02:05"
