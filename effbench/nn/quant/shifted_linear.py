"""A linear with integer codes, and a scale and a shift for each group."""

from __future__ import annotations

from typing import Self

import torch

from effbench.nn.quant import shifted
from effbench.nn.quant.layout import ALIGNED, SHIFTS, Layout
from effbench.nn.quant.linears import QuantisedLinear


class ShiftedLinear(QuantisedLinear):
    """A linear whose buffers are those of `effbench.nn.quant.shifted.Shifted`.

    Args:
        linear: The layer it stands for.
        bits: Bits per code, 2 to 8.
        group_size: Neighbouring weights of a row that share scale and shift.
    """

    scales: torch.Tensor
    shifts: torch.Tensor

    def __init__(self, linear: torch.nn.Linear, bits: int, group_size: int) -> None:
        super().__init__(linear)
        self.bits = bits
        self.group_size = group_size

    @classmethod
    def quantise(
        cls,
        linear: torch.nn.Linear,
        bits: int,
        group_size: int,
        search: shifted.Search = shifted.Search(),  # noqa: B008
    ) -> Self:
        """Return `linear` with its weight as codes; the bias is shared."""
        stored = shifted.quantise(linear.weight, bits, group_size, search)
        return cls(linear, bits, group_size)._set(stored._asdict().items())

    @classmethod
    def empty(cls, linear: torch.nn.Linear, bits: int, group_size: int) -> Self:
        """Return a layer in the place of `linear` that waits for a state dict."""
        sizes = linear.in_features, linear.out_features
        stored = shifted.empty(*sizes, bits, group_size, linear.weight.device)
        return cls(linear, bits, group_size)._set(stored._asdict().items())

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return W expanded, [d_out, d_in] in `dtype`."""
        stored = shifted.Shifted(self.codes, self.scales, self.shifts)
        return shifted.dequantise(stored, self.in_features, self.bits, self.group_size, dtype)

    def layout(self) -> Layout | None:
        """Return how the codes lie; None for ragged groups."""
        group = min(self.group_size, self.in_features)
        if self.in_features % ALIGNED or group % ALIGNED:
            return None
        return Layout(self.bits, group, self.scales, self.shifts, planes=SHIFTS)

    def extra_repr(self) -> str:
        """Return the sizes, for printing."""
        return f"{super().extra_repr()}, bits={self.bits}, group_size={self.group_size}"
