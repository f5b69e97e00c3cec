"""Runs of one command, each a process of its own, without importing anew what all of them need.

A nursery is a process that has imported what any run imports and does nothing else: it forks a
process for each run, one at a time. What the runs of a grid or a campaign share is thus the
libraries; memory, random states and open files are each run's own. Runs on a CUDA device, which
does not survive a fork, and runs side by side are processes from the ground up.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from effbench.runner.signals import INTERRUPTED
from effbench.util.errors import RunFailedError
from effbench.util.wrap import write

_open: list[Nursery] = []
"""The one that runs are forked from now, if any."""

NAME = "effbench.runner.nursery_process"
"""Module of the process."""
LENGTH = 8
"""Bytes of a message's length."""


@contextmanager
def nursery() -> Iterator[None]:
    """Have runs forked from one process inside, where the system can and a run may be."""
    if _open or not hasattr(os, "fork") or sys.platform == "darwin":
        yield
        return
    _open.append(Nursery())
    try:
        yield
    finally:
        _open.pop().close()


def nursery_for(device: str) -> Nursery | None:
    """Return what a run on a device is to be forked from; None for a process of its own."""
    return _open[0] if _open and device == "cpu" else None


@dataclass
class Child:
    """A run's process that a nursery forked; leaving its context waits for its end."""

    pid: int
    _control: socket.socket
    returncode: int | None = None

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        self.wait()

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def wait(self) -> int:
        """Wait for its end; return its exit status, negative for the signal that ended it."""
        if self.returncode is None:
            said = receive(self._control)
            self.returncode = said["status"] if said else -signal.SIGKILL
        return self.returncode


class Nursery:
    """The launcher's side of it; the process begins with the first run."""

    barren = False
    """Whether runs cannot be forked here."""
    _process: subprocess.Popen[bytes] | None = None
    _control: socket.socket

    def fork(self, text: str, variables: Mapping[str, str], files: Sequence[int]) -> Child | None:
        """Begin a run; return None where this cannot be done, and never will.

        Args:
            text: Its job.
            variables: Its environment beside that of this process.
            files: Numbers of open files: its standard error, and one for the reason of a failure.

        Raises:
            RunFailedError: When Ctrl-C came before the run began.
        """
        if self.barren:
            return None
        try:
            if self._process is None:
                self._start()
            send(self._control, {"job": text, "variables": variables})
            socket.send_fds(self._control, [b"f"], list(files))
            said = receive(self._control)
        except ConnectionError:
            said = None
        except KeyboardInterrupt:
            self.close()
            write("Stopped before the run began.")
            raise RunFailedError(INTERRUPTED) from None
        if said is None:
            self.close()
            self.barren = True
            return None
        return Child(said["pid"], self._control)

    def _start(self) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", NAME, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )

    def close(self) -> None:
        """End the process, and with it a run that nobody waits for: it saves its state first."""
        if self._process:
            self._control.close()
            self._process.wait()
            self._process = None


def send(control: socket.socket, what: dict[str, Any]) -> None:
    """Send a message."""
    content = json.dumps(what).encode()
    control.sendall(len(content).to_bytes(LENGTH) + content)


def receive(control: socket.socket) -> dict[str, Any] | None:
    """Return the next message; None when the other side has ended."""
    head = _exactly(control, LENGTH)
    content = _exactly(control, int.from_bytes(head)) if head else b""
    message: dict[str, Any] | None = json.loads(content) if content else None
    return message


def _exactly(control: socket.socket, size: int) -> bytes:
    """Return so many bytes; fewer when the other side has ended."""
    content = b""
    while len(content) < size:
        try:
            more = control.recv(size - len(content))
        except ConnectionError:
            return b""
        if not more:
            return b""
        content += more
    return content
