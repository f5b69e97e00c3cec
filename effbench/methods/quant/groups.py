"""Methods whose artefact is integer codes with a scale for each group of a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from effbench.api.schema import Bits, PositiveInt
from effbench.api.shape import Anatomy
from effbench.methods.base import Method
from effbench.nn.quant.formats.grouped import Grouped


@dataclass(frozen=True)
class PacksGroups(Method):
    """A method that leaves what it packs in the format `grouped`."""

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
