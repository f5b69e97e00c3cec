"""Adapters whose ranks grow while they train, and parameters replaced under an optimiser.

How much an adapter matters: the mean over its ranks k of |sum_l A_kl dL/dA_kl|. The same sums over
B are equal, rank by rank, for both are the derivative of the loss in the size of rank k. The upper
half of the adapters shares what may be added; new rows of A are Gaussian and new columns of B zero,
so that growing changes no output. Source: Zhao et al., APT, arXiv 2401.12200, and its code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from effbench.nn.adapters.lowrank import (
    LowRankLinear,
    RankControl,
    adapter,
    low_rank_layers,
    merged_weight,
)
from effbench.nn.llama.surgery import replace_module
from effbench.nn.llama.swap import Cut, Replace
from effbench.util.errors import UserError

Moments = Literal["reset", "keep"]


def rank_sums(layer: LowRankLinear) -> torch.Tensor:
    """Return |sum_l A_kl dL/dA_kl| of each rank k, [r]; zeros without a gradient."""
    a = layer.lora_A
    if a.grad is None:
        return torch.zeros(len(a), device=a.device)
    return (a.detach() * a.grad).sum(1).abs()


def adapter_parameters(model: nn.Module) -> int:
    """Return the parameters of all adapters."""
    return sum(x.lora_A.numel() + x.lora_B.numel() for _, x in low_rank_layers(model))


def grown_ranks(
    ranks: Mapping[str, int],
    widths: Mapping[str, int],
    importance: Mapping[str, float],
    target: int,
    most: int,
) -> dict[str, int]:
    """Return the new ranks of the adapters that grow.

    Those below `most` are sorted by importance, and the upper half gets what is missing to the
    target, each in proportion to its size: r' = floor(r ((target - now) / size of that half + 1)).

    Args:
        ranks: Rank of each adapter.
        widths: d_in + d_out of each, its parameters per rank.
        importance: Of each.
        target: Parameters of all adapters after growing, at most.
        most: Highest rank.
    """
    open_ = sorted((n for n in ranks if ranks[n] < most), key=lambda n: -importance[n])
    top = open_[: math.ceil(len(open_) / 2)]
    now = sum(ranks[n] * widths[n] for n in ranks)
    size = sum(ranks[n] * widths[n] for n in top)
    if not size or target <= now:
        return {}
    rate = (target - now) / size + 1
    return {n: min(most, int(ranks[n] * rate)) for n in top if int(ranks[n] * rate) > ranks[n]}


def grow(
    layer: LowRankLinear, rank: int, generator: torch.Generator, replace: Replace | None = None
) -> None:
    """Raise an adapter's rank in place, its scale and its output unchanged.

    Args:
        layer: The adapter.
        rank: Not below its rank.
        generator: CPU generator of the new rows of A, which have the variance of the first ones.
        replace: Told of each parameter that is replaced.
    """
    old_a, old_b = layer.lora_A, layer.lora_B
    rows = rank - len(old_a)
    drawn = torch.randn(rows, layer.in_features, generator=generator)
    drawn = (drawn / math.sqrt(3 * layer.in_features)).to(old_a)

    def longer(t: torch.Tensor) -> torch.Tensor:
        return torch.cat([t, t.new_zeros(rows, t.shape[1])])

    def wider(t: torch.Tensor) -> torch.Tensor:
        return torch.cat([t, t.new_zeros(t.shape[0], rows)], dim=1)

    new_a, new_b = nn.Parameter(longer(old_a.detach())), nn.Parameter(wider(old_b.detach()))
    with torch.no_grad():
        new_a[len(old_a) :] = drawn
    set_factors(layer, new_a, new_b)
    if replace is not None:
        replace(old_a, new_a, longer)
        replace(old_b, new_b, wider)


def set_factors(layer: LowRankLinear, a: nn.Parameter, b: nn.Parameter) -> None:
    """Give an adapter other factors of any rank, with the scale that it has."""
    scale = layer.alpha / layer.control.active
    layer.lora_A, layer.lora_B = a, b
    layer.control, layer.alpha = RankControl(len(a)), scale * len(a)


def set_rank(layer: LowRankLinear, rank: int) -> None:
    """Give an adapter zero factors of a rank, for a checkpoint to fill."""
    a, b = layer.lora_A, layer.lora_B
    set_factors(
        layer,
        nn.Parameter(a.new_zeros(rank, a.shape[1])),
        nn.Parameter(b.new_zeros(b.shape[0], rank)),
    )


def adapt(model: nn.Module, names: Iterable[str], rank: int, scale: float, seed: int) -> None:
    """Put an adapter beside each named linear; its rank is its own, for it may grow.

    Args:
        model: Frozen.
        names: Qualified names of linears.
        rank: Of each adapter at first.
        scale: Of each, the same at every rank.
        seed: The run's.
    """
    for name in list(names):
        linear, control = model.get_submodule(name), RankControl(rank)
        replace_module(model, name, adapter(linear, name, control, scale * rank, seed))


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Put a dense linear, with the update in its weight, where each adapter is."""
    for name, layer in list(low_rank_layers(model)):
        linear: Any = layer.base
        linear.weight.data = merged_weight(layer)
        replace_module(model, name, linear)
    return model


