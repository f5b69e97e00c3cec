"""What a generator of rows is, and how it is found: by the name of its file in this folder."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import ClassVar

from effbench.api.spec import DatasetSpec
from effbench.data.readers import Row
from effbench.util.errors import UserError, did_you_mean
from effbench.util.rooms import Room


class Generator:
    """Base of all generators: the same seed gives the same rows, on any machine."""

    name: ClassVar[str] = ""
    """The name of its file; set when it is found."""
    parts: ClassVar[tuple[str, ...]] = ("all",)
    """What `dataset.splits` can name: sets of rows that have none in common."""
    seeded: ClassVar[bool] = False
    """Whether it has a draw for each seed (`dataset.subset`); else there is one."""

    def rows(self, part: str, seed: int) -> Iterable[Row]:
        """Return the rows of a part, always the same."""
        raise NotImplementedError


ROOM = Room("data.generators", Generator, "There is no generator {!r}.")
names = ROOM.names


@cache
def find(name: str) -> Generator:
    """Return the generator called `name`.

    Raises:
        UserError: When there is none.
    """
    return ROOM.find(name)()


def sources(spec: DatasetSpec) -> dict[str, Iterable[Row]]:
    """Return the rows of each split of a generated dataset.

    Raises:
        UserError: For an unknown generator or part, and a seed that is none.
    """
    generator, seed = find(spec.id), _seed_of(spec)
    return {split: generator.rows(part, seed) for split, part in parts_of(spec).items()}


def parts_of(spec: DatasetSpec) -> dict[str, str]:
    """Return which part each split is.

    Raises:
        UserError: For an unknown generator or part.
    """
    known, parts = find(spec.id).parts, spec.splits or {"all": "all"}
    for part in parts.values():
        if part not in known:
            raise UserError(
                f"The generator {spec.id} makes no part {part!r}.", did_you_mean(part, known)
            )
    return parts


def _seed_of(spec: DatasetSpec) -> int:
    if not spec.subset:
        return 0
    if not find(spec.id).seeded:
        raise UserError(
            f"dataset.subset={spec.subset} is a seed, and the generator {spec.id} takes none.",
            "Leave it out.",
        )
    try:
        return int(spec.subset)
    except ValueError:
        raise UserError(
            f"dataset.subset={spec.subset} is no seed of the generator {spec.id}.",
            "Give a whole number.",
        ) from None
