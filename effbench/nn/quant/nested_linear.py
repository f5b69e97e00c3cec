"""A linear that holds nested codes as bit planes, and is read at one of several widths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open

from effbench.nn.quant import nested, planes
from effbench.nn.quant.layout import ALIGNED, NESTED, Layout
from effbench.nn.quant.linears import QuantisedLinear
from effbench.util.errors import UserError

LARGEST = torch.finfo(torch.float16).max
"""Largest weight that a table can hold."""


class NestedLinear(QuantisedLinear):
    """A linear with the codes of `effbench.nn.quant.nested`, at the width `bits` of the moment.

    Buffers: `planes` [B, N, ⌈K / 8⌉] uint8 (`effbench.nn.quant.planes` says how they lie), and for
    each width b a `table_<b>` [N, 2^b] float16. A product at b bits reads the first b planes and
    one table, and nothing else. `own_bits` is the layer's width where widths are chosen for a
    budget (`effbench.nn.quant.mixed`).

    Args:
        linear: The layer it stands for.
        seed_bits: Lowest width.
        parent_bits: Highest width B, at which it is read at first.
    """

    planes: torch.Tensor

    def __init__(self, linear: torch.nn.Linear, seed_bits: int, parent_bits: int) -> None:
        super().__init__(linear)
        self.seed_bits = seed_bits
        self.parent_bits = self.bits = self.own_bits = parent_bits

    @classmethod
    def quantise(
        cls,
        linear: torch.nn.Linear,
        seed_bits: int,
        parent_bits: int,
        sensitivity: torch.Tensor | None = None,
        seed: nested.Seed = "optimal",
    ) -> Self:
        """Return `linear` with its weight in nested codes; the bias is shared.

        Args:
            linear: Its weight [N, K] is finite and within float16.
            seed_bits: Lowest width.
            parent_bits: Highest width.
            sensitivity: [N, K], what an error of each weight costs; None for all alike.
            seed: How clusters are found.
        """
        found = nested.quantise(linear.weight.detach(), sensitivity, seed_bits, parent_bits, seed)
        tables = ((f"table_{b}", table.half()) for b, table in found.tables.items())
        stored = ("planes", planes.pack(found.codes, parent_bits)), *tables
        return cls(linear, seed_bits, parent_bits)._set(stored)

    @classmethod
    def empty(cls, linear: torch.nn.Linear, seed_bits: int, parent_bits: int) -> Self:
        """Return a layer in the place of `linear` that waits for a state dict."""
        rows, device = linear.out_features, linear.weight.device
        bytes_ = planes.plane_bytes(linear.in_features)
        codes = torch.zeros(parent_bits, rows, bytes_, dtype=torch.uint8, device=device)
        tables = (
            (f"table_{b}", torch.zeros(rows, 2**b, dtype=torch.float16, device=device))
            for b in range(seed_bits, parent_bits + 1)
        )
        return cls(linear, seed_bits, parent_bits)._set((("planes", codes), *tables))

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The bit planes, uint8."""
        return self.planes

    @property
    def table(self) -> torch.Tensor:
        """The levels of the current width, [N, 2^bits] float16."""
        return self.get_buffer(f"table_{self.bits}")

    def use(self, bits: int) -> None:
        """Read at another width from now on.

        Raises:
            ValueError: For a width that was not built.
        """
        if not self.seed_bits <= bits <= self.parent_bits:
            raise ValueError(f"There is no width {bits} of {self.seed_bits} to {self.parent_bits}.")
        if self._kept and bits != self.bits:
            self._kept.clear()
        self.bits = bits

    def dense_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Return W at the current width, [d_out, d_in] in `dtype`."""
        codes = planes.unpack(self.planes[: self.bits], self.in_features)
        return self.table.to(dtype).gather(1, codes.long())

    def measure(self, weight: torch.Tensor, sensitivity: torch.Tensor) -> torch.Tensor:
        """Return what each width loses, [widths] float64: the sum of F (w - ŵ)^2.

        Args:
            weight: W, [N, K].
            sensitivity: F, [N, K].
        """
        codes = planes.unpack(self.planes, self.in_features).long()
        found = []
        for bits in range(self.seed_bits, self.parent_bits + 1):
            level = self.get_buffer(f"table_{bits}").float()
            lost = level.gather(1, codes >> (self.parent_bits - bits)) - weight.float()
            found.append((lost.square_() * sensitivity).sum(dtype=torch.float64))
        return torch.stack(found)

    def layout(self) -> Layout | None:
        """Return how the planes of the current width lie; None where rows do not fill blocks."""
        if self.in_features % ALIGNED:
            return None
        stride = self.planes[0].numel()
        return Layout(NESTED, self.in_features, self.table, planes=self.bits, stride=stride)

    def extra_repr(self) -> str:
        """Return the sizes, for printing."""
        return f"{super().extra_repr()}, bits={self.bits} of {self.seed_bits}-{self.parent_bits}"


def load_lowest(targets: Mapping[str, torch.Tensor], path: Path) -> None:
    """Copy buffers of nested linears from a file that may have further planes and tables.

    Of the planes only the first are read; those above them stay on the disk.

    Args:
        targets: Buffers by name, those of the widths that are wanted.
        path: A safetensors file.

    Raises:
        UserError: When the file lacks one, or has it in another shape.
    """
    try:
        with safe_open(path, "pt") as file:
            for name, target in targets.items():
                first = file.get_slice(name)[: len(target)]
                if first.shape != target.shape:
                    raise ValueError(f"{name} is {tuple(first.shape)}, not {tuple(target.shape)}")
                target.copy_(first)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} does not hold these codes: {error}.",
            "Use it with the model and method settings that made it.",
        ) from None


@contextmanager
def read_at(model: torch.nn.Module, bits: int | None) -> Iterator[None]:
    """Read all nested linears of a model at one width inside the context; None is each at its own.

    Raises:
        ValueError: For a width that was not built.
    """
    before = [(m, m.bits) for m in model.modules() if isinstance(m, NestedLinear)]
    try:
        for layer, _ in before:
            layer.use(layer.own_bits if bits is None else bits)
        yield
    finally:
        for layer, width in before:
            layer.use(width)
