"""KL divergence with the leading terms of its series perturbed (PTLoss), and what is beside it.

Zhang et al., Knowledge Distillation with Perturbed Loss: From a Vanilla Teacher to a Proxy Teacher,
KDD 2024, arXiv 2305.05010. With p_t and p_s the teacher's and the student's distributions over C
classes, since -log p = sum_{m >= 1} (1 - p)^m / m:

    KL(p_t || p_s)  = sum_c p_t log p_t + sum_c p_t sum_{m >= 1} (1 - p_s)^m / m
    l(p_t, p_s)     = KL(p_t || p_s) + sum_c p_t sum_{m = 1}^{M} eps_{g(c), m} (1 - p_s)^m

The series is never cut: the divergence is exact and the perturbation is added. Our choices: classes
share coefficients in groups g, so that a vocabulary has a few of them; the gradient of the second
term is written out, so that nothing but the two distributions is kept for it.

Logarithms of probabilities come in, float32 or more; a class that is not there has -inf in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch.nn.utils.rnn import pad_sequence

Groups = Literal["all", "rank", "class"]
"""Classes that share coefficients: all of them, those of similar rank, or none."""

RANKS = (1, 10)
"""Ranks by the teacher where a group ends: the first class, those up to the tenth, the rest."""


def groups_of(log_t: torch.Tensor, by: Groups) -> torch.Tensor:
    """Return the group of each class, int32: [1, 1], [1, C], or [N, C] where it is by rank.

    Args:
        log_t: The teacher's log-probabilities, [N, C].
        by: What classes of a group have in common.
    """
    if by == "all":
        return torch.zeros(1, 1, dtype=torch.int32, device=log_t.device)
    if by == "class":
        places = torch.arange(log_t.shape[-1], dtype=torch.int32, device=log_t.device)
        return places[None]
    first, near = RANKS
    best = log_t.topk(min(near, log_t.shape[-1]), dim=-1).indices
    groups = torch.full_like(log_t, 2, dtype=torch.int32)
    return groups.scatter_(-1, best, 1).scatter_(-1, best[..., :first], 0)


# -- polynomials in u = 1 - p: coefficients [..., G, powers from 0 on] -----------------------------


def polynomial(eps: torch.Tensor) -> torch.Tensor:
    """Return sum_m eps_m u^m, of coefficients [..., G, M]."""
    return torch.nn.functional.pad(eps, (1, 0))


def derivative(coefficients: torch.Tensor) -> torch.Tensor:
    """Return the derivative by u."""
    powers = torch.arange(coefficients.shape[-1], device=coefficients.device)
    return (powers * coefficients)[..., 1:]


def horner(coefficients: torch.Tensor, groups: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Return the value at each u [..., N, C], by the coefficients of its group; see `groups_of`."""
    total = torch.zeros_like(u)
    for power in reversed(range(coefficients.shape[-1])):
        total.mul_(u).add_(coefficients[..., power][..., groups])
    return total


# -- losses, [N] each ------------------------------------------------------------------------------


def kl(log_t: torch.Tensor, log_s: torch.Tensor) -> torch.Tensor:
    """Return KL(p_t || p_s) of distributions [N, C], in nats; the gradient goes to the student."""
    apart = (log_t - log_s).masked_fill(log_t == -torch.inf, 0)
    return (log_t.exp() * apart).sum(-1)


def perturbed_kl(
    log_t: torch.Tensor, log_s: torch.Tensor, eps: torch.Tensor, groups: torch.Tensor
) -> torch.Tensor:
    """Return PTLoss of distributions [N, C]; at eps = 0 it is `kl`, bit for bit.

    Args:
        log_t: The teacher's log-probabilities.
        log_s: The student's.
        eps: Coefficients [G, M].
        groups: Of each class; see `groups_of`.
    """
    moved: torch.Tensor = _Perturbation.apply(log_s, log_t.exp(), eps.to(log_s.dtype), groups)
    return kl(log_t, log_s) + moved


class _Perturbation(torch.autograd.Function):
    """sum_c p_t sum_m eps_m u^m with u = 1 - p_s, and its gradient by log p_s."""

    @staticmethod
    def forward(
        ctx: Any, log_s: torch.Tensor, p_t: torch.Tensor, eps: torch.Tensor, groups: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(log_s, p_t, eps, groups)
        u = -torch.expm1(log_s)
        return (p_t * horner(polynomial(eps), groups, u)).sum(-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        log_s, p_t, eps, groups = ctx.saved_tensors
        slope = horner(derivative(polynomial(eps)), groups, -torch.expm1(log_s))
        return -gradient[..., None] * p_t * log_s.exp() * slope, None, None, None


def reverse_kl(log_t: torch.Tensor, log_s: torch.Tensor) -> torch.Tensor:
    """Return KL(p_s || p_t) of distributions [N, C], in nats."""
    return kl(log_s, log_t)


def focal(log_t: torch.Tensor, log_s: torch.Tensor, gamma: float) -> torch.Tensor:
    """Return sum_c p_t (1 - p_s)^gamma (-log p_s) of distributions [N, C].

    Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, arXiv 1708.02002, with the
    teacher's distribution in the place of the label.
    """
    u = (-torch.expm1(log_s)).clamp(min=torch.finfo(log_s.dtype).tiny)
    surprise = -log_s.masked_fill(log_s == -torch.inf, 0)
    return (log_t.exp() * u**gamma * surprise).sum(-1)


# -- distributions ---------------------------------------------------------------------------------


def padded(scores: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Return scores [B] of examples' answers, side by side, as [E, C]; -inf where there is none.

    Args:
        scores: Of all answers.
        sizes: Answers of each example.
    """
    return pad_sequence(list(scores.split(list(sizes))), True, -torch.inf)


def smoothed(log_p: torch.Tensor, share: float) -> torch.Tensor:
    """Return (1 - share) p + share / C as log-probabilities [N, C]."""
    if not share:
        return log_p
    there = log_p > -torch.inf
    even = there.sum(-1, keepdim=True)
    mixed = ((1 - share) * log_p.exp() + share / even).log()
    return torch.where(there, mixed, log_p)
