"""Bit planes of nested codes, and a table of levels for each row and width."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from effbench.api.schema import Bits
from effbench.api.weights import Packed
from effbench.nn.quant import nested_linear
from effbench.nn.quant.planes import plane_bytes
from effbench.util.lazy import torch


@dataclass(frozen=True)
class AnyPrecisionCodes(Packed):
    """Codes of `bits` bits of which the first are codes too (`effbench.nn.quant.nested`)."""

    bits: Bits = 8
    """Highest width, whose planes are in memory."""
    seed_bits: Bits = 3
    """Lowest width."""
    width: int = 0
    """Width that is read; 0 for the highest."""

    def at(self, bits: int) -> Self:
        """Return the same in memory, read at another width."""
        return replace(self, width=bits)

    @property
    def widths(self) -> range:
        """All widths, the lowest first."""
        return range(self.seed_bits, self.bits + 1)

    def reads(self, d_in: int, d_out: int) -> list[int]:
        """Return the bytes that one product reads at each of the widths."""
        return [self.at(b).read_bytes(d_in, d_out, 0) for b in self.widths]

    def bytes(self, d_in: int, d_out: int, element: int) -> int:
        """Return the bytes of all planes and of the tables of all widths."""
        tables = sum(table_bytes(d_out, b) for b in self.widths)
        return self.bits * d_out * plane_bytes(d_in) + tables

    def read_bytes(self, d_in: int, d_out: int, element: int) -> int:
        """Return the bytes of the planes of the width that is read, and of its table."""
        width = self.width or self.bits
        return width * d_out * plane_bytes(d_in) + table_bytes(d_out, width)

    def quantise(
        self, linear: torch.nn.Linear, compute_dtype: torch.dtype | None = None
    ) -> torch.nn.Linear:
        """Return `linear` in nested codes, an error of each weight costing the same."""
        return nested_linear.NestedLinear.quantise(linear, self.seed_bits, self.bits)

    def empty(self, linear: torch.nn.Linear) -> torch.nn.Linear:
        """Return a layer that waits for a state dict."""
        return nested_linear.NestedLinear.empty(linear, self.seed_bits, self.bits)


def table_bytes(d_out: int, bits: int) -> int:
    """Return the bytes of the float16 levels of every row at one width."""
    return 2 * d_out * 2**bits
