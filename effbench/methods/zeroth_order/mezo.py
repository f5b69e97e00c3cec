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

from collections.abc import Callable, Iterable, Iterator, Sequence
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
from effbench.util.errors import UserError
from effbench.util.lazy import torch

MOST_SEED = 2**31 - 1


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
        return Estimates()

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
            Step(p, group["lr"] / self.perturbations, group["weight_decay"] if p.ndim > 1 else 0.0)
            for group in optimizer.param_groups
            for p in group["params"]
        ]
        training = model.training
        model.eval()

        def loss() -> float:
            with ctx.autocast():
                return sum(float(self.loss(model, batch, ctx)) for batch in window)

        with torch.no_grad():
            seeds = torch.randint(MOST_SEED, (self.perturbations,), generator=ctx.generator)
            found = [two_point(steps, loss, seed, self.epsilon) for seed in seeds.tolist()]
            for estimate in found:
                descend(steps, estimate)
        model.train(training)
        ctx.evolution.found = found
        optimizer.step()  # without gradients it changes nothing; the schedule counts its calls
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


@dataclass(frozen=True)
class Estimate:
    """What two passes found out about one direction."""

    seed: int
    """Of z."""
    gradient: float
    """g, the slope of the loss along z."""
    loss: float
    """Mean loss of both passes."""


@dataclass(frozen=True)
class Step:
    """A tensor that trains, and how far it goes."""

    tensor: torch.Tensor
    rate: float
    """Learning rate."""
    decay: float
    """Decoupled weight decay."""


class Estimates(Evolution):
    """Remembers the estimates of a step: its event tells them, and a run can be replayed."""

    def __init__(self) -> None:
        self.found: Sequence[Estimate] = ()

    def metrics(self) -> dict[str, float]:
        """Return seed and g of each direction; from the second one on with its number."""
        named: dict[str, float] = {}
        for number, estimate in enumerate(self.found, 1):
            end = f"_{number}" if number > 1 else ""
            named |= {f"seed{end}": estimate.seed, f"projected_gradient{end}": estimate.gradient}
        return named


def directions(steps: Iterable[Step], seed: int) -> Iterator[tuple[Step, torch.Tensor]]:
    """Yield each tensor with its part of z, drawn on its device in their order."""
    draws: dict[torch.device, torch.Generator] = {}
    for step in steps:
        place = step.tensor.device
        if place not in draws:
            draws[place] = torch.Generator(place).manual_seed(seed)
        size, dtype = step.tensor.shape, step.tensor.dtype
        yield step, torch.normal(0, 1, size, generator=draws[place], dtype=dtype, device=place)


def perturb(steps: Iterable[Step], seed: int, scale: float) -> None:
    """Add `scale` times the z of a seed to the tensors, in place."""
    for step, z in directions(steps, seed):
        step.tensor.add_(z, alpha=scale)


def two_point(
    steps: Sequence[Step], loss: Callable[[], float], seed: int, epsilon: float
) -> Estimate:
    """Return the slope of a loss along the z of a seed; all but rounding is undone.

    Args:
        steps: The tensors that train, in a fixed order.
        loss: Computes the loss from the tensors as they are.
        seed: Of z.
        epsilon: Distance to either side.
    """
    perturb(steps, seed, epsilon)
    above = loss()
    perturb(steps, seed, -2 * epsilon)
    below = loss()
    perturb(steps, seed, epsilon)
    return Estimate(seed, (above - below) / (2 * epsilon), (above + below) / 2)


def descend(steps: Iterable[Step], estimate: Estimate) -> None:
    """Go down the slope: theta <- theta - rate (g z + decay theta), in place."""
    for step, z in directions(steps, estimate.seed):
        z.mul_(estimate.gradient)
        if step.decay:
            z.add_(step.tensor, alpha=step.decay)
        step.tensor.sub_(z, alpha=step.rate)
