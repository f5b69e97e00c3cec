"""One of the other processes of a training on several devices: see `effbench.runner.peers`.

`python -m effbench.runner.peer FOLDER RANK`, with the job on standard input.
"""

from __future__ import annotations

import json
import signal
import sys
import traceback
from pathlib import Path

from effbench.api.schema import build
from effbench.api.spec import Job
from effbench.results.store import RunFolder, Store
from effbench.runner.signals import ASKED, end_with_parent
from effbench.runner.worker import quiet_libraries
from effbench.util.ending import leave
from effbench.util.errors import StoppedError, UserError


def main(folder: Path, rank: int, text: str) -> int:
    """Help with a job and return the exit status.

    Args:
        folder: Where the processes meet; the reason of a failure goes there.
        rank: Which one this is.
        text: The job.
    """
    job = build(Job, json.loads(text), "job")
    quiet_libraries()
    from effbench.runner.peers import UNKNOWN, reason_name

    try:
        help_with(job, folder, rank)
    except UserError as error:
        (folder / reason_name(rank)).write_text(error.message)
        return 2
    except StoppedError:
        return 0
    except Exception:
        (folder / reason_name(rank)).write_text(traceback.format_exc())
        return UNKNOWN
    return 0


def help_with(job: Job, folder: Path, rank: int) -> None:
    """Train together with the run's own process; what this one writes, nobody reads.

    Raises:
        StoppedError: When the run was asked to stop.
        UserError: What a user can mend.
    """
    from effbench.runner.peers import join
    from effbench.runner.run import open_run
    from effbench.runner.stages.train import assist

    scratch = RunFolder(folder / f"process{rank}")
    scratch.create(job.spec)
    run = open_run(job, scratch, Store(Path(job.runtime.results)))
    join(run, rank, folder)
    assist(run)


if __name__ == "__main__":
    for number in (signal.SIGINT, *ASKED):
        signal.signal(number, signal.SIG_IGN)  # the run's own process decides, and tells
    end_with_parent(signal.SIGKILL)
    leave(main(Path(sys.argv[1]), int(sys.argv[2]), sys.stdin.read()))
