"""The model as it is: the base line of every comparison, and the way to evaluate any artefact."""

from __future__ import annotations

from dataclasses import dataclass, replace

from effbench.api.cost import Cost, dense_cost
from effbench.api.shape import DTYPE_BYTES, Shape
from effbench.methods.reads import Reads


@dataclass(frozen=True)
class Unchanged(Reads):
    """Changes nothing and trains nothing."""

    def cost(self, shape: Shape, dtype: str, point: str = "", base: Cost | None = None) -> Cost:
        """Return the cost of what is there, nothing trainable."""
        return replace(base or dense_cost(shape, DTYPE_BYTES[dtype]), trainable=0)
