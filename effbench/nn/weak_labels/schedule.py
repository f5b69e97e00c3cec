"""Which classifier of a boosting each training step is for, and how it learns there."""

from __future__ import annotations

from dataclasses import dataclass

REFRESHES = 5
"""Times that the targets of a self-training are made."""


@dataclass(frozen=True)
class Schedule:
    """Equal spans of steps, one for each classifier, which end with self-training.

    With fewer steps than classifiers some have none, and are left out.
    """

    steps: int
    members: int
    self_training: float
    """Share of each span."""

    def start(self, member: int) -> int:
        """Return the first step of a classifier's span."""
        return -(-member * self.steps // self.members)

    def member(self, step: int) -> int:
        """Return whose span a step is in."""
        return step * self.members // self.steps

    def alone_since(self, step: int) -> int:
        """Return the step at which the self-training of the span of `step` begins."""
        end = self.start(self.member(step) + 1)
        return end - round(self.self_training * (end - self.start(self.member(step))))

    def alone(self, step: int) -> bool:
        """Whether a step learns from the classifier's own predictions."""
        return step >= self.alone_since(step)

    def refreshes(self, step: int) -> bool:
        """Whether the targets of the self-training are made anew before a step."""
        begun = self.alone_since(step)
        every = -(-(self.start(self.member(step) + 1) - begun) // REFRESHES)
        return step >= begun and (step - begun) % every == 0
