"""Operating points of models whose layers do not all run on every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from effbench.api.points import Point
from effbench.api.shape import ModelShape
from effbench.util.errors import UserError

Way = Literal["exit", "speculative"]
"""A way of decoding through one depth or another."""
MOST_POINTS = 64
"""Longest window of which all shorter ones are evaluated without being listed."""


@dataclass(frozen=True)
class Depth(Point):
    """The model of the first layers, or of those that a method keeps of as many."""

    skips_layers: ClassVar[bool] = True

    depth: int
    """How many layers it has."""

    @property
    def name(self) -> str:
        """`d<n>`."""
        return f"d{self.depth}"


@dataclass(frozen=True)
class Mixed(Point):
    """Decoding that goes through one depth or another."""

    skips_layers: ClassVar[bool] = True

    decoding: Way

    @property
    def name(self) -> str:
        """The way of decoding."""
        return self.decoding


@dataclass(frozen=True)
class Window(Point):
    """A schedule of dropped tokens."""

    skips_layers: ClassVar[bool] = True

    window: int
    """Dropped tokens between two refreshes."""
    baseline: Literal["reuse", "identity"] | None = None
    """What is in the place of the stand-ins, if they do not work."""

    @property
    def name(self) -> str:
        """`k<n>`, or `k<n>-<baseline>`."""
        return f"k{self.window}-{self.baseline}" if self.baseline else f"k{self.window}"


def check_windows(window: int, windows: Sequence[int] | None) -> None:
    """Refuse windows to evaluate that are too many, none at all, or no rising list.

    Args:
        window: The one that is trained.
        windows: Those to evaluate; None for all from 0 to `window`.

    Raises:
        UserError: Naming the setting.
    """
    if windows is None:
        if window > MOST_POINTS:
            raise UserError(
                f"method.window={window} would be {window + 1} operating points.",
                f"List those to evaluate, like 'method.windows=[0,{window}]'.",
            )
    elif not windows:
        raise UserError("method.windows is empty.", "Leave it out, or list a window.")
    elif list(windows) != sorted(set(windows)):
        raise UserError(f"method.windows={list(windows)} is not a rising list.", "List each once.")


def check_exits(
    decoding: Sequence[Way], exits: Sequence[int], thresholds: Sequence[float], setting: str
) -> None:
    """Refuse ways of decoding that have no exit to leave at, and thresholds of other exits.

    Args:
        decoding: At least one.
        exits: Depths at which tokens can leave; the last is that of the deepest exit.
        thresholds: One for each but the last; empty for the paper's.
        setting: Which setting of the method lists the depths.

    Raises:
        UserError: Naming the setting.
    """
    if len(exits) < 2:
        raise UserError(
            f"method.decoding={list(decoding)} needs an exit below layer {exits[-1]}, the last "
            "one.",
            f"List a shallower depth in method.{setting}.",
        )
    if thresholds and len(thresholds) != len(exits) - 1:
        raise UserError(
            f"method.thresholds has {len(thresholds)} values for the exits {list(exits[:-1])}.",
            f"Give {len(exits) - 1}.",
        )


def read_mixed(
    whole: ModelShape, way: Way, exits: Sequence[int], draft: int, tokens: int
) -> ModelShape:
    """Return a model as a way of decoding reads it out.

    Both depend on the text; stated is the most that they can need per token: nobody leaves early,
    or no draft is kept.

    Args:
        whole: All layers.
        way: Of decoding.
        exits: Depths at which tokens can leave.
        draft: Layers that draft.
        tokens: Drafted tokens of a round.
    """
    if way == "exit":
        return replace(whole, readout=replace(whole.readout, runs=len(exits)))
    drafting = whole.map(lambda i, x: x.running(tokens + 1, 1 + tokens * (i < draft)))
    readout = replace(whole.readout, runs=2 * tokens + 1, reads=tokens + 1)
    return replace(drafting, readout=readout)
