"""Linear reward heads on states that stay: fitted many at once, and scored out of fold.

A pair is x = h(preferred) - h(other), [d], so that a head's margin is w . x and the loss of
Bradley and Terry is log(1 + exp(-w . x)). Everything is full-batch gradient descent from zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import softplus

RIDGE = 1e-3
"""Weight of |w|^2 / 2 in the loss of a head."""
PART = 0.7
"""Share of the pairs outside its fold that a proxy is trained on."""


def scaled(pairs: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    """Return pairs [n, d] in float32, over the root mean square length of those in `like`."""
    length = (pairs if like is None else like).float().square().sum(1).mean().sqrt()
    return pairs.float() / length.clamp(min=1e-12)


def losses(pairs: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Return the loss of each pair [n, d] under a head [d], [n]."""
    return softplus(-(pairs @ head))


def gradient(
    pairs: torch.Tensor,
    heads: torch.Tensor,
    weights: torch.Tensor,
    targets: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the gradients of K weighted sums of losses, [d, K].

    Args:
        pairs: [n, d].
        heads: [d, K].
        weights: Of each pair for each head, [n, K].
        targets: Where given, [n], the losses are (w . x - target)^2 / 2.
    """
    if targets is not None:
        return pairs.T @ (weights * (pairs @ heads - targets[:, None]))
    return -pairs.T @ (weights * torch.sigmoid(-(pairs @ heads)))


def fit(
    pairs: torch.Tensor,
    weights: torch.Tensor,
    steps: int,
    rate: float,
    targets: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return heads [d, K] that minimise the weighted mean losses of pairs.

    Args:
        pairs: [n, d], `scaled`.
        weights: Of each pair for each head, [n, K]; only their proportions matter.
        steps: Of gradient descent.
        rate: Its step size; below 8, with targets below 2, the loss falls in each.
        targets: As of `gradient`.
    """
    share = weights / weights.sum(0).clamp(min=1e-12)
    heads = pairs.new_zeros(pairs.shape[1], weights.shape[1])
    for _ in range(steps):
        heads -= rate * (gradient(pairs, heads, share, targets) + RIDGE * heads)
    return heads


def folds_of(names: Sequence[object], folds: int, generator: torch.Generator) -> torch.Tensor:
    """Return a fold for each pair, [n], by lot; pairs of one name are in one fold."""
    different = list(dict.fromkeys(names))
    lots = torch.randperm(len(different), generator=generator) % folds
    place = dict(zip(different, lots.tolist(), strict=True))
    return torch.tensor([place[name] for name in names])


def out_of_fold(
    pairs: torch.Tensor,
    folds: torch.Tensor,
    proxies: int,
    steps: int,
    rate: float,
    generator: torch.Generator,
    targets: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return margins [n, E], each of a head that was trained on a part of the other folds.

    With targets they are predictions.

    Args:
        pairs: [n, d], `scaled`.
        folds: Of each pair, [n].
        proxies: E.
        steps: Of each head.
        rate: Step size.
        generator: Draws the parts.
        targets: As of `gradient`; where one is NaN no head is trained on it.
    """
    count = int(folds.max()) + 1
    outside = folds[:, None] != torch.arange(count)
    if targets is not None:
        outside &= ~targets.isnan()[:, None]
        targets = targets.nan_to_num()
    found = []
    for _ in range(proxies):
        part = torch.rand(len(pairs), generator=generator) < PART
        masks = (outside & part[:, None]).to(pairs)
        margins = pairs @ fit(pairs, masks, steps, rate, targets)
        found.append(margins.gather(1, folds[:, None].to(pairs.device)))
    return torch.cat(found, dim=1)
