"""Integer codes of 2 to 8 bits with a scale and a shift per group (`effbench.nn.quant.shifted`)."""

from __future__ import annotations

from dataclasses import dataclass

from effbench.api.schema import Bits, PositiveInt
from effbench.api.weights import Packed
from effbench.nn.quant import shifted_linear
from effbench.nn.quant.shifted import shifted_bytes
from effbench.util.lazy import torch


@dataclass(frozen=True)
class ShiftedCodes(Packed):
    """Codes, float16 scales and float16 shifts."""

    bits: Bits = 4
    """Bits per code."""
    group_size: PositiveInt = 64
    """Neighbouring weights of a row that share scale and shift."""

    def bytes(self, d_in: int, d_out: int, element: int) -> int:
        """Return the bytes of codes, scales and shifts."""
        return shifted_bytes(d_in, d_out, self.bits, self.group_size)

    def quantise(
        self, linear: torch.nn.Linear, compute_dtype: torch.dtype | None = None
    ) -> torch.nn.Linear:
        """Return `linear` with its weight as codes."""
        return shifted_linear.ShiftedLinear.quantise(linear, self.bits, self.group_size)

    def empty(self, linear: torch.nn.Linear) -> torch.nn.Linear:
        """Return a layer that waits for a state dict."""
        return shifted_linear.ShiftedLinear.empty(linear, self.bits, self.group_size)
