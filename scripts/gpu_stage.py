"""What a file in scripts/gpu works with: it runs commands, and notes rows of the table.

Such a file has a docstring whose first line names the stage, `SECONDS` (its time limit), and
`run(stage)`. Each row is on disk as soon as it is known.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
FOLDER = HERE / "gpu"
WORDS = "the of and to in is was for on that with as by at from it be are this which or an were"
LARGE = ["model=llama2-7b", "model.source=random", "hardware=cuda"]
"""Llama 2 7B's shape with random weights: it costs what the real one costs."""
SMALL = ["model=tiny", "hardware=cpu"]
"""What stands for it in a rehearsal."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    value: float | None
    """None when it could not be had; `note` then says why."""
    unit: str = ""
    at_least: float | None = None
    """What it is to reach."""
    at_most: float | None = None
    key: str = ""
    """The record that it is from."""
    note: str = ""

    @property
    def reached(self) -> bool | None:
        """Whether the value is where it should be; None when nothing is asked of it."""
        if self.value is None or (self.at_least is None and self.at_most is None):
            return None
        low = -float("inf") if self.at_least is None else self.at_least
        high = float("inf") if self.at_most is None else self.at_most
        return low <= self.value <= high


class FailedError(Exception):
    """A command of a stage failed; the text is its last words."""


class Stage:
    """One stage as it runs.

    Args:
        name: Of its file, without number and ending.
        out: Folder of the results.
        tiny: Whether this is a rehearsal: tiny shapes, on the CPU.
    """

    def __init__(self, name: str, out: Path, tiny: bool) -> None:
        self.name = name
        self.out = out
        self.tiny = tiny
        self.failures = 0
        self._rows = out / f"{name}.rows.jsonl"

    @property
    def model(self) -> list[str]:
        """Words that choose the model of 7B shape, or the tiny one."""
        return SMALL if self.tiny else LARGE

    def size(self, real: int, tiny: int) -> int:
        """Return a number, or the one that stands for it in a rehearsal."""
        return tiny if self.tiny else real

    def prose(self) -> list[str]:
        """Return words that choose a generated text in rows of 512 bytes (128 in a rehearsal)."""
        path = self.out / "prose.txt"  # named without its folder, which no record is to hold
        if not path.exists():
            draws, words = random.Random(0), WORDS.split()
            rows = (" ".join(draws.choices(words, k=400)) for _ in range(200))
            path.write_text("\n\n".join(rows))
        length = self.size(512, 128)
        return [
            *("dataset=file", "dataset.kind=text", f"dataset.files.all={path.name}"),
            f"dataset.max_length={length}",
        ]

    def effbench(self, *words: str) -> Any:
        """Run what `effbench WORDS` runs, and return its record.

        A run has a process of its own, as ever; a rehearsal does without, for it measures nothing.

        Raises:
            UserError: When the words are refused.
            FailedError: When the run fails.
        """
        from effbench.config.compose import compose
        from effbench.runner.local import execute, record_of
        from effbench.runner.worker import run_here
        from effbench.util.errors import RunFailedError

        print("+ effbench", *words, flush=True)
        stage, *overrides = words
        # Named from the stage's folder, in which it runs: a record holds its command.
        job = compose(stage, [*overrides, "run.results=results"])
        if self.tiny:
            run_here(job)
            _forget_accelerator()
            return record_of(job)
        try:
            return execute(job)
        except RunFailedError as failure:
            log = self.out / "results" / "runs" / job.spec.key / "log.txt"
            text = log.read_text() if log.exists() else f"exit status {failure.status}"
            raise FailedError(_last_words(text)) from None

    def command(self, *words: str, cwd: Path = ROOT) -> str:
        """Run a command and return what it printed; the stage's log has it all.

        Raises:
            FailedError: When it fails.
        """
        print("+", *words, flush=True)
        said = []
        with subprocess.Popen(
            words,
            cwd=cwd,
            env=os.environ | environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                said.append(line)
        if process.returncode:
            raise FailedError(_last_words("".join(said)))
        return "".join(said)

    @contextmanager
    def part(self, what: str) -> Iterator[None]:
        """Note a row without a value when the work inside fails, and go on after it."""
        try:
            yield
        except Exception as error:
            self.failures += 1
            print(f"{type(error).__name__}: {error}", flush=True)
            self.note(Row(what, None, note=str(error) or type(error).__name__))

    def note(self, row: Row) -> None:
        """Add a row to the table."""
        with self._rows.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")

    def metric(self, what: str, record: Any, name: str, **limits: Any) -> float:
        """Add a metric of a record to the table, and return its value.

        Args:
            what: The row's name.
            record: Where it is.
            name: The metric: `NAME`, `NAME@PHASE` or `NAME@PHASE/POINT`.
            limits: `at_least`, `at_most`, `note`.
        """
        name, _, place = name.partition("@")
        phase, _, point = place.partition("/")
        found = [
            m
            for m in record.metrics
            if (m.name, m.phase or "") == (name, phase) and (not point or m.point == point)
        ]
        if not found:
            raise FailedError(f"record {record.key} has no {name} {place}".rstrip())
        value = found[-1].value
        self.note(Row(what, value, found[-1].unit, key=record.key, **limits))
        return float(value)


def environment() -> dict[str, str]:
    """Return the variables of every process: this checkout's code, and no network."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _forget_accelerator() -> None:
    """accelerate keeps its precision for the life of a process; a run has a process of its own."""
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


def stages() -> dict[str, Path]:
    """Return the file of every stage by its name, in the order they run."""
    return {path.stem.partition("_")[2]: path for path in sorted(FOLDER.glob("[0-9]*_*.py"))}


def load(path: Path) -> ModuleType:
    """Return the module in a stage's file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(out: Path, name: str) -> list[Row]:
    """Return the rows that a stage has noted so far."""
    path = out / f"{name}.rows.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [Row(**json.loads(line)) for line in lines]


def _last_words(text: str) -> str:
    """Return the line that says what went wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling: Sequence[str] = [line for line in lines if "Error" in line] or lines or ["no output"]
    return telling[-1][:300]
