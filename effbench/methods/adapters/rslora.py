"""rsLoRA: LoRA whose scale falls with the square root of the rank.

Kalajdzievski, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA, 2023, arXiv
2312.03732.

    y = W x + (alpha / sqrt(R)) * B A drop(x)        A [R, d_in], B [d_out, R], x [*, d_in]

With alpha / R the update and its gradients shrink as R grows, so that high ranks learn like low
ones; with alpha / sqrt(R) they keep their size. It is LoRA with alpha sqrt(R) for alpha, bit for
bit. Our choices are those of `lora`; alpha 16 is the paper's too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from effbench.api.method_types import Paper
from effbench.methods.adapters.lora import LoRA


@dataclass(frozen=True)
class RankStabilisedLoRA(LoRA):
    """Low-rank adaptation with a scale that is stable over ranks."""

    paper: ClassVar[Paper | None] = Paper(
        "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", "arXiv 2023", "2312.03732"
    )
    data_parallel: ClassVar[frozenset[str]] = frozenset({"none"})

    @property
    def numerator(self) -> float:
        """What over R is the update's scale alpha / sqrt(R)."""
        return self.alpha * math.sqrt(self.rank)
