"""What `effbench.runner.local` starts: it heeds signals before it imports what a run needs."""

from __future__ import annotations

import sys

from effbench.runner.signals import INTERRUPTED, end_with_parent, interrupt_when_asked
from effbench.util.ending import leave


def main() -> int:
    """Run the job on standard input and return the exit status."""
    end_with_parent()
    interrupt_when_asked()
    try:
        from effbench.runner import worker

        return worker.main()
    except KeyboardInterrupt:
        sys.stderr.write("Stopped before the run began.\n")
        return INTERRUPTED


if __name__ == "__main__":
    leave(main())
