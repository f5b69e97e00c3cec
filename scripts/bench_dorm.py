"""DORM on a linear toy: accuracy over the number of pairs, against all baselines, and data ratios.

Pairs of three sources with 5, 40 and 90 % swapped answers, 20 features of which one direction says
who is preferred; 100 validation pairs and 4,000 test pairs without a swap. Rewards are linear. The
sources are of one size, so that sources alike are pairs alike.

    python scripts/bench_dorm.py [SEEDS]
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from effbench.nn.weighting import grouping, linear
from effbench.nn.weighting.bilevel import Mixture, Outer, Schedule, search
from effbench.report.table import Table
from effbench.stats.paired import paired_difference
from effbench.stats.reaching import reaching

SIZES = (125, 250, 500, 1000, 2000)
FLIPS = (0.05, 0.4, 0.9)
FEATURES, VALIDATION, TEST = 20, 100, 4000
STEPS, RATE, PART = 400, 4.0, 1 / 3
FOLDS, PROXIES = 5, 3
ALIKE, ALONE = "pairs alike", "validation alone"
POOLED = "train and validation pooled, alike"
W, BY_SOURCE = "DORM, w itself", "DORM over sources, w itself"


@dataclass
class Toy:
    """One draw of the toy, and stage 1 on it."""

    pairs: torch.Tensor
    sources: torch.Tensor
    swapped: torch.Tensor
    validation: torch.Tensor
    test: torch.Tensor
    evidence: grouping.Evidence
    generator: torch.Generator

    @classmethod
    def of(cls, seed: int, count: int) -> Toy:
        """Draw it; the fewer pairs of a seed are the first of the more."""
        draws = torch.Generator().manual_seed(seed)
        true = torch.nn.functional.normalize(torch.randn(FEATURES, generator=draws), dim=0)

        def clean(rows: int) -> torch.Tensor:
            pairs = torch.randn(rows, FEATURES, generator=draws)
            return pairs * torch.sign(pairs @ true)[:, None]

        sources = torch.arange(SIZES[-1]) % len(FLIPS)
        lots = torch.rand(SIZES[-1], generator=draws)
        swapped = lots < torch.tensor(FLIPS)[sources]
        pairs = clean(SIZES[-1]) * (1 - 2 * swapped.float())[:, None]
        others = [clean(rows) for rows in (VALIDATION, TEST)]
        first = pairs[:count]
        scaled = linear.scaled(first)
        folds = linear.folds_of(range(count), FOLDS, draws)
        margins = linear.out_of_fold(scaled, folds, PROXIES, STEPS // 2, RATE, draws)
        validation, test = (linear.scaled(x, first) for x in others)
        evidence = grouping.Evidence.of(margins)
        return cls(scaled, sources[:count], swapped[:count], validation, test, evidence, draws)

    @property
    def alike(self) -> torch.Tensor:
        """Weights that are all one."""
        return torch.ones(len(self.pairs), dtype=torch.float64)

    def trained(self, weights: torch.Tensor, trusted: bool = False) -> torch.Tensor:
        """Return a head [d] trained with weights, on validation pairs too where `trusted`."""
        pairs, own = self.pairs, weights
        if trusted:
            pairs = torch.cat([pairs, self.validation])
            own = torch.cat([weights, torch.ones(VALIDATION)])
        return linear.fit(pairs, own.float()[:, None], STEPS, RATE)[:, 0]

    def drawn(self, weights: torch.Tensor) -> torch.Tensor:
        """Return weights of a subset that is drawn in proportion."""
        places = grouping.subset(weights, round(PART * len(weights)), self.generator)
        return torch.zeros_like(weights).index_fill(0, torch.tensor(places), 1.0)

    def first(self) -> torch.Tensor:
        """Return the weights of stage 1."""
        return grouping.first_weights(self.evidence, 1.0, 3.0)

    def dorm(self, by: str = "clusters") -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights of stage 2, and w."""
        names = [f"source {n}" for n in self.sources.tolist()]
        groups = grouping.grouped(grouping.labels_of(names, self.evidence, by))
        mixture = Mixture(grouping.first_logits(self.first(), groups), Outer(0.05))
        head = search(self.pairs, groups.of, self.validation, mixture, Schedule(), STEPS, RATE)
        return grouping.pair_weights(mixture.shares, groups), head

    def accuracy(self, head: torch.Tensor) -> float:
        """Return the share of test pairs that a head orders rightly."""
        return float(((self.test @ head) > 0).double().mean())

    def auroc(self, weights: torch.Tensor) -> float:
        """Return how often a pair with a right answer weighs more than a swapped one."""
        return grouping.auroc(weights, self.swapped)


