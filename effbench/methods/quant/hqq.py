"""HQQ: rounded weights whose zero points are moved so that the few large errors count little.

Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, Mobius Labs 2023,
https://mobiusml.github.io/hqq_blog. Over each group of `group_size` neighbours w in a row of
W [d_out, d_in], with L = 2^bits - 1:

    ŵ = s q + o,   s = (max w - min w) / L,   q = clamp(round((w - o) / s), 0, L)
    e = sign(r) max(|r| - |r|^(p - 1) / β, 0),   r = w - ŵ
    o = mean(w - e - s q),   β <- κ β               `rounds` times, from o = min w

Per linear: codes [⌈d_out · d_in · bits / 8⌉] uint8, scales and shifts o [d_out, ⌈d_in /
group_size⌉] float16. Our choices: o in the place of the authors' zero point z = -o / s, for it
needs no more digits where a group lies far from zero; each group keeps the shift with the least
mean |r|, where theirs stop with the whole matrix; a shorter last group. All linears of the decoder
blocks are quantised; embeddings, norms and head are not. No data is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Interval

from effbench.api.method_types import Paper
from effbench.api.schema import Bits, PositiveFloat, PositiveInt
from effbench.api.shape import Anatomy
from effbench.methods.compresses import CompressesLinears
from effbench.nn.quant import shifted, shifted_linear
from effbench.nn.quant.formats.shifted import ShiftedCodes
from effbench.util.lazy import torch


@dataclass(frozen=True)
class HQQ(CompressesLinears):
    """Rounds every decoder weight on a grid that is shifted by half-quadratic splitting."""

    paper: ClassVar[Paper | None] = Paper(
        "Half-Quadratic Quantization of Large Machine Learning Models",
        "Mobius Labs 2023",
        "https://mobiusml.github.io/hqq_blog",
    )
    anatomy: ClassVar[Anatomy] = "other"
    produces: ClassVar[str] = "shifted"

    bits: Bits = 4
    """Bits per weight, scales and shifts not counted."""
    group_size: PositiveInt = 64
    """Neighbouring weights of a row that share scale and shift."""
    p: Annotated[float, Interval(gt=0, le=1)] = 0.7
    """Exponent of the error that is made small; the lower, the less do outliers count."""
    beta: PositiveFloat = 10.0
    """β in the first round; the larger, the more of the error is left out of account."""
    kappa: Annotated[float, Interval(ge=1)] = 1.01
    """What β is multiplied by after each round; the authors' program leaves it at β by default."""
    rounds: PositiveInt = 20
    """At the most; 1 is rounding from the least to the largest weight."""

    @property
    def format(self) -> ShiftedCodes:
        """What weights become."""
        return ShiftedCodes(self.bits, self.group_size)

    def compressed(self, linear: torch.nn.Linear) -> torch.nn.Module:
        """Return a linear of shifted codes."""
        search = shifted.Search(self.p, self.beta, self.kappa, self.rounds)
        return shifted_linear.ShiftedLinear.quantise(linear, self.bits, self.group_size, search)
