"""What a person sees while a run works: one line that moves, or plain lines without a terminal."""

from __future__ import annotations

import sys
import time
from contextlib import suppress

from rich.console import Console


class Progress:
    """Writes to stderr; says nothing when switched off."""

    INTERVAL_TTY = 0.2
    INTERVAL_PLAIN = 10.0

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._console = Console(stderr=True, highlight=False)
        self._tty = self._console.is_terminal
        self._last = 0.0
        self._open_line = False

    def say(self, text: str) -> None:
        """Write a line that stays."""
        if self._enabled:
            with suppress(OSError):  # the terminal may be gone; the run's state is to be saved yet
                self._end_line()
                self._console.print(text, markup=False)

    def bar(self, what: str, done: int, total: int, details: str = "") -> None:
        """Show how far something is; called as often as one likes."""
        now = time.monotonic()
        interval = self.INTERVAL_TTY if self._tty else self.INTERVAL_PLAIN
        last = 0 < total <= done
        if not self._enabled or (now - self._last < interval and not (last and details)):
            return
        self._last = now
        place = f"{done}/{total}" if total else str(done)
        line = f"{what} {place} {details}".rstrip()
        with suppress(OSError):
            self._draw(line, done, total, last)

    def _draw(self, line: str, done: int, total: int, last: bool) -> None:
        if not self._tty:
            self._console.print(line, markup=False)
            return
        text = f"{_drawn(done, total)} {line}".strip()[: self._console.width - 1]
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()
        self._open_line = True
        if last:
            self._end_line()

    def count(self, what: str, done: int, details: str = "") -> None:
        """Show how far something is whose end is not known."""
        self.bar(what, done, 0, details)

    def _end_line(self) -> None:
        if self._open_line:
            sys.stderr.write("\n")
            self._open_line = False


def _drawn(done: int, total: int, width: int = 24) -> str:
    filled = round(width * done / total) if total else 0
    return "━" * filled + "╺" * (width - filled) if total else ""


def duration(seconds: float) -> str:
    """Return seconds as `1:02:03` or `2:03`."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"
