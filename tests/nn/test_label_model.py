"""The generative label model: its equations, what it finds, and snorkel's beside it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from effbench.nn.weak_labels import label_model
from effbench.nn.weak_labels.pool import HIDDEN
from effbench.util.errors import UserError

CLASSES = 3
LABELS = (0, 0, 1, 1, 2, 2, 0)
RIGHT = (0.5, 0.4, 0.5, 0.3, 0.4, 0.5, 0.2)
"""How often a rule fires on its class."""
WRONG = (0.02, 0.05, 0.02, 0.1, 0.05, 0.02, 0.2)
"""How often on each other one: the last rule says nothing."""
TRUE_MU = torch.tensor(
    [[RIGHT[r] if c == LABELS[r] else WRONG[r] for c in range(CLASSES)] for r in range(len(LABELS))]
)


def drawn(rows: int = 3000, known: int = 60, seed: int = 0) -> tuple[Any, Any, Any]:
    """Return who fires, the labels that are known, and all of them."""
    draws = torch.Generator().manual_seed(seed)
    truth = torch.randint(CLASSES, (rows,), generator=draws)
    fires = torch.rand(rows, len(LABELS), generator=draws) < TRUE_MU.T[truth]
    labels = torch.full_like(truth, HIDDEN)
    labels[:known] = truth[:known]
    return fires, labels, truth


def test_rates_are_found_from_few_labels_and_many_texts() -> None:
    fires, labels, _ = drawn()
    found = label_model.fitted(fires, labels, CLASSES)
    alone = label_model.fitted(fires[:60], labels[:60], CLASSES)
    assert (found - TRUE_MU).abs().max() < 0.08
    assert (found - TRUE_MU).abs().mean() < (alone - TRUE_MU).abs().mean()


def test_with_all_labels_rates_are_counts() -> None:
    fires, _, truth = drawn(200)
    found = label_model.fitted(fires, truth, CLASSES)
    for rule in range(len(LABELS)):
        for c in range(CLASSES):
            mine = fires[truth == c, rule]
            assert found[rule, c] == pytest.approx((int(mine.sum()) + 1) / (len(mine) + 2))


def test_the_posterior_is_the_product_over_rules_that_fire() -> None:
    fires, shares = torch.tensor([[True, False, True]]), torch.tensor([0.5, 0.3, 0.2]).double()
    mu = torch.tensor([[0.5, 0.1, 0.2], [0.9, 0.9, 0.9], [0.3, 0.4, 0.1]]).double()
    products = [0.5 * 0.5 * 0.3, 0.3 * 0.1 * 0.4, 0.2 * 0.2 * 0.1]
    found = label_model.posterior(fires, mu, shares)[0].tolist()
    assert found == pytest.approx([p / math.fsum(products) for p in products])


def test_it_is_right_more_often_than_votes_alike() -> None:
    fires, labels, truth = drawn()
    found = label_model.weak_labels(fires, LABELS, labels, CLASSES, "generative", 0)
    votes = torch.stack([fires[:, [x == c for x in LABELS]].sum(1) for c in range(CLASSES)], 1)
    covered = fires.any(1)
    assert torch.equal(found == HIDDEN, ~covered)
    ours = (found == truth)[covered].double().mean()
    alike = (votes.argmax(1) == truth)[covered].double().mean()
    assert ours > alike + 0.02


def test_names_of_classes_do_not_matter() -> None:
    fires, labels, _ = drawn(400)
    names = torch.tensor([2, 0, 1])
    renamed = torch.where(labels == HIDDEN, HIDDEN, names[labels])
    mu, other = (label_model.fitted(fires, each, CLASSES) for each in (labels, renamed))
    torch.testing.assert_close(other[:, names], mu)


def test_snorkel_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "snorkel.labeling.model", None)
    fires, labels, _ = drawn(50)
    with pytest.raises(UserError, match="needs the package snorkel"):
        label_model.weak_labels(fires, LABELS, labels, CLASSES, "snorkel", 0)
    few = label_model.weak_labels(fires[:, :2], LABELS[:2], labels, CLASSES, "snorkel", 0)
    ours = label_model.weak_labels(fires[:, :2], LABELS[:2], labels, CLASSES, "generative", 0)
    assert torch.equal(few, ours)


def test_ours_and_snorkels_agree() -> None:
    pytest.importorskip("snorkel.labeling.model")
    fires, labels, truth = drawn()
    theirs, ours = (
        label_model.weak_labels(fires, LABELS, labels, CLASSES, by, 0)
        for by in ("snorkel", "generative")
    )
    covered = fires.any(1)
    assert (theirs == ours)[covered].double().mean() > 0.85
    right = [(found == truth)[covered].double().mean() for found in (theirs, ours)]
    assert abs(right[0] - right[1]) < 0.05
