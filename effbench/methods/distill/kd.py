"""Logit distillation: every weight trains on the labels and on a teacher's distribution.

Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network, 2015, arXiv 1503.02531.

    loss = (1 - w) * CE(y, s) + w * T^2 * KL(softmax(t / T) || softmax(s / T))

s and t are the student's and the teacher's logits [B, T, V]; both terms are sums over the tokens
that count, divided by the tokens of the whole accumulation window. T^2 keeps the gradients of the
second term of the first one's size. Our choices: forward KL in float32, w = 0.5, T = 2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from effbench.api.batch import Batch
from effbench.api.method_types import Context, Paper, Weights
from effbench.api.objectives import DISTILLED
from effbench.api.points import Point
from effbench.api.schema import Fraction, PositiveFloat
from effbench.api.shape import Anatomy, AnyShape, ModelShape, Phase
from effbench.methods.trains import Trains
from effbench.nn.losses import token
from effbench.util.errors import UserError
from effbench.util.lazy import torch


@dataclass(frozen=True)
class Distillation(Trains):
    """Training of every weight towards labels and a teacher."""

    paper: ClassVar[Paper | None] = Paper(
        "Distilling the Knowledge in a Neural Network", "NIPS 2014 workshop", "1503.02531"
    )
    anatomy: ClassVar[Anatomy] = "other"
    model_kinds: ClassVar[frozenset[str]] = frozenset({"causal", "classifier", "seq2seq"})
    learning_rate: ClassVar[float] = 5e-5
    weighted_version: ClassVar[int] = 2
    """2: all terms of the loss have the weights of their rows."""
    needs: ClassVar[dict[str, Any]] = {"teacher": "tiny"}

    teacher: str = ""
    """Name of the teacher's model config, or the path of its folder; has to be set."""
    temperature: PositiveFloat = 2.0
    """T, by which both models' logits are divided."""
    weight: Fraction = 0.5
    """w, the share of the distillation term; 0 is plain training."""

    @property
    def weights(self) -> Weights:
        """The base is held as float32 masters."""
        return "float32"

    def resolve(self, shape: AnyShape) -> Self:
        """Refuse to run without a teacher."""
        if not self.teacher:
            raise UserError("kd has no teacher.", "Set method.teacher to the name of a model.")
        return self

    def aux_models(self) -> dict[str, str]:
        """Return the teacher."""
        return {"teacher": self.teacher} if self.teacher else {}

    def loss(self, model: torch.nn.Module, batch: Batch, ctx: Context) -> torch.Tensor:
        """Return the mixed loss of one micro-batch, a scalar."""
        if not self.weight:
            return super().loss(model, batch, ctx)
        logits = self.logits(model, batch)
        with torch.no_grad():
            target = self.logits(ctx.aux["teacher"], batch)
        hard = batch.weighed(token.token_nll(logits, batch.labels)).sum()
        soft = token.token_kl(target, logits, batch.labels, self.temperature)
        soft = batch.weighed(soft).sum()
        mixed = (1 - self.weight) * hard + self.weight * self.temperature**2 * soft
        return mixed / batch.window_tokens

    def shape(
        self, base: ModelShape, point: Point, phase: Phase, folder: Path | None
    ) -> ModelShape:
        """Train every weight, with both distributions, their products and their gradients."""
        return replace(super().shape(base, point, phase, folder), objective=DISTILLED)
