"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from effbench.util.errors import UserError

SCRATCH = re.compile(r"\..+\.[0-9a-f]{8}\.(part|old)")
"""Names of what is not finished yet."""

HINTS = {
    errno.ENOSPC: "Free some space or choose another folder, then give the command again.",
    errno.EDQUOT: "Your quota is used up: free some space or choose another folder.",
    errno.EACCES: "Choose a folder that you may write to.",
    errno.EPERM: "Choose a folder that you may write to.",
    errno.EROFS: "The file system is read-only: choose another folder.",
    errno.ENOTDIR: "A file stands where a folder is needed: choose another folder.",
    errno.EEXIST: "A file stands where a folder is needed: choose another folder.",
    errno.EISDIR: "A folder stands where a file is needed: move it away.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ENOENT: "Its folder is gone or cannot be made: choose another one.",
    errno.ELOOP: "It is a link that leads back to itself: remove it.",
}
"""What to do about an error that is the user's to mend; any other one is a bug."""
FULL = {errno.ENOSPC, errno.EDQUOT}
"""Errors that can be mended even where nobody knows the file, as that which output is sent to."""


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader, or a crash at any moment, sees the old or the new one.

    Missing folders are made. When this returns, the file survives a loss of power.

    Args:
        path: The file.
        content: Bytes, or text to be written as UTF-8.

    Raises:
        UserError: When the disk is full or the place cannot be written; nothing is left behind.
    """
    with open_atomic(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write; it takes the place of `path` only when all went well.

    Raises:
        UserError: As `write_atomic`.
    """
    with atomic_path(path) as part, part.open("xb") as file:
        yield file


@contextmanager
def atomic_path(path: Path, before: Callable[[Path], None] = lambda part: None) -> Iterator[Path]:
    """Yield where to write a file; it takes the place of `path` only when all went well.

    For libraries that open files themselves, so that nothing has to hold all of it in memory.

    Args:
        path: The file.
        before: Called with the whole new file before it takes its place.

    Raises:
        UserError: As `write_atomic`.
    """
    part = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")
    with mendable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            _sync(part)
            before(part)
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        _sync(path.parent)


def require_folder(folder: Path) -> None:
    """Refuse a folder that cannot be made or written, before work whose result goes there.

    Raises:
        UserError: Saying why; nothing is made.
    """
    place = folder.expanduser().absolute()
    there = next(p for p in (place, *place.parents) if os.path.lexists(p))
    with mendable(folder):
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(there))


@contextmanager
def making(folder: Path) -> Iterator[None]:
    """Make a folder with those that it lies in; after an error, those that are empty go again.

    Raises:
        UserError: When it cannot be made.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        with mendable(folder):
            folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for place in made:
            with suppress(OSError):
                place.rmdir()
        raise


@contextmanager
def scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """Yield a new, empty, hidden folder in `parent`; what is left of it goes away afterwards.

    Args:
        parent: An existing folder.
        name: What the folder is for; part of its name.

    Raises:
        UserError: When the disk is full or `parent` cannot be written, also while it is filled.
    """
    folder = parent / f".{name}.{os.urandom(4).hex()}.part"
    try:
        with mendable(parent):
            folder.mkdir()
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def replace_folder(new: Path, final: Path) -> None:
    """Put the folder `new` where `final` is, on the same file system; `final` may be there already.

    The files of `new` are on the disk before it gets its name. Only when `final` was there is
    there a moment between two renames at which neither stands under that name.

    Raises:
        UserError: When the place cannot be written; `final` is then as it was.
    """
    old = final.with_name(f".{final.name}.{os.urandom(4).hex()}.old")
    with mendable(final):
        for place in (*new.rglob("*"), new):
            _sync(place)
        final.parent.mkdir(parents=True, exist_ok=True)
        if final.exists():
            final.rename(old)
        try:
            new.rename(final)
        except BaseException:
            if old.exists():
                old.rename(final)
            raise
        _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def scratch_in(folder: Path) -> Iterator[Path]:
    """Yield what processes that were killed left of the functions above, anywhere in `folder`."""
    for place in folder.rglob(".*"):
        if SCRATCH.fullmatch(place.name):
            yield place


STALE_SECONDS = 86400
"""Age from which nobody is writing a file any more."""


def sweep_stale(folder: Path) -> None:
    """Remove what processes that were killed long ago left of the functions above in a folder.

    For folders that several processes write into.
    """
    for place in folder.glob(".*"):
        with suppress(OSError):
            if (
                SCRATCH.fullmatch(place.name)
                and time.time() - place.stat().st_mtime > STALE_SECONDS
            ):
                remove(place)


def remove(place: Path) -> None:
    """Remove a file or a folder, as far as it is there."""
    if place.is_dir():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)


def tree_bytes(place: Path) -> int:
    """Return the bytes of a file, or of all files in a folder; what vanishes meanwhile has none."""
    total = 0
    for path in [place, *place.rglob("*")] if place.is_dir() else [place]:
        with suppress(OSError):
            total += path.lstat().st_size if not path.is_dir() else 0
    return total


def _sync(place: Path) -> None:
    """Have the system write a file, or the list of a folder's entries, to the disk."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def mendable(path: Path) -> Iterator[None]:
    """Turn a full disk or a place that cannot be written into an error that says what to do.

    Raises:
        UserError: For the errors in `HINTS`; any other one is a bug and goes on.
    """
    try:
        yield
    except Exception as error:
        number = _system_error(error)
        if number not in HINTS:
            raise
        message = f"{path} cannot be written: {os.strerror(number)}."
        raise UserError(message, HINTS[number]) from None


@contextmanager
def places() -> Iterator[None]:
    """Turn an error about a place that cannot be used into one that says what to do.

    For the outermost call of a process. That something is not there may be a bug, and goes on.

    Raises:
        UserError: Naming the place; of a full disk also when it has no name, as where a command's
            output is sent to.
    """
    try:
        yield
    except OSError as error:
        number = error.errno or 0
        if error.filename is None and number in FULL:
            message = f"A file or the output cannot be written: {error.strerror}."
            raise UserError(message, HINTS[number]) from None
        if error.filename is None or number == errno.ENOENT or number not in HINTS:
            raise
        message = f"{error.filename} cannot be used: {error.strerror}."
        raise UserError(message, HINTS[number]) from None


def _system_error(error: BaseException | None) -> int:
    """Return the number of the system error behind an exception, 0 when there is none.

    torch raises an error of its own while it handles that of the file; safetensors only quotes it,
    and numpy says how much of an array it could not write, without a number.
    """
    while error is not None and not isinstance(error, UserError):
        if isinstance(error, OSError):
            short = re.fullmatch(r"\d+ requested and \d+ written", str(error))
            return errno.ENOSPC if short else error.errno or 0
        if quoted := re.search(r"\(os error (\d+)\)", str(error)):
            return int(quoted[1])
        error = error.__cause__ or error.__context__
    return 0
