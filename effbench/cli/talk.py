"""What `effbench generate` and `effbench chat` do in a terminal."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from effbench.runner.progress import Progress
from effbench.util.errors import UserError
from effbench.util.wrap import write

if TYPE_CHECKING:
    from effbench.runner.try_out import Speaker


COMMANDS = "/clear begins anew, /quit or Ctrl-D ends."
COMMAND = re.compile(r"/[a-z]*")
"""A line that looks like a command, and like no path or text."""


@dataclass(frozen=True)
class Wish:
    """How answers are made."""

    point: str
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


def generate_once(
    words: Sequence[str], extra: Sequence[Path], text: str, raw: bool, wish: Wish
) -> None:
    """Print what comes after a prompt.

    Raises:
        UserError: Without a prompt, and as composing and loading do.
    """
    if not text.strip():
        raise UserError("There is no prompt.", "Give one: --prompt TEXT, or --prompt - for stdin.")
    with _speaker(words, extra, wish) as speaker:
        ids = speaker.plain(text) if raw else speaker.rendered([("user", text)])
        _stream(speaker, ids, wish)


def talk(words: Sequence[str], extra: Sequence[Path], wish: Wish) -> None:
    """Read lines and print answers until the input ends.

    Raises:
        UserError: As composing and loading do.
    """
    with _speaker(words, extra, wish) as speaker:
        if not speaker.chats:
            write("This model has no chat template: it goes on from the plain text.")
        write(COMMANDS)
        turns: list[tuple[str, str]] = []
        for line in _lines():
            if line == "/clear":
                turns.clear()
                continue
            if COMMAND.fullmatch(line):
                write(f"There is no {line}. {COMMANDS}")
                continue
            turns.append(("user", line))
            try:
                answer = _stream(speaker, speaker.rendered(turns), wish)
            except UserError as error:
                turns.pop()
                write(f"{error.message} Begin anew with /clear.")
                continue
            turns.append(("assistant", answer))


def _lines() -> Iterator[str]:
    """Yield what is typed, without empty lines, until /quit or the end."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if line in ("/quit", "/exit"):
            return
        if line:
            yield line


@contextmanager
def _speaker(words: Sequence[str], extra: Sequence[Path], wish: Wish) -> Iterator[Speaker]:
    from effbench.config.compose import compose
    from effbench.runner.worker import quiet_libraries

    progress = Progress(sys.stderr.isatty())
    job = compose("eval", [*words, "evaluator=[]"], extra)
    job = replace(job, runtime=replace(job.runtime, progress=False))
    with TemporaryDirectory() as scratch:
        quiet_libraries()
        with progress.during(f"loading {job.spec.parent or job.spec.model.called}"):
            from effbench.runner.try_out import Speaker

            speaker = Speaker.of(job, wish.point, Path(scratch))
        for line in speaker.not_followed(not wish.temperature):
            write(line)
        yield speaker


def _stream(speaker: Speaker, ids: list[int], wish: Wish) -> str:
    """Print an answer as it comes, and how fast it came; an interrupt ends it."""
    from effbench.nn.decode.generate import Sampling
    from effbench.runner.try_out import Telling

    told, said = Telling(), ""
    sampling = Sampling(wish.temperature, top_p=wish.top_p)
    try:
        for piece in speaker.answer(ids, wish.max_new_tokens, sampling, wish.seed, told):
            said += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        if not said:
            raise
    print(flush=True)
    at = f" at {speaker.point.name}" if speaker.point.name else ""
    write(f"[{told.line()}{at}]")
    return said
