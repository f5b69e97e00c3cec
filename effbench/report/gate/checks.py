"""What a gate found of one metric or one resource."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from effbench.report.gate.policy import Tier
from effbench.report.table import Value

State = Literal["kept", "broken", "open"]
"""Shown to hold, shown not to, or neither."""


@dataclass(frozen=True)
class Check:
    """One line of a verdict."""

    name: str
    """Metric, with its task, split and phase."""
    tier: Tier
    state: State
    run: Value
    base: Value | None
    """Of the run that it is held against; None where it lacks the metric."""
    wanted: str
    """The margin or the limit, as people read it."""
    difference: Value | None = None
    """Run - base with its 90 % interval, to which the one-sided tests amount; of items alone."""
    items: int = 0
    covers: str = ""
    """What the interval covers: `seeds and items`, or `items` alone."""
    p: float | None = None
    """Of the run being worse by the margin, adjusted after Holm: small when it is not."""
    p_beyond: float | None = None
    """Of the run not being worse by more than the margin, adjusted: small when it is."""
    settles: str = ""
    """What would settle an open one."""

    @property
    def finding(self) -> str:
        """The state in words."""
        if self.difference is None:
            return {"kept": "kept", "broken": "broken", "open": "not shown"}[self.state]
        return {"kept": "not worse", "broken": "worse", "open": "not shown"}[self.state]
