"""Which ranks of all adapters stay within a budget: schedule, importance and choice of AdaLoRA.

A rank is a triplet (P's column, lambda, Q's row), see `nn.adapters.svd`. Of every weight w with
gradient g, with I = |w g| and two running averages (Zhang et al., AdaLoRA, arXiv 2303.10512):

    sensitivity  I' = beta1 I' + (1 - beta1) I
    uncertainty  U  = beta2 U + (1 - beta2) |I - I'|

A weight scores s = I' U, a triplet the score of its lambda and the mean scores of its two vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from effbench.nn.adapters.svd import SVDLinear

Averages = dict[str, dict[str, torch.Tensor]]
"""`sensitivity` and `uncertainty`, each by the name of a parameter."""


@dataclass(frozen=True)
class BudgetSchedule:
    """Ranks that all adapters together may have after each step; steps count from 1."""

    first: int
    """Ranks at the start."""
    target: int
    """Ranks at the end."""
    begin: int
    """Last step at which all of them are there."""
    end: int
    """First step at which the target is met; later, the choice does not change."""
    interval: int
    """Steps from choice to choice."""

    def budget(self, step: int) -> int:
        """Return b(step): cubic from `first` down to `target` between `begin` and `end`."""
        if step >= self.end:
            return self.target
        if step <= self.begin:
            return self.first
        left = 1 - (step - self.begin) / (self.end - self.begin)
        return int((self.first - self.target) * left**3 + self.target)

    def chooses(self, step: int) -> bool:
        """Return whether the ranks that stay are chosen after this step."""
        within = self.begin < step < self.end and step % self.interval == 0
        return within or step == self.end


def no_averages() -> Averages:
    """Return averages that have seen nothing."""
    return {"sensitivity": {}, "uncertainty": {}}


@torch.no_grad()
def observe(
    layers: Mapping[str, SVDLinear], averages: Averages, beta1: float, beta2: float
) -> None:
    """Take the weights and their gradients as they are now into the averages."""
    for name, parameter in _parameters(layers):
        if parameter.grad is None:
            continue
        now = (parameter * parameter.grad).abs()
        smooth, unsure = (
            averages[kind].setdefault(name, torch.zeros_like(parameter))
            for kind in ("sensitivity", "uncertainty")
        )
        smooth.mul_(beta1).add_(now, alpha=1 - beta1)
        unsure.mul_(beta2).add_((now - smooth).abs(), alpha=1 - beta2)


def scores(layers: Mapping[str, SVDLinear], averages: Averages) -> torch.Tensor:
    """Return the score of every triplet, [layers, R]; zeros where nothing was observed."""
    weights = {
        name: averages["sensitivity"][name] * averages["uncertainty"][name]
        if name in averages["sensitivity"]
        else torch.zeros_like(parameter)
        for name, parameter in _parameters(layers)
    }
    found = []
    for name in layers:
        q, lambdas, p = (weights[f"{name}.{part}"] for part in ("lora_A", "lora_E", "lora_B"))
        found.append(lambdas + q.mean(1) + p.mean(0))
    return torch.stack(found)


def best(score: torch.Tensor, budget: int) -> torch.Tensor:
    """Return which triplets are the `budget` best ones, [layers, R] bool.

    Exactly so many: of equal ones the lower ranks stay, in all layers alike.
    """
    by_rank = score.T.flatten()
    order = by_rank.sort(descending=True, stable=True).indices
    kept = torch.zeros_like(by_rank, dtype=torch.bool)
    kept[order[:budget]] = True
    return kept.view(score.shape[1], score.shape[0]).T


def _parameters(layers: Mapping[str, SVDLinear]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for name, layer in layers.items():
        for part in ("lora_A", "lora_E", "lora_B"):
            yield f"{name}.{part}", getattr(layer, part)
