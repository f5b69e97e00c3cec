"""When a run prunes and when its adapters grow; steps are counted from 0."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from effbench.util.errors import UserError


@dataclass(frozen=True)
class PruningSchedule:
    """A pruning window within a run."""

    total: int
    """Steps of the run."""
    start: float
    """Where the window begins, as a share of all steps."""
    end: float
    """Where it ends."""
    prunings: int
    """Pruning steps in it, the last one at its end."""
    growths: int
    """Growth steps, the last one at its end or in the middle of the run, whichever is later."""
    warm: int = 0
    """Steps at least before the first pruning."""

    @cached_property
    def window(self) -> tuple[int, int]:
        """The first and the last step of the window."""
        first = max(0, self.warm - 1, round(self.start * self.total) - 1)
        return first, max(first, round(self.end * self.total) - 1)

    @cached_property
    def pruning_steps(self) -> frozenset[int]:
        """The steps that search for blocks."""
        return frozenset(_spread(*self.window, self.prunings))

    def growth_steps(self, grow: float) -> dict[int, float]:
        """Return how many times its first size an adapter may have, by growth step."""
        first, last = self.window
        steps = _spread(first, max(last, self.total // 2), self.growths)
        return {step: 1 + (grow - 1) * k / self.growths for k, step in enumerate(steps, 1)}

    def over(self, step: int) -> bool:
        """Whether the window has come to its end."""
        return step >= self.window[1]

    def ratio(self, step: int, keep: float) -> float:
        """Return gamma, the share of weights to keep at a step."""
        first, last = self.window
        progress = 1.0 if self.over(step) else (step - first) / (last - first)
        return kept_ratio(progress, keep)

    def share(self, step: int) -> float:
        """Return mu: 0 up to the start of the window, 1 from its end on, linear between."""
        first, last = self.window
        return min(1.0, max(0.0, (step - first) / max(1, last - first)))


def _spread(first: int, last: int, count: int) -> list[int]:
    """Return `count` steps after `first`, evenly spaced, the last one `last`."""
    return [round(first + (last - first) * k / count) for k in range(1, count + 1)]


def kept_ratio(progress: float, target: float) -> float:
    """Return the share of weights to keep at a point of the pruning window.

    gamma = target + (1 - target) (1 - progress)^3: 1 at the start, falling ever more slowly.

    Args:
        progress: 0 at the start of the window, 1 at its end and after it.
        target: The share to keep in the end.
    """
    return target + (1 - target) * (1 - min(1.0, max(0.0, progress))) ** 3


def check_window(begin: float, end: float) -> None:
    """Refuse a pruning window that ends before it begins.

    Raises:
        UserError: Naming `method.begin` and `method.end`.
    """
    if begin > end:
        raise UserError(
            f"method.begin={begin} lies behind method.end={end}.",
            "Let the pruning window begin before it ends.",
        )
