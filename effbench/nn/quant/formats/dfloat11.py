"""DFloat11: exponents as Huffman codes, nothing lost (`effbench.nn.quant.dfloat11`)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import cast

from effbench.api.schema import NonNegativeInt
from effbench.api.weights import Packed
from effbench.nn.quant import dfloat11
from effbench.util.lazy import torch

ENTROPY = 2.6
"""Bits of an exponent's code, for weights that are normally distributed."""
SIDE = ENTROPY * (5 / 64 + 32 / (64 * 512))
"""Bits of gaps and positions per weight."""
TABLES = 4 * 256 + 12
"""Bytes of tables, lengths and padding of a unit, as most have them."""


@dataclass(frozen=True)
class DFloat11Format(Packed):
    """Sign and mantissa as they are, exponents in as many bits as their frequencies ask for."""

    unit: NonNegativeInt = 0
    """Weights that share one code with these; 0 is a matrix alone."""
    stored: NonNegativeInt = 0
    """Bytes of these weights where they have been encoded; 0 where that is still to come."""

    def bytes(self, d_in: int, d_out: int, element: int) -> int:
        """Return the bytes where they are known, else what normally distributed weights take."""
        if self.stored:
            return self.stored
        count = d_in * d_out
        bits = 8 * (element - 1) + ENTROPY + SIDE
        return math.ceil(count * bits / 8 + TABLES * count / (self.unit or count))

    def measured(self, layer: torch.nn.Linear) -> DFloat11Format:
        """Return the format with the bytes of a layer that is alone in its unit."""
        unit = cast("dfloat11.DFloat11Linear", layer).unit
        return replace(self, stored=unit.encoded.nbytes)

    def quantise(
        self, linear: torch.nn.Linear, compute_dtype: torch.dtype | None = None
    ) -> torch.nn.Linear:
        """Return `linear` with its weight encoded, in a unit of its own."""
        encoded = dfloat11.encode({"The weight": linear.weight})
        return dfloat11.pack({"": linear}, encoded, dfloat11.Scratch(), "")[""]

    def empty(self, linear: torch.nn.Linear) -> torch.nn.Linear:
        """Return a layer that waits for a state dict."""
        nothing = dfloat11.nothing(linear.weight.device)
        return dfloat11.pack({"": linear}, nothing, dfloat11.Scratch(), "")[""]
