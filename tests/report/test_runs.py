"""The list of runs: what is chosen, its age and state; and what may be removed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from effbench.report.runs import age, fitted, listed, listing
from effbench.results import records
from effbench.results.housekeeping import leftovers, removal_of
from effbench.results.records import SCHEMA, Metric, Record
from effbench.results.store import Store
from effbench.util.errors import CONTROL, UserError

FIRST, SECOND, STOPPED = "a" * 16, "b" * 16, "c" * 16


def record_of(key: str, method: str, parent: str = "", seed: int = 0) -> Record:
    spec = {name: {"name": what} for name, what in (("method", method), ("model", "tiny"))}
    return Record(
        SCHEMA,
        key,
        f"train {method}",
        "train",
        {**spec, "seed": seed},
        {"command": f"effbench train method={method}"},
        parent,
        f"2026-01-0{1 + seed}T10:00:00+00:00",
        5.0,
        [Metric("loss", 1.5, "nats/token", split="test")],
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two records, the second from the first, with run folders, and an interrupted run."""
    found = Store(tmp_path)
    for record in (record_of(FIRST, "lora"), record_of(SECOND, "qlora", FIRST, seed=1)):
        records.write(record, found.records)
        begin(found, record.key, {**record.spec, "parent": record.parent})
        found.run(record.key).finish()
    begin(found, STOPPED, {"stage": "train", "method": {"name": "dora"}, "parent": "", "seed": 2})
    return found


def begin(store: Store, key: str, spec: dict[str, object]) -> None:
    folder = store.run(key)
    folder.path.mkdir(parents=True)
    folder.manifest.begin()
    folder.write_json("spec.json", spec)
    folder.write_json("environment.json", {"command": "effbench train method=dora"})


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ((), {FIRST, SECOND, STOPPED}),
        (("method=lora",), {FIRST}),
        (("method=lora,dora",), {FIRST, STOPPED}),
        (("method=*lora", "seed=1"), {SECOND}),
        (("state=finished",), {FIRST, SECOND}),
        (("state=interrupted",), {STOPPED}),
        (("key=bbbb",), {SECOND}),
        (("state=finished", "method=dora"), set()),
    ],
)
def test_filters_choose_runs(store: Store, filters: tuple[str, ...], expected: set[str]) -> None:
    assert {run.key for run in listed(store, filters)} == expected


def test_a_run_at_work_is_running_and_passed_over(store: Store) -> None:
    with store.run(STOPPED).locked():
        assert [r.key for r in listed(store, ["state=running"])] == [STOPPED]
        assert leftovers(store, interrupted=True) == []
        with pytest.raises(UserError, match="at work"):
            removal_of(store, [STOPPED])
    assert listed(store, ["state=running"]) == []


def test_the_full_list_has_size_and_command(store: Store) -> None:
    text = listing(store, ["method=dora"], full=True).text()
    size = store.run(STOPPED).bytes_on_disk()
    assert size == sum(p.stat().st_size for p in store.run(STOPPED).path.rglob("*") if p.is_file())
    assert re.search(rf"interrupted +{size} B +effbench train method=dora", text)


