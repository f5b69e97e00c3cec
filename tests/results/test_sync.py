"""Stores merged into stores: here, and in what stands for a bucket."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import fsspec
import pytest
from config.test_config import SPEC

from effbench.results import places, records
from effbench.results.records import SCHEMA, Record, read_all, write
from effbench.results.store import RunFolder, Store
from effbench.results.sync import sync
from effbench.util.errors import UserError

KEYS = ("00aa11bb22cc33dd", "11aa11bb22cc33dd", "22aa11bb22cc33dd")


def record(key: str, seconds: float = 1.0) -> Record:
    started = "2026-01-01T00:00:00.000+00:00"
    return Record(SCHEMA, key, f"run {key}", "train", {}, {}, "", started, seconds, [])


def store(folder: Path, *keys: str, seconds: float = 1.0) -> Path:
    for key in keys:
        write(record(key, seconds), folder / "records")
    return folder


def run(folder: Path, key: str, weights: bytes = b"weights") -> RunFolder:
    """Make the folder of a finished run, with its record."""
    made = Store(store(folder, key)).run(key)
    made.create(SPEC)
    with made.writing("artefact/adapter.safetensors") as part:
        part.write_bytes(weights)
    (made.path / "log.txt").write_text("no part of the manifest\n")
    made.finish()
    return made


def bytes_of(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def memory() -> Iterator[str]:
    """Return an address in fsspec's memory, which stands for a bucket."""
    yield "memory://store/results"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture(params=["folder", "bucket"])
def target(request: pytest.FixtureRequest, tmp_path: Path, memory: str) -> str:
    return memory if request.param == "bucket" else str(tmp_path / "target")


def test_what_is_new_is_copied_once_and_back(tmp_path: Path, target: str) -> None:
    source = store(tmp_path / "source", *KEYS)
    (source / "records" / ".x.json.0123abcd.part").write_text("half")
    assert [*sync(str(source), target).new] == [*KEYS]
    again = sync(str(source), target)
    assert not again.new and again.same == [*KEYS]
    assert [*sync(target, str(tmp_path / "back")).new] == [*KEYS]
    assert bytes_of(tmp_path / "back" / "records").keys() == {f"{key}.json" for key in KEYS}
    assert read_all(tmp_path / "back" / "records") == read_all(source / "records")


def test_a_dry_run_only_says_it(tmp_path: Path) -> None:
    source = store(tmp_path / "source", *KEYS)
    run(source, KEYS[0])
    merge = sync(str(source), str(tmp_path / "target"), runs=True, dry_run=True)
    assert [*merge.new] == [*KEYS] and [*merge.runs] == [KEYS[0]]
    assert not (tmp_path / "target").exists()


def test_a_conflict_is_named_and_both_keep_theirs(tmp_path: Path, cli: Callable) -> None:
    source, target = store(tmp_path / "a", *KEYS[:2]), tmp_path / "b"
    store(target, KEYS[0], seconds=2.0)
    run(source, KEYS[2])
    run(target, KEYS[2], b"others")
    before = bytes_of(source), bytes_of(target)
    status, out, said = cli("sync", str(source), str(target), "--runs")
    assert status == 2 and "2 of them differ" in said
    assert f"differs  {KEYS[0]}  record: other seconds" in out
    assert f"differs  {KEYS[2]}  folder of the run: finished at another time" in out
    after = bytes_of(target)
    assert bytes_of(source) == before[0]
    assert after.pop(f"records/{KEYS[1]}.json") and after == before[1]


def test_records_of_other_forms_are_the_same_when_they_say_the_same(tmp_path: Path) -> None:
    source, target = store(tmp_path / "a", KEYS[0]), store(tmp_path / "b", KEYS[0])
    path = target / "records" / f"{KEYS[0]}.json"
    values = json.loads(path.read_text())
    del values["digest"], values["seeds"]  # as an earlier version wrote it
    path.write_text(json.dumps(values) + "\n")
    assert sync(str(source), str(target)).same == [KEYS[0]]


@pytest.mark.parametrize("newer", ["source", "target"])
def test_a_store_of_a_newer_version_is_refused_before_anything_is_written(
    tmp_path: Path, newer: str
) -> None:
    source, target = store(tmp_path / "source", *KEYS), store(tmp_path / "target", KEYS[0])
    write(replace(record(KEYS[2]), schema=SCHEMA + 1), tmp_path / newer / "records")
    before = bytes_of(target)
    with pytest.raises(UserError, match=f"{newer}.*was written by a newer effbench"):
        sync(str(source), str(target))
    assert bytes_of(target) == before


def test_a_damaged_record_is_named_and_goes_nowhere(tmp_path: Path, memory: str) -> None:
    source = store(tmp_path / "source", *KEYS)
    (source / "records" / f"{KEYS[1]}.json").write_text('{"key": ')
    with pytest.raises(UserError, match=f"{KEYS[1]}.json is not a whole record"):
        sync(str(source), memory)
    assert not fsspec.filesystem("memory").store


