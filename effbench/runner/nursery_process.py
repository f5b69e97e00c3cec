"""What `effbench.runner.nursery` starts: it imports what runs need, and forks a process for each.

Signals are for the runs: their launcher passes them on. It ends with its launcher, and a run that
is at work then is asked to stop.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
from contextlib import suppress
from typing import Any

from effbench.runner.nursery import receive, send
from effbench.runner.signals import ASKED, INTERRUPTED, end_with_parent, interrupt_when_asked
from effbench.util.ending import leave

FILES = 2
"""That come with a job: where standard error goes, and the reason of a failure."""


def main() -> int:
    """Fork runs until the launcher is gone."""
    end_with_parent(signal.SIGKILL)
    control = socket.socket(fileno=int(sys.argv[1]))
    usual = {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, *ASKED)}
    _import_what_runs_need()
    from effbench.resources.memory import FilePages

    gc.collect()
    gc.freeze()  # a child that looks through these objects would copy their pages
    pages = FilePages.resident()
    while (asked := receive(control)) is not None:
        files = socket.recv_fds(control, 1, FILES)[1]
        if (pid := os.fork()) == 0:
            control.close()
            end_with_parent()
            for number, handler in usual.items():
                signal.signal(number, handler)
            leave(_run(asked, files, pages))
        for number in files:
            os.close(number)
        with suppress(ConnectionError):  # nobody waits for the run; the next turn is the last
            send(control, {"pid": pid})
            send(control, {"status": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])})
    return 0


def _import_what_runs_need() -> None:
    """Import what every run that opens a model imports, and no more."""
    from effbench.runner import worker

    worker.quiet_libraries()  # they ask for it while they are imported
    from effbench.models.load import import_libraries
    from effbench.runner import open, run

    import_libraries()
    del open, run


def _run(asked: dict[str, Any], files: list[int], pages: Any) -> int:
    """Run a job in the process that was forked for it, and return its exit status."""
    interrupt_when_asked()
    from effbench.runner import worker

    try:
        errors, reason = files
        os.dup2(errors, 2)
        os.environ.update({**asked["variables"], worker.REASON: str(reason)})
        pages.touch()
        return worker.run_text(asked["job"])
    except KeyboardInterrupt:
        sys.stderr.write("Stopped before the run began.\n")
        return INTERRUPTED


if __name__ == "__main__":
    leave(main())
