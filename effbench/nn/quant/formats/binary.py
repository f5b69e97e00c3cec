"""Sums of scaled signs, a bit each (`effbench.nn.quant.binary`)."""

from __future__ import annotations

from dataclasses import dataclass

from effbench.api.schema import Bits, PositiveInt
from effbench.api.weights import Packed
from effbench.nn.quant import binary, plane_linears
from effbench.util.lazy import torch


@dataclass(frozen=True)
class BinaryCodes(Packed):
    """Signs, float16 scales and, where groups have them, float32 offsets."""

    bits: Bits = 4
    """Signs per weight."""
    group_size: PositiveInt = 128
    """Neighbouring weights of a row that share their scales."""
    offset: bool = False
    """Whether each group has an offset."""

    @property
    def settings(self) -> tuple[int, int, bool]:
        """Bits, group size and whether there are offsets."""
        return self.bits, self.group_size, self.offset

    def bytes(self, d_in: int, d_out: int, element: int) -> int:
        """Return the bytes of signs, scales and offsets."""
        return binary.binary_bytes(d_in, d_out, *self.settings)

    def quantise(
        self, linear: torch.nn.Linear, compute_dtype: torch.dtype | None = None
    ) -> torch.nn.Linear:
        """Return `linear` with its weight as scaled signs."""
        return plane_linears.BinaryLinear.quantise(linear, *self.settings)

    def empty(self, linear: torch.nn.Linear) -> torch.nn.Linear:
        """Return a layer that waits for a state dict."""
        return plane_linears.BinaryLinear.empty(linear, *self.settings)
