"""Events of a run: one JSON line each, appended, and cut back to the checkpoint on resume."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from effbench.api.spec import Job
from effbench.results.manifest import damaged
from effbench.results.tracker import Wandb
from effbench.util.files import mendable, write_atomic
from effbench.util.seals import SUM, Chain, mend_log, read_log

LASTING = ("interrupted", "part")
"""Events that stay when a run goes back to an earlier place: what a stopped phase took was taken,
and a finished part of a compression is on disk."""


class EventLog:
    """Facts with a clock. A tracker, when asked for, gets a copy of each.

    Raises:
        UserError: When the log that is there is damaged.
    """

    def __init__(self, path: Path, job: Job) -> None:
        self._path = path
        with mendable(path):
            mend_log(path)
        self._open()
        self._begun = self.position()
        self._tracker = Wandb(job, path.parent) if job.runtime.tracker == "wandb" else None

    def _open(self) -> None:
        self._chain = Chain(self._path)
        with _named(self._path):
            for _ in read_log(self._path, self._chain):
                pass
        with mendable(self._path):
            self._file = self._path.open("a", encoding="utf-8")

    def append(self, kind: str, **facts: Any) -> None:
        """Add one event."""
        line = {"time": round(time.time(), 4), "event": kind, **facts}
        with mendable(self._path):
            self._file.write(self._chain.seal(json.dumps(line)) + "\n")
            self._file.flush()
        if self._tracker is not None:
            self._tracker.log(kind, facts)

    def position(self) -> int:
        """Return the length of the log in bytes, for `cut`; all of it is on the disk then."""
        with mendable(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
        return self._file.tell()

    def cut(self, position: int = 0) -> None:
        """Forget the events behind `position`.

        What lasts is kept, and the phases that this process has finished.

        Raises:
            UserError: When the log does not reach there.
        """
        self._file.flush()
        log = self._path.read_bytes()
        if position and log[position - 1 : position] != b"\n":
            raise damaged(self._path, "it lacks its end")
        earlier = log[:position] + _only(log[position : self._begun], LASTING)
        kept = earlier + _only(log[max(position, self._begun) :], (*LASTING, "phase"))
        if kept != log:
            self._file.close()
            write_atomic(self._path, _resealed(kept, position, self._path))
            self._open()
            self._begun = min(self._begun, len(earlier))

    def after(self, kind: str) -> int | None:
        """Return the position behind the last event of a kind, for `cut`; None without one."""
        self._file.flush()
        place, found = 0, None
        for line in self._path.read_bytes().splitlines(keepends=True):
            place += len(line)
            if json.loads(line)["event"] == kind:
                found = place
        return found

    def so_far(self) -> Iterator[dict[str, Any]]:
        """Yield all events, in order."""
        self._file.flush()
        return read_events(self._path)

    def close(self) -> None:
        """Close the log and the tracker."""
        self._file.close()
        if self._tracker is not None:
            self._tracker.finish()


def _only(lines: bytes, kinds: Sequence[str]) -> bytes:
    """Return the lines of events of some kinds."""
    events = lines.splitlines(keepends=True)
    return b"".join(line for line in events if json.loads(line)["event"] in kinds)


def _resealed(log: bytes, position: int, path: Path) -> bytes:
    """Return a log from whose middle lines were taken behind `position`, with sums that fit."""
    chain = Chain(path)
    for line in log[:position].splitlines():
        chain.read(line)
    rest = (SUM.sub(b"}", line).decode() for line in log[position:].splitlines())
    return log[:position] + b"".join(chain.seal(line).encode() + b"\n" for line in rest)


def read_events(path: Path, kind: str = "") -> Iterator[dict[str, Any]]:
    """Yield the events of a kind, or all; a last line that a crash cut off is left out.

    Raises:
        UserError: When the log is damaged.
    """
    with _named(path):
        for event in read_log(path):
            if kind in ("", event["event"]):
                yield event


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Say of a log that cannot be read which one it is.

    Raises:
        UserError: When that happens.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise damaged(path, str(error)) from None
