"""SHA-256 of whole files, remembered while the file system says that they are unchanged.

A file is taken to be what it was while its place, size, times of change and inode are. What was
written moments ago is not remembered: two writes may fall into one tick of the clock.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from effbench.util.cache import cache_dir
from effbench.util.errors import UserError
from effbench.util.files import write_atomic

REMEMBERED_BYTES = 1 << 20
"""Smaller files are hashed each time, which is as fast as looking up their hash."""
SAID_BYTES = 1 << 30
"""So much takes a second or more, and is said."""
SETTLED_SECONDS = 2.0
"""How long a file has to be unchanged for its hash to be remembered."""
CHUNK_BYTES = 1 << 24


def hashes_of(paths: Sequence[Path]) -> list[str]:
    """Return the SHA-256 of the content of files, in hexadecimal.

    Says on standard error how far it is when there is much to read. What is remembered lies in the
    cache; when that is damaged or cannot be written, files are read again.

    Raises:
        UserError: When a file cannot be read.
    """
    try:
        known = {path: _recalled(path) for path in paths}
        progress = _Progress(sum(p.stat().st_size for p, sha in known.items() if not sha))
        return [known[path] or _hashed(path, progress) for path in paths]
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be read: {error.strerror}.", "Correct the path or its rights."
        ) from None


def hash_of(path: Path) -> str:
    """Return the SHA-256 of one file; see `hashes_of`."""
    return hashes_of([path])[0]


class _Progress:
    """Says how much of what is to be read has been read."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.said = total, 0, -1

    def advance(self, path: Path, size: int) -> None:
        self.done += size
        tenth = 10 * self.done // max(1, self.total)
        if self.total >= SAID_BYTES and tenth > self.said:
            self.said = tenth
            gigabytes = f"{self.total / 1e9:.1f} GB"
            print(f"Hashing {gigabytes} at {path.parent}: {10 * tenth} %", file=sys.stderr)


def _hashed(path: Path, progress: _Progress) -> str:
    began, before, total = time.time(), _state(path), hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            total.update(chunk)
            progress.advance(path, len(chunk))
    found, settled = total.hexdigest(), began - max(before[1:3]) / 1e9 > SETTLED_SECONDS
    if before[0] >= REMEMBERED_BYTES and settled and _state(path) == before:
        content = {"path": str(path.resolve()), "state": before, "sha256": found}
        with suppress(UserError, OSError):
            write_atomic(_memory(path), json.dumps({**content, "check": _check(content)}))
    return found


def _recalled(path: Path) -> str:
    """Return the hash that is remembered of a file, "" where there is none that holds."""
    state = _state(path)
    if state[0] < REMEMBERED_BYTES:
        return ""
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        content = json.loads(_memory(path).read_text())
        check = content.pop("check")
        if (content["path"], content["state"]) == (str(path.resolve()), state):
            return str(content["sha256"]) if check == _check(content) else ""
    return ""


def _state(path: Path) -> list[int]:
    """Return size, times of change of content and of anything, in nanoseconds, and inode."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _memory(path: Path) -> Path:
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]
    return cache_dir() / "hashes" / f"{name}.json"


def _check(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
