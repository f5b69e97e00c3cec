"""Losses over sequences of which some are preferred to others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import softplus


def bradley_terry(scores: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """Return -log sigmoid(s_best - s_other) of each example, a mean over its others, [E].

    Bradley and Terry, Rank Analysis of Incomplete Block Designs, Biometrika 39, 1952.

    Args:
        scores: Of each sequence, [B]; the preferred one of an example is its first.
        sizes: Sequences of each example, at least two.
    """
    units = scores.split(list(sizes))
    return torch.stack([softplus(unit[1:] - unit[0]).mean() for unit in units])
