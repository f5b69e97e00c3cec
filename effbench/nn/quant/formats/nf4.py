"""NF4: 4-bit weights on the quantiles of a normal distribution (`effbench.nn.quant.nf4`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from effbench.api.weights import Packed
from effbench.nn.quant import linears
from effbench.nn.quant.nf4 import nf4_bytes
from effbench.util.lazy import torch


@dataclass(frozen=True)
class NF4Format(Packed):
    """Doubly quantised 4-bit NormalFloat; 0.516 bytes per weight."""

    fused: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-2

    backend: Literal["auto", "torch", "bitsandbytes"] = "auto"
    """Who expands the codes."""

    def bytes(self, d_in: int, d_out: int, element: int) -> int:
        """Return the bytes of codes, both levels of scales, and offset."""
        return nf4_bytes(d_in, d_out)

    def quantise(
        self, linear: torch.nn.Linear, compute_dtype: torch.dtype | None = None
    ) -> torch.nn.Linear:
        """Return `linear` with its weight rounded to NF4."""
        return linears.NF4Linear.quantise(linear, compute_dtype, self.backend)

    def empty(self, linear: torch.nn.Linear) -> torch.nn.Linear:
        """Return a layer that waits for a state dict."""
        return linears.NF4Linear.empty(linear, None, self.backend)
