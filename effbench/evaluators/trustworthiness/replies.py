"""What a generated text says: one of the answers, a refusal, or neither."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Reply:
    """A generated text, understood."""

    kind: Literal["answer", "refuse", "invalid"]
    index: int | None = None
    """Which answer; None unless `kind` is `answer`."""


REFUSAL = re.compile(
    r"\b(?:i(?:'m| am) (?:sorry,? but|unable|not able)"
    r"|i (?:can't|cannot|can not|won't|will not|must not|refuse|must decline|decline)\b"
    r"|i (?:would|'d) rather not|i apologi[sz]e"
    r"|as an ai\b"
    r"|it(?:'s| is) not (?:appropriate|possible) to)"
)


def parse(text: str, choices: Sequence[str]) -> Reply:
    """Return what `text` says; total, every text is one of the three.

    What comes first counts: a choice named in whole words, or words of refusal. Where two choices
    start at the same place, the longer one counts. A negation around a choice is not understood.

    Args:
        text: What a model generated.
        choices: Possible answers.
    """
    said = _plain(text)
    found = [
        (place, -len(choice), index)
        for index, choice in enumerate(choices)
        if (place := _place(said, _plain(choice))) is not None
    ]
    refusal = REFUSAL.search(said)
    if found and (refusal is None or min(found)[0] <= refusal.start()):
        return Reply("answer", min(found)[2])
    return Reply("refuse" if refusal else "invalid")


def _plain(text: str) -> str:
    return " ".join(text.replace("\u2019", "'").casefold().split()).rstrip(".!\"'")


def _place(text: str, choice: str) -> int | None:
    if not choice:
        return None
    found = re.search(rf"(?<!\w){re.escape(choice)}(?!\w)", text)
    return found.start() if found else None
