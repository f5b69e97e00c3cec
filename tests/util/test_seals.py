"""Hashes tell every change of what was written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from effbench.util import seals
from effbench.util.seals import Chain, hash_of, mend_log, read_log, sealed, unsealed


def log_at(path: Path, *lines: str) -> list[bytes]:
    chain = Chain(path)
    path.write_text("".join(chain.seal(line) + "\n" for line in lines))
    return path.read_bytes().splitlines(keepends=True)


def test_a_log_is_read_as_it_was_written_without_a_torn_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log_at(path, '{"a": 1}', '{"b": 2}')
    with path.open("a") as file:
        file.write('{"c": 3')
    assert list(read_log(path)) == [{"a": 1}, {"b": 2}]
    mend_log(path)
    assert path.read_bytes().endswith(b"}\n")


@pytest.mark.parametrize("order", [[0, 2], [1, 2], [1, 0, 2], [0, 0, 1, 2]])
def test_lines_left_out_moved_or_doubled_are_told(tmp_path: Path, order: list[int]) -> None:
    path = tmp_path / "log"
    lines = log_at(path, '{"a": 1}', '{"b": 2}', '{"c": 3}')
    path.write_bytes(b"".join(lines[i] for i in order))
    with pytest.raises(ValueError, match=r"line \d is not as it was written"):
        list(read_log(path))


def test_every_bit_of_a_log_counts(tmp_path: Path) -> None:
    path = tmp_path / "log"
    whole = b"".join(log_at(path, '{"a": 1}', '{"b": 2}'))
    for place in range(len(whole) - 1):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="line"):
            list(read_log(path))


def test_the_log_of_another_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    log_at(tmp_path / "one" / "log", '{"a": 1}')
    (tmp_path / "one").rename(tmp_path / "two")
    with pytest.raises(ValueError, match="line 1"):
        list(read_log(tmp_path / "two" / "log"))


def test_lines_of_before_stand_before_those_with_a_sum(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text('{"old": 1}\n')
    chain = Chain(path)
    assert list(read_log(path, chain)) == [{"old": 1}]
    line = chain.seal('{"new": 2}') + "\n"
    path.write_text('{"old": 1}\n' + line)
    assert list(read_log(path)) == [{"old": 1}, {"new": 2}]
    path.write_text('{"old": 1}\n' + line + '{"late": 3}\n')
    with pytest.raises(ValueError, match="line 3"):
        list(read_log(path))


def test_a_hash_does_not_depend_on_how_a_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    content = os.urandom(1000)
    path.write_bytes(content)
    monkeypatch.setattr(seals, "CHUNK_BYTES", 64)
    several = hash_of(path)
    path.write_bytes(content[:-1])
    assert hash_of(path) != several
    path.write_bytes(content[64:128] + content[:64] + content[128:])
    assert hash_of(path) != several
    path.write_bytes(b"")
    assert hash_of(path)


def test_a_text_is_what_was_sealed() -> None:
    assert unsealed(sealed("a\nb", "x"), "x") == "a\nb"
    with pytest.raises(ValueError, match="not what was written"):
        unsealed(sealed("a\nb", "x"), "y")
    with pytest.raises(ValueError, match="not what was written"):
        unsealed(sealed("a\nb", "x") + " ", "x")
