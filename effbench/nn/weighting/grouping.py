"""First weights of pairs, the groups that they are dealt into, and draws in proportion.

From E margins a pair, m_ie = r_e(preferred) - r_e(other), of proxies that were not trained on it:

    U_i = rank of std_e(m_ie) among all pairs, in [0, 1]       uncertainty
    D_i = share of e with m_ie < 0                             disagreement with the label
    omega_i = n exp(s_i) / sum_j exp(s_j)                      s_i = a U_i - b D_i in [-3, 3]

The quantities are named by DORM (Zhang et al., Findings of EMNLP 2025); these formulas are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

MOST_SCORE = 3.0
"""Where scores are cut on both sides: no pair weighs over 400 times what another does."""
TERCILES = ("low", "middle", "high")


class Evidence(NamedTuple):
    """What proxies say of pairs, [n] each, in [0, 1]."""

    uncertainty: torch.Tensor
    disagreement: torch.Tensor

    @classmethod
    def of(cls, margins: torch.Tensor) -> Evidence:
        """Return the evidence of margins [n, E], each of a proxy that had not seen the pair."""
        spread = margins.std(1, unbiased=False)
        ranks = spread.argsort(stable=True).argsort().double()
        return cls(ranks / max(1, len(margins) - 1), (margins < 0).double().mean(1))

    @property
    def agreed(self) -> torch.Tensor:
        """Whether fewer than half of the proxies are against the label, [n] bool."""
        return self.disagreement < 0.5


def first_weights(evidence: Evidence, uncertainty: float, disagreement: float) -> torch.Tensor:
    """Return omega, [n] with mean 1.

    Args:
        evidence: Of the pairs.
        uncertainty: a.
        disagreement: b.
    """
    score = uncertainty * evidence.uncertainty - disagreement * evidence.disagreement
    return len(score) * score.clamp(-MOST_SCORE, MOST_SCORE).softmax(0)


def easiest(margins: torch.Tensor, fraction: float) -> torch.Tensor:
    """Return weights [n] with mean 1: alike for pairs that proxies are surest of, 0 for others.

    Args:
        margins: [n, E], each of a proxy that had not seen the pair.
        fraction: Of the pairs that stays.
    """
    count = max(1, round(fraction * len(margins)))
    best = margins.mean(1).argsort(descending=True, stable=True)[:count].cpu()
    weights = torch.zeros(len(margins), dtype=torch.float64)
    weights[best] = len(margins) / count
    return weights


class Groups(NamedTuple):
    """Which group each pair is in, [n], and what the groups are called."""

    of: torch.Tensor
    names: tuple[str, ...]

    @property
    def sizes(self) -> torch.Tensor:
        """Pairs of each group, [G] float64."""
        return self.of.bincount(minlength=len(self.names)).double()

    def totals(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sums of values [n] by group, [G]."""
        return values.new_zeros(len(self.names)).index_add(0, self.of, values)


def grouped(labels: Sequence[str]) -> Groups:
    """Return the groups of pairs with one label; groups stand in the order of their names."""
    names = tuple(sorted(set(labels)))
    places = {name: place for place, name in enumerate(names)}
    return Groups(torch.tensor([places[label] for label in labels]), names)


def labels_of(sources: Sequence[str], evidence: Evidence, by: str) -> list[str]:
    """Return the label of each pair's group.

    Args:
        sources: Where each pair comes from.
        evidence: Of the pairs.
        by: `sources`; `pairs`, each a group; or `clusters`: source, tercile of U, and whether the
            proxies agree.
    """
    if by == "sources":
        return list(sources)
    if by == "pairs":
        width = len(str(len(sources)))
        return [f"pair {place:0{width}}" for place in range(len(sources))]
    terciles = (evidence.uncertainty * 3).long().clamp(max=2).tolist()
    words = [("disagreed", "agreed")[agreed] for agreed in evidence.agreed.long().tolist()]
    return [
        f"{source}, {TERCILES[third]} uncertainty, {word}"
        for source, third, word in zip(sources, terciles, words, strict=True)
    ]


def first_logits(weights: torch.Tensor, groups: Groups, tau: float = 1.0) -> torch.Tensor:
    """Return p [G] whose softmax(p / tau) are the shares that groups have of the weights [n].

    With equal weights a group's share is that of its pairs, and training is the ordinary one.
    """
    return tau * (groups.totals(weights) / weights.sum()).log()


def pair_weights(
    shares: torch.Tensor, groups: Groups, within: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the weight of each pair, [n] with mean 1: its group's share, dealt out among it.

    Args:
        shares: lambda [G].
        groups: Of the pairs.
        within: Weights [n] in whose proportion a group deals; all alike without.
    """
    own = torch.ones(len(groups.of), dtype=shares.dtype) if within is None else within
    weights: torch.Tensor = len(own) * shares[groups.of] * own / groups.totals(own)[groups.of]
    return weights


def subset(weights: torch.Tensor, count: int, generator: torch.Generator) -> list[int]:
    """Return `count` different places, drawn one after the other in proportion to weights [n].

    Places whose weight is 0 come last, by lot.
    """
    keys = torch.rand(len(weights), generator=generator, dtype=torch.float64).log() / weights
    lots = torch.rand(len(weights), generator=generator, dtype=torch.float64)
    order = sorted(range(len(weights)), key=lambda i: (-float(keys[i]), float(lots[i])))
    return sorted(order[:count])


def repeated(weights: torch.Tensor, generator: torch.Generator) -> list[int]:
    """Return n places, each as often as its weight [n] says: the floor or the ceiling of it.

    Systematic sampling: one random start, and steps of one weight each.
    """
    ends = (weights.double() * len(weights) / weights.double().sum()).cumsum(0)
    marks = torch.arange(len(weights)) + torch.rand(1, generator=generator, dtype=torch.float64)
    return torch.searchsorted(ends, marks, right=True).clamp(max=len(weights) - 1).tolist()


def auroc(weights: torch.Tensor, wrong: torch.Tensor) -> float:
    """Return how often a right pair weighs more than a wrong one, ties counting half.

    It is the area under the curve of true over false positives, 0.5 for weights that say nothing.

    Args:
        weights: [n].
        wrong: Whether each is wrong, [n] bool, some and not all of them.
    """
    _, places, counts = weights.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2.0).double()[places]  # of ties the mean
    right, few = int((~wrong).sum()), int(wrong.sum())
    return float((ranks[~wrong].sum() - right * (right + 1) / 2) / (right * few))
