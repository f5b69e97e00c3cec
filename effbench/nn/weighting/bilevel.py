"""Shares of groups in a training loss, learnt so that what it leads to is good on validation.

With lambda = softmax(p / tau) over G groups and l_g the mean loss of a group, the penalty form of
min_lambda L_val(w*(lambda)), w* = argmin_w sum_g lambda_g l_g(w), is

    min_{lambda, w} max_u  L_val(w) + alpha [ sum_g lambda_g l_g(w) - sum_g lambda_g l_g(u) ]

    u <- u - eta_u grad sum_g lambda_g l_g(u)
    w <- w - eta_w [ grad L_val(w) + alpha grad sum_g lambda_g l_g(w) ] / (1 + alpha)
    p <- p - eta_p alpha J (l(w) - l(u))           J = (diag(lambda) - lambda lambda^T) / tau

w is pulled towards validation, u is not: a group that is worse under w than under u is in conflict
with validation and loses weight. The first-order penalty is that of ScaleBiO (arXiv 2406.19976);
that DORM solves it so is inferred from its code.

Our choices: running means of the groups' losses over mini-batches; the difference over its own
running size, so that eta_p has no unit of loss; floor and entropy, both off by default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from effbench.nn.weighting import linear


@dataclass(frozen=True)
class Outer:
    """How p moves."""

    rate: float = 0.5
    """eta_p, on differences of size one."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """Adam's normalisation leaves nothing of the size of alpha."""
    tau: float = 1.0
    """Temperature."""
    floor: float = 0.0
    """Part of the shares that is dealt out evenly: lambda_g >= floor / G."""
    entropy: float = 0.0
    """Weight of a bonus for the entropy of softmax(p / tau), over alpha."""
    smoothing: float = 0.9
    """Decay of running means."""

    def shares(self, logits: torch.Tensor) -> torch.Tensor:
        """Return lambda [G], positive with sum 1."""
        mixed: torch.Tensor = (1 - self.floor) * (logits / self.tau).softmax(0)
        return mixed + self.floor / len(logits)

    def gradient(self, logits: torch.Tensor, difference: torch.Tensor) -> torch.Tensor:
        """Return d/dp of sum_g lambda_g d_g - entropy H(softmax(p / tau)), [G] with sum 0.

        Args:
            logits: p [G].
            difference: d = l(w) - l(u), [G].
        """
        soft = (logits / self.tau).softmax(0)
        slope = (1 - self.floor) * difference
        if self.entropy:
            slope = slope + self.entropy * soft.log()
        found: torch.Tensor = soft * (slope - soft @ slope) / self.tau
        return found


class Mixture:
    """p, and what a run has seen of its groups.

    Args:
        logits: First p, [G].
        outer: How it moves.
    """

    def __init__(self, logits: torch.Tensor, outer: Outer) -> None:
        self.outer = outer
        self.logits = logits.detach().double().clone()
        kind = torch.optim.Adam if outer.optimizer == "adam" else torch.optim.SGD
        self.optimizer: torch.optim.Optimizer = kind([self.logits], lr=outer.rate)
        self.losses = torch.zeros(2, len(logits), dtype=torch.float64)
        """Running means of l(w) and l(u), [2, G]."""
        self.seen = torch.zeros(len(logits), dtype=torch.bool)
        self.size = torch.zeros((), dtype=torch.float64)
        """Running mean square of the difference."""

    @property
    def shares(self) -> torch.Tensor:
        """lambda, [G] float64."""
        return self.outer.shares(self.logits)

    def observe(self, groups: torch.Tensor, upper: torch.Tensor, lower: torch.Tensor) -> None:
        """Take in a batch; groups that it lacks stay as they are.

        Args:
            groups: Of each pair, [B].
            upper: Its loss under w, [B].
            lower: And under u, [B].
        """
        both = torch.stack([upper, lower]).detach().double().cpu()
        counts = groups.bincount(minlength=len(self.logits))
        means = torch.zeros_like(self.losses).index_add(1, groups, both) / counts.clamp(min=1)
        keep = torch.where(self.seen, self.outer.smoothing, 0.0)
        self.losses = torch.where(counts > 0, keep * self.losses + (1 - keep) * means, self.losses)
        self.seen |= counts > 0

    def difference(self) -> torch.Tensor:
        """Return l(w) - l(u) over its running size, [G]; 0 where a group was never seen."""
        raw = torch.where(self.seen, self.losses[0] - self.losses[1], 0.0)
        spread = (raw - self.shares @ raw).square()[self.seen].mean() if self.seen.any() else 0.0
        decay = self.outer.smoothing if self.size else 0.0
        self.size = decay * self.size + (1 - decay) * spread
        return raw / self.size.sqrt() if self.size else raw

    def move(self, penalty: float) -> None:
        """Make a step of p along what was observed; with `penalty` alpha = 0 it makes none."""
        slope = self.outer.gradient(self.logits, self.difference())
        self.logits.grad = penalty * slope
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Return p, the running means and the optimiser's state."""
        return {
            "logits": self.logits,
            "losses": self.losses,
            "seen": self.seen,
            "size": self.size,
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`, bit for bit."""
        with torch.no_grad():
            self.logits.copy_(state["logits"].cpu())
        self.losses, self.seen, self.size = (state[k].cpu() for k in ("losses", "seen", "size"))
        self.optimizer.load_state_dict(state["optimizer"])


@dataclass(frozen=True)
class Schedule:
    """alpha over a run, and when p is frozen."""

    penalty: float = 10.0
    """alpha at first."""
    growth: float = 1.0
    """Factor of alpha from one round to the next, c."""
    rounds: int = 1
    """Rounds, of equal length."""
    hold: float = 0.1
    """Share of the steps at the start in which u and w learn and p stays."""

    def penalty_at(self, step: int, steps: int) -> float:
        """Return alpha at a step (from 0) of so many."""
        return self.penalty * self.growth ** (self.rounds * step // max(1, steps))

    def moves(self, step: int, steps: int) -> bool:
        """Whether p moves at a step."""
        return step >= self.hold * steps


def search(
    states: torch.Tensor,
    groups: torch.Tensor,
    validation: torch.Tensor,
    mixture: Mixture,
    schedule: Schedule,
    steps: int,
    rate: float,
) -> torch.Tensor:
    """Move a mixture by two linear heads that see all pairs in each step; return w [d].

    Args:
        states: Training pairs [n, d], `linear.scaled`.
        groups: Of each, [n].
        validation: Pairs [m, d] of the validation set, scaled alike.
        mixture: Its p moves, in place.
        schedule: alpha, and when p is frozen.
        steps: Of both heads.
        rate: eta_u = eta_w.
    """
    sizes = groups.bincount(minlength=len(mixture.logits))
    upper = states.new_zeros(states.shape[1], 1)
    lower, even = upper.clone(), torch.full_like(validation[:, :1], 1 / len(validation))
    for step in range(steps):
        alpha = schedule.penalty_at(step, steps)
        own = (mixture.shares / sizes)[groups].to(states)[:, None]
        below = linear.gradient(states, lower, own)
        above = linear.gradient(validation, upper, even)
        above = (above + alpha * linear.gradient(states, upper, own)) / (1 + alpha)
        mixture.observe(
            groups,
            linear.losses(states, upper[:, 0]),
            linear.losses(states, lower[:, 0]),
        )
        lower -= rate * (below + linear.RIDGE * lower)
        upper -= rate * (above + linear.RIDGE * upper)
        if schedule.moves(step, steps):
            mixture.move(alpha)
    return upper[:, 0]
