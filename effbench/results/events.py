"""Events of a run: one JSON line each, appended, and cut back to the checkpoint on resume."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from effbench.api.spec import Job
from effbench.results.tracker import Wandb
from effbench.util.files import mendable, write_atomic

LASTING = ("interrupted", "part")
"""Events that stay when a run goes back to an earlier place: what a stopped phase took was taken,
and a finished part of a compression is on disk."""


class EventLog:
    """Facts with a clock. A tracker, when asked for, gets a copy of each."""

    def __init__(self, path: Path, job: Job) -> None:
        _mend(path)
        self._path = path
        self._file = path.open("a", encoding="utf-8")
        self._begun = self.position()
        self._tracker = Wandb(job, path.parent) if job.runtime.tracker == "wandb" else None

    def append(self, kind: str, **facts: Any) -> None:
        """Add one event."""
        line = {"time": round(time.time(), 4), "event": kind, **facts}
        with mendable(self._path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        if self._tracker is not None:
            self._tracker.log(kind, facts)

    def position(self) -> int:
        """Return the length of the log in bytes, for `cut`."""
        self._file.flush()
        return self._file.tell()

    def cut(self, position: int = 0) -> None:
        """Forget the events behind `position`.

        What lasts is kept, and the phases that this process has finished.
        """
        self._file.flush()
        log = self._path.read_bytes()
        earlier = log[:position] + _only(log[position : self._begun], LASTING)
        kept = earlier + _only(log[max(position, self._begun) :], (*LASTING, "phase"))
        if kept != log:
            self._file.close()
            write_atomic(self._path, kept)
            self._file = self._path.open("a", encoding="utf-8")
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


def _mend(path: Path) -> None:
    """Cut off a last line that a crash left unfinished, so that the next one stands alone."""
    if path.is_file():
        with path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def read_events(path: Path, kind: str = "") -> Iterator[dict[str, Any]]:
    """Yield the events of a kind, or all; a last line that a crash cut off is left out."""
    if not path.is_file():
        return
    for line in path.read_text().splitlines():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            return
        if kind in ("", event["event"]):
            yield event
