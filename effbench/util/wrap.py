"""Text in lines that fit a terminal."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from typing import TextIO

from effbench.util.errors import printable


def write(text: str, stream: TextIO | None = None, indent: int = 0) -> None:
    """Write a text as lines of its own; in a terminal no word of it is broken or acted upon.

    Args:
        text: Lines; elsewhere than in a terminal they stay as they are.
        stream: Where to; standard error by default.
        indent: Blanks before what goes on in further lines.
    """
    stream, text = stream or sys.stderr, printable(text)
    print(wrapped(text, indent) if stream.isatty() else text, file=stream, flush=True)


def columns() -> int:
    """Return the width of the terminal in characters."""
    return shutil.get_terminal_size().columns


def joined(text: str) -> str:
    """Return a text whose paragraphs are a line each, so that a terminal can break them anew.

    What is indented stays as it is: equations, and lists.
    """
    found: list[str] = []
    for line in text.split("\n"):
        goes_on = bool(found) and found[-1][:1].strip() and line[:1].strip(" -*|")
        if goes_on:
            found[-1] += f" {line}"
        else:
            found.append(line)
    return "\n".join(found)


QUOTED = re.compile(r"'[\w.+~]+=[^'\n]*'")
"""A setting that is one word to a shell."""
KEPT = "\0"
"""Stands for a blank at which no line may end."""


def wrapped(text: str, indent: int = 0) -> str:
    """Return a text in lines of the terminal's width; what is quoted for a shell stays whole."""
    whole = QUOTED.sub(lambda word: word[0].replace(" ", KEPT), text)
    return _in_lines(whole, indent).replace(KEPT, " ")


def _in_lines(text: str, indent: int) -> str:
    width = columns()
    lines = (
        textwrap.wrap(
            line,
            width,
            break_long_words=False,
            break_on_hyphens=False,
            drop_whitespace=True,
            replace_whitespace=False,
            subsequent_indent=" " * indent,
        )
        for line in text.split("\n")
    )
    return "\n".join("\n".join(parts) for parts in lines)
