"""LUT-GEMM: weights as sums of scaled signs, for products by tables of partial sums.

Park et al., LUT-GEMM: Quantized Matrix Multiplication based on LUTs for Efficient Inference in
Large-Scale Generative Language Models, ICLR 2024, arXiv 2206.09557. Over each group of `group_size`
neighbours w in a row of W [d_out, d_in]:

    ŵ = Σ_i a_i b_i + o,   b_i in {-1, 1}^g,   a_1 >= ... >= a_bits >= 0
    greedy     r = w - o; for each i: b_i = sign(r), a_i = mean|r|, r -= a_i b_i
    refined    `rounds` times: a by least squares, b the nearest of the 2^bits sums of ±a_i

o is 0 or, with `offset`, the mean of the group. With `source` rtn nothing is fitted: the codes of
round-to-nearest (`rtn`) are written in this form, with offsets, and stand for the same weights.

Per linear, with G = ⌈d_in / group_size⌉: planes [bits, d_out, ⌈d_in / 8⌉] uint8, scales [bits,
d_out, G] float16, offsets [d_out, G] float32. Our choices: a direct solution with a ridge for the
authors' damped conjugate gradients; a group stops when its error falls no more; sign(0) is 1;
offsets in float32, in which the conversion is exact; no importance weights and no pruning. The
paper's product is `effbench.nn.quant.binary.table_product`, a reference that counts its operations.
The memory is saved for real; time is where signs are multiplied as they are
(`nn/decode/kernels/planes.h`), elsewhere each product expands its weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from effbench.api.method_types import Paper
from effbench.api.schema import Bits, NonNegativeInt, PositiveInt
from effbench.api.shape import Anatomy, AnyShape
from effbench.methods.compresses import CompressesLinears
from effbench.nn.quant import plane_linears
from effbench.nn.quant.binary import TABLE_INPUTS
from effbench.nn.quant.formats.binary import BinaryCodes
from effbench.util.errors import UserError
from effbench.util.lazy import torch


@dataclass(frozen=True)
class LUTGEMM(CompressesLinears):
    """Turns every decoder weight into a sum of scaled signs."""

    paper: ClassVar[Paper | None] = Paper(
        "LUT-GEMM: Quantized Matrix Multiplication based on LUTs for Efficient Inference in "
        "Large-Scale Generative Language Models",
        "ICLR 2024",
        "2206.09557",
    )
    anatomy: ClassVar[Anatomy] = "other"
    produces: ClassVar[str] = "binary"

    bits: Bits = 4
    """Signs per weight; scales and offsets not counted."""
    group_size: PositiveInt = 128
    """Neighbouring weights of a row that share their scales; a multiple of 8."""
    rounds: NonNegativeInt = 15
    """Of refinement, at the most; 0 is greedy."""
    offset: bool = False
    """Whether the mean of each group is kept beside its signs."""
    source: Literal["weights", "rtn"] = "weights"
    """What the signs are fitted to, or `rtn`: the codes of round-to-nearest, converted exactly."""

    def resolve(self, shape: AnyShape) -> Self:
        """Refuse groups that do not end with a table of 8 inputs."""
        if self.group_size % TABLE_INPUTS:
            raise UserError(
                f"method.group_size={self.group_size} is no multiple of {TABLE_INPUTS}, the inputs "
                "of one table.",
                "Use 32, 64 or 128; the last group of a row may be shorter.",
            )
        return self

    @property
    def format(self) -> BinaryCodes:
        """What weights become."""
        return BinaryCodes(self.bits, self.group_size, self.offset or self.source == "rtn")

    def compressed(self, linear: torch.nn.Linear) -> torch.nn.Module:
        """Return a linear of scaled signs."""
        if self.source == "rtn":
            return plane_linears.BinaryLinear.rounded(linear, self.bits, self.group_size)
        return plane_linears.BinaryLinear.quantise(
            linear, self.bits, self.group_size, self.offset, self.rounds
        )
