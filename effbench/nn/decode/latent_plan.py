"""The ranks of one artefact at each of its operating points, and their file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from effbench.nn.decode.ranks import Order, Sizes, Spectra, chosen
from effbench.util.errors import UserError
from effbench.util.files import write_atomic

FILE = "ranks.json"


class Ranks(NamedTuple):
    """Ranks of every layer at one operating point."""

    keys: Sequence[int]
    values: Sequence[int]

    def by_layer(self) -> Iterator[tuple[int, int]]:
        """Yield the ranks of keys and of values of each layer."""
        return zip(*self, strict=True)


class Plan(NamedTuple):
    """The ranks of several operating points of one artefact."""

    width: int
    """The full rank, D."""
    points: Mapping[str, Ranks]
    """By the name of a point."""

    def at(self, point: str) -> Ranks:
        """Return the ranks at a point; without a name, the largest of all in each layer."""
        return self.points[point] if point else self._extreme(max)

    def factors(self) -> Ranks:
        """Return the ranks of the factors in memory, 0 where all points keep all directions."""
        lowest = self._extreme(min)
        return Ranks(
            *(
                [most if low < self.width else 0 for most, low in zip(*pair, strict=True)]
                for pair in zip(self.at(""), lowest, strict=True)
            )
        )

    def write(self, folder: Path) -> None:
        """Write it beside the tensors of an artefact."""
        write_atomic(folder / FILE, json.dumps(self._asdict()) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Plan:
        """Return the plan of an artefact.

        Raises:
            UserError: When it cannot be read.
        """
        path = folder / FILE
        try:
            width, points = json.loads(path.read_text()).values()
            return cls(width, {name: Ranks(*own) for name, own in points.items()})
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} cannot be read: {error}.", "Run again with --fresh to make it anew."
            ) from None

    def _extreme(self, of: Callable[[Iterable[int]], int]) -> Ranks:
        parts = zip(*self.points.values(), strict=True)
        return Ranks(*([of(own) for own in zip(*part, strict=True)] for part in parts))


def planned(
    order: Order, spectra: Spectra, sizes: Sizes, points: Mapping[str, tuple[float, float]]
) -> Plan:
    """Return the ranks of every point, given the shares of keys and of values that it keeps.

    Raises:
        UserError: When a share is too small for ranks of at least a unit.
    """
    found = {name: Ranks(*chosen(order, spectra, sizes, own)) for name, own in points.items()}
    return Plan(sizes.width, found)
