"""How a run is asked to stop: by Ctrl-C, a signal, a closed terminal or the end of its launcher.

The process that launches a run and the process that runs it may both get the same signal, and one
passes it on to the other; so only Ctrl-C counts twice.
"""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

ASKED = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
)
"""Signals of who wants the run to end, beside Ctrl-C; the last two are a scheduler's."""
PARENT_DEATH = 1
"""PR_SET_PDEATHSIG of prctl(2)."""
INTERRUPTED = 130
"""Exit status of a run that was asked to stop."""


class Process(Protocol):
    """What a signal can be passed on to."""

    def send_signal(self, number: int, /) -> None:
        """Send it a signal."""


class Stop:
    """Whether somebody asked the run to stop."""

    requested = False


@contextmanager
def stop_signal() -> Iterator[Stop]:
    """Turn signals into a request; a Ctrl-C after the first one acts at once."""
    stop = Stop()
    if any(getattr(signal.getsignal(n), "came", False) for n in ASKED):
        stop.requested = True
    usual = signal.getsignal(signal.SIGINT)

    def request(number: int, frame: Any) -> None:
        stop.requested = True
        signal.signal(signal.SIGINT, usual)

    with handled((signal.SIGINT, *_heeded()), request):
        yield stop


@contextmanager
def passed_on(process: Process) -> Iterator[None]:
    """Pass signals on to a process; Ctrl-C it gets by itself, from the terminal.

    What a signal was to do here besides, as to put a job back into its queue, it does when the
    process has ended: it has saved its state by then. That it ended says the process itself.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is told of signals
        return
    before = {number: signal.getsignal(number) for number in _heeded()}
    came: dict[int, None] = {}

    def pass_on(number: int, frame: Any) -> None:
        came[number] = None
        process.send_signal(number)

    with handled(_heeded(), pass_on):
        yield
    for number in came:
        if callable(then := before[number]) and not isinstance(then, Interrupt):
            then(number, None)


class Interrupt:
    """Ends what a process does as Ctrl-C does; it knows whether a signal came.

    A library that catches whatever is raised while it is imported would lose the signal.
    """

    came = False

    def __call__(self, number: int, frame: Any) -> None:
        """Handle a signal.

        Raises:
            KeyboardInterrupt: Each time.
        """
        self.came = True
        raise KeyboardInterrupt


def interrupt_when_asked() -> None:
    """Let signals end this process as Ctrl-C does, with a word, wherever it is."""
    interrupt = Interrupt()
    for number in _heeded():
        signal.signal(number, interrupt)


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """Have this process sent a signal when the one that started it is gone (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH, number)


def _heeded() -> tuple[int, ...]:
    """Return the signals that this process was not told to ignore, as `nohup` tells."""
    return tuple(s for s in ASKED if signal.getsignal(s) is not signal.SIG_IGN)


@contextmanager
def handled(numbers: tuple[int, ...], handler: Any) -> Iterator[None]:
    """Have a function called for some signals, in place of what is usual."""
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, usual in before.items():
            signal.signal(number, usual)
