"""Which texts a rule fires on, and the labels that several rules give together.

    s(x, r) = beta cos(e(x), e(x_r)) + (1 - beta) |v_x & v_r| / |v_r|     fires where s >= sigma

e(x) is the mean state of a text, less the mean over all unlabelled ones, over its length, so that
cosines are of what differs (states of a causal model are anisotropic); v_x are the words that the
model expects after x. That both parts are weighed against each other is the paper's; beta and the
centring are our choices, and that a rule never fires on a text without any of its words.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import normalize

from effbench.nn.weak_labels.pool import HIDDEN, Pool
from effbench.nn.weak_labels.rules import Rule

THRESHOLDS = [i / 20 for i in range(21)]
"""Values of sigma that are tried."""


class Matcher:
    """Scores of rules on all rows of a pool.

    Args:
        pool: The rows.
        beta: Weight of the cosine.
    """

    def __init__(self, pool: Pool, beta: float) -> None:
        centre = pool.features[pool.unlabelled].mean(0) if pool.unlabelled.any() else 0.0
        self.units = normalize(pool.features - centre, dim=1)
        self.words = [frozenset(words) for words in pool.words]
        self.places = {text: place for place, text in enumerate(pool.texts)}
        self.beta = beta

    def scores(self, rules: Sequence[Rule]) -> torch.Tensor:
        """Return s of each row and rule, [N, R]; -inf where the row has none of the words.

        A rule whose anchor is no text of the pool, such as one that a person wrote without any,
        goes by its words alone: its cosine is 1.
        """
        columns = [self._column(rule) for rule in rules]
        return torch.stack(columns, 1) if columns else torch.zeros(len(self.words), 0)

    def _column(self, rule: Rule) -> torch.Tensor:
        wanted = frozenset(rule.words)
        overlap = torch.tensor([len(wanted & words) / len(wanted) for words in self.words])
        score = self.beta * self._cosines(rule.anchor) + (1 - self.beta) * overlap
        return score.masked_fill(overlap == 0, -torch.inf)

    def _cosines(self, anchor: str) -> torch.Tensor:
        if anchor not in self.places:
            return torch.ones(len(self.words))
        place = self.places[anchor]
        cosines = self.units @ self.units[place]
        cosines[place] = 1.0  # not a rounding less
        return cosines


def weak_labels(
    scores: torch.Tensor, sigmas: Sequence[float], labels: Sequence[int], classes: int
) -> torch.Tensor:
    """Return the class of the largest sum of scores, [N]; HIDDEN where no rule fires, or for a tie.

    Args:
        scores: Of rows and rules, [N, R].
        sigmas: Threshold of each rule, [R].
        labels: Class of each rule, [R].
        classes: How many there are.
    """
    fires = scores >= torch.tensor(sigmas)
    firing = scores.masked_fill(~fires, 0.0)
    sums = torch.full((len(scores), classes), -torch.inf)
    for label in set(labels):
        mine = torch.tensor([one == label for one in labels])
        of_class = firing[:, mine].sum(1)
        sums[:, label] = of_class.masked_fill(~fires[:, mine].any(1), -torch.inf)
    best, found = sums.max(1)
    ties = (sums == best[:, None]).sum(1) > 1
    return found.masked_fill(ties | ~fires.any(1), HIDDEN)


def tuned(scores: torch.Tensor, labels: Sequence[int], truth: torch.Tensor, floor: float) -> float:
    """Return the smallest sigma at which rules are right often enough, together; 1 where none is.

    Args:
        scores: Of the rows of the development half and the rules of a round, [n, R].
        labels: Class of each rule, [R].
        truth: Class of each row, [n].
        floor: Least share of the firings that are right.
    """
    right = truth[:, None] == torch.tensor(labels)
    for sigma in THRESHOLDS:
        fires = scores >= sigma
        if fires.any() and right[fires].float().mean() >= floor:
            return sigma
    return THRESHOLDS[-1]
