"""Evaluators that ask no model: they play what it would do, from shapes and stated ceilings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from effbench.api.cost import Cost
from effbench.api.footprint import Pass
from effbench.api.points import UNNAMED, Point
from effbench.api.shape import AnyShape
from effbench.evaluators.base import Evaluator, Result
from effbench.results.records import Metric
from effbench.util.errors import UserError

if TYPE_CHECKING:
    from effbench.api.spec import Spec
    from effbench.data.dataset import Data
    from effbench.evaluators.subject import Subject


@dataclass(frozen=True)
class Scene:
    """What a simulation knows of a model at one operating point."""

    shape: AnyShape
    cost: Cost
    """At the point."""
    whole: Cost
    """Of all that is in memory."""
    point: Point = UNNAMED
    seed: int = 0

    def metric(self, name: str, value: float, unit: str, n: int = 0) -> Metric:
        """Return a number with the label that all simulated ones have, in its name too."""
        return Metric(f"simulated_{name}", value, unit, self.point.name, n=n, obtained="simulated")


@dataclass(frozen=True)
class Simulator(Evaluator):
    """Base of the evaluators that need no model."""

    itemwise: ClassVar[bool] = False
    needs_model: ClassVar[bool] = False

    def simulate(self, scene: Scene) -> Result:
        """Return what the simulation gives, each metric made by `Scene.metric`.

        Raises:
            UserError: When it cannot be played, with the setting to change.
        """
        raise NotImplementedError

    def run(self, subject: Subject) -> Result:
        """Play it beside evaluators that measure."""
        if subject.shape is None or subject.cost is None:
            raise UserError(f"{self.name} needs the model's shape, which is not known here.")
        whole = subject.whole or subject.cost
        return self.simulate(Scene(subject.shape, subject.cost, whole, subject.point, subject.seed))

    def passes(self, spec: Spec, data: Data | None = None) -> list[Pass]:
        """Return no passes: no model runs."""
        return []


def quantile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least a share of all values do not exceed."""
    ordered = sorted(values)
    place = -int(-share * len(ordered) // 1)  # the ceiling
    return ordered[max(0, place - 1)]
