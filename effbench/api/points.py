"""Operating points: the ways in which one artefact can be used.

A point is a value. Its name is what records, events, folders and commands carry, and it is made
from the fields, never read back: `find_point` alone goes from a name to a point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from effbench.util.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Point:
    """One way to use an artefact; on its own the model as it is, without a name.

    A method with several has a subclass whose fields say what holds at a point, and whose `name`
    is made from them. Points of one class with the same fields are the same.
    """

    skips_layers: ClassVar[bool] = False
    """Whether tokens may pass fewer layers than the model has, which bounds how much faster than
    all of it this can be."""

    @property
    def name(self) -> str:
        """What it is called where there are only words; different for each point of a method."""
        return ""

    def __str__(self) -> str:
        return self.name


UNNAMED: Final = Point()
"""The model as its method leaves it, or as training has it: the only point of most methods."""


def find_point(points: Sequence[Point], name: str, owner: str) -> Point:
    """Return the point that a name means.

    Args:
        points: Those of the method.
        name: As in a record or on a command line.
        owner: Whose points they are, for the message.

    Raises:
        UserError: When there is none.
    """
    named = {point.name: point for point in points}
    if name in named:
        return named[name]
    known = [known for known in named if known]
    raise UserError(
        f"{owner} has no point {name!r}.",
        did_you_mean(name, known) if known else "It has one alone, which has no name: give none.",
    )


def require_distinct(points: Sequence[Point], owner: str) -> None:
    """Refuse points of which two have the same name, or none at all.

    Raises:
        UserError: Naming the point.
    """
    names = [point.name for point in points]
    if not names:
        raise UserError(f"{owner} has no operating point.", "Let it be evaluated at one.")
    for name in names:
        if names.count(name) > 1:
            twice = f"the point {name} twice" if name else "two points without a name"
            raise UserError(f"{owner} would have {twice}.", "List each value once.")
