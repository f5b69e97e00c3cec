"""What a paper says about the question of a table, and what our records say of it.

A verdict names the pairs of rows that it rests on. They are tested anew from the records whenever
it is shown, so that it cannot outlive them: see `report.verdicts`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import MinLen

from effbench.api.schema import NonNegativeFloat
from effbench.util.errors import UserError, did_you_mean

Text = Annotated[str, MinLen(1)]

State = Literal["reproduced", "direction", "not reproduced", "cannot be tested here", "not run yet"]
"""`direction`: what was found points where the claim does, at another size or scale."""

OPEN: tuple[State, ...] = ("cannot be tested here", "not run yet")
"""States that need no pair of rows."""


@dataclass(frozen=True)
class Claim:
    """What a paper reports."""

    claim: Text
    """In a sentence, with its numbers."""
    source: Text
    """Paper, and table or section."""
    sure: Literal["read", "recalled"]
    """Whether it was read there, or is from memory or from a report of others."""
    scale: str = ""
    """The paper's models and data."""
    held: str = ""
    """What the paper says that it held equal."""


@dataclass(frozen=True)
class Pair:
    """Two rows of a table, and what their paired test has to find."""

    row: Text
    """An arm, with its operating point where it has several: `QDyLoRA r8`."""
    against: Text
    """The row that it is held against."""
    finding: Literal["lower", "higher", "cannot be told apart"]
    metric: str = ""
    """Empty for the first one of the table."""
    by: NonNegativeFloat = 0.0
    """Least size of the difference, in the unit of the metric."""


@dataclass(frozen=True)
class Verdict:
    """What we found of a paper's claim."""

    state: State
    reason: Text
    """Why, in a sentence."""
    control: str = ""
    """What tells the claim's cause from another one."""
    rests_on: list[Pair] = field(default_factory=list)
    bench: str = ""
    """Command of a benchmark that it rests on, in the place of records."""

    def check(self, arms: Iterable[str], where: str) -> None:
        """Check that it rests on something, and on rows of this table.

        Args:
            arms: Names of the table's arms.
            where: The file, for messages.

        Raises:
            UserError: When it rests on nothing, or on a row of no arm.
        """
        if self.state not in OPEN and not (self.rests_on or self.bench):
            raise UserError(
                f"{where}: the verdict {self.state!r} rests on nothing.",
                f"Name rows (rests_on:) or a benchmark (bench:), or say: state: {OPEN[-1]}",
            )
        for name in (name for pair in self.rests_on for name in (pair.row, pair.against)):
            split_row(name, arms, where)


def split_row(name: str, arms: Iterable[str], where: str) -> tuple[str, str]:
    """Return the arm and the operating point of a row's name.

    Raises:
        UserError: When it begins with no arm.
    """
    arms = list(arms)
    fits = [arm for arm in arms if name == arm or name.startswith(f"{arm} ")]
    if not fits:
        hint = did_you_mean(name, arms)
        raise UserError(f"{where}: the verdict rests on {name!r}, which is no arm.", hint)
    arm = max(fits, key=len)
    return arm, name[len(arm) :].strip()
