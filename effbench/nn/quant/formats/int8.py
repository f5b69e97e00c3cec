"""8-bit integers with a scale for each row (`effbench.nn.quant.int8`)."""

from __future__ import annotations

from dataclasses import dataclass

from effbench.api.weights import Packed
from effbench.nn.quant import int8_linear
from effbench.nn.quant.int8 import int8_bytes
from effbench.util.lazy import torch


@dataclass(frozen=True)
class RowsOfIntegers(Packed):
    """Codes and float32 scales; activations below a threshold are rounded too."""

    threshold: float = 0.0
    """Size from which on an activation is multiplied as it is; 0 is all of them."""

    def bytes(self, d_in: int, d_out: int, element: int) -> int:
        """Return the bytes of codes and scales."""
        return int8_bytes(d_in, d_out)

    def quantise(
        self, linear: torch.nn.Linear, compute_dtype: torch.dtype | None = None
    ) -> torch.nn.Linear:
        """Return `linear` with its weight as integers."""
        return int8_linear.Int8Linear.quantise(linear, self.threshold, compute_dtype)

    def empty(self, linear: torch.nn.Linear) -> torch.nn.Linear:
        """Return a layer that waits for a state dict."""
        return int8_linear.Int8Linear.empty(linear, self.threshold)
