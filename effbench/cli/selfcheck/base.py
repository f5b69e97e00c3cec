"""What a check is, and how all of them are run.

A file `effbench/cli/selfcheck/NAME.py` is a family of checks. Its function `run(short)` yields a
`Check` for every number that has to lie between two bounds; the short form takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from effbench.util.errors import UserError, did_you_mean

NOT_CHECKS = {"__init__", "base"}


@dataclass(frozen=True)
class Check:
    """A number and the bounds that it has to keep."""

    name: str
    value: float
    low: float
    high: float
    unit: str = ""
    detail: str = ""
    """What it was found on, for people."""

    @property
    def passed(self) -> bool:
        """Whether the number lies between its bounds, both included."""
        return self.low <= self.value <= self.high


def families() -> list[str]:
    """Return the names of all families of checks, without importing any."""
    folder = Path(__file__).parent
    return sorted(p.stem for p in folder.glob("*.py") if p.stem not in NOT_CHECKS)


def run(names: Sequence[str] = (), short: bool = False) -> Iterator[tuple[str, Check]]:
    """Yield every check with the name of its family.

    Args:
        names: Families; none means all.
        short: Whether to take the form that is over in seconds.

    Raises:
        UserError: For a family that there is not.
    """
    for name in names:
        if name not in families():
            raise UserError(f"There are no checks {name!r}.", did_you_mean(name, families()))
    for name in names or families():
        module = import_module(f"effbench.cli.selfcheck.{name}")
        for check in module.run(short):
            yield name, check
