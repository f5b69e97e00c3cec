"""Steps along random directions, from the loss on either side of the parameters.

    g = (L(theta + eps z) - L(theta - eps z)) / (2 eps)         a scalar, z ~ N(0, I) of a seed
    theta <- theta - lr (g z + decay theta)

z is drawn anew whenever it is needed, tensor by tensor, and never stored. Source: Malladi et al.,
Fine-Tuning Language Models with Just Forward Passes, NeurIPS 2023, arXiv 2305.17333.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from effbench.api.evolution import Evolution

MOST_SEED = 2**31 - 1


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


def draw_seeds(count: int, generator: torch.Generator) -> list[int]:
    """Return the seeds of so many directions, drawn from a CPU generator."""
    seeds: list[int] = torch.randint(MOST_SEED, (count,), generator=generator).tolist()
    return seeds


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


def estimate(
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
