"""CPU-seconds of a finished command given again: no model is loaded, nothing is run."""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

LIMIT = 1.0
WORDS = ["train", "method=lora", "model=tiny", "dataset=arithmetic", "train.max_steps=3"]


def cpu_seconds(*words: str) -> float:
    """Return the CPU seconds of a command of effbench and of what it starts."""
    command = [str(Path(sys.executable).parent / "effbench"), *words]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    with tempfile.TemporaryDirectory() as results:
        command = [*WORDS, f"run.results={results}"]
        print(f"first run   {cpu_seconds(*command):.2f} CPU-s")
        times = sorted(cpu_seconds(*command) for _ in range(7))
    median = statistics.median(times)
    print(f"run again   {median:.2f} CPU-s [{times[0]:.2f}, {times[-1]:.2f}]")
    print(f"limit {LIMIT} CPU-s: {'reached' if median <= LIMIT else 'MISSED'}")
    return int(median > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
