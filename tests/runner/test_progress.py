"""What a person sees while a run works."""

from __future__ import annotations

import itertools
import json
import re
import sys
import time

import pytest

from effbench.api.schema import plain
from effbench.runner.progress import Progress
from effbench.runner.run import Run
from effbench.runner.worker import run_text
from effbench.testing.bench import Bench
from effbench.util.errors import UserError


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let 30 seconds pass between two looks at the clock."""
    ticks = itertools.count(1000, 30)
    monkeypatch.setattr(time, "monotonic", lambda: float(next(ticks)))


def terminal(monkeypatch: pytest.MonkeyPatch) -> Progress:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    return Progress(True)


def seen(text: str) -> list[str]:
    """Return the lines that stand in a terminal after all was written to it."""
    lines = [re.split(r"\r\x1b\[K", line)[-1] for line in text.split("\n")]
    return [line for line in lines if line]


def test_time_that_is_left(
    clock: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = Progress(True)
    for done in (10, 11, 12):  # it went on from 10
        progress.bar("step", done, 20, "loss 2")
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == "step 10/20 loss 2"
    assert second == "step 11/20 loss 2  9:00 left"  # 60 s for one, nine to come
    assert third == "step 12/20 loss 2  8:00 left"
    progress.bar("item", 30, 40)
    assert capsys.readouterr().err == "item 30/40\n", "another bar has a pace of its own"


def test_what_is_over_says_nothing_of_time(clock: None, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(True)
    progress.bar("part", 0, 2)
    progress.bar("part", 2, 2, "layers")
    assert capsys.readouterr().err.splitlines() == ["part 0/2", "part 2/2 layers"]


def test_a_line_about_now_gives_way(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = terminal(monkeypatch)
    progress.now("loading torch")
    progress.say("tiny loaded")
    progress.bar("step", 1, 2)
    progress.say("a note")
    with progress.during("reading"):
        pass
    progress.say("the end")
    lines = seen(capsys.readouterr().err)
    assert lines[0] == "tiny loaded"
    assert lines[1].endswith("step 1/2"), "a bar stays"
    assert lines[2:] == ["a note", "the end"]


def test_without_a_terminal_each_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(True)
    progress.now("loading torch")
    progress.say("tiny loaded")
    assert capsys.readouterr().err.splitlines() == ["loading torch ...", "tiny loaded"]


def test_switched_off_it_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(False)
    progress.now("a")
    progress.say("b")
    progress.bar("c", 1, 2)
    assert capsys.readouterr().err == ""


def test_why_a_run_was_refused_stands_in_a_line_of_its_own(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(run: Run) -> None:
        run.progress.now("reading rows")
        raise UserError("There are none.", "")

    monkeypatch.setattr("effbench.runner.stages.eval.perform", refuse)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    job = bench.job("eval", "run.progress=true")
    assert run_text(json.dumps(plain(job))) == 2
    assert seen(capsys.readouterr().err)[-1] == "Error: There are none."
