"""The proxy teacher: the student that a perturbed loss asks for, found without a student.

    p_px = argmin over the simplex of  sum_c n_c p_t [ -log p + sum_m eps_m (1 - p)^m ]

with p_t and p of each class c, and n_c classes that are alike (1, but for the tail of a vocabulary
held as one entry). It is stationary where all classes with p_t > 0 have one value of

    g(p) = p_t [ 1 / p + sum_m m eps_m (1 - p)^(m - 1) ]

The paper (arXiv 2305.05010) names no solver. Ours is Newton's method under the equality constraint
(Boyd and Vandenberghe, Convex Optimization, section 10.2), whose Hessian is diagonal here: feasible
steps from p_t, cut short of the boundary and halved until the objective falls, in float64 and for
all examples and coefficients at once. It needs the objective to be convex: see `convexity`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from effbench.nn.losses.perturbed import derivative, horner, polynomial

MOST_STEPS = 200
MOST_HALVINGS = 40
TO_BOUNDARY = 0.95
"""Share of the way to p = 0 that one step may go."""
CLOSE = 1e-9
"""Relative change at which the step that was just made is the last: errors are then its square."""


def proxy(
    p_t: torch.Tensor,
    eps: torch.Tensor,
    groups: torch.Tensor,
    counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the proxy's distributions, [..., N, C] float64; they add up to 1.

    Args:
        p_t: The teacher's, [N, C]; a class with 0 keeps 0.
        eps: Coefficients [..., G, M], within the bound of `convexity.used`.
        groups: Of each class, [N or 1, C or 1].
        counts: Classes that an entry stands for, [C]; None is one each.
    """
    p_t, eps = p_t.double(), eps.double()
    counts = torch.ones_like(p_t[0]) if counts is None else counts.double()
    problem = _Problem(p_t, polynomial(eps), groups, counts)
    p = p_t.expand(*eps.shape[:-2], *p_t.shape)
    for _ in range(MOST_STEPS):
        step = problem.newton(p)
        p = problem.moved(p, step)
        if bool((step.abs() <= CLOSE * p).all()):
            break
    return p


@dataclass(frozen=True)
class _Problem:
    """The objective, without the part that does not depend on p; see the module's text."""

    p_t: torch.Tensor
    perturbation: torch.Tensor
    groups: torch.Tensor
    counts: torch.Tensor

    def value(self, p: torch.Tensor) -> torch.Tensor:
        """Return the objective of each example, [..., N]."""
        moved = self.p_t * horner(self.perturbation, self.groups, 1 - p)
        return (self.counts * (moved - torch.xlogy(self.p_t, p))).sum(-1)

    def newton(self, p: torch.Tensor) -> torch.Tensor:
        """Return the step to the minimum of the quadratic model on the plane of sum 1."""
        there = self.p_t > 0
        safe = torch.where(there, p, 1.0)
        slope, u = derivative(self.perturbation), 1 - p
        g = self.p_t * (1 / safe + horner(slope, self.groups, u))
        # At the edge of the bound the curvature may vanish at one p.
        bend = (1 + safe.square() * horner(derivative(slope), self.groups, u)).clamp(min=1e-9)
        inverse = torch.where(there, safe / self.p_t * safe / bend, 0.0)
        missing = 1 - (self.counts * p).sum(-1, keepdim=True)
        weight = self.counts * inverse
        level = ((weight * g).sum(-1, keepdim=True) - missing) / weight.sum(-1, keepdim=True)
        return inverse * (g - level)

    def moved(self, p: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """Return the point after as much of a step as lowers the objective."""
        shrink = torch.where(p > 0, -step / p, 0.0).amax(-1, keepdim=True)
        share = (TO_BOUNDARY / shrink.clamp(min=TO_BOUNDARY)).clamp(max=1)
        before = self.value(p)
        room = 1e-11 * (1 + before.abs())  # rounding
        for _ in range(MOST_HALVINGS):
            worse = self.value(p + share * step) > before + room
            if not bool(worse.any()):
                break
            share = torch.where(worse[..., None], share / 2, share)
        return p + share * step
