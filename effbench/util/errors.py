"""The one exception that a user can mend; every other exception is a bug."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters that a terminal acts upon, but for tabs and line ends."""


def printable(text: str) -> str:
    """Return a text that somebody else may have written without what a terminal would act upon."""
    return CONTROL.sub("\ufffd", text)


def printable_values(value: Any) -> Any:
    """Return plain values whose texts a terminal may be given."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(k): printable_values(v) for k, v in value.items()}
    return [printable_values(v) for v in value] if isinstance(value, list) else value


class UserError(Exception):
    """Something the user can put right; shown in a few lines, without a traceback.

    Args:
        message: What is wrong, in one sentence.
        hint: What to do about it.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


def require_unicode(text: str, what: str, hint: str) -> str:
    """Return a text without the halves of characters that Python reads of bytes that are none.

    Args:
        text: As it was typed or read.
        what: What it is.
        hint: What to do where it has some.

    Raises:
        UserError: When it has some.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        bad = text[error.start : error.end]
        raise UserError(f"{what} is not UTF-8: {bad!a} is no character.", hint) from None
    return text


class NewerVersionError(UserError):
    """Something that a newer effbench wrote; says what is not known here."""


class StoppedError(Exception):
    """A run was asked to stop and its state is safe; says how far it came."""


class RunFailedError(Exception):
    """A run's process ended with another exit status than zero; it has said why itself.

    Args:
        status: Its exit status.
        reason: What it said, as far as it is known.
    """

    def __init__(self, status: int, reason: str = "") -> None:
        super().__init__(reason or f"exit status {status}")
        self.status = status


MEMORY_SIGNS = (
    "can't allocate memory",
    "cannot allocate memory",
    "bad_alloc",
    "out of memory",
    "storage size calculation overflowed",
    "memoryerror",
    "memory allocation of",
)
"""How libraries in C++, Python and Rust say that an allocation failed, in lower case."""


def says_out_of_memory(text: str) -> bool:
    """Return whether an error message speaks of memory that could not be had."""
    lowered = text.lower()
    return any(sign in lowered for sign in MEMORY_SIGNS)


def ran_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception means that there was too little memory."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError | OSError) and says_out_of_memory(str(error))


def nearest(word: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """Return the known words nearest to `word`, best first."""
    words = sorted(set(known))
    folded = {w.lower().replace("-", "_"): w for w in words}
    close = difflib.get_close_matches(word.lower().replace("-", "_"), folded, limit, 0.55)
    return [folded[c] for c in close]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a hint that names the nearest known words, or all of them when few."""
    words = sorted(set(known))
    close = nearest(word, words)
    if close:
        return f"Did you mean {' or '.join(repr(c) for c in close)}?"
    if len(words) <= 12:
        return f"Known: {', '.join(words)}." if words else "None is known here."
    return f"{len(words)} are known; the first: {', '.join(words[:8])}, …"
