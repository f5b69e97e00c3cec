"""A program of somebody else's that works for a run: ended with it, and measured as it is."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

from effbench.api.method_types import ProgramUsage
from effbench.resources.memory import PeakMemory
from effbench.util.errors import StoppedError, UserError

TETHER = Path(__file__).with_name("tether.py")
SAMPLE_SECONDS = 0.1
"""Between two looks at what a program says."""
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
    told, tells = os.pipe()
    with TemporaryFile() as said, os.fdopen(told) as told_file:
        begun = time.monotonic()
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(TETHER), str(tells), *words],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                env={**(environment or {}), **os.environ},
                process_group=0,
                pass_fds=[tells],
            )
        finally:
            os.close(tells)
        try:
            _wait(process, said, stop, show)
        finally:
            _end(process)
        status, peak, processor = _took(told_file.read(), process.returncode)
        if status:
            raise _failed(words[0], status, _lines(said))
    PeakMemory.saw(peak)
    return ProgramUsage(time.monotonic() - begun, processor, peak)


def _wait(
    process: subprocess.Popen[bytes],
    said: BinaryIO,
    stop: Callable[[], bool],
    show: Callable[[str], None],
) -> None:
    while process.poll() is None:
        show(next(iter(_lines(said)[-1:]), ""))
        if stop():
            raise StoppedError("ending the program, which will begin anew")
        time.sleep(SAMPLE_SECONDS)


def _took(told: str, returned: int) -> tuple[int, int, float]:
    """Return a program's status, its largest resident size in bytes and its processor seconds."""
    if not told:  # ended together with the process that waits for it
        return returned or -signal.SIGKILL, 0, 0.0
    status, resident, processor = json.loads(told)
    scale = 1 if sys.platform == "darwin" else 1024
    return os.waitstatus_to_exitcode(status), resident * scale, processor


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
