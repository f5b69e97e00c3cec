"""Methods whose artefact is integer codes with a scale for each group of a row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from effbench.api.points import Point
from effbench.api.schema import Bits, PositiveInt
from effbench.api.shape import Anatomy, ModelShape, Phase
from effbench.methods.base import Method
from effbench.nn.quant.formats.grouped import Grouped
from effbench.util.lazy import torch


@dataclass(frozen=True)
class PacksGroups(Method):
    """A method that leaves every decoder linear in the format `grouped`."""

    anatomy: ClassVar[Anatomy] = "other"
    produces: ClassVar[str] = "grouped"

    bits: Bits = 4
    """Bits per weight, scales not counted."""
    group_size: PositiveInt = 128
    """Neighbouring weights of a row that share one scale."""
    symmetric: bool = False
    """Levels around zero, without a zero point of each group."""

    @property
    def format(self) -> Grouped:
        """What weights become."""
        return Grouped(self.bits, self.group_size, self.symmetric)

    def empty(self, linear: torch.nn.Linear) -> torch.nn.Module:
        """Return a packed linear without codes."""
        return self.format.empty(linear)

    def shape(
        self, base: ModelShape, point: Point, phase: Phase, folder: Path | None
    ) -> ModelShape:
        """Pack every decoder linear."""
        return base.packed(self.format)
