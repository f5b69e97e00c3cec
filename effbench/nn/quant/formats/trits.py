"""Sums of scaled trits, two bits each (`effbench.nn.quant.trits`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Interval

from effbench.api.schema import PositiveInt
from effbench.api.weights import Packed
from effbench.nn.quant import plane_linears
from effbench.nn.quant.trits import trit_bytes
from effbench.util.lazy import torch


@dataclass(frozen=True)
class Trits(Packed):
    """Trit planes and float16 scales."""

    planes: Annotated[int, Interval(ge=1, le=3)] = 2
    """Trits per weight."""
    group_size: PositiveInt = 128
    """Neighbouring weights of a row that share their scales."""

    def bytes(self, d_in: int, d_out: int, element: int) -> int:
        """Return the bytes of trits and scales."""
        return trit_bytes(d_in, d_out, self.planes, self.group_size)

    def quantise(
        self, linear: torch.nn.Linear, compute_dtype: torch.dtype | None = None
    ) -> torch.nn.Linear:
        """Return `linear` with its weight as trit planes."""
        return plane_linears.TritLinear.quantise(linear, self.planes, self.group_size)

    def empty(self, linear: torch.nn.Linear) -> torch.nn.Linear:
        """Return a layer that waits for a state dict."""
        return plane_linears.TritLinear.empty(linear, self.planes, self.group_size)
