"""What became of the rows of a dataset: read, left out, cut, counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Reading:
    """What was read of one source of rows, and what of it was left out."""

    read: int = 0
    """Rows."""
    empty: int = 0
    """Rows that hold nothing (kind `text`)."""
    missing: int = 0
    """Rows without a value or an answer, which `dataset.missing=skip` leaves out."""
    repeated: int = 0
    """Rows with the same content as another one."""

    unmixed: int = 0
    """Rows beyond the share of their file (`dataset.mix`)."""

    def kept(self) -> dict[str, int]:
        """Return it as a record keeps it: shares only where there were any."""
        values = asdict(self)
        return values if self.unmixed else {k: v for k, v in values.items() if k != "unmixed"}

    def line(self) -> str:
        """Return it in words."""
        gone = {
            "empty": self.empty,
            "without a value": self.missing,
            "repeated": self.repeated,
            "beyond the share of their file": self.unmixed,
        }
        left = ", ".join(f"{count:,} {what}" for what, count in gone.items() if count)
        return f"{self.read:,} rows read" + (f", of which left out: {left}" if left else "")


@dataclass
class Account:
    """What a split's rows are as tokens. `scored` is what has a loss."""

    rows: int
    tokens: int
    """Of all rows, with one answer each."""
    scored_tokens: int
    bytes: int
    """UTF-8 bytes of the text of all rows, before anything is cut."""
    scored_bytes: int
    """UTF-8 bytes of the text whose tokens have a loss."""
    prompts_cut: int = 0
    """Rows of which a prompt lost its start to `dataset.max_length`."""
    answers_cut: int = 0
    """Rows of which an answer lost its end, or 1 for the end of packed text."""
    cut_tokens: int = 0
    """Tokens lost, with one answer for each row."""
    asked_before: int = 0
    """Rows whose prompt was trained on, with another answer."""

    def line(self) -> str:
        """Return it in words."""
        scored = f"{self.scored_tokens:,} of them scored, in {self.scored_bytes:,} bytes"
        cuts = {"a prompt loses its start": self.prompts_cut, "an answer its end": self.answers_cut}
        lost = ", ".join(f"in {count:,} {what}" for what, count in cuts.items() if count)
        told = f"; {lost} ({self.cut_tokens:,} tokens)" if lost else ""
        if self.asked_before:
            told += f"; {self.asked_before:,} prompts were trained on with another answer"
        return f"{self.rows:,} rows, {self.tokens:,} tokens, {scored}{told}"


def lines(data: Mapping[str, Any]) -> list[str]:
    """Return what a record holds of its data, in words."""
    read = {n: Reading(**r).line() for n, r in data.get("sources", {}).items()}
    used = {n: Account(**s).line() for n, s in data.get("splits", {}).items()}
    return [f"{name}: {line}" for part in (read, used) for name, line in part.items()]
