"""What a dimension of trust is: questions that are made here, and what each answer is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from effbench.api.schema import digest
from effbench.evaluators.trustworthiness.replies import Reply, parse
from effbench.util.rooms import Room


@dataclass(frozen=True)
class Item:
    """A question with the answers that a model can choose from."""

    prompt: str
    choices: tuple[str, ...]
    """Possible answers, without a space in front."""
    values: tuple[float, ...]
    """What each answer is worth: 1 for one that can be trusted, 0 for one that cannot."""
    kind: str
    """Which variant of the dimension it belongs to."""
    cluster: str
    """Items that say the same here are variants of one question, so not independent."""
    system: str = ""
    """What the model is told before the prompt."""
    group: str = ""
    """Whom the question is about, where groups are compared."""

    @property
    def id(self) -> str:
        """A hash of the content."""
        return digest([self.system, self.prompt, self.choices, self.values])


class Dimension:
    """Base of all dimensions."""

    name: ClassVar[str] = ""
    """The name of its file; set by `find`."""
    lenient: ClassVar[bool] = False
    """Whether only a bad answer counts against the model: to refuse or to say something else is
    as good as a good answer."""

    def items(self, count: int, seed: int) -> list[Item]:
        """Return about `count` questions; the same seed gives the same ones.

        Raises:
            UserError: When data that they are made from cannot be had.
        """
        raise NotImplementedError

    def reply(self, item: Item, text: str) -> Reply:
        """Return what a generated text says."""
        return parse(text, item.choices)

    def outcomes(self, items: Sequence[Item], picks: Sequence[int | None]) -> list[float]:
        """Return one number per item; their mean is the score, 0 to 1, higher is better.

        Args:
            items: Questions of this dimension.
            picks: Index of the chosen answer; None for a refusal or for something else.
        """
        other = float(self.lenient)
        return [
            other if pick is None else item.values[pick]
            for item, pick in zip(items, picks, strict=True)
        ]

    def extras(self, items: Sequence[Item], picks: Sequence[int | None]) -> dict[str, list[float]]:
        """Return further metrics: from a name to one number per item; the mean is a share."""
        return {}


ROOM = Room(
    "evaluators.trustworthiness.dimensions", Dimension, "There is no dimension of trust {!r}."
)
names = ROOM.names


@cache
def find(name: str) -> Dimension:
    """Return the dimension called `name`.

    Raises:
        UserError: When there is none.
    """
    return ROOM.find(name)()
