from __future__ import annotations

import multiprocessing as mp
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from config.test_config import SPEC

from effbench.results.store import MARKER, RunFolder, Store
from effbench.runner.local import execute, record_of
from effbench.util.errors import UserError
from effbench.util.files import mendable, open_atomic, replace_folder, scratch_folder, write_atomic

PARTIAL = "*.part"


def finished(store: Store, **changes) -> str:
    spec = replace(SPEC, **changes)
    run = store.run(spec.key)
    run.create(spec)
    run.finish()
    return spec.key


# -- locks -----------------------------------------------------------------------------------------


def _hold(path: Path, ready, release) -> None:
    with RunFolder(path).locked():
        ready.set()
        release.wait(20)


def test_a_run_has_one_process_and_the_others_wait_for_it(tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    ready, release = context.Event(), context.Event()
    run = RunFolder(tmp_path / "runs" / "abcd")
    holder = context.Process(target=_hold, args=(run.path, ready, release))
    holder.start()
    said: list[str] = []
    entered = threading.Event()

    def second() -> None:
        with run.locked(said.append):
            entered.set()

    try:
        assert ready.wait(20)
        waiter = threading.Thread(target=second)
        waiter.start()
        while not said:
            time.sleep(0.01)
        assert said == [f"process {holder.pid} on {os.uname().nodename}"]
        assert not entered.wait(0.1)
        release.set()
        assert entered.wait(20)
        waiter.join()
    finally:
        release.set()
        holder.join()
    with run.locked(said.append):
        pass
    assert len(said) == 1


def test_the_lock_of_a_process_that_died_is_free(tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    ready, never = context.Event(), context.Event()
    run = RunFolder(tmp_path / "abcd")
    holder = context.Process(target=_hold, args=(run.path, ready, never))
    holder.start()
    assert ready.wait(20)
    holder.kill()
    holder.join()
    waited: list[str] = []
    with run.locked(waited.append):
        assert not waited


# -- what is finished ------------------------------------------------------------------------------


def test_a_run_is_finished_only_by_its_marker(tmp_path: Path) -> None:
    store = Store(tmp_path)
    run = store.run(SPEC.key)
    run.create(SPEC)
    run.artefact.mkdir()
    run.checkpoint.write_text("state")
    (run.path / "parts").mkdir()
    assert not run.finished
    with pytest.raises(UserError, match="is not finished"):
        store.resolve(SPEC.key)
    run.finish()
    assert run.finished
    assert not run.checkpoint.exists()
    assert not (run.path / "parts").exists()
    assert store.resolve(SPEC.key) == SPEC.key


def test_clearing_takes_the_marker_first(tmp_path: Path, monkeypatch) -> None:
    run = Store(tmp_path).run(SPEC.key)
    run.create(SPEC)
    run.finish()
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)
    run.clear()
    assert run.path.is_dir()
    assert not run.finished


def test_only_a_run_with_nothing_to_go_on_from_is_discarded(tmp_path: Path) -> None:
    run = Store(tmp_path).run(SPEC.key)
    for name in ("checkpoint.pt", "artefact/x", "parts/x", "evaluations/x", MARKER):
        run.create(SPEC)
        (run.path / name).parent.mkdir(exist_ok=True)
        (run.path / name).touch()
        run.discard_unless_begun()
        assert (run.path / name).exists()
        run.clear()
    run.create(SPEC)
    (run.path / "parts").mkdir()
    (run.path / "log.txt").touch()
    run.discard_unless_begun()
    assert not run.path.exists()


def test_a_crash_between_record_and_marker_is_mended_by_the_same_command(bench, monkeypatch):
    words = ("eval", "dataset.limit.test=8")
    job = bench.job(*words)

    def crash(self: RunFolder) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish", crash)
        with pytest.raises(KeyboardInterrupt):
            bench.run(*words)
    assert (bench.store.records / f"{job.spec.key}.json").is_file()
    assert record_of(job) is None
    record = bench.run(*words)
    assert record_of(job) == record
    assert bench.folder(job).finished
    assert execute(job) == record, "a finished run is read, not run"


# -- names -----------------------------------------------------------------------------------------


def test_a_run_is_known_by_key_prefix_and_latest(tmp_path: Path) -> None:
    store = Store(tmp_path)
    keys = [finished(store, seed=s) for s in range(20)]
    assert store.resolve(keys[3]) == keys[3]
    assert store.resolve(keys[3][:8]) == keys[3]
    assert store.resolve("latest") == keys[-1]
    (store.run(keys[0]).path / "touched").write_text("later")
    assert store.resolve("latest") == keys[-1], "the one that finished last"
    twice = next(k[0] for k in keys if sum(o[0] == k[0] for o in keys) > 1)
    with pytest.raises(UserError, match=r"fits \d+ runs"):
        store.resolve(twice)
    with pytest.raises(UserError, match="There is no run 'zz'") as caught:
        store.resolve("zz")
    assert "effbench runs" in caught.value.hint


def test_latest_passes_over_what_is_not_finished(tmp_path: Path) -> None:
    store = Store(tmp_path)
    key = finished(store)
    other = replace(SPEC, seed=5)
    store.run(other.key).create(other)
    assert store.resolve("latest") == key


def test_ancestors_are_in_order_and_without_evaluations(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first = finished(store)
    second = finished(store, stage="eval", parent=first)
    third = finished(store, stage="compress", parent=second)
    chain = store.ancestors(replace(SPEC, stage="eval", parent=third))
    assert list(chain) == [first, third]
    assert [s.key for s in chain.values()] == [first, third]


@pytest.mark.parametrize("text", [None, "{", '{"stage": "train"}'])
def test_a_spec_that_cannot_be_read_is_the_users_to_mend(tmp_path: Path, text) -> None:
    store = Store(tmp_path)
    key = finished(store)
    path = store.run(key).path / "spec.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match=f"The spec of run {key} cannot be read"):
        store.ancestors(replace(SPEC, parent=key))


# -- files -----------------------------------------------------------------------------------------


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    write_atomic(path, "old")
    with pytest.raises(KeyboardInterrupt), open_atomic(path) as file:
        file.write(b"new")
        file.flush()
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert not list(tmp_path.rglob(PARTIAL))


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    final = tmp_path / "artefact"
    for content in ("one", "two"):
        with scratch_folder(tmp_path, "artefact") as new:
            (new / "x").write_text(content)
            replace_folder(new, final)
        assert (final / "x").read_text() == content
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if target == final and self.suffix == ".part":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(KeyboardInterrupt), scratch_folder(tmp_path, "artefact") as new:
        (new / "x").write_text("three")
        replace_folder(new, final)
    assert (final / "x").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["artefact"]


def test_an_error_of_the_user_passes_through(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mine"), mendable(tmp_path):
        raise UserError("mine")


def test_runs_that_go_on_from_each_other_are_told(tmp_path: Path, monkeypatch) -> None:
    store = Store(tmp_path)
    monkeypatch.setattr(
        store, "spec_of", lambda key: replace(SPEC, parent="b" if key == "a" else "a")
    )
    with pytest.raises(UserError, match="goes on from itself"):
        store.ancestors(replace(SPEC, parent="a"))
