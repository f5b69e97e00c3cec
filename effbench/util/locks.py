"""One process at a time: a lock that the others wait for, on any file system.

The system's own lock goes when its process dies. Some file systems have none (Lustre without
`flock`, NFS without a lock server): there a file that names its holder stands for it. It is taken
over when its holder ran on this machine and is gone; one of another machine has to be deleted.
"""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from filelock import BaseFileLock

NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
"""How a file system says that it has no locks."""
POLL_SECONDS = 0.1


@contextmanager
def locked(path: Path, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock `path`; wait for another process that holds it.

    Args:
        path: The lock's file, in an existing folder. It stays when the lock is let go of: waiting
            processes have it open.
        on_wait: Called once with the holder's description before waiting.
    """
    lock = _acquired(path, on_wait)
    try:
        yield
    finally:
        lock.release()


def is_held(path: Path) -> bool:
    """Whether a process holds the lock `path`; it is taken for an instant where none does."""
    from filelock import FileLock, SoftFileLock, Timeout

    marker = path.with_name(f"{path.name}.held")
    if marker.exists():
        path, kind = marker, SoftFileLock
    elif path.exists():
        kind = FileLock
    else:
        return False
    try:
        with kind(path, blocking=False):
            return False
    except Timeout:
        return True


def _acquired(path: Path, on_wait: Callable[[str], None] | None) -> BaseFileLock:
    from filelock import FileLock, SoftFileLock

    hard = FileLock(path, poll_interval=POLL_SECONDS)
    try:
        _wait_for(hard, path, on_wait, "")
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        path.unlink(missing_ok=True)
        marker = path.with_name(f"{path.name}.held")
        soft = SoftFileLock(marker, poll_interval=POLL_SECONDS)
        _wait_for(soft, marker, on_wait, f" (if it is gone, delete {marker})")
        return soft
    path.write_text(f"{os.getpid()}\n{platform.node()}\n")
    return hard


def _wait_for(
    lock: BaseFileLock, path: Path, on_wait: Callable[[str], None] | None, advice: str
) -> None:
    from filelock import Timeout

    try:
        lock.acquire(blocking=False)
    except Timeout:
        if on_wait:
            on_wait(_holder(path) + advice)
        lock.acquire()


def _holder(path: Path) -> str:
    """Return who holds a lock, as its file says: process and machine in its first two lines."""
    try:
        number, machine, *_ = path.read_text().split()
    except (OSError, ValueError):
        return "another process"
    return f"process {number} on {machine}"
