"""PTQTP: weights as sums of two ternary planes, fitted without data.

Xiao et al., PTQTP: Post-Training Quantization to Trit-Planes for Large Language Models, arXiv
2509.16989. Over each group of `group_size` neighbours w in a row of W [d_out, d_in]:

    ŵ = Σ_k a_k t_k,   t_k in {-1, 0, 1}^g, a_k >= 0, k up to `planes`
    a = (S Sᵀ + λ I)⁻¹ S w           given the trits S [planes, g], in float64
    t = argmin (w - Σ_k a_k c_k)²    given the scales, over all combinations c of trits

by turns from t_k = sign(w), where all a_k are mean|w| / planes, until ‖Δa‖₂ < `tolerance` in a
group or `max_iters` rounds are over. λ starts at 1e-8 and is raised tenfold, up to 1, as long as
the condition number of S Sᵀ + λ I is above `condition`.

Per linear: planes [2 · planes, d_out, ⌈d_in / 8⌉] uint8, scales [planes, d_out, ⌈d_in /
group_size⌉] float16. Our choices: 2 bits for a trit, which need no division to be read; one plane
or three, beside the paper's two; the order of equal combinations; trits chosen once more for the
rounded scales; a shorter last group where the size does not divide a row (the paper cuts the
flattened matrix). All linears of the decoder blocks are quantised; embeddings, norms and head are
not. The memory is saved for real; time is where trits are multiplied as they are
(`nn/decode/kernels/planes.h`), elsewhere each product first expands its weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Interval

from effbench.api.method_types import Paper
from effbench.api.schema import PositiveFloat, PositiveInt
from effbench.api.shape import Anatomy
from effbench.methods.compresses import CompressesLinears
from effbench.nn.quant import plane_linears, trits
from effbench.nn.quant.formats.trits import Trits
from effbench.util.lazy import torch


@dataclass(frozen=True)
class PTQTP(CompressesLinears):
    """Turns every decoder weight into a sum of scaled trits."""

    paper: ClassVar[Paper | None] = Paper(
        "PTQTP: Post-Training Quantization to Trit-Planes for Large Language Models",
        "arXiv 2025",
        "2509.16989",
    )
    anatomy: ClassVar[Anatomy] = "other"
    produces: ClassVar[str] = "trits"

    planes: Annotated[int, Interval(ge=1, le=3)] = 2
    """Trits per weight, two stored bits each; scales not counted."""
    group_size: PositiveInt = 128
    """Neighbouring weights of a row that share their scales."""
    max_iters: PositiveInt = 50
    """Rounds of scales and trits, at the most."""
    tolerance: PositiveFloat = 1e-4
    """A group is done when its scales move by less."""
    condition: PositiveFloat = 1e6
    """Largest condition number of the equations for the scales; above it λ is raised."""

    @property
    def format(self) -> Trits:
        """What weights become."""
        return Trits(self.planes, self.group_size)

    def compressed(self, linear: torch.nn.Linear) -> torch.nn.Module:
        """Return a linear of trit planes."""
        search = trits.Search(self.max_iters, self.tolerance, self.condition)
        return plane_linears.TritLinear.quantise(linear, self.planes, self.group_size, search)
