"""CPU-seconds (user + system, median) of the commands that must start at once, and of those that
look at all records: of 1,000 and of 10,000, made of those here."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from effbench.results.records import Record, read_all, write

HERE = Path("results")
SIZES = (1_000, 10_000)
START = 0.2
"""CPU-seconds of a command that must start at once."""
COMMANDS = {
    "--help": ["--help"],
    "train --help": ["train", "--help"],
    "list methods": ["list", "methods"],
    "runs": ["runs"],
    "completion of method=q": None,
}
OF_MANY = {
    "runs": (["runs"], 2.3),
    "runs show latest": (["runs", "show", "latest"], 2.3),
    "compare": (["compare", "{0}", "{1}"], 2.3),
    "table qdylora": (["table", "qdylora"], 2.3),
    "table grand": (["table", "grand"], 2.3),
    "report": (["report", "-o", "{results}/report.html"], 2.3),
}
"""Words and the most CPU-seconds: .3 until it begins, 2 until it is shown."""


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


def shown(name: str, words: list[str] | None, limit: float, times: int = 9) -> bool:
    """Measure a command after a first call; say what it took, and return whether it keeps to it."""
    first = cpu_seconds(words)
    taken = sorted(cpu_seconds(words) for _ in range(times))
    median = statistics.median(taken)
    verdict = "reached" if median <= limit else "MISSED"
    print(
        f"{name:<24} {median:7.3f} CPU-s [{taken[0]:.3f}, {taken[-1]:.3f}]; first {first:.3f}; "
        f"limit {limit}: {verdict}",
        flush=True,
    )
    return median <= limit


def grown(size: int, to: Path) -> list[str]:
    """Write as many records as are wanted, made of those here with other seeds; return keys."""
    here = read_all(HERE / "records")
    for part in ("campaigns", "tunings"):
        shutil.copytree(HERE / part, to / part)
    for number in range(size):
        write(_again(here[number % len(here)], number // len(here)), to / "records")
    return [record.key for record in here[:2]]


def _again(record: Record, turn: int) -> Record:
    """Return a record as if it was run once more, with another seed."""
    if not turn:
        return record
    metrics = [replace(m, value=m.value * (1 + turn / 1e4)) for m in record.metrics]
    key, parent = (_key(k, turn) for k in (record.key, record.parent))
    spec = {**record.spec, "seed": 1000 + turn}
    return replace(record, key=key, parent=parent, spec=spec, metrics=metrics)


def _key(key: str, turn: int) -> str:
    return hashlib.sha256(f"{key}/{turn}".encode()).hexdigest()[:16] if key else ""


def main() -> int:
    kept = [shown(name, words, START) for name, words in COMMANDS.items()]
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            keys = grown(size, Path(folder))
            print(f"\n{size:,} records")
            for name, (words, limit) in OF_MANY.items():
                filled = [word.format(*keys, results=folder) for word in words]
                kept.append(shown(name, [*filled, "--results", folder], limit, 3))
    return int(not all(kept))


if __name__ == "__main__":
    sys.exit(main())
