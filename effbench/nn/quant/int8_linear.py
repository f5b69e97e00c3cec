"""A linear with 8-bit integer weights that multiplies 8-bit integer activations."""

from __future__ import annotations

from typing import Self

import torch

from effbench.nn.quant import int8
from effbench.nn.quant.linears import QuantisedLinear


class Int8Linear(QuantisedLinear):
    """A linear whose buffers are those of `effbench.nn.quant.int8.Int8`.

    Args:
        linear: The layer it stands for.
        threshold: Size from which on an activation is multiplied as it is; 0 is all of them.
        compute_dtype: What x is cast to; None takes its own.
    """

    scales: torch.Tensor

    def __init__(
        self,
        linear: torch.nn.Linear,
        threshold: float,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(linear, compute_dtype)
        self.threshold = threshold

    @classmethod
    def quantise(
        cls,
        linear: torch.nn.Linear,
        threshold: float,
        compute_dtype: torch.dtype | None = None,
    ) -> Self:
        """Return `linear` with its weight as integers; the bias is shared."""
        stored = int8.quantise(linear.weight)
        return cls(linear, threshold, compute_dtype)._set(stored._asdict().items())

    @classmethod
    def empty(cls, linear: torch.nn.Linear, threshold: float) -> Self:
        """Return a layer in the place of `linear` that waits for a state dict."""
        stored = int8.empty(linear.in_features, linear.out_features, linear.weight.device)
        return cls(linear, threshold)._set(stored._asdict().items())

    @property
    def stored(self) -> int8.Int8:
        """The buffers as one value."""
        return int8.Int8(self.codes, self.scales)

    @property
    def rounds_inputs(self) -> bool:
        """Whether x is rounded too."""
        return self.threshold > 0

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return W expanded, [d_out, d_in] in `dtype`."""
        return int8.dequantise(self.stored, dtype)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T, [..., d_out], without a gradient; x is rounded where it is small."""
        if not self.threshold:
            return super().product(x)
        rows = int8.product(x.reshape(-1, self.in_features), self.stored, self.threshold)
        return rows.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Return the sizes, for printing."""
        return f"{super().extra_repr()}, threshold={self.threshold}"
