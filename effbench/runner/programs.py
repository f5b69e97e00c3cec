"""A program of somebody else's that works for a run: ended with it, and measured as it is."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

from effbench.api.method_types import ProgramUsage
from effbench.resources.memory import PeakMemory
from effbench.util.errors import StoppedError, UserError

TETHER = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execvp(sys.argv[1], sys.argv[1:])"
)
"""Becomes another program that gets SIGTERM when the process that started it is gone."""
SAMPLE_SECONDS = 0.1
"""Between two looks at the program's processes."""
GRACE_SECONDS = 5.0
"""Between asking a program to end and ending it."""
LAST_LINES = 3
"""Of what a program said that are shown when it fails."""
LINE = 160
"""Letters of a line that are shown."""
COLOURS = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
"""What tells a terminal to change its colours, or where it writes; it is not shown."""


def run_program(
    words: Sequence[str],
    environment: Mapping[str, str] | None = None,
    stop: Callable[[], bool] = lambda: False,
    show: Callable[[str], None] = lambda text: None,
) -> ProgramUsage:
    """Run a program to its end.

    Args:
        words: The program and its arguments.
        environment: Variables for it where they are not set here.
        stop: Whether it is to be ended.
        show: Called with the last line that it said, again and again.

    Raises:
        UserError: When it fails, with the last that it said.
        StoppedError: When it was ended because `stop` said so.
    """
    with TemporaryFile() as said:
        begun = time.monotonic()
        process = subprocess.Popen(
            [*_tether(), *words],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**(environment or {}), **os.environ},
            process_group=0,
        )
        try:
            peak, processor = _watched(process, said, stop, show)
        finally:
            _end(process)
        if process.returncode:
            raise _failed(words[0], process.returncode, _lines(said))
    PeakMemory.saw(peak)
    return ProgramUsage(time.monotonic() - begun, processor, peak)


def _tether() -> list[str]:
    return [sys.executable, "-P", "-c", TETHER] if sys.platform == "linux" else []


def _watched(
    process: subprocess.Popen[bytes],
    said: BinaryIO,
    stop: Callable[[], bool],
    show: Callable[[str], None],
) -> tuple[int, float]:
    """Wait for a program; return its largest resident size and its processor time.

    The system's own figure of the largest size is that of who started it, where that was larger, so
    processes are looked at; it stands in only where none was seen.
    """
    peak = 0
    while True:
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if ended:
            process.returncode = os.waitstatus_to_exitcode(status)
            scale = 1 if sys.platform == "darwin" else 1024
            return peak or usage.ru_maxrss * scale, usage.ru_utime + usage.ru_stime
        peak = max([peak, *map(_largest, _family(process.pid))])
        show(next(iter(_lines(said)[-1:]), ""))
        if stop():
            raise StoppedError("ending the program, which will begin anew")
        time.sleep(SAMPLE_SECONDS)


def _family(number: int) -> Iterator[int]:
    """Yield a process and all that it and they started, as far as the system tells."""
    yield number
    with suppress(OSError):
        for task in Path(f"/proc/{number}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _family(int(child))


def _largest(number: int) -> int:
    """Return the largest resident size of a process so far, in bytes; 0 where it is gone."""
    with suppress(OSError):
        for line in Path(f"/proc/{number}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a program, and what it left running in its group."""
    if process.returncode is None:
        _signal(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    _signal(process.pid, signal.SIGKILL)
    process.wait()


def _signal(group: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _lines(said: BinaryIO) -> list[str]:
    """Return the last lines of a file that a process writes, whose place in it is left alone."""
    size = os.fstat(said.fileno()).st_size
    start = max(0, size - 8 * LAST_LINES * LINE)
    text = os.pread(said.fileno(), size - start, start).decode(errors="replace")
    lines = (line.strip() for line in COLOURS.sub("", text).replace("\r", "\n").splitlines())
    return [line[:LINE] for line in lines if line][-LAST_LINES:]


def _failed(program: str, status: int, lines: Sequence[str]) -> UserError:
    last = "\n".join(lines) or "It said nothing."
    if status == -signal.SIGKILL:
        why = "was killed (SIGKILL), most likely because memory ran out"
    elif status < 0:
        why = f"was ended by {signal.Signals(-status).name}"
    else:
        why = f"ended with status {status}"
    return UserError(f"{program} {why}:\n{last}", "Try the command by hand on a small model.")
