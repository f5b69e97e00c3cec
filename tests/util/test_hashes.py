"""Hashes of whole files are remembered, and never of what a file is no longer."""

from __future__ import annotations

import hashlib
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from effbench.util import hashes
from effbench.util.errors import UserError
from effbench.util.hashes import hash_of, hashes_of


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EFFBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "REMEMBERED_BYTES", 10)
    monkeypatch.setattr(hashes, "SETTLED_SECONDS", -1.0)
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * 40)
    return path


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def memories(cache: Path) -> list[Path]:
    return list(cache.rglob("*.json"))


def forged(cache: Path) -> None:
    """Put another hash into the memory, so that it shows whether that is used."""
    [path] = memories(cache)
    content = json.loads(path.read_text())
    content.pop("check")
    content["sha256"] = "remembered"
    path.write_text(json.dumps({**content, "check": hashes._check(content)}))


def test_a_hash_is_remembered(file: Path, cache: Path) -> None:
    assert hash_of(file) == sha(file)
    forged(cache)
    assert hash_of(file) == "remembered"


@pytest.mark.parametrize("place", [0, 5000, -1])
def test_a_changed_byte_is_seen_though_size_and_time_are_kept(
    file: Path, cache: Path, place: int
) -> None:
    before, times = hash_of(file), file.stat()
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert hash_of(file) == sha(file) != before


def test_another_file_in_its_place_is_seen(file: Path, cache: Path) -> None:
    hash_of(file)
    forged(cache)
    other = file.with_name("other")
    other.write_bytes(b"x" * file.stat().st_size)
    other.replace(file)
    assert hash_of(file) == sha(file)


def test_what_was_just_written_is_not_remembered(file: Path, cache: Path, monkeypatch) -> None:
    monkeypatch.setattr(hashes, "SETTLED_SECONDS", 2.0)
    assert hash_of(file) == sha(file)
    assert not memories(cache)


def test_what_changes_while_it_is_read_is_not_remembered(
    file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def advance(self, path: Path, size: int) -> None:
        time.sleep(0.02)
        path.touch()

    monkeypatch.setattr(hashes._Progress, "advance", advance)
    hash_of(file)
    assert not memories(cache)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"check": 1}'])
def test_a_damaged_memory_is_made_again(file: Path, cache: Path, damage: bytes) -> None:
    hash_of(file)
    [path] = memories(cache)
    path.write_bytes(damage)
    assert hash_of(file) == sha(file)
    assert json.loads(path.read_text())["sha256"] == sha(file)


def test_a_flipped_digit_in_the_memory_is_seen(file: Path, cache: Path) -> None:
    found = hash_of(file)
    [path] = memories(cache)
    path.write_text(path.read_text().replace(found, "0" * 64))
    assert hash_of(file) == found


def test_a_cache_that_cannot_be_written_is_done_without(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_file").write_text("")
    monkeypatch.setenv("EFFBENCH_CACHE", str(tmp_path / "a_file"))
    assert hash_of(file) == sha(file)


def test_processes_may_remember_at_once(file: Path, cache: Path) -> None:
    with ProcessPoolExecutor(2) as pool:
        assert set(pool.map(hash_of, [file] * 8)) == {sha(file)}
    assert not list(cache.rglob("*.part"))


def test_much_to_read_is_said_and_what_is_remembered_is_not(
    file: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "SAID_BYTES", 1000)
    monkeypatch.setattr(hashes, "CHUNK_BYTES", 4000)
    hashes_of([file])
    assert [line.split()[-2] for line in capsys.readouterr().err.splitlines()] == [
        "30",
        "70",
        "100",
    ]
    hashes_of([file])
    assert not capsys.readouterr().err


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none cannot be read: No such file"):
        hash_of(tmp_path / "none")
