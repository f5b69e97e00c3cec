"""What a person sees while a run works: one line that moves, or plain lines without a terminal."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from effbench.util.wrap import write

PACE = "EFFBENCH_PACE"
"""Variable with the seconds between two plain lines, where a grid reads them and shows the last."""


class Progress:
    """Writes to stderr; says nothing when switched off."""

    INTERVAL_TTY = 0.2
    INTERVAL_PLAIN = 10.0

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._tty = sys.stderr.isatty()
        plain = float(os.environ.get(PACE, self.INTERVAL_PLAIN))
        self._interval = self.INTERVAL_TTY if self._tty else plain
        self._last = 0.0
        self._after = ""
        self._what = ""
        self._begun = (0, 0.0)

    def say(self, text: str) -> None:
        """Write a line that stays."""
        if self._enabled:
            with suppress(OSError):  # the terminal may be gone; the run's state is to be saved yet
                self._end_line()
                write(text)

    def now(self, text: str) -> None:
        """Say what begins now; in a terminal the next line takes its place."""
        if not self._tty:
            self.say(f"{text} ...")
        elif self._enabled:
            with suppress(OSError):
                self._end_line()
                self._draw(f"{text} ...", after="\r\x1b[K")

    @contextmanager
    def during(self, text: str) -> Iterator[None]:
        """Say what happens for as long as it does."""
        self.now(text)
        try:
            yield
        finally:
            self._end_line()

    def bar(self, what: str, done: int, total: int, details: str = "") -> None:
        """Show how far something is, and the time it still takes; called as often as one likes.

        Args:
            what: What is counted.
            done: How many of them are over.
            total: How many there are; 0 where that is not known.
            details: What else to show.
        """
        now = time.monotonic()
        if what != self._what:
            self._what, self._begun = what, (done, now)
        last = 0 < total <= done
        if not self._enabled or (now - self._last < self._interval and not (last and details)):
            return
        self._last = now
        line = " ".join(filter(None, (what, _place(done, total), details, self._left(done, total))))
        with suppress(OSError):
            if not self._tty:
                print(line, file=sys.stderr, flush=True)
                return
            self._draw(f"{_drawn(done, total)} {line}".strip())
            if last:
                self._end_line()

    def _left(self, done: int, total: int) -> str:
        """Return the time that is left at the pace since the first of these lines."""
        first, begun = self._begun
        if not first < done < total:
            return ""
        left = (time.monotonic() - begun) / (done - first) * (total - done)
        return f" {duration(left)} left"

    def _draw(self, text: str, after: str = "\n") -> None:
        """Draw over the line that stands there, which another is written `after`."""
        sys.stderr.write(f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}")
        sys.stderr.flush()
        self._after = after

    def _end_line(self) -> None:
        """Leave a bar where it stands, and wipe away what began."""
        sys.stderr.write(self._after)
        self._after = ""


def _place(done: int, total: int) -> str:
    return f"{done}/{total}" if total else str(done)


def _drawn(done: int, total: int, width: int = 24) -> str:
    filled = round(width * done / total) if total else 0
    return "━" * filled + "╺" * (width - filled) if total else ""


def duration(seconds: float) -> str:
    """Return seconds as `1:02:03` or `2:03`."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"
