"""MeZO: fine-tuning from forward passes alone, in the memory of inference.

Malladi et al., Fine-Tuning Language Models with Just Forward Passes, NeurIPS 2023, arXiv
2305.17333. With z ~ N(0, I) drawn from a seed, tensor by tensor, whenever it is needed:

    g = (L(theta + eps z) - L(theta - eps z)) / (2 eps)         a scalar
    theta <- theta - lr (g z + decay theta)

z is never stored, nothing is back-propagated, and no optimiser has a state. A run is the list of
its (seed, g, lr), which each step's event has. With several perturbations a step is the mean of
their updates, all estimated at the same theta.

From the paper: the two-sided estimate, Gaussian z, no dropout while it is estimated, a constant
learning rate (`train.schedule=constant`), eps 1e-3 for all weights and 1e-2 for adapters. Ours:
adapters by default, masters in float32 where every weight learns (a bfloat16 weight would round eps
z away), decay on no vector, the final norm's included; the reported loss is the mean of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, Self

from effbench.api.batch import Batch
from effbench.api.evolution import Evolution
from effbench.api.method_types import Context, Paper, Weights
from effbench.api.points import Point
from effbench.api.schema import PositiveFloat, PositiveInt
from effbench.api.shape import AnyShape, ModelShape, Phase
from effbench.methods.adapters.lora import LoRA
from effbench.methods.trains import Trains
from effbench.nn.adapters import peft_lora
from effbench.nn.zeroth_order import two_point
from effbench.util.errors import UserError
from effbench.util.lazy import torch


@dataclass(frozen=True)
class MeZO(LoRA):
    """Zeroth-order training of adapters or of every weight."""

    paper: ClassVar[Paper | None] = Paper(
        "Fine-Tuning Language Models with Just Forward Passes", "NeurIPS 2023", "2305.17333"
    )
    learning_rate: ClassVar[float] = 1e-4

    trains: Literal["lora", "full"] = "lora"
    """Adapters on a frozen base, or every weight."""
    epsilon: PositiveFloat | None = None
    """Length of a perturbation over that of z; null is 1e-2 for adapters, 1e-3 for all weights."""
    perturbations: PositiveInt = 1
    """Estimates of a step, each from two passes of its own."""

    @property
    def weights(self) -> Weights:
        """The base is held as float32 masters where it learns whole."""
        return "float32" if self.trains == "full" else "compute"

    def resolve(self, shape: AnyShape) -> Self:
        """Return the method with its epsilon; refuse adapters that do not fit, or are not there."""
        if self.trains == "lora":
            return replace(super().resolve(shape), epsilon=self.epsilon or 1e-2)
        if self.eval_ranks:
            raise UserError(
                "method.eval_ranks cuts adapters, and method.trains=full has none.",
                "Leave it out, or set method.trains=lora.",
            )
        return replace(self, epsilon=self.epsilon or 1e-3)

    def prepare(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Put adapters in, or let every weight train."""
        kind = LoRA if self.trains == "lora" else Trains
        return kind.prepare(self, model, ctx)

    def evolution(self, model: torch.nn.Module, ctx: Context) -> Evolution:
        """Return what remembers the seeds and estimates of a step for its event."""
        return two_point.Estimates()

    def update(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        window: Sequence[Batch],
        ctx: Context,
    ) -> torch.Tensor:
        """Make one step from twice as many passes as perturbations; return the mean loss."""
        assert self.epsilon is not None
        steps = [
            two_point.Step(
                p, group["lr"] / self.perturbations, group["weight_decay"] if p.ndim > 1 else 0.0
            )
            for group in optimizer.param_groups
            for p in group["params"]
        ]
        training = model.training
        model.eval()

        def loss() -> float:
            with ctx.autocast():
                return sum(float(self.loss(model, batch, ctx)) for batch in window)

        with torch.no_grad():
            seeds = two_point.draw_seeds(self.perturbations, ctx.generator)
            found = [two_point.estimate(steps, loss, seed, self.epsilon) for seed in seeds]
            for estimate in found:
                two_point.descend(steps, estimate)
        model.train(training)
        ctx.evolution.found = found
        # Without gradients it changes nothing; the schedule counts its calls. A scaler of losses in
        # float16, which stands before it, refuses a step for which it has scaled none.
        getattr(optimizer, "optimizer", optimizer).step()
        return torch.tensor(sum(e.loss for e in found) / len(found))

    def as_peft(self, model: torch.nn.Module, point: Point) -> peft_lora.PeftAdapter | None:
        """Return the adapter; None where every weight was trained."""
        return super().as_peft(model, point) if self.trains == "lora" else None

    def shape(
        self, base: ModelShape, point: Point, phase: Phase, folder: Path | None
    ) -> ModelShape:
        """Count two passes and no gradient."""
        full = self.trains == "full"
        model = base.trained() if full else super().shape(base, point, phase, folder)
        return replace(model, forwards=2 * self.perturbations)
