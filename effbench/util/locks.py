"""One process at a time: a lock that the others wait for, on any file system.

The system's own lock goes when its process dies. Some file systems have none (Lustre without
`flock`, NFS without a lock server): there a file that names its holder stands for it, and its
holder touches it from time to time. It is taken over when its holder ran on this machine and is
gone, or when it was not touched for long. That time runs on the clock of who waits: two machines
may disagree about the hour. A holder that finds its file taken over, as after a long sleep, ends at
once, which loses no more than a kill does.
"""

from __future__ import annotations

import errno
import os
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effbench.util.wrap import write

if TYPE_CHECKING:
    from filelock import BaseFileLock, SoftFileLease

NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
"""How a file system says that it has no locks."""
POLL_SECONDS = 0.1
LEASE_SECONDS, TOUCH_SECONDS = 300.0, 20.0
"""After how long a file that nobody touches is taken over, and how often its holder does."""
HOLDER = re.compile(r"(?:.*\n)?(?:pid=)?(?P<pid>\d+)\n(?:host=)?(?P<machine>\S+)\n")
"""What a lock's file says first; filelock puts the form of the file before it."""
TAKEN_OVER = 75
"""Exit status of a process that has lost its lock (EX_TEMPFAIL of sysexits.h)."""


@contextmanager
def locked(path: Path, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock `path`; wait for another process that holds it.

    Args:
        path: The lock's file, in an existing folder. It stays when the lock is let go of. Who holds
            the lock may remove it: those that wait look whether what they opened has a name still.
        on_wait: Called once with the holder's description before waiting.
    """
    lock = _acquired(path, on_wait)
    try:
        yield
    finally:
        lock.release()


def is_held(path: Path) -> bool:
    """Whether a process holds the lock `path`; it is taken for an instant where none does."""
    from filelock import Timeout

    marker = _marker(path)
    try:
        if marker.exists():
            with _lease(marker).acquire(blocking=False):
                return False
        if path.exists():
            with _system_lock(path).acquire(blocking=False):
                return False
    except Timeout:
        return True
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return False


def _acquired(path: Path, on_wait: Callable[[str], None] | None) -> BaseFileLock:
    hard = _system_lock(path)
    try:
        _wait_for(hard, path, on_wait, "")
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        path.unlink(missing_ok=True)
        marker = _marker(path)
        soft = _lease(marker)
        minutes = f"{LEASE_SECONDS / 60:g} minutes"
        _wait_for(soft, marker, on_wait, f" (if it is gone, {marker} is free after {minutes})")
        return soft
    path.write_text(f"{os.getpid()}\n{platform.node()}\n")
    return hard


def _marker(path: Path) -> Path:
    return path.with_name(f"{path.name}.held")


def _system_lock(path: Path) -> BaseFileLock:
    from filelock import FileLock

    return FileLock(path, poll_interval=POLL_SECONDS, fallback_to_soft=False)


def _lease(marker: Path) -> SoftFileLease:
    from filelock import SoftFileLease

    return SoftFileLease(
        marker,
        poll_interval=POLL_SECONDS,
        lease_duration=LEASE_SECONDS,
        heartbeat_interval=TOUCH_SECONDS,
        on_compromise=_give_up,
    )


def _give_up(loss: Any) -> None:
    """End this process, from whose hands a lock has gone: its work may be another one's by now."""
    with suppress(OSError):
        write(f"This process lost {loss.lock_file} ({loss.reason}), and ends.")
    os._exit(TAKEN_OVER)


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
    """Return who holds a lock, as its file says: process and machine."""
    with suppress(OSError):
        if found := HOLDER.match(path.read_text()):
            return f"process {found['pid']} on {found['machine']}"
    return "another process"