def test_runs_go_through_their_manifests(tmp_path: Path, target: str) -> None:
    source = tmp_path / "source"
    whole, broken = run(source, KEYS[0]), run(source, KEYS[1])
    Store(source).run(KEYS[2]).create(SPEC)
    (broken.artefact / "adapter.safetensors").write_bytes(b"veights")
    with pytest.raises(UserError, match=f"runs/{KEYS[1]} cannot be read"):
        sync(str(source), target, runs=True)
    broken.clear()
    merge = sync(str(source), target, runs=True)
    assert merge.unfinished == [KEYS[2]]
    assert not sync(str(source), target, runs=True).runs
    back = tmp_path / "back"
    assert [*sync(target, str(back), runs=True).runs] == [KEYS[0]]
    copied = Store(back).run(KEYS[0])
    assert copied.finished_at and copied.check_artefact(whole=True)
    assert bytes_of(copied.path) == bytes_of(whole.path)
    assert [p.name for p in Store(back).runs.iterdir() if p.is_dir()] == [KEYS[0]]


def test_a_run_in_a_bucket_is_there_when_its_marker_is(
    tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "source", KEYS[0])
    put, done = places.Remote.put, list[str]()

    def cut_off(self: places.Remote, name: str, content: bytes | Path) -> None:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(name)
        put(self, name, content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(places.Remote, "put", cut_off)
        sync(str(tmp_path / "source"), memory, runs=True)
    assert not [name for name in done if name.endswith("FINISHED")]
    assert [*sync(str(tmp_path / "source"), memory, runs=True).runs] == [KEYS[0]]
    assert [*sync(memory, str(tmp_path / "back"), runs=True).runs] == [KEYS[0]]


def test_a_full_disk_is_named_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    run(source, KEYS[0])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(places.Local, "get", full)
    with pytest.raises(UserError, match=f"{target / 'runs'} cannot be written: No space left"):
        sync(str(source), str(target), runs=True)
    assert not any(path.is_dir() for path in (target / "runs").iterdir())
    assert [path.name for path in (target / "records").iterdir()] == [f"{KEYS[0]}.json"]


def test_names_that_lead_out_of_the_store_are_not_taken(tmp_path: Path, memory: str) -> None:
    files = fsspec.filesystem("memory")
    files.pipe_file("/store/results/runs/../../evil.json", b"x")
    files.pipe_file("/store/results/runs/k/../../../evil.json", b"x")
    assert places.place_of(memory).names("runs", deep=True) == []


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["nowhere", "b"], "There are no results in nowhere"),
        (["nonsense://x", "b"], "nonsense://x cannot be opened: Protocol not known"),
    ],
)
def test_a_source_that_is_none_is_refused(cli: Callable, words: list[str], part: str) -> None:
    status, _, said = cli("sync", *words)
    assert status == 2 and part in said
    assert not any(Path().iterdir())


def test_two_records_of_one_key_at_once_leave_the_first(tmp_path: Path) -> None:
    place = places.Local(tmp_path)
    place.put("records/x.json", b"first")
    with pytest.raises(FileExistsError):
        place.put("records/x.json", b"second")
    assert bytes_of(tmp_path) == {"records/x.json": b"first"}
    assert records.record_files(tmp_path / "records")


def test_a_run_whose_record_is_another_one_there_is_left_where_it_is(tmp_path: Path) -> None:
    source, target = tmp_path / "a", store(tmp_path / "b", KEYS[0], seconds=2.0)
    run(source, KEYS[0])
    merge = sync(str(source), str(target), runs=True)
    assert [*merge.conflicts] == [KEYS[0]] and not merge.runs
    assert not Store(target).run(KEYS[0]).path.exists()


def test_who_is_quicker_meanwhile_is_not_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target, put = store(tmp_path / "a", *KEYS), tmp_path / "b", places.Local.put

    def quicker(place: places.Local, name: str, content: bytes) -> None:
        if KEYS[0] in name:
            store(target, KEYS[0], seconds=2.0)
        put(place, name, content)

    monkeypatch.setattr(places.Local, "put", quicker)
    sync(str(source), str(target))
    found = {r.key: r.seconds for r in read_all(target / "records")}
    assert found == {KEYS[0]: 2.0, KEYS[1]: 1.0, KEYS[2]: 1.0}


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """Return an address in a bucket of moto's S3 server on this machine."""
    if not find_spec("moto"):
        pytest.skip("needs moto[server]")
    from urllib.request import Request, urlopen

    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "46931"]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_EC2_METADATA_DISABLED"):
        monkeypatch.setenv(name, "true")
    try:
        for _ in range(300):
            try:
                urlopen(Request("http://127.0.0.1:46931/bucket", method="PUT")).close()
                break
            except OSError:
                time.sleep(0.1)
        yield "s3://bucket/results?endpoint_override=127.0.0.1:46931&scheme=http"
    finally:
        server.terminate()
        server.wait()


@pytest.mark.slow
def test_a_bucket_of_s3(tmp_path: Path, bucket: str) -> None:
    whole = run(store(tmp_path / "source", *KEYS[1:]), KEYS[0], os.urandom(1 << 20))
    for expected in (3, 0):
        assert len(sync(str(tmp_path / "source"), bucket, runs=True).new) == expected
    back = tmp_path / "back"
    merge = sync(bucket, str(back), runs=True)
    assert len(merge.new) == 3 and [*merge.runs] == [KEYS[0]]
    assert bytes_of(Store(back).run(KEYS[0]).path) == bytes_of(whole.path)
    store(tmp_path / "other", KEYS[0], seconds=3.0)
    assert [*sync(str(tmp_path / "other"), bucket).conflicts] == [KEYS[0]]
    with pytest.raises(UserError, match="s3://other/results cannot be reached"):
        sync(str(back), bucket.replace("bucket", "other"))
