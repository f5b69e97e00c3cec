"""Losses over sequences of which some are preferred to others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import softplus

from effbench.api.examples import CHOSEN, IGNORED, REJECTED


def bradley_terry(scores: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Return -log sigmoid(s_best - s_other) of each example, a mean over its others, [E].

    Bradley and Terry, Rank Analysis of Incomplete Block Designs, Biometrika 39, 1952.

    Args:
        scores: Of each sequence, [B]; the preferred one of an example is its first.
        sizes: Sequences of each example, at least two.
    """
    units = scores.split(list(sizes))
    return torch.stack([softplus(unit[1:] - unit[0]).mean() for unit in units])


def conservative(scores: torch.Tensor, sizes: Sequence[int], swapped: float) -> torch.Tensor:
    """Return (1 - e) l(s) + e l(-s), the loss under labels of which a share e is wrong, [E].

    Mitchell, A note on DPO with noisy preferences (cDPO), 2023; it is label smoothing.

    Args:
        scores: As of `bradley_terry`, l.
        sizes: Likewise.
        swapped: e, below 1/2.
    """
    right, wrong = bradley_terry(scores, sizes), bradley_terry(-scores, sizes)
    return (1 - swapped) * right + swapped * wrong


def unbiased(scores: torch.Tensor, sizes: Sequence[int], swapped: float) -> torch.Tensor:
    """Return ((1 - e) l(s) - e l(-s)) / (1 - 2 e), whose mean over noise is l of true labels, [E].

    Chowdhury et al., Provably Robust DPO: Aligning Language Models with Noisy Feedback, ICML 2024,
    arXiv 2403.00409. It can be negative. Arguments as of `conservative`.
    """
    right, wrong = bradley_terry(scores, sizes), bradley_terry(-scores, sizes)
    return ((1 - swapped) * right - swapped * wrong) / (1 - 2 * swapped)


def rated(scores: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Return the squared errors of scores against the ratings that pairs stand for, means, [E]."""
    wanted = torch.full_like(scores, REJECTED)
    starts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
    wanted[starts.to(scores.device)] = CHOSEN
    return torch.stack([x.mean() for x in (scores - wanted).square().split(list(sizes))])


def regressed(outputs: torch.Tensor, ratings: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Return the squared errors of what was rated, a mean over all ratings of an example, [E].

    Args:
        outputs: Of each sequence for each attribute, [B, A].
        ratings: [B, A], `IGNORED` where there is none; an example has at least one.
        sizes: Sequences of each example.
    """
    known = ratings != IGNORED
    errors = torch.where(known, outputs - ratings, 0.0).square()
    parts = zip(errors.split(list(sizes)), known.split(list(sizes)), strict=True)
    return torch.stack([error.sum() / rated.sum() for error, rated in parts])
