"""Folders in the cache that are made once: whole or not at all, and safe between processes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from effbench.util.errors import UserError
from effbench.util.files import HINTS, remove
from effbench.util.locks import locked

MANIFEST = ".effbench.json"
"""Written last into a finished folder: its origin, and size and SHA-256 of every file."""


def cache_dir() -> Path:
    """Return the cache folder: EFFBENCH_CACHE, else `effbench` in the user's cache folder."""
    own = os.environ.get("EFFBENCH_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "effbench"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_once(
    folder: Path, origin: Mapping[str, Any], make: Callable[[Path], None], doing: str
) -> Path:
    """Return `folder`, filled by `make` if it is not there yet or no longer what it was.

    Args:
        folder: Where the result stands.
        origin: What it is made from; another origin makes it anew.
        make: Fills an empty folder.
        doing: The work in words, for who has to wait for another process (`fetching NAME`).

    Raises:
        UserError: When the disk is full or cannot be written; `folder` is then as before.
    """
    if intact(folder, origin, whole=True):
        return folder
    with disk_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_name(f".{folder.name}.lock")
        with locked(lock, lambda holder: _say(f"Waiting: {holder} is {doing} …")):
            if intact(folder, origin, whole=True):
                return folder
            fresh = folder.with_name(f".{folder.name}.new")
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir()
            try:
                make(fresh)
                _write_manifest(fresh, origin, _files(fresh))
                remove(folder)
                fresh.rename(folder)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
    return folder


_whole: set[Path] = set()
"""Folders whose files' hashes this process has compared."""


def intact(folder: Path, origin: Mapping[str, Any], whole: bool = False) -> bool:
    """Whether `folder` was made from `origin` and still holds the files that were made.

    Sizes are compared every time. Hashes are compared once in a process before the files are read,
    and whenever EFFBENCH_VERIFY=1.

    Args:
        folder: Where the result stands.
        origin: What it should be made from.
        whole: Whether the files are about to be read.
    """
    whole = (whole and folder not in _whole) or os.environ.get("EFFBENCH_VERIFY") == "1"
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["files"]
        if manifest["origin"] != dict(origin):
            return False
        if any((folder / name).stat().st_size != size for name, (size, _) in files.items()):
            return False
        if whole:
            if any(sha256_of(folder / name) != sha for name, (_, sha) in files.items()):
                return False
            _whole.add(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return True


def _files(folder: Path) -> dict[str, tuple[int, str]]:
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {p.relative_to(folder).as_posix(): (p.stat().st_size, sha256_of(p)) for p in paths}


def _write_manifest(folder: Path, origin: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    content = {"origin": dict(origin), "files": files}
    fresh = folder / f"{MANIFEST}.{os.getpid()}"
    fresh.write_text(json.dumps(content, indent=1, sort_keys=True))
    fresh.replace(folder / MANIFEST)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


@contextlib.contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Turn a full or forbidden disk into a `UserError` that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"No space is left on the disk of {place}.",
                "Free some, or set EFFBENCH_CACHE to a folder on a larger disk.",
            ) from None
        if error.errno in HINTS:
            raise UserError(
                f"{error.filename or place} cannot be written: {error.strerror}.",
                "Set EFFBENCH_CACHE to a folder that you may write to.",
            ) from None
        raise
