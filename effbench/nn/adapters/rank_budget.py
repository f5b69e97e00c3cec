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
from typing import Any

import torch

from effbench.api.evolution import Evolution
from effbench.api.method_types import Context
from effbench.nn.adapters.svd import SVDLinear, prune

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


class RankPruning(Evolution):
    """Weighs the ranks after each step, and prunes those beyond the budget.

    Args:
        layers: The adapters by name.
        ctx: Of the run.
        schedule: The budgets of the run.
        beta1: Weight of the past in the sensitivity.
        beta2: Weight of the past in its uncertainty.
    """

    def __init__(
        self,
        layers: Mapping[str, SVDLinear],
        ctx: Context,
        schedule: BudgetSchedule,
        beta1: float,
        beta2: float,
    ) -> None:
        self.layers, self.ctx, self.schedule = layers, ctx, schedule
        self.betas = beta1, beta2
        self.averages = no_averages()
        self.kept: dict[str, list[int]] | None = None
        """The ranks of each layer that stay, once they are chosen for good."""

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the step's gradients into account, and prune where it is time."""
        step, schedule = self.ctx.step + 1, self.schedule
        if step < schedule.end:
            observe(self.layers, self.averages, *self.betas)
        if schedule.chooses(step):
            chosen = self._best(schedule.budget(step))
            prune(self.layers, chosen)
            if step == schedule.end:
                self.kept, self.averages = chosen, no_averages()
        elif self.kept is not None:
            prune(self.layers, self.kept)

    def chosen(self) -> dict[str, list[int]]:
        """Return the ranks of each layer that stay; the best ones where none are chosen yet."""
        return self.kept or self._best(self.schedule.target)

    def _best(self, count: int) -> dict[str, list[int]]:
        """Return the ranks of each layer that are among the `count` that matter most."""
        rows = best(scores(self.layers, self.averages), count).cpu()
        return {
            name: row.nonzero().flatten().tolist()
            for name, row in zip(self.layers, rows, strict=True)
        }

    @property
    def final(self) -> bool:
        """Whether the ranks that stay are chosen for good."""
        return self.kept is not None

    def metrics(self) -> dict[str, float]:
        """Return the ranks that all layers together may have."""
        return {"rank_budget": float(self.schedule.budget(self.ctx.step + 1))}

    def state_dict(self) -> dict[str, Any]:
        """Return the running averages, and the ranks that stay."""
        return {"averages": self.averages, "kept": self.kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self.averages, self.kept = state["averages"], state["kept"]


def _parameters(layers: Mapping[str, SVDLinear]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for name, layer in layers.items():
        for part in ("lora_A", "lora_E", "lora_B"):
            yield f"{name}.{part}", getattr(layer, part)
