"""LoRA+: LoRA whose B learns faster than its A.

Hayou, Ghosh and Yu, LoRA+: Efficient Low Rank Adaptation of Large Models, ICML 2024, arXiv
2402.12354.

    y = W x + (alpha / R) * B A drop(x)        rate of A: eta, rate of B: ratio * eta

In the limit of wide models one rate for both cannot make both factors learn features; the paper
finds a ratio of about 16 good. The groups are those of peft's optimiser for it. Our choice: eta is
a quarter of LoRA's rate here, so that the rates of A and B lie as far below it as above it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from effbench.api.method_types import Paper
from effbench.api.schema import PositiveFloat
from effbench.methods.adapters.lora import LoRA
from effbench.util.lazy import torch


@dataclass(frozen=True)
class LoRAPlus(LoRA):
    """Low-rank adaptation with two learning rates."""

    paper: ClassVar[Paper | None] = Paper(
        "LoRA+: Efficient Low Rank Adaptation of Large Models", "ICML 2024", "2402.12354"
    )
    data_parallel: ClassVar[frozenset[str]] = frozenset({"none"})
    learning_rate: ClassVar[float] = 2.5e-4
    version: ClassVar[int] = 2
    """2: a classifier's head trains too, at the rate of A."""

    ratio: PositiveFloat = 16.0
    """Learning rate of B over that of A, which is `train.learning_rate`; 1 is LoRA, bit for bit."""

    def param_groups(self, model: torch.nn.Module) -> list[tuple[list[torch.nn.Parameter], float]]:
        """Return A and B as groups of their own; one group where their rates are the same.

        The norm that gradients are clipped to is summed in the order of the groups.
        """
        if self.ratio == 1:
            return super().param_groups(model)
        layers = list(self.adapters(model))
        return [
            ([p for _, a, _ in layers for p in a.parameters()], 1.0),
            ([p for _, _, b in layers for p in b.parameters()], self.ratio),
        ]