Arm = Callable[[Toy, torch.Tensor, torch.Tensor], torch.Tensor]
ARMS: dict[str, Arm] = {
    ALIKE: lambda toy, *_: toy.trained(toy.alike),
    "stage 1 alone": lambda toy, *_: toy.trained(toy.first()),
    "filter by disagreement": lambda toy, *_: toy.trained(toy.evidence.agreed.double()),
    "random third": lambda toy, *_: toy.trained(toy.drawn(toy.alike)),
    "third drawn by DORM": lambda toy, weights, _: toy.trained(toy.drawn(weights)),
    ALONE: lambda toy, *_: toy.trained(0 * toy.alike, trusted=True),
    POOLED: lambda toy, *_: toy.trained(toy.alike, trusted=True),
    "DORM, then training": lambda toy, weights, _: toy.trained(weights),
    "DORM, then training with validation pooled": (
        lambda toy, weights, _: toy.trained(weights, trusted=True)
    ),
    W: lambda _, __, head: head,
    BY_SOURCE: lambda toy, *_: toy.dorm("sources")[1],
    "right answers alone (oracle)": lambda toy, *_: toy.trained((~toy.swapped).double()),
}


Curves = dict[str, list[list[float]]]
"""Accuracies by arm, seed and number of pairs."""


def accuracies(found: Curves) -> Table:
    """Return a row for each arm: means over seeds."""
    rows = []
    for name, curves in found.items():
        means = [sum(c[place] for c in curves) / len(curves) for place in range(len(SIZES))]
        rows.append((name, *(f"{mean:.3f}" for mean in means)))
    head = ("arm", *(f"{count:,}" for count in SIZES))
    return Table(f"accuracy over pairs, mean of {len(found[W])} seeds", head, rows)


def differences(found: Curves, ours: str) -> Table:
    """Return what an arm is ahead of each other one, paired by seed."""
    shown, rows = (0, 2, len(SIZES) - 1), []
    for name, curves in found.items():
        cells = []
        for place in shown:
            d = paired_difference([c[place] for c in found[ours]], [c[place] for c in curves])
            cells.append(f"{d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}]")
        if name != ours:
            rows.append((name, *cells))
    head = (f"{ours}, less", *(f"{SIZES[place]:,}" for place in shown))
    return Table("paired differences, 95 % intervals over seeds", head, rows)


def ratios(found: Curves) -> Table:
    """Return how much less data an arm takes for what others reach with all, seed by seed."""
    rows = []
    for name in (ALIKE, ALONE, POOLED):
        cells = []
        for ours in (W, BY_SOURCE):
            pairs = zip(found[ours], found[name], strict=True)
            needed = [reaching(SIZES, mine, theirs[-1]) for mine, theirs in pairs]
            cells.append(", ".join(f"{SIZES[-1] / n:.1f}" if n < math.inf else "-" for n in needed))
        rows.append((name, *cells))
    title = f"{SIZES[-1]:,} pairs over those that are needed for the same accuracy, by seed"
    return Table(f"{title} (16: or more; -: not reached)", ("as good as", W, BY_SOURCE), rows)


def main() -> None:
    """Print accuracies, paired differences, and the data that equal accuracy takes."""
    seeds = range(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
    found: Curves = {name: [[0.0] * len(SIZES) for _ in seeds] for name in ARMS}
    ranks: dict[str, list[float]] = {"stage 1": [], "DORM": []}
    for seed in seeds:
        for place, count in enumerate(SIZES):
            toy = Toy.of(seed, count)
            weights, head = toy.dorm()
            for name, arm in ARMS.items():
                found[name][seed][place] = toy.accuracy(arm(toy, weights, head))
        ranks["stage 1"].append(toy.auroc(toy.first()))
        ranks["DORM"].append(toy.auroc(weights))
    for part in (
        accuracies(found),
        differences(found, W),
        differences(found, BY_SOURCE),
        ratios(found),
    ):
        print(part.markdown(), end="\n\n")
    told = ", ".join(f"{name} {sum(x) / len(x):.3f}" for name, x in ranks.items())
    print(f"AUROC of the weight against swapped answers, {SIZES[-1]:,} pairs: {told}")


if __name__ == "__main__":
    main()
