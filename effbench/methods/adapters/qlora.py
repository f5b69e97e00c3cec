"""QLoRA: LoRA on a base whose decoder linears are held in 4 bits.

Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, NeurIPS 2023, arXiv 2305.14314.

    y = dequant(W) x + (alpha / R) * B A drop(x)

W is NF4: blocks of 64 weights with one absmax each, the absmaxima again 8-bit in blocks of 256
(double quantisation), 0.516 bytes per weight. Embeddings, norms and head stay in the compute dtype.
Our choice: 32-bit AdamW that is not paged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from effbench.api.method_types import Paper, Weights
from effbench.methods.adapters.lora import LoRA


@dataclass(frozen=True)
class QLoRA(LoRA):
    """Low-rank adaptation of an NF4 base, through peft."""

    paper: ClassVar[Paper | None] = Paper(
        "QLoRA: Efficient Finetuning of Quantized LLMs", "NeurIPS 2023", "2305.14314"
    )
    data_parallel: ClassVar[frozenset[str]] = frozenset({"none"})
    accepts: ClassVar[frozenset[str]] = frozenset({"dense"})

    @property
    def weights(self) -> Weights:
        """The base is NF4."""
        return "nf4"
