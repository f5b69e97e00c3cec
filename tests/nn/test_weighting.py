"""Weights of training pairs: stage 1, groups, draws, and the bilevel search with linear heads."""

from __future__ import annotations

import json

import pytest
import torch

from effbench.nn.weighting import grouping, linear, table
from effbench.nn.weighting.bilevel import Mixture, Outer, Schedule, search
from effbench.nn.weighting.grouping import (
    Evidence,
    Groups,
    first_logits,
    first_weights,
    grouped,
    labels_of,
    pair_weights,
    repeated,
    subset,
)

FLIPS = (0.05, 0.4, 0.9)
OUTER, SCHEDULE = Outer(0.05), Schedule()


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clean(count: int, d: int, generator: torch.Generator) -> torch.Tensor:
    """Return pairs [count, d] of which the first coordinate says who is preferred."""
    pairs = torch.randn(count, d, generator=generator)
    return pairs * torch.sign(pairs[:, :1])


def toy(seed: int, count: int = 300, d: int = 20) -> tuple[torch.Tensor, torch.Tensor, list]:
    """Return pairs of three sources with flipped labels, their sources, validation and test."""
    generator = draws(seed)
    sources = torch.arange(len(FLIPS)).repeat_interleave(count // len(FLIPS))
    flipped = torch.rand(len(sources), generator=generator) < torch.tensor(FLIPS)[sources]
    pairs = clean(len(sources), d, generator) * (1 - 2 * flipped.float())[:, None]
    others = [clean(n, d, generator) for n in (100, 1000)]
    return linear.scaled(pairs), sources, [linear.scaled(x, pairs) for x in others]


def found(
    pairs: torch.Tensor,
    of: torch.Tensor,
    validation: torch.Tensor,
    outer: Outer = OUTER,
    schedule: Schedule = SCHEDULE,
    steps: int = 150,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the shares and the head that a search ends with."""
    sizes = of.bincount().double()
    mixture = Mixture((sizes / sizes.sum()).log(), outer)
    head = search(pairs, of, validation, mixture, schedule, steps, 4.0)
    return mixture.shares, head


def accuracy(head: torch.Tensor, pairs: torch.Tensor) -> float:
    return float(((pairs @ head) > 0).double().mean())


# -- shares and their gradient -------------------------------------------------------------------


@pytest.mark.parametrize("outer", [Outer(), Outer(tau=0.7, floor=0.1, entropy=0.3)])
def test_the_gradient_is_that_of_autograd(outer: Outer) -> None:
    p = torch.randn(5, dtype=torch.float64, generator=draws()).requires_grad_()
    difference = torch.randn(5, dtype=torch.float64, generator=draws(1))
    soft = (p / outer.tau).softmax(0)
    value = outer.shares(p) @ difference + outer.entropy * (soft * soft.log()).sum()
    [expected] = torch.autograd.grad(value, p)
    torch.testing.assert_close(outer.gradient(p.detach(), difference), expected)


@pytest.mark.parametrize("outer", [Outer(), Outer(floor=0.1)])
def test_shares_are_a_distribution_that_a_constant_does_not_move(outer: Outer) -> None:
    p, d = torch.randn(2, 6, dtype=torch.float64, generator=draws())
    shares = outer.shares(8 * p)
    assert shares.min() > outer.floor / 6 - 1e-12 and shares.min() > 0
    assert shares.sum().item() == pytest.approx(1)
    found = outer.gradient(p, d)
    assert found.sum().item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(outer.gradient(p, d + 17), found)


def observed(mixture: Mixture, upper: list[float], lower: list[float]) -> None:
    groups = torch.arange(len(upper))
    mixture.observe(groups, torch.tensor(upper), torch.tensor(lower))


def test_equal_losses_and_no_penalty_leave_p_alone() -> None:
    mixture = Mixture(torch.tensor([0.3, -0.2]), Outer(rate=1.0))
    before = mixture.logits.clone()
    observed(mixture, [1.0, 2.0], [1.0, 2.0])
    mixture.move(10.0)
    assert mixture.logits.equal(before)
    observed(mixture, [1.0, 2.0], [2.0, 1.0])
    mixture.move(0.0)
    assert mixture.logits.equal(before)
    mixture.move(1.0)
    assert mixture.shares[0] > before.softmax(0)[0]  # worse under w: it loses


def test_one_group_keeps_all() -> None:
    pairs, _, (validation, _) = toy(0)
    shares, _ = found(pairs, torch.zeros(len(pairs), dtype=torch.long), validation, steps=20)
    assert shares.tolist() == [1.0]


def test_units_of_loss_do_not_matter() -> None:
    ends = []
    for unit in (1.0, 1000.0):
        mixture = Mixture(torch.zeros(3), Outer(rate=0.5))
        for n in range(4):
            observed(mixture, [unit * n, unit, 0.0], [unit, 0.0, 2 * unit])
            mixture.move(1.0)
        ends.append(mixture.logits)
    torch.testing.assert_close(*ends)


def test_a_group_that_a_batch_lacks_keeps_its_means() -> None:
    mixture = Mixture(torch.zeros(3), Outer(smoothing=0.9))
    mixture.observe(torch.tensor([0, 0, 1]), torch.tensor([1.0, 3.0, 5.0]), torch.zeros(3))
    assert mixture.losses[0].tolist() == [2.0, 5.0, 0.0]
    assert mixture.difference()[2] == 0  # never seen
    mixture.observe(torch.tensor([1]), torch.tensor([15.0]), torch.ones(1))
    assert mixture.losses[0].tolist() == pytest.approx([2.0, 6.0, 0.0])
    assert mixture.losses[1].tolist() == pytest.approx([0.0, 0.1, 0.0])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_restored_mixture_goes_on_bit_for_bit(optimizer: str) -> None:
    def gone_on(mixture: Mixture, steps: range) -> Mixture:
        for n in steps:
            observed(mixture, [n / 7, 1.0, 0.3], [0.2, n / 3, 0.1])
            mixture.move(2.0)
        return mixture

    outer = Outer(optimizer=optimizer)
    whole = gone_on(Mixture(torch.zeros(3), outer), range(8))
    half = gone_on(Mixture(torch.zeros(3), outer), range(4))
    again = Mixture(torch.ones(3), outer)
    again.load_state_dict(half.state_dict())
    gone_on(again, range(4, 8))
    assert again.logits.equal(whole.logits)
    assert again.losses.equal(whole.losses) and again.size == whole.size


def test_rounds_raise_the_penalty_and_the_start_holds_p() -> None:
    schedule = Schedule(penalty=2.0, growth=3.0, rounds=3, hold=0.5)
    assert [schedule.penalty_at(n, 6) for n in range(6)] == [2, 2, 6, 6, 18, 18]
    assert [schedule.moves(n, 6) for n in range(6)] == [False] * 3 + [True] * 3


# -- the search ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_the_clean_source_rises_and_the_flipped_one_falls(seed: int) -> None:
    pairs, sources, (validation, test) = toy(seed)
    shares, head = found(pairs, sources, validation)
    assert shares[0] > 0.9 > 1 / 3 > shares[1] > shares[2]
    assert shares[2] < 0.02
    even = linear.fit(pairs, torch.ones(len(pairs), 1), 150, 4.0)[:, 0]
    both = torch.cat([pairs, validation])
    pooled = linear.fit(both, torch.ones(len(both), 1), 150, 4.0)[:, 0]
    assert accuracy(head, test) > accuracy(pooled, test) + 0.03
    assert accuracy(pooled, test) > accuracy(even, test)


def test_without_penalty_w_is_trained_on_validation_alone() -> None:
    pairs, sources, (validation, _) = toy(0)
    shares, head = found(pairs, sources, validation, schedule=Schedule(penalty=0.0), steps=20)
    alone = linear.fit(validation, torch.ones(len(validation), 1), 20, 4.0)[:, 0]
    torch.testing.assert_close(head, alone)
    torch.testing.assert_close(shares, torch.full((3,), 1 / 3, dtype=torch.float64))


def test_with_a_large_penalty_and_weights_that_stay_w_is_the_weighted_minimiser() -> None:
    pairs, sources, (validation, _) = toy(0)
    outer, schedule = Outer(rate=0.0), Schedule(penalty=1e7)
    shares, head = found(pairs, sources, validation, outer, schedule, steps=20)
    weights = pair_weights(shares, Groups(sources, ("a", "b", "c"))).float()
    weighted = linear.fit(pairs, weights[:, None], 20, 4.0)[:, 0]
    torch.testing.assert_close(head, weighted, atol=1e-5, rtol=1e-4)


def test_groups_may_have_any_order() -> None:
    pairs, sources, (validation, _) = toy(0)
    order = torch.tensor([2, 0, 1])
    shares, _ = found(pairs, sources, validation, steps=60)
    permuted, _ = found(pairs, order[sources], validation, steps=60)
    torch.testing.assert_close(permuted[order], shares)


def test_swapping_every_answer_turns_the_head_and_moves_no_share() -> None:
    pairs, sources, (validation, _) = toy(0)
    shares, head = found(pairs, sources, validation, steps=60)
    swapped, turned = found(-pairs, sources, -validation, steps=60)
    assert swapped.equal(shares)
    assert turned.equal(-head)


def test_a_group_whose_answers_are_swapped_loses() -> None:
    pairs, sources, (validation, _) = toy(0)
    sign = 1 - 2 * (sources == 0).float()
    shares, _ = found(pairs * sign[:, None], sources, validation)
    assert shares[0] < 0.1 < 1 / 3


# -- proxies ---------------------------------------------------------------------------------------


def test_no_proxy_saw_the_pair_that_it_judges() -> None:
    pairs, _, _ = toy(0, 60)
    folds = linear.folds_of(range(len(pairs)), 3, draws())
    margins = linear.out_of_fold(pairs, folds, 2, 20, 4.0, draws(1))
    one = (folds == 1).float()[:, None]
    again = linear.out_of_fold(pairs * (1 - 2 * one), folds, 2, 20, 4.0, draws(1))
    torch.testing.assert_close(again[folds == 1], -margins[folds == 1])
    assert not torch.allclose(again[folds == 0], margins[folds == 0])


def test_heads_with_targets_are_least_squares_over_the_targets_that_there_are() -> None:
    states = linear.scaled(torch.randn(60, 4, generator=draws()))
    targets = states @ torch.tensor([2.0, -1, 0, 0.5]) + 0.1 * torch.randn(60, generator=draws(1))
    targets[::5] = torch.nan
    folds = torch.arange(60) % 4
    found = linear.out_of_fold(states, folds, 1, 300, 1.0, draws(2), targets)
    part = torch.rand(60, generator=draws(2)) < linear.PART
    for fold in range(4):
        seen = (folds != fold) & part & ~targets.isnan()
        x, y = states[seen].double(), targets[seen].double()
        ridge = x.T @ x / len(x) + linear.RIDGE * torch.eye(4, dtype=torch.float64)
        head = torch.linalg.solve(ridge, x.T @ y / len(x))
        own = folds == fold
        torch.testing.assert_close(
            found[own, 0].double(), states[own].double() @ head, atol=1e-4, rtol=1e-4
        )


def test_heads_that_are_fitted_together_are_those_fitted_alone() -> None:
    pairs, sources, _ = toy(0, 60)
    weights = torch.stack([torch.ones(60), (sources == 0).float()], 1)
    together = linear.fit(pairs, weights, 15, 4.0)
    alone = linear.fit(pairs[sources == 0], torch.ones(20, 1), 15, 4.0)
    torch.testing.assert_close(together[:, 1:], alone)
    w = together[:, 0].clone().requires_grad_()
    [expected] = torch.autograd.grad(linear.losses(pairs, w).mean(), w)
    found = linear.gradient(pairs, together[:, :1], torch.full((60, 1), 1 / 60))
    torch.testing.assert_close(found[:, 0], expected)


def test_pairs_of_one_prompt_are_in_one_fold() -> None:
    names = [n % 7 for n in range(30)]
    folds = linear.folds_of(names, 3, draws())
    assert set(folds.tolist()) == {0, 1, 2}
    assert all(
        len({int(f) for f, n in zip(folds, names, strict=True) if n == k}) == 1 for k in names
    )


MARGINS = torch.tensor([[1.0, 1.0, 1.1], [-1.0, -2.0, 3.0], [-1.0, -1.0, -1.2], [4.0, -9.0, 9.0]])


def test_uncertainty_is_a_rank_and_disagreement_a_share() -> None:
    evidence = Evidence.of(MARGINS)
    assert evidence.uncertainty.tolist() == pytest.approx([0, 2 / 3, 1 / 3, 1])
    assert evidence.disagreement.tolist() == pytest.approx([0, 2 / 3, 1, 1 / 3])
    assert evidence.agreed.tolist() == [True, False, False, True]
    assert Evidence.of(100 * MARGINS).uncertainty.equal(evidence.uncertainty)


def test_first_weights_have_mean_one_and_follow_the_formula() -> None:
    evidence = Evidence.of(MARGINS)
    weights = first_weights(evidence, 1.0, 3.0)
    assert weights.mean().item() == pytest.approx(1)
    score = evidence.uncertainty - 3 * evidence.disagreement
    torch.testing.assert_close((weights / weights[0]).log(), score - score[0])
    cut = first_weights(evidence, 0.0, 99.0)  # cut at -3
    assert (cut[0] / cut[2]).log().item() == pytest.approx(3)


# -- groups and draws ------------------------------------------------------------------------------


def test_groups_are_sources_by_tercile_by_agreement() -> None:
    evidence = Evidence.of(MARGINS)
    labels = labels_of(["a", "a", "b", "b"], evidence, "clusters")
    assert labels == [
        "a, low uncertainty, agreed",
        "a, high uncertainty, disagreed",
        "b, middle uncertainty, disagreed",
        "b, high uncertainty, agreed",
    ]
    assert grouped(labels_of(["b", "a", "b", "b"], evidence, "sources")).of.tolist() == [1, 0, 1, 1]
    assert len(grouped(labels_of(["a"] * 12, evidence, "pairs")).names) == 12


def test_equal_weights_are_ordinary_training() -> None:
    groups = Groups(torch.tensor([0, 1, 1, 1, 2]), ("a", "b", "c"))
    even = torch.ones(5, dtype=torch.float64)
    shares = Outer(tau=0.9).shares(first_logits(even, groups, 0.9))
    torch.testing.assert_close(shares, groups.sizes / 5)
    torch.testing.assert_close(pair_weights(shares, groups), even)
    assert repeated(even, draws()) == [0, 1, 2, 3, 4]


def test_weights_of_pairs_give_each_group_its_share() -> None:
    groups = Groups(torch.tensor([0, 1, 1, 0, 2]), ("a", "b", "c"))
    shares = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    within = torch.tensor([1.0, 2.0, 1.0, 3.0, 1.0], dtype=torch.float64)
    for own in (None, within):
        weights = pair_weights(shares, groups, own)
        torch.testing.assert_close(groups.totals(weights) / 5, shares)
    assert (weights[3] / weights[0]).item() == pytest.approx(3)


def test_pairs_are_repeated_as_often_as_they_weigh() -> None:
    weights = torch.tensor([0.0, 2.5, 0.25, 1.25, 1.0], dtype=torch.float64)
    totals = torch.zeros(5)
    generator = draws()
    for _ in range(200):
        counts = torch.tensor(repeated(weights, generator)).bincount(minlength=5)
        assert counts.sum() == 5
        assert all(
            w - 1 < c < w + 1 for c, w in zip(counts.tolist(), weights.tolist(), strict=True)
        )
        totals += counts
    torch.testing.assert_close(totals / 200, weights.float(), atol=0.12, rtol=0)


def test_a_subset_is_drawn_in_proportion_and_never_twice() -> None:
    weights = torch.tensor([0.0, 4.0, 1.0, 1.0, 2.0])
    firsts = torch.zeros(5)
    generator = draws()
    for _ in range(400):
        assert subset(weights, 4, generator) == [1, 2, 3, 4]
        firsts[subset(weights, 1, generator)] += 1
    torch.testing.assert_close(firsts / 400, weights / 8, atol=0.08, rtol=0)


# -- the table -------------------------------------------------------------------------------------


def test_the_table_can_be_read_and_restored(tmp_path) -> None:
    groups = grouped(["a", "b", "a", "b"])
    weights = torch.tensor([0.5, 1.5, 0.7, 1.3])
    made = table.PairTable(list("wxyz"), ["s"] * 4, Evidence.of(MARGINS), groups, weights)
    again = table.PairTable.of(made.state())
    again.write(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / table.FILE).read_text().splitlines()]
    assert rows == made.rows()
    assert rows[1] == {
        "id": "x",
        "source": "s",
        "uncertainty": 0.666667,
        "disagreement": 0.666667,
        "group": "b",
        "weight": 1.5,
    }
    assert made.told() == "mean weight of a pair in 2 groups: b: 1.4 (2 pairs); a: 0.6 (2 pairs)"
    assert not list(made.parameters()) and not list(made.buffers())


def test_auroc_counts_right_pairs_above_wrong_ones_and_ties_half() -> None:
    weights = torch.tensor([0.1, 0.7, 0.7, 0.3, 2.0, 0.1])
    wrong = torch.tensor([True, False, True, False, False, False])
    above = [(r > w) + 0.5 * (r == w) for r in weights[~wrong] for w in weights[wrong]]
    assert grouping.auroc(weights, wrong) == pytest.approx(float(sum(above)) / 8)
    assert grouping.auroc(torch.ones(6), wrong) == 0.5
