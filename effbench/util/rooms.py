"""A room: a folder with one file for each thing of a sort, found by the file's name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

from effbench.util.errors import UserError, did_you_mean
from effbench.util.offered import Kind, class_offered, offered
from effbench.util.package_data import only_class

T = TypeVar("T")
BASE = "base"
"""The file of a room that says what the others are."""


@dataclass(frozen=True)
class Room(Generic[T]):
    """The classes of a sort: those of effbench's files, and those that other packages offer."""

    package: str
    """Below `effbench`, with dots. A file whose name begins with `_` is none of its things."""
    base: type[T]
    """What the classes are subclasses of; its `name` is set in each when it is found."""
    unknown: str
    """What is said of a name that is none here, with {} for it."""
    offers: Kind | None = None
    """The entry points by which other packages bring their own; None where they cannot."""

    def names(self) -> tuple[str, ...]:
        """Return all names, sorted, without importing any."""
        return _names(self)

    def find(self, name: str) -> type[T]:
        """Return the class called `name`.

        Raises:
            UserError: When there is none, or its file does not hold exactly one.
        """
        if name not in self.names():
            raise UserError(self.unknown.format(name), did_you_mean(name, self.names()))
        found: type[T] = _found(self, name)
        return found


@cache
def _found(room: Room[Any], name: str) -> Any:
    if room.offers and name in offered(room.offers):
        cls: Any = class_offered(room.offers, name, room.base)
    else:
        cls = only_class(f"effbench.{room.package}.{name}", room.base)
    cls.name = name
    return cls


@cache
def _names(room: Room[Any]) -> tuple[str, ...]:
    folder = Path(__file__).parents[1].joinpath(*room.package.split("."))
    own = {p.stem for p in folder.glob("[!_]*.py")} - {BASE}
    return tuple(sorted(own.union(offered(room.offers) if room.offers else ())))
