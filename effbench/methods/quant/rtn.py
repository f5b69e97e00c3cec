"""Round-to-nearest weights with one scale per group: what every other quantiser must beat.

Sources: block-wise rounding as studied by Dettmers and Zettlemoyer, "The case for 4-bit precision:
k-bit inference scaling laws", ICML 2023, arXiv 2212.09720; the zero point per group is common use.

With L = 2^b - 1, over each group of `group_size` neighbours w in a row of W [d_out, d_in]:

    s = (max(w, 0) - min(w, 0)) / L,   z = round(-min(w, 0) / s)
    q = clamp(round(w / s) + z, 0, L),   ŵ = s · (q - z)

Per linear: codes [⌈d_out · d_in · b / 8⌉] uint8, scales [d_out, ⌈d_in / group_size⌉] float16, zeros
[⌈d_out · ⌈d_in / group_size⌉ · b / 8⌉] uint8; no zeros when symmetric (z fixed in the middle).

Our choices: integer codes (the paper finds quantile and float codes better at equal bits), groups
of 128 inside a row, float16 scales and zero points of b bits. All linears of the decoder blocks are
quantised; embeddings, norms and head are not. No data is used. The memory is saved for real; time
is where codes are multiplied as they are (`nn/decode/kernels/packed.h`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from effbench.api.method_types import Paper
from effbench.methods.compresses import CompressesLinears
from effbench.methods.quant.groups import PacksGroups
from effbench.util.lazy import torch


@dataclass(frozen=True)
class RTN(PacksGroups, CompressesLinears):
    """Rounds every decoder weight to the nearest of 2^bits levels of its group."""

    paper: ClassVar[Paper | None] = Paper(
        "The case for 4-bit precision: k-bit Inference Scaling Laws", "ICML 2023", "2212.09720"
    )

    def compressed(self, linear: torch.nn.Linear) -> torch.nn.Module:
        """Return a linear rounded to the nearest codes."""
        return self.format.quantise(linear)
