"""Full fine-tuning: every weight trains, the yardstick of the methods that train fewer.

The masters are float32, whatever the compute dtype: a bfloat16 weight would round most updates of
a small learning rate away. Our choice: learning rate 5e-5, for small models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from effbench.api.method_types import Weights
from effbench.api.shape import Anatomy
from effbench.methods.trains import Trains


@dataclass(frozen=True)
class Full(Trains):
    """Training of every weight."""

    anatomy: ClassVar[Anatomy] = "other"
    model_kinds: ClassVar[frozenset[str]] = frozenset({"causal", "classifier", "seq2seq"})
    data_parallel: ClassVar[frozenset[str]] = frozenset({"none", "fsdp"})
    learning_rate: ClassVar[float] = 5e-5

    @property
    def weights(self) -> Weights:
        """The base is held as float32 masters."""
        return "float32"
