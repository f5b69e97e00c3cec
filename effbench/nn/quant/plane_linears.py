"""Linear layers whose weights are sums of scaled bit planes: trits, or signs."""

from __future__ import annotations

from typing import ClassVar, Self

import torch

from effbench.nn.quant import binary, groupwise, trits
from effbench.nn.quant.alternating import refuse_not_finite
from effbench.nn.quant.layout import ALIGNED, SIGNS, TRITS, Layout
from effbench.nn.quant.linears import QuantisedLinear


class PlaneLinear(QuantisedLinear):
    """Base of the layers with `planes` [B, N, ⌈K / 8⌉] uint8 and `scales` [P, N, G] float16.

    Args:
        linear: The layer it stands for.
        group_size: Neighbouring weights of a row that share their scales.
    """

    kind: ClassVar[int]
    """What the planes are for kernels."""
    planes: torch.Tensor
    scales: torch.Tensor

    def __init__(self, linear: torch.nn.Linear, group_size: int) -> None:
        super().__init__(linear)
        self.group_size = group_size

    def layout(self) -> Layout | None:
        """Return how the planes lie; None where a block of columns ends within a group."""
        group = min(self.group_size, self.in_features)
        if self.in_features % ALIGNED or group % ALIGNED:
            return None
        count, stride = len(self.planes), self.planes[0].numel()
        return Layout(self.kind, group, self.scales, planes=count, stride=stride)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The bit planes, uint8."""
        return self.planes

    def extra_repr(self) -> str:
        """Return the sizes, for printing."""
        return f"{super().extra_repr()}, planes={len(self.scales)}, group_size={self.group_size}"


class TritLinear(PlaneLinear):
    """A linear with weights of scaled trits; its buffers are those of `trits.Trits`."""

    kind: ClassVar[int] = TRITS

    @classmethod
    def quantise(
        cls,
        linear: torch.nn.Linear,
        planes: int,
        group_size: int,
        search: trits.Search = trits.Search(),  # noqa: B008
    ) -> Self:
        """Return `linear` with its weight as trit planes; the bias is shared."""
        refuse_not_finite(linear.weight)
        stored = trits.quantise(linear.weight, planes, group_size, search)
        return cls(linear, group_size)._set(stored._asdict().items())

    @classmethod
    def empty(cls, linear: torch.nn.Linear, planes: int, group_size: int) -> Self:
        """Return a layer in the place of `linear` that waits for a state dict."""
        sizes = linear.in_features, linear.out_features
        stored = trits.empty(*sizes, planes, group_size, linear.weight.device)
        return cls(linear, group_size)._set(stored._asdict().items())

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return W expanded, [d_out, d_in] in `dtype`."""
        stored = trits.Trits(self.planes, self.scales)
        return trits.dequantise(stored, self.in_features, self.group_size, dtype)


class BinaryLinear(PlaneLinear):
    """A linear with weights of scaled signs; its buffers are those of `binary.Binary`."""

    kind: ClassVar[int] = SIGNS
    offsets: torch.Tensor | None

    @classmethod
    def quantise(
        cls,
        linear: torch.nn.Linear,
        bits: int,
        group_size: int,
        offset: bool = False,
        rounds: int = 15,
    ) -> Self:
        """Return `linear` with its weight as scaled signs; the bias is shared."""
        refuse_not_finite(linear.weight)
        stored = binary.quantise(linear.weight, bits, group_size, offset, rounds)
        return cls(linear, group_size)._set(stored._asdict().items())

    @classmethod
    def rounded(cls, linear: torch.nn.Linear, bits: int, group_size: int) -> Self:
        """Return `linear` with its weight rounded to the nearest codes, these written as signs."""
        refuse_not_finite(linear.weight)
        codes = groupwise.quantise(linear.weight, bits, group_size, symmetric=False)
        stored = binary.from_groups(codes, linear.in_features, bits, group_size)
        return cls(linear, group_size)._set(stored._asdict().items())

    @classmethod
    def empty(
        cls, linear: torch.nn.Linear, bits: int, group_size: int, offset: bool = False
    ) -> Self:
        """Return a layer in the place of `linear` that waits for a state dict."""
        sizes = linear.in_features, linear.out_features
        stored = binary.empty(*sizes, bits, group_size, offset, linear.weight.device)
        return cls(linear, group_size)._set(stored._asdict().items())

    @property
    def stored(self) -> binary.Binary:
        """The buffers as one value."""
        return binary.Binary(self.planes, self.scales, self.offsets)

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return W expanded, [d_out, d_in] in `dtype`."""
        return binary.dequantise(self.stored, self.in_features, self.group_size, dtype)

    def layout(self) -> Layout | None:
        """Return how the planes lie, with what is added to each group."""
        found = super().layout()
        return None if found is None else found._replace(zeros=self.offsets)
