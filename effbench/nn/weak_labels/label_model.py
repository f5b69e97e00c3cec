"""Labels from rules of which some are better than others: a generative model of who fires when.

Dawid and Skene, Maximum Likelihood Estimation of Observer Error-Rates Using the EM Algorithm, 1979;
Ratner et al., Snorkel: Rapid Training Data Creation with Weak Supervision, VLDB 2017, arXiv
1711.10160. Given its class y a text makes rules fire independently of each other:

    P(r fires | y) = mu_{r,y}
    P(y | x) ~ P(y) prod_{r fires on x} mu_{r,y}            a rule that does not fire says nothing

The posterior is that of snorkel 0.10. mu is found by EM here, from what does not fire too; there by
matching the moments of votes. Our choices: rows with a known label keep it and P(y) is theirs, so
that classes have their names; one imagined firing and one silence of each rule for each class.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Literal

import torch

from effbench.nn.weak_labels.pool import HIDDEN
from effbench.util.errors import UserError

By = Literal["votes", "generative", "snorkel"]
"""The largest sum of scores; this model; that of the package snorkel."""
ITERATIONS, IMAGINED = 100, 1.0
"""Of EM, and observations of each kind that are added to all counts."""
FEWEST_RULES = 3
"""Below it snorkel's moments do not determine its model."""


def class_shares(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Return P(y) of rows with a label, [K] float64, with one imagined row of each class."""
    counts = labels[labels != HIDDEN].bincount(minlength=classes).double() + IMAGINED
    return counts / counts.sum()


def fitted(fires: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Return mu [R, K] by EM, which begins at the rows whose label is known.

    Args:
        fires: Whether a rule fires on a row, [N, R] bool.
        labels: Of the rows, [N]; HIDDEN where nobody knows it.
        classes: K.
    """
    known = labels != HIDDEN
    truth = torch.nn.functional.one_hot(labels.clamp(min=0), classes).double()
    shares, fired = class_shares(labels, classes), fires.double()
    beliefs = truth * known[:, None]
    for _ in range(ITERATIONS):
        mu = (fired.T @ beliefs + IMAGINED) / (beliefs.sum(0) + 2 * IMAGINED)
        logs = fired @ mu.log() + (1 - fired) @ (1 - mu).log() + shares.log()
        beliefs = torch.where(known[:, None], truth, logs.softmax(1))
    return mu


def posterior(fires: torch.Tensor, mu: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Return P(y | x), [N, K], by the rules that fire."""
    return (fires.double() @ mu.log() + shares.log()).softmax(1)


def by_snorkel(
    fires: torch.Tensor, rule_labels: torch.Tensor, shares: torch.Tensor, seed: int
) -> torch.Tensor:
    """Return P(y | x), [N, K], of snorkel's LabelModel, fitted to all rows without their labels.

    Args:
        fires: [N, R] bool.
        rule_labels: Class that each rule votes for, [R].
        shares: P(y), [K].
        seed: Of its optimiser.

    Raises:
        UserError: When the package is not installed.
    """
    model: Any = _snorkel()(cardinality=len(shares), verbose=False)
    votes = torch.where(fires, rule_labels, HIDDEN).numpy()
    model.fit(votes, class_balance=shares.tolist(), seed=seed, progress_bar=False)
    return torch.from_numpy(model.predict_proba(votes))


def _snorkel() -> Any:
    try:
        return import_module("snorkel.labeling.model").LabelModel
    except ImportError as error:
        raise UserError(
            f"method.label_model=snorkel needs the package snorkel: {error}.",
            "pip install 'effbench[snorkel]', or method.label_model=generative.",
        ) from None


def weak_labels(
    fires: torch.Tensor,
    rule_labels: Sequence[int],
    labels: torch.Tensor,
    classes: int,
    by: By,
    seed: int,
) -> torch.Tensor:
    """Return the likeliest class of each row, [N]; HIDDEN where no rule fires, or for a tie.

    Args:
        fires: Whether a rule fires on a row, [N, R] bool.
        rule_labels: Class of each rule, [R].
        labels: Those of rows that are known, [N]; HIDDEN elsewhere.
        classes: K.
        by: Which model; snorkel's needs three rules, and with fewer it is ours.
        seed: Of snorkel's.
    """
    shares = class_shares(labels, classes)
    if by == "snorkel" and fires.shape[1] >= FEWEST_RULES:
        found = by_snorkel(fires, torch.tensor([*rule_labels]), shares, seed)
    else:
        found = posterior(fires, fitted(fires, labels, classes), shares)
    best, label = found.max(1)
    ties = (found == best[:, None]).sum(1) > 1
    return label.masked_fill(ties | ~fires.any(1), HIDDEN)
