"""CPU-seconds of the commands that must start at once (user + system, median of nine)."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

LIMIT = 0.2
COMMANDS = {
    "--help": ["--help"],
    "train --help": ["train", "--help"],
    "list methods": ["list", "methods"],
    "runs": ["runs"],
    "completion of method=q": None,
}


def cpu_seconds(words: list[str] | None) -> float:
    environment = dict(os.environ)
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # what is installed has its bytecode
    if words is None:
        words = []
        environment |= {
            "_EFFBENCH_COMPLETE": "complete_bash",
            "COMP_WORDS": "effbench train method=q",
            "COMP_CWORD": "2",
        }
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [str(Path(sys.executable).parent / "effbench"), *words]
    subprocess.run(command, env=environment, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    worst = 0.0
    for name, words in COMMANDS.items():
        cpu_seconds(words)
        times = sorted(cpu_seconds(words) for _ in range(9))
        median = statistics.median(times)
        worst = max(worst, median)
        print(f"{name:<24} {median:.3f} CPU-s [{times[0]:.3f}, {times[-1]:.3f}]")
    print(f"limit {LIMIT} CPU-s: {'reached' if worst <= LIMIT else 'MISSED'}")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
