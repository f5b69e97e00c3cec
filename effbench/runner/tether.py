"""Starts a program and tells what it took: `python -I -S tether.py PIPE PROGRAM ARGUMENT...`.

A process of its own, because the largest resident size that the system tells of a program is that
of who started it where that was larger, and a run is larger than most programs; and because a
program is to end with the run that asked for it.
"""

from __future__ import annotations

import json
import os
import sys

DEATH_SIGNAL, TERMINATE = 1, 15
"""Of `prctl(2)`: the signal that a process gets when the one that started it is gone."""


def tied() -> None:
    """End with the process that started this one, where the system can tell (Linux)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(DEATH_SIGNAL, TERMINATE)


def run(pipe: int, words: list[str]) -> None:
    """Run a program, and write its wait status, its resident KiB and its seconds into a pipe."""
    os.set_inheritable(pipe, False)
    tied()
    number = os.fork()
    if not number:
        tied()
        try:
            os.execvp(words[0], words)
        except OSError as error:
            print(error, flush=True)
            os._exit(127)
    _, status, usage = os.wait4(number, 0)
    took = [status, usage.ru_maxrss, usage.ru_utime + usage.ru_stime]
    os.write(pipe, json.dumps(took).encode())


if __name__ == "__main__":
    run(int(sys.argv[1]), sys.argv[2:])
