"""QDyLoRA: DyLoRA on a base whose decoder linears are held in 4 bits.

Rajabzadeh et al., QDyLoRA: Quantized Dynamic Low-Rank Adaptation for Efficient Large Language Model
Tuning, EMNLP 2024 Industry Track, arXiv 2402.10462.

    b ~ p(b) at each optimiser step
    y = dequant(W) x + (alpha / b) * B[:, :b] (A[:b] drop(x))      A [R, d_in], B [d_out, R]

W is NF4 with double quantisation, as in QLoRA (arXiv 2305.14314); the ranks are DyLoRA's (arXiv
2210.07558). One run leaves an adapter for every rank up to R. The paper's highest rank is 64.

Our choices, as in `dylora`: R = 16 for small models, b uniform on 1 … R and the same everywhere
in a step, all seven linears of a block, alpha 16, no dropout, AdamW that is not paged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from effbench.api.method_types import Paper, Weights
from effbench.methods.adapters.dylora import DyLoRA


@dataclass(frozen=True)
class QDyLoRA(DyLoRA):
    """Low-rank adaptation of an NF4 base that is trained for all ranks at once."""

    paper: ClassVar[Paper | None] = Paper(
        "QDyLoRA: Quantized Dynamic Low-Rank Adaptation for Efficient Large Language Model Tuning",
        "EMNLP 2024 Industry Track",
        "2402.10462",
    )
    data_parallel: ClassVar[frozenset[str]] = frozenset({"none"})
    learning_rate: ClassVar[float] = 1e-3
    accepts: ClassVar[frozenset[str]] = frozenset({"dense"})

    @property
    def weights(self) -> Weights:
        """The base is NF4."""
        return "nf4"
