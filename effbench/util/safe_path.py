"""Python's safe path: the folder in which a command is given holds no module of a run.

Python puts the current folder first on the path of what it starts with `-m`
(https://docs.python.org/3/using/cmdline.html#envvar-PYTHONSAFEPATH), as the libraries that take
runs to other processes do: a `yaml.py` that happens to lie there would be run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

NAME = "PYTHONSAFEPATH"


@contextmanager
def safe_path() -> Iterator[Callable[[], None]]:
    """Start Python processes with a safe path; give what undoes it there, for their own programs.

    A run calls that first: a program of the user's may count on modules beside it.
    """
    undo = partial(_set, os.environ.get(NAME))
    os.environ[NAME] = "1"
    try:
        yield undo
    finally:
        undo()


def _set(value: str | None) -> None:
    os.environ.pop(NAME, None)
    if value is not None:
        os.environ[NAME] = value
