"""Starts a program and tells what it took: `python -I -S tether.py PIPE PROGRAM ARGUMENT...`.

A process of its own, because the largest resident size that the system tells of a program is that
of who started it where that was larger, and a run is larger than most programs; and because a
program is to end with the run that asked for it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress

DEATH_SIGNAL = 1
"""Of `prctl(2)`: the signal that a process gets when the one that started it is gone."""
ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that are the program's to heed."""


def tied(number: int) -> None:
    """Get a signal when the process that started this one is gone, where the system can (Linux)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(DEATH_SIGNAL, number)


def stand_aside() -> None:
    """Leave the group of processes to the program, to outlive and to wait for it."""
    for number in ASKING:
        signal.signal(number, signal.SIG_IGN)
    with suppress(OSError):
        os.setpgid(0, os.getpgid(os.getppid()))


def run(pipe: int, words: list[str]) -> None:
    """Run a program, and write its wait status, its resident KiB and its seconds into a pipe."""
    os.set_inheritable(pipe, False)
    tied(signal.SIGKILL)
    number = os.fork()
    if not number:
        tied(signal.SIGTERM)
        try:
            os.execvp(words[0], words)
        except OSError as error:
            print(error, flush=True)
            os._exit(127)
    stand_aside()
    _, status, usage = os.wait4(number, 0)
    took = [status, usage.ru_maxrss, usage.ru_utime + usage.ru_stime]
    os.write(pipe, json.dumps(took).encode())


if __name__ == "__main__":
    run(int(sys.argv[1]), sys.argv[2:])
