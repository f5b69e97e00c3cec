"""Small runs to kill and to damage, and commands that are given inside this process."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from effbench.testing.bench import TINY, forget_accelerator

HERE = ["hardware.device=cpu", "hardware.dtype=float32", "hardware.threads=1"]
SHORT = [*TINY, *HERE, "evaluator.perplexity.batch_tokens=120"]
RUNS: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "train, checkpoints": ("train", "method=sorted_lora", "train.checkpoint_every=5"),
    "train, validation": (
        "train",
        "method=adalora",
        "train.checkpoint_every=3",
        "train.validate_every=2",
        "train.patience=2",
    ),
    "compress": ("compress",),
    "eval": ("eval",),
    "eval, several": ("eval", "evaluator=[perplexity,choices,similarity]"),
}
"""What is run, by name: the command and its words beside `SHORT`."""


@dataclass(frozen=True)
class Said:
    """How a command ended and what it said."""

    status: int
    out: str
    err: str


@cache
def _app() -> Any:
    """Return the command line, made once in a process."""
    from typer.main import get_command

    from effbench.cli.main import app

    return get_command(app)


def command(words: Sequence[str], root: Path) -> Said:
    """Give a command in this process, with runs in it too.

    Args:
        words: After `effbench`.
        root: The results folder.
    """
    from effbench.cli import main as module

    def process(command: Sequence[str], text: str, *_: object) -> int:
        from effbench.runner import worker

        forget_accelerator()
        with mock.patch.object(sys, "stdin", io.StringIO(text)):
            return worker.main()

    def call() -> None:
        try:
            _app().main(list(words), prog_name="effbench", standalone_mode=True)
        except SystemExit as stop:
            statuses.append(int(stop.code or 0))

    statuses: list[int] = []
    out, err = io.StringIO(), io.StringIO()
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        mock.patch("effbench.runner.local._run_process", process),
        mock.patch.dict(os.environ, {"EFFBENCH_RESULTS": str(root)}),
    ):
        status = module._guarded(call)
    return Said(status or statuses[-1], out.getvalue(), err.getvalue())
