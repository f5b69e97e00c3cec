"""A row of data as tokens: one sequence, or several that stay together, and named columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

IGNORED = -100
"""Label of a token that counts in no loss; an answer's rating where it has none."""
CHOSEN, REJECTED = 4.0, 1.0
"""Ratings that a pair without ratings stands for, on HelpSteer2's scale of 0 to 4."""


@dataclass(frozen=True)
class Tokens:
    """One sequence: a prompt without a loss, and after it an answer or a text."""

    ids: list[int]
    """Tokens of the whole sequence."""
    prompt_length: int
    """Leading tokens without a loss; 0 for plain text."""
    answer_bytes: int
    """UTF-8 bytes that the loss covers."""
    cut: tuple[int, int] = (0, 0)
    """Tokens that did not fit: of the prompt's start, and of the answer's end."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Values by name: a number for the sequence, or a list with one for each token."""

    @property
    def loss_tokens(self) -> int:
        """Tokens that count in the loss; the first predicts nothing."""
        return len(self.ids) - max(1, self.prompt_length)

    def labels(self) -> list[int]:
        """Return the labels, not shifted, -100 on the prompt."""
        return [IGNORED] * self.prompt_length + self.ids[self.prompt_length :]


@dataclass(frozen=True)
class Classed(Tokens):
    """A text and the number of a class in the place of an answer in words."""

    said: tuple[int, ...] = ()
    """Tokens of the answer."""


@dataclass(frozen=True)
class Turns(Tokens):
    """One conversation: answers with a loss, and between them what others say."""

    silent: tuple[tuple[int, int], ...] = ()
    """Spans after the prompt without a loss."""

    @property
    def loss_tokens(self) -> int:
        """Tokens that count in the loss."""
        return super().loss_tokens - sum(stop - start for start, stop in self.silent)

    def labels(self) -> list[int]:
        """Return the labels, not shifted, -100 on the prompt and on what is silent."""
        labels = super().labels()
        for start, stop in self.silent:
            labels[start:stop] = [IGNORED] * (stop - start)
        return labels


@dataclass(frozen=True)
class Example:
    """One row. Its sequences are never dealt into different batches."""

    id: str
    """Content hash, 16 hexadecimal digits."""
    sequences: tuple[Tokens, ...]
    """What goes into a batch, at least one. As data has it, prompt and right answer alone."""
    choices: tuple[Tokens, ...] = ()
    """Prompt and answer for each answer, where wrong ones are known too."""
    right: int = 0
    """Index of the right one of `choices`."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Values by name: a number, or a list as long in every example. `weight` is that of the row in
    the loss, 1 where there is none."""

    @property
    def ids(self) -> list[int]:
        """Tokens of the first sequence."""
        return self.sequences[0].ids

    @property
    def prompt_length(self) -> int:
        """Leading tokens of the first sequence without a loss."""
        return self.sequences[0].prompt_length

    @property
    def answer_bytes(self) -> int:
        """UTF-8 bytes that the loss of the first sequence covers."""
        return self.sequences[0].answer_bytes

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(s.ids) for s in self.sequences)

    @property
    def loss_tokens(self) -> int:
        """Tokens of all sequences that count in the loss; the first of each predicts nothing."""
        return sum(s.loss_tokens for s in self.sequences)

    def labels(self) -> list[int]:
        """Return the labels of the first sequence."""
        return self.sequences[0].labels()

    def compared(self) -> Example:
        """Return the example with all its choices as sequences, the right one first.

        Each has its place among the choices as the column `choice`.
        """
        known = [
            replace(c, columns={**c.columns, "choice": place})
            for place, c in enumerate(self.choices)
        ]
        others = (c for place, c in enumerate(known) if place != self.right)
        return replace(self, sequences=(known[self.right], *others))
