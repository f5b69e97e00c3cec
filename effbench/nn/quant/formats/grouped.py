"""Integer codes of 2 to 8 bits with a scale per group of a row (`effbench.nn.quant.groupwise`)."""

from __future__ import annotations

from dataclasses import dataclass

from effbench.api.schema import Bits, PositiveInt
from effbench.api.weights import Packed
from effbench.nn.quant import linears
from effbench.nn.quant.groupwise import grouped_bytes
from effbench.util.lazy import torch


@dataclass(frozen=True)
class Grouped(Packed):
    """Round-to-nearest codes, float16 scales and, unless symmetric, zero points."""

    bits: Bits = 4
    """Bits per code."""
    group_size: PositiveInt = 128
    """Neighbouring weights of a row that share one scale."""
    symmetric: bool = False
    """Whether there is no zero point."""

    @property
    def settings(self) -> tuple[int, int, bool]:
        """Bits, group size and symmetry."""
        return self.bits, self.group_size, self.symmetric

    def bytes(self, d_in: int, d_out: int, element: int) -> int:
        """Return the bytes of codes, scales and zero points."""
        return grouped_bytes(d_in, d_out, *self.settings)

    def quantise(
        self, linear: torch.nn.Linear, compute_dtype: torch.dtype | None = None
    ) -> torch.nn.Linear:
        """Return `linear` with its weight rounded to the nearest codes."""
        return linears.PackedLinear.quantise(linear, *self.settings)

    def empty(self, linear: torch.nn.Linear) -> linears.PackedLinear:
        """Return a layer that waits for a state dict."""
        return linears.PackedLinear.empty(linear, *self.settings)
