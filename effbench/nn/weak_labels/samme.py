"""Boosting of K classes: votes of classifiers and weights of instances.

Zhu, Zou, Rosset and Hastie, Multi-class AdaBoost, Statistics and Its Interface 2, 2009 (SAMME):

    err   = sum_i w_i [m(x_i) != y_i] / sum_i w_i
    alpha = log((1 - err) / err) + log(K - 1)
    w_i  <- w_i exp(alpha [m(x_i) != y_i]), over their sum

After a step the mass on what was wrong is (K - 1) / K, whatever err was.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

SMALLEST_ERROR = 1e-6
"""Errors are kept so far from 0 and 1, so that votes are finite."""

Vote = Literal["probability", "one_hot", "last"]
"""What classifiers give to a vote: probabilities, or their best class; or the last one alone."""


def weighted_error(wrong: torch.Tensor, weights: torch.Tensor) -> float:
    """Return err, away from 0 and 1.

    Args:
        wrong: Whether each instance is misclassified, [N] bool.
        weights: Of the instances, [N], not negative.
    """
    share = float((weights * wrong).sum() / weights.sum())
    return min(max(share, SMALLEST_ERROR), 1 - SMALLEST_ERROR)


def vote_of(error: float, classes: int) -> float:
    """Return alpha: 0 for a classifier as good as guessing, less for a worse one."""
    return math.log((1 - error) / error) + math.log(classes - 1)


def reweighted(weights: torch.Tensor, wrong: torch.Tensor, vote: float) -> torch.Tensor:
    """Return the weights after a classifier with this vote, [N], their sum 1."""
    raised = weights * torch.exp(vote * wrong.to(weights.dtype))
    return raised / raised.sum()


def hardest(weights: torch.Tensor, confidence: torch.Tensor, count: int) -> list[int]:
    """Return the places of the largest weights; ties go to the least confident, then to the first.

    Args:
        weights: Of the instances, [N].
        confidence: Largest probability that the ensemble gives to a class, [N].
        count: Most places.
    """
    keys = list(zip((-weights).tolist(), confidence.tolist(), strict=True))
    return sorted(range(len(keys)), key=lambda i: (*keys[i], i))[:count]


def combined(probabilities: torch.Tensor, votes: torch.Tensor, how: Vote) -> torch.Tensor:
    """Return the ensemble's probabilities, [N, K].

    Classifiers whose vote is not positive are not in it; where none is, the first one decides.

    Args:
        probabilities: Of each classifier, [T, N, K].
        votes: alpha of each classifier, [T].
        how: What is added up.
    """
    votes = votes.clamp(min=0)
    if not votes.any():
        return probabilities[0]
    if how == "last":
        return probabilities[int(votes.nonzero().max())]
    if how == "one_hot":
        best = probabilities.argmax(-1)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, best[..., None], 1.0)
    return torch.einsum("t,tnk->nk", votes / votes.sum(), probabilities)