def test_a_list_fits_a_terminal_and_breaks_no_word(store: Store) -> None:
    table = listing(store, ["state=finished"], full=True)
    wide, narrow = fitted(table, 200), fitted(table, 60)
    assert wide.splitlines()[0] == "All: stage train, model tiny, dataset —"
    assert "qlora" in wide and len(wide.splitlines()) == 2 + 2 + 2
    assert max(map(len, narrow.splitlines())) <= 60
    lines = [line.strip() for line in narrow.splitlines()]
    at = next(i for i, line in enumerate(lines) if line.startswith(SECOND[:8]))
    assert lines[at + 1 : at + 3] == ["loss 1.500 nats/token", "effbench train method=qlora"]
    assert not {*narrow.split()} - {*wide.split()}
    (alone,) = listing(store, ["method=dora"]).rows
    assert fitted(listing(store, ["method=dora"]), 200).splitlines()[2].split()[-1] == alone[-1]


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("methd=x", "Did you mean 'method'?"),
        ("state=finishd", "Did you mean 'finished'?"),
        ("method=", "For example: method=NAME or method=A,B."),
        ("method=none", "See all: effbench runs"),
    ],
)
def test_a_filter_that_is_none_says_what_there_is(store: Store, word: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        listing(store, [word])
    assert caught.value.hint == hint


@pytest.mark.parametrize(
    ("seconds", "expected"), [(59, "59 s"), (60, "1 min"), (7199, "1 h"), (86400 * 40, "40 d")]
)
def test_an_age_is_in_its_largest_whole_unit(seconds: int, expected: str) -> None:
    assert age("1970-01-02T00:00:00+00:00", 86400 + seconds) == expected
    assert age("1970-01-02T00:00:00", 86400 + seconds) == expected


def test_a_run_that_others_started_from_stays(store: Store) -> None:
    with pytest.raises(UserError, match=f"{SECOND} started from"):
        removal_of(store, [FIRST])
    (store.records / f"{SECOND}.json").unlink()
    with pytest.raises(UserError, match=f"{SECOND} started from"):
        removal_of(store, [FIRST])  # its folder says so too
    for removal in removal_of(store, [FIRST[:4], SECOND]):
        removal.carry_out(store)
    assert store.run_keys() == [STOPPED]
    assert not list(store.records.glob("*.json"))


def test_cleaning_keeps_what_can_go_on(store: Store) -> None:
    folder = store.run(STOPPED)
    assert [r.key for r in leftovers(store)] == [STOPPED]
    folder.checkpoint.write_text("state")
    assert leftovers(store) == []
    (store.run(FIRST).path / "checkpoint.pt").write_text("x" * 100)
    found = leftovers(store, interrupted=True)
    assert {r.key: r.bytes for r in found} == {FIRST: 100, STOPPED: folder.bytes_on_disk()}
    for removal in found:
        removal.carry_out(store)
    assert store.run(FIRST).finished
    assert not store.run(FIRST).checkpoint.exists()
    assert not folder.path.exists()
    assert len(list(store.records.glob("*.json"))) == 2


def test_no_run_is_removed_unasked(store: Store, cli: Callable[..., tuple[int, str, str]]) -> None:
    at = ["--results", str(store.root)]
    status, out, said = cli("runs", "rm", SECOND, *at)
    assert (status, "--yes" in said, SECOND in out) == (2, True, True)
    assert store.run(SECOND).finished
    assert cli("runs", "rm", SECOND, "--yes", *at)[0] == 0
    assert not store.run(SECOND).path.exists()
    assert "Runs have no 'run.results'" in cli("runs", "run.results=x", *at)[2]
    assert cli("runs", "clean", "--yes", *at)[0] == 0
    assert not store.run(STOPPED).path.exists()
    assert "Nothing to remove." in cli("runs", "clean", *at)[2]
    assert "lora" in cli("runs", "method=lora", *at)[1]


def test_what_a_terminal_would_act_upon_is_not_listed(store: Store) -> None:
    spec = {"stage": "train", "method": {"name": "\x1b]0;owned\x07"}}
    folder = store.run(STOPPED).path
    (folder / "spec.json").write_text(json.dumps(spec))
    (folder / "environment.json").write_text(json.dumps({"command": "effbench \x1b[2J"}))
    (run,) = listed(store, ["state=interrupted"])
    assert not CONTROL.search(f"{run.method}{run.command}"), "nor in the command"


def test_a_damaged_spec_of_an_unfinished_run_is_listed(store: Store) -> None:
    (store.run(STOPPED).path / "spec.json").write_text(json.dumps([1]))
    (run,) = listed(store, ["state=interrupted"])
    assert replace(run, started="") == replace(run, started="", method="", stage="", seed="")


OWN_DATA = {"name": "file", "files": {"test": "b.csv", "train": ["data/a.csv", "b.csv"]}}


def test_runs_of_ones_own_model_and_files_are_listed_by_their_names(store: Store) -> None:
    for key, seed, model in (
        ("d" * 16, 3, {"name": "folder", "path": "/x/my-model/"}),
        ("e" * 16, 4, {"name": "hub", "id": "Org/Name-1B", "path": ""}),
        ("f" * 16, 5, {"name": "folder", "path": f"/h/models--O--N/snapshots/{'0' * 40}"}),
        ("0" * 16, 6, {"name": "folder", "path": "."}),
        ("1" * 16, 7, {"name": "mine", "source": "folder", "path": "/x/other"}),
    ):
        record = record_of(key, "lora", seed=seed)
        record = replace(record, spec={**record.spec, "model": model, "dataset": OWN_DATA})
        records.write(record, store.records)
        begin(store, f"{key[:15]}9", {**record.spec, "parent": ""})
    found = {(r.key, r.model, r.dataset) for r in listed(store, ["dataset=a.csv+1"])}
    assert {(key[0], model) for key, model, _ in found} == {
        ("d", "my-model"),
        ("e", "Name-1B"),
        ("f", "N"),
        ("0", "folder"),
        ("1", "mine"),
    }
    assert len(found) == 10  # finished and not