class Growth:
    """Lets the more important half of a model's adapters grow at some steps of its training.

    Args:
        model: Carries the adapters.
        steps: How many times their first size all adapters together may have, by growth step; none
            where they do not grow.
        most: Highest rank.
        beta: Weight of the past in the running importance.
        generator: CPU generator of the new rows of A.
    """

    def __init__(
        self,
        model: nn.Module,
        steps: Mapping[int, float],
        most: int,
        beta: float,
        generator: torch.Generator,
    ) -> None:
        self.model, self.steps, self.most = model, steps, most
        self.beta, self.generator = beta, generator
        self.first = adapter_parameters(model)
        """Parameters of the adapters before they grow."""
        self.importance: dict[str, float] = {}
        """Running importance of each adapter."""
        self.ranks: dict[str, int] = {}
        """Rank of each adapter that has grown."""

    def after_backward(self, step: int, replace: Replace) -> None:
        """Take the step's gradients into the importance, and grow where it is time.

        Args:
            step: Of the run, from 0.
            replace: Told of each parameter that is replaced.
        """
        if not self.steps:
            return
        for name, layer in low_rank_layers(self.model):
            now = float(rank_sums(layer).mean())
            before = self.importance.get(name, 0.0)
            self.importance[name] = self.beta * before + (1 - self.beta) * now
        if step in self.steps:
            self.grow_to(int(self.steps[step] * self.first), replace)

    def grow_to(self, target: int, replace: Replace) -> None:
        """Let the more important half grow until all adapters have `target` parameters at most."""
        layers = dict(low_rank_layers(self.model))
        ranks = {name: layer.control.max_rank for name, layer in layers.items()}
        widths = {name: layer.in_features + layer.out_features for name, layer in layers.items()}
        larger = grown_ranks(ranks, widths, self.importance, target, self.most)
        for name, rank in larger.items():
            grow(layers[name], rank, self.generator, replace)
        self.ranks |= larger

    def goes_on(self, step: int) -> bool:
        """Whether a growth step is still to come."""
        return step < max(self.steps, default=step)

    def state_dict(self) -> dict[str, Any]:
        """Return what was found and done so far."""
        return {"importance": self.importance, "ranks": self.ranks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back, and give the prepared adapters the ranks that they had."""
        self.importance, self.ranks = state["importance"], state["ranks"]
        for name, layer in low_rank_layers(self.model):
            if name in self.ranks:
                set_rank(layer, self.ranks[name])


class OptimizerRemap:
    """Replaces trained parameters under an optimiser; a `Replace`.

    Args:
        optimizer: Of torch, accelerate or bitsandbytes.
        moments: `reset` starts the moments of a replaced parameter anew; `keep` cuts them as the
            parameter was cut, with zeros for what is new.
    """

    def __init__(self, optimizer: Any, moments: Moments) -> None:
        self.optimizer = optimizer
        self.moments = moments

    def __call__(self, old: nn.Parameter, new: nn.Parameter, cut: Cut) -> None:
        """Let the optimiser train `new` in the place of `old`; the gradient is cut along."""
        for group in self.optimizer.param_groups:
            group["params"] = [new if p is old else p for p in group["params"]]
        state = self.optimizer.state.pop(old, None)
        if state and self.moments == "keep":
            self.optimizer.state[new] = {k: self._cut(v, old, cut) for k, v in state.items()}
        if old.grad is not None:
            new.grad = cut(old.grad)

    def _cut(self, value: Any, old: nn.Parameter, cut: Cut) -> Any:
        if not isinstance(value, torch.Tensor) or value.shape != old.shape:
            return value
        if not value.is_floating_point():
            raise UserError(
                "method.moments=keep cannot cut an 8-bit optimiser's moments.",
                "Set train.optimizer=adamw, or method.moments=reset.",
            )
        return cut(value)


def drop(optimizer: Any, parameters: Iterable[nn.Parameter]) -> None:
    """Let an optimiser forget parameters that are gone; the moments of all others stay."""
    gone = {id(p) for p in parameters}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in gone:
                optimizer.state.pop(parameter, None)
        group["params"] = [p for p in group["params"] if id(p) not in gone]
