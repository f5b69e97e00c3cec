"""Rows that were trained on, found again in other files, formats and templates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from effbench.data.render import Text
from effbench.util.errors import UserError


class Shared(NamedTuple):
    """How many rows were found again."""

    rows: int
    """All that they are made of stood in one row that was trained on."""
    prompts: int
    """What they ask with did, and their answers did not."""


class Trained:
    """The rows of trainings: what they were known by, and the values that they were made of."""

    def __init__(self) -> None:
        self.ids: set[str] = set()
        self._rows: dict[str, set[int]] = {}
        self._count = 0

    def add(self, kept: Any) -> None:
        """Add what `kept` left; runs before values were kept left names of rows alone."""
        if isinstance(kept, list):
            self.ids |= set(kept)
            return
        self.ids |= set(kept["ids"])
        for values in kept["values"]:
            self._count += 1
            for value in values:
                self._rows.setdefault(value, set()).add(self._count)

    def shared(self, texts: Iterable[Text]) -> Shared:
        """Return how many of these rows were trained on."""
        rows = prompts = 0
        for text in texts:
            if self._has(text):
                rows += 1
            elif text.asked and self._in_one_row(text.asked):
                prompts += 1
        return Shared(rows, prompts)

    def _has(self, text: Text) -> bool:
        if not self.ids.isdisjoint((text.id, text.rendered)):
            return True
        return self._in_one_row((*text.asked, *text.answered))

    def _in_one_row(self, values: Sequence[str]) -> bool:
        """Whether one row that was trained on is made of all these values, and perhaps of more."""
        found = sorted((self._rows.get(value, set()) for value in values), key=len)
        return bool(found) and bool(set.intersection(*found))


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
        "values": [[*text.asked, *text.answered] for text in texts],
    }
