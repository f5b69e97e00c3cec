"""A teacher's distributions on examples whose label is known, and how good distributions are there.

    Brier score  = || p - onehot(y) ||_2^2
    NLL          = -log p(y)                         nats

The mean of the first is the squared L2 distance to the truth, and a constant that p has no part in.

A vocabulary is held as its most likely entries and one more, whose tokens share the rest evenly
(our choice): C is then small, and `counts` says how many tokens each entry stands for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import pad

from effbench.nn.losses.perturbed import Groups, groups_of
from effbench.nn.losses.proxy import proxy


@dataclass(frozen=True)
class Labelled:
    """Distributions of N examples over C entries."""

    log_t: torch.Tensor
    """The teacher's log-probabilities of one class of each entry, [N, C] float64."""
    labels: torch.Tensor
    """The right entry of each example, [N] int64."""
    counts: torch.Tensor
    """Classes that an entry stands for, [C] float64."""
    rows: torch.Tensor
    """Which row of data each example is of, [N] int64: those of one row are not independent."""

    def only(self, chosen: torch.Tensor) -> Labelled:
        """Return some of the examples, by a mask [N]."""
        return replace(
            self, log_t=self.log_t[chosen], labels=self.labels[chosen], rows=self.rows[chosen]
        )

    def brier(self, p: torch.Tensor) -> torch.Tensor:
        """Return the Brier score of distributions [..., N, C], one for each example [..., N]."""
        right = self.labels.expand(p.shape[:-1])[..., None]
        return (self.counts * p.square()).sum(-1) - 2 * p.gather(-1, right)[..., 0] + 1

    def nll(self, scores: torch.Tensor) -> torch.Tensor:
        """Return -log p of the right class, [N], of distributions whose logits are [N, C]."""
        whole = torch.logsumexp(scores + self.counts.log(), -1)
        return whole - scores.gather(-1, self.labels[:, None])[:, 0]

    def proxy_brier(self, eps: torch.Tensor, by: Groups) -> torch.Tensor:
        """Return the Brier score of the proxies of coefficients [K, G, M], [K, N]."""
        groups = groups_of(self.log_t, by)
        return self.brier(proxy(self.log_t.exp(), eps, groups, self.counts))


def joined(parts: Sequence[Labelled]) -> Labelled:
    """Return the examples of several; where one has fewer classes, the missing ones have p = 0."""
    widest = max(parts, key=lambda part: len(part.counts))
    width = len(widest.counts)
    log_t = [pad(p.log_t, (0, width - p.log_t.shape[-1]), value=-torch.inf) for p in parts]
    labels, rows = ([getattr(p, name) for p in parts] for name in ("labels", "rows"))
    return Labelled(torch.cat(log_t), torch.cat(labels), widest.counts, torch.cat(rows))


def labelled(
    log_t: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor, entries: int
) -> Labelled:
    """Return the most likely classes of distributions [N, V], and the others as one entry.

    Args:
        log_t: Log-probabilities; none is -inf where classes have to be left out.
        labels: The right classes, [N].
        rows: [N].
        entries: Classes that are held one by one; V of at most as many are held as they are.
    """
    log_t = log_t.double().log_softmax(-1)
    left = log_t.shape[-1] - entries
    if left <= 0:
        return Labelled(log_t, labels, torch.ones_like(log_t[0]), rows)
    kept, where = log_t.topk(entries, dim=-1)
    found = where == labels[:, None]
    place = torch.where(found.any(-1), found.int().argmax(-1), entries)
    rest = log_t.scatter(-1, where, -torch.inf).logsumexp(-1, keepdim=True)
    counts = torch.ones(entries + 1, dtype=kept.dtype, device=kept.device)
    counts[-1] = left
    return Labelled(torch.cat([kept, rest - math.log(left)], -1), place, counts, rows)
