"""Rows that were trained on, found again in other files, formats and templates.

A row is found by its question and its right answer, whatever fields these stand in and whatever
the words around them are. Values of some length are looked for anywhere in a row; short ones, which
are the same by chance, only where they play the same part: in the field of that name, or as all of
the question, or as the right answer. Where both rows are multiple choice the wrong answers count
too: the same question with others is another row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from effbench.data.render import Text, traces
from effbench.util.errors import UserError

QUESTION, ANSWER = "\x1fquestion", "\x1fanswer"
"""The parts that short values play, where a field of the row would stand."""


class Shared(NamedTuple):
    """How many rows were found again."""

    rows: int
    """Their question and their right answer stood in one row that was trained on."""
    prompts: int
    """What they ask with did, and their answers did not."""


class Trained:
    """The rows of trainings: what they were known by, and the values that they were made of."""

    def __init__(self) -> None:
        self.ids: set[str] = set()
        self._rows: dict[str, set[int]] = {}
        self._choices: set[int] = set()
        self._count = 0

    def add(self, kept: Any) -> None:
        """Add what `kept` left.

        Runs before values were kept left names of rows alone. Later ones did not say which rows are
        multiple choice, so that any of theirs can be.
        """
        if isinstance(kept, list):
            self.ids |= set(kept)
            return
        self.ids |= set(kept["ids"])
        first, count = self._count, len(kept["values"])
        self._choices |= {first + place for place in kept.get("choices", range(count))}
        self._count += count
        for row, values in enumerate(kept["values"], first):
            for value in values:
                self._rows.setdefault(value, set()).add(row)

    def shared(self, texts: Iterable[Text]) -> Shared:
        """Return how many of these rows were trained on."""
        rows = prompts = 0
        for text in texts:
            asked = self._asked(text)
            if not self.ids.isdisjoint((text.id, text.rendered)) or self._answered(text, asked):
                rows += 1
            elif asked:
                prompts += 1
        return Shared(rows, prompts)

    def _asked(self, text: Text) -> set[int]:
        """Return which rows that were trained on hold the question of a row; none without one."""
        if not text.asked:
            return set()
        return self._with(text.asked).union(*(self._with(one) for one in _questions(text)))

    def _answered(self, text: Text, asked: set[int]) -> bool:
        """Whether one of the rows that hold its question, `asked`, holds its right answer too."""
        if not text.asked or not text.answered:
            return bool(asked or self._with(text.answered))
        if asked & self._with(text.answered):
            return True
        if text.choices:
            asked = asked - self._choices
        return any(asked & self._with(one) for one in (traces(text.right_source), *_answers(text)))

    def _with(self, values: Sequence[str]) -> set[int]:
        """Return which rows are made of all these values, and perhaps of more; none for none."""
        found = sorted((self._rows.get(value, set()) for value in values), key=len)
        return set.intersection(*found) if found else set()


def _questions(text: Text) -> list[tuple[str, ...]]:
    """Return what a question is found by whatever its field is: its words, its only value."""
    asked = [*text.sources[0].values()]
    return [traces({QUESTION: one}) for one in (text.prompt, *asked[: len(asked) == 1])]


def _answers(text: Text) -> list[tuple[str, ...]]:
    """Return what a right answer is found by whatever its field is: its words, its only value.

    A text says all that it is made of.
    """
    said = [*text.right_source.values()]
    if not text.sources[1]:
        said = [*text.sources[0].values()]
    elif len(said) > 1:
        said = []
    return [traces({ANSWER: one}) for one in (text.answer, *said)]


def require_apart(train: Sequence[Text], rows: Sequence[Text], split: str) -> None:
    """Refuse a split that is learnt from beside `train` and asks what `train` asks.

    Args:
        train: The training rows.
        rows: Those of the other split.
        split: Its name.

    Raises:
        UserError: With the number of such rows, in whatever template they stand.
    """
    trained = Trained()
    trained.add(kept(train))
    shared = sum(trained.shared(rows))
    if shared:
        raise UserError(
            f"{shared} prompts of split {split!r}, by which training is judged, stand in split "
            "'train' too.",
            "Deal rows by what they ask (dataset.known_by=source), remove them from one, or say "
            "dataset.allow_overlap=true.",
        )


def kept(texts: Sequence[Text]) -> dict[str, Any]:
    """Return what is kept of rows that are trained on, as plain values; see `Trained`."""
    ids = {text.id for text in texts} | {text.rendered for text in texts}
    return {
        "ids": sorted(ids - {""}),
        "values": [_left(text) for text in texts],
        "choices": [place for place, text in enumerate(texts) if text.choices and text.answered],
    }


def _left(text: Text) -> list[str]:
    """Return what a row is found again by."""
    parts = {value for one in (*_questions(text), *_answers(text)) for value in one}
    return sorted({*text.asked, *text.answered, *parts})
