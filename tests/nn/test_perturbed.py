"""The perturbed loss, its proxy and their search against independent computations."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from helpers import HeldBytes

from effbench.api.objectives import CHUNK, PERTURBED_BYTES
from effbench.nn.losses import fitting, proxy_search
from effbench.nn.losses.convexity import LIMIT, check, peak, peaks, used
from effbench.nn.losses.labelled import Labelled, joined, labelled
from effbench.nn.losses.perturbed import (
    Groups,
    focal,
    groups_of,
    kl,
    padded,
    perturbed_kl,
    reverse_kl,
    smoothed,
)
from effbench.nn.losses.proxy import proxy
from effbench.nn.losses.recalibration import Recalibration, fitted
from effbench.nn.losses.teaching import Teaching, known_nll
from effbench.nn.losses.token import Readout, token_kl
from effbench.util.errors import UserError

ONE = torch.zeros(1, 1, dtype=torch.int64)
BY_CLASS = torch.arange(4)[None]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logs(seed: int, rows: int = 6, classes: int = 4, sharp: float = 2.0) -> torch.Tensor:
    """Return log-probabilities [N, C] in float64."""
    drawn = torch.randn(rows, classes, generator=seeded(seed), dtype=torch.float64)
    return (sharp * drawn).log_softmax(-1)


def coefficients(seed: int, groups: int = 4, orders: int = 5, draws: int = 1) -> torch.Tensor:
    """Return random coefficients [draws, G, M] within the bound."""
    return proxy_search.candidates((groups, orders), draws, seeded(seed))[1:]


def naive(log_t: torch.Tensor, log_s: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """Return the loss as the paper writes it, eps [C or 1, M]."""
    p_t, p_s = log_t.exp(), log_s.exp()
    powers = torch.stack([(1 - p_s) ** m for m in range(1, eps.shape[-1] + 1)], -1)
    return (p_t * (log_t - log_s)).sum(-1) + (p_t * (eps * powers).sum(-1)).sum(-1)


# -- the loss --------------------------------------------------------------------------------------


def test_the_loss_is_the_papers() -> None:
    log_t, log_s = logs(1), logs(2)
    for groups, eps in ((BY_CLASS, coefficients(3)[0]), (ONE, coefficients(4, groups=1)[0])):
        found = perturbed_kl(log_t, log_s, eps, groups)
        torch.testing.assert_close(found, naive(log_t, log_s, eps), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("orders", [0, 5])
def test_without_coefficients_it_is_kl_bit_for_bit(orders: int) -> None:
    teacher, student = (torch.randn(2, 7, 9, generator=seeded(i)) for i in (1, 2))
    labels, results = torch.ones(2, 7, dtype=torch.int64), []
    labels[0, :3] = -100
    counted = labels[:, 1:] != -100
    for perturbs in (False, True):
        z = student.clone().requires_grad_()
        if perturbs:
            log_t, log_s = (x[:, :-1][counted].log_softmax(-1) for x in (teacher, z))
            losses = perturbed_kl(log_t, log_s, torch.zeros(1, orders), ONE)
        else:
            losses = token_kl(teacher, z, labels, 1.0)
        losses.sum().backward()
        results.append((losses, z.grad))
    for plain, found in zip(*results, strict=True):
        assert found.equal(plain)


def test_the_gradient_is_that_of_differences_and_of_the_closed_form() -> None:
    z = torch.randn(3, 4, generator=seeded(5), dtype=torch.float64, requires_grad=True)
    log_t, eps = logs(6, 3), coefficients(7)[0]

    def loss(z: torch.Tensor) -> torch.Tensor:
        return perturbed_kl(log_t, z.log_softmax(-1), eps, BY_CLASS)

    assert torch.autograd.gradcheck(loss, z)
    (found,) = torch.autograd.grad(loss(z).sum(), z)
    p_s, p_t = z.detach().softmax(-1), log_t.exp()
    terms = torch.stack([m * eps[:, m - 1] * (1 - p_s) ** (m - 1) for m in range(1, 6)]).sum(0)
    a = p_s * p_t * (1 / p_s + terms)
    torch.testing.assert_close(found, -a + p_s * a.sum(-1, keepdim=True))


def test_it_is_finite_where_probabilities_end() -> None:
    log_s = torch.tensor([[0.0, -69.0, -200.0]], requires_grad=True)
    log_t = torch.tensor([[0.2, 0.3, 0.5]]).log()
    loss = perturbed_kl(log_t, log_s, torch.tensor([[0.5, -0.2, 1.0]]), ONE)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert log_s.grad is not None and log_s.grad.isfinite().all()


def test_one_minus_p_keeps_its_digits_near_one() -> None:
    log_s = torch.tensor([[-1e-9, -20.0]])
    found = perturbed_kl(torch.tensor([[0.0, -torch.inf]]), log_s, torch.tensor([[1.0]]), ONE)
    assert float(found) == pytest.approx(2e-9, rel=1e-5)  # of which half is KL


def test_the_whole_series_is_kl_and_a_part_of_it_focal_loss() -> None:
    p = torch.linspace(0.1, 1, 20, dtype=torch.float64)
    log_s = torch.stack([p, 1 - p], -1).log()
    certain = torch.tensor([[0.0, -torch.inf]], dtype=torch.float64).expand(20, 2)
    series = torch.tensor([[-1 / m for m in range(1, 401)]], dtype=torch.float64)
    assert perturbed_kl(certain, log_s, series, ONE).abs().max() < 1e-10
    eps = [-1.0, *(1 / (m - 1) - 1 / m for m in range(2, 201))]
    found = perturbed_kl(certain, log_s, torch.tensor([eps], dtype=torch.float64), ONE)
    torch.testing.assert_close(found, -(1 - p) * p.log(), atol=1e-10, rtol=0)
    torch.testing.assert_close(found, focal(certain, log_s, 1.0), atol=1e-10, rtol=0)


def test_focal_loss_without_an_exponent_is_cross_entropy() -> None:
    log_t, log_s = logs(1), logs(2)
    torch.testing.assert_close(focal(log_t, log_s, 0.0), -(log_t.exp() * log_s).sum(-1))


def test_reverse_kl_is_kl_the_other_way_round() -> None:
    p, q = (torch.distributions.Categorical(logits=logs(i)) for i in (1, 2))
    expected = torch.distributions.kl_divergence(q, p)
    torch.testing.assert_close(reverse_kl(p.logits, q.logits), expected)


def test_a_class_that_is_not_there_changes_nothing() -> None:
    z_t, z_s = (torch.randn(3, 4, generator=seeded(i), dtype=torch.float64) for i in (1, 2))
    eps, results = coefficients(8)[0], []
    for extra in (0, 1):
        student = z_s.clone().requires_grad_()
        log_t, log_s = (padded_by(z, extra).log_softmax(-1) for z in (z_t, student))
        more = torch.cat([eps, torch.ones(extra, 5)])
        losses = [
            perturbed_kl(log_t, log_s, more, torch.arange(4 + extra)[None]),
            reverse_kl(log_t, log_s),
            focal(log_t, log_s, 2.0),
            kl(smoothed(log_t, 0.1), log_s),
        ]
        torch.stack(losses).sum().backward()
        solved = proxy(log_t.exp(), more, torch.arange(4 + extra)[None])
        results.append([*losses, student.grad, solved[:, :4]])
        assert not solved[:, 4:].any()
    for plain, found in zip(*results, strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-14, atol=1e-14)


def padded_by(z: torch.Tensor, extra: int) -> torch.Tensor:
    return torch.nn.functional.pad(z, (0, extra), value=-math.inf)


def test_answers_of_several_questions_stand_in_rows() -> None:
    found = padded(torch.arange(5.0), [2, 3])
    assert found.tolist() == [[0, 1, -math.inf], [2, 3, 4]]


def test_ranks_are_the_teachers() -> None:
    found = groups_of(torch.arange(12.0)[None], "rank")
    assert found.tolist() == [[2, 2, *[1] * 9, 0]]
    assert groups_of(torch.tensor([[1.0, 3.0, 2.0]]), "rank").tolist() == [[1, 0, 1]]


# -- the proxy -------------------------------------------------------------------------------------


def bisected(p_t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """Return the proxy by nested bisection: of the level, and within it of each probability."""
    powers = torch.arange(5, dtype=p_t.dtype)

    def g(p: torch.Tensor) -> torch.Tensor:
        terms = ((powers + 1) * eps * (1 - p)[..., None] ** powers).sum(-1)
        return p_t * (1 / p + terms)

    def at(level: torch.Tensor) -> torch.Tensor:
        low, high = torch.full_like(p_t, 1e-12), torch.ones_like(p_t)
        for _ in range(40):
            p = (low + high) / 2
            low, high = torch.where(g(p) > level, p, low), torch.where(g(p) > level, high, p)
        return (low + high) / 2

    low = (p_t * (1 + eps[:, 0])).amin(-1, keepdim=True)
    high = g(torch.full_like(p_t, 1e-6)).amax(-1, keepdim=True)
    for _ in range(55):
        level = (low + high) / 2
        more = at(level).sum(-1, keepdim=True) > 1
        low, high = torch.where(more, level, low), torch.where(more, high, level)
    return at((low + high) / 2)


def test_the_proxy_is_where_bisection_ends() -> None:
    p_t, eps = logs(0).exp(), coefficients(10)[0]
    found = proxy(p_t, eps, BY_CLASS)
    torch.testing.assert_close(found, bisected(p_t, eps), atol=1e-9, rtol=0)


def test_the_proxy_is_the_minimiser_and_what_free_logits_learn() -> None:
    """By the perturbed loss, and by plain KL to the proxy: the theorem of the paper."""
    log_t, eps = logs(20), coefficients(21)[0]
    aim = proxy(log_t.exp(), eps, BY_CLASS)
    for loss in (
        lambda log_s: perturbed_kl(log_t, log_s, eps, BY_CLASS),
        lambda log_s: kl(aim.log(), log_s),
    ):
        z = torch.zeros(6, 4, dtype=torch.float64, requires_grad=True)
        lbfgs = torch.optim.LBFGS(
            [z],
            max_iter=500,
            tolerance_grad=1e-13,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )

        def step(loss=loss, z=z, lbfgs=lbfgs) -> torch.Tensor:
            lbfgs.zero_grad()
            value = loss(z.log_softmax(-1)).sum()
            value.backward()
            return value

        lbfgs.step(step)
        torch.testing.assert_close(z.detach().softmax(-1), aim, atol=1e-7, rtol=0)


@pytest.mark.parametrize("sharp", [0.5, 3.0, 10.0])
def test_a_proxy_is_a_distribution_and_stationary(sharp: float) -> None:
    p_t, eps = logs(30, 40, sharp=sharp).exp(), coefficients(31, draws=30)
    p = proxy(p_t, eps, BY_CLASS)
    assert p.shape == (30, 40, 4)
    assert (p.sum(-1) - 1).abs().max() < 1e-12
    u = 1 - p
    slopes = torch.stack([(m + 1) * eps[:, None, :, m] * u**m for m in range(5)])
    g = p_t * (1 / p + slopes.sum(0))
    size = p_t * (1 / p + slopes.abs().sum(0))
    assert ((g - g[..., :1]).abs() / size.amax(-1, keepdim=True)).max() < 1e-8


def test_the_proxy_of_no_coefficients_is_the_teacher() -> None:
    p_t = logs(40).exp()
    torch.testing.assert_close(proxy(p_t, torch.zeros(4, 5), BY_CLASS), p_t, atol=1e-15, rtol=0)


def test_the_order_of_the_classes_does_not_matter() -> None:
    p_t, eps, order = logs(41).exp(), coefficients(42)[0], torch.tensor([2, 0, 3, 1])
    found = proxy(p_t[:, order], eps[order], BY_CLASS)
    torch.testing.assert_close(found, proxy(p_t, eps, BY_CLASS)[:, order])


def test_shared_coefficients_sharpen_above_zero_and_smooth_below() -> None:
    p_t = logs(43, sharp=1.0).exp()

    def entropy(value: float) -> torch.Tensor:
        p = proxy(p_t, torch.full((1, 5), value), ONE)
        assert p.argsort(-1).equal(p_t.argsort(-1))
        return -(p * p.log()).sum(-1)

    falling = [entropy(v) for v in (-0.2, -0.1, 0.0, 0.5, 2.0)]
    assert all((b < a).all() for a, b in pairwise(falling))


def test_coefficients_of_one_class_raise_that_class() -> None:
    p_t, eps = logs(44).exp(), torch.zeros(4, 5)
    eps[2] = 0.4
    found = proxy(p_t, eps, BY_CLASS)
    assert (found[:, 2] > p_t[:, 2]).all()
    assert (found[:, [0, 1, 3]] < p_t[:, [0, 1, 3]]).all()


def test_entries_that_stand_for_several_classes_are_solved_as_these() -> None:
    tail = torch.tensor([[0.5, 0.3, 0.05, 0.05, 0.05, 0.05]], dtype=torch.float64)
    eps = coefficients(45, groups=1)[0]
    whole = proxy(tail, eps, ONE)
    held = proxy(tail[:, :3], eps, ONE, torch.tensor([1.0, 1.0, 4.0]))
    torch.testing.assert_close(held, whole[:, :3])


@pytest.mark.parametrize("order", range(1, 9))
def test_the_bound_is_the_largest_curvature(order: int) -> None:
    p = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    expected = (order * (order - 1) * p**2 * (1 - p) ** max(0, order - 2)).max()
    assert peak(order) == pytest.approx(float(expected), abs=1e-8)


def test_coefficients_beyond_the_bound_are_refused() -> None:
    check(None, 3)
    check([[-50.0, -LIMIT / 2]], 1)
    assert used([-50.0, -LIMIT / 2]) == pytest.approx(LIMIT)
    with pytest.raises(UserError, match="several minima"):
        check([[0.0, 0.0], [1.0, -0.5]], 2)
    for rows in ([], [[1.0], [1.0, 2.0]]):
        with pytest.raises(UserError, match="no list of equally long lists"):
            check(rows, None)
    with pytest.raises(UserError, match="1 lists for 3 groups"):
        check([[0.1]], 3)


# -- the search ------------------------------------------------------------------------------------


def sampled(log_p: torch.Tensor, log_t: torch.Tensor, seed: int) -> Labelled:
    """Return a teacher's distributions with labels drawn from the true ones."""
    right = log_p.exp().multinomial(1, generator=seeded(seed))[:, 0]
    return labelled(log_t, right, torch.arange(len(right)), entries=64)


def search(data: Labelled, groups: Groups = "all") -> proxy_search.Found:
    shape = (data.log_t.shape[1] if groups == "class" else 1, 2)
    return proxy_search.search(data, groups, shape, 12, seeded())


def test_drawn_coefficients_are_within_the_bound() -> None:
    drawn = coefficients(50, draws=200)
    room = torch.tensor(peaks(5), dtype=torch.float64)
    assert ((-drawn).clamp(min=0) @ room).max() <= LIMIT + 1e-12
    assert (drawn[..., 1:] < 0).any()
    assert proxy_search.candidates((2, 3), 4, seeded())[0].eq(0).all()


def test_an_overconfident_teacher_is_mended_towards_the_truth() -> None:
    truth = logs(51, 150, 3, sharp=1.0)
    teacher = (3 * truth).log_softmax(-1)
    found = search(sampled(truth, teacher, 52), "class")
    assert found.accepted and found.proxy < found.teacher
    p = proxy(teacher.exp(), found.eps, groups_of(teacher, "class"))
    before, after = ((q - truth.exp()).square().sum(-1).mean() for q in (teacher.exp(), p))
    assert after < 0.5 * before


def test_a_calibrated_teacher_is_left_alone() -> None:
    answers = []
    for seed in range(4):
        truth = logs(60 + seed, 60, 3, sharp=1.0)
        found = search(sampled(truth, truth, seed))
        assert found.proxy <= found.teacher
        answers.append(bool(found.eps.any()))
        assert answers[-1] == found.accepted
    assert sum(answers) <= 1


def test_the_same_seed_finds_the_same() -> None:
    truth = logs(53, 40, 3)
    data = sampled(truth, (2 * truth).log_softmax(-1), 1)
    first, second = search(data), search(data)
    assert first.eps.equal(second.eps) and first.gain == second.gain


def test_the_guard_judges_on_rows_that_chose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every winner is chosen without the fold that it is scored on."""
    truth = logs(54, 30, 3)
    data = sampled(truth, truth, 2)
    seen, refined = [], proxy_search.refined

    def watched(data, tried, scores, sets, by):
        seen.append(sets)
        return refined(data, tried, scores, sets, by)

    monkeypatch.setattr(proxy_search, "refined", watched)
    search(data)
    [sets] = seen
    assert (~sets[:-1]).sum(0).eq(1).all()
    assert sets[-1].all()
    for part in range(2):  # what a set chooses does not depend on what it leaves out
        spoiled = replace(data, labels=torch.where(sets[part], data.labels, 0))
        both = []
        for some in (data, spoiled):
            tried = coefficients(58, 3, 2, 9)
            scores = some.proxy_brier(tried, "class")
            both.append(refined(some, tried, scores, sets[part : part + 1], "class")[0])
        assert both[0].equal(both[1])


def test_tokens_of_one_row_are_in_one_fold_and_count_as_one() -> None:
    rows = torch.arange(20).repeat_interleave(3)
    dealt = proxy_search.folds(rows, seeded())
    assert dealt.view(20, 3).eq(dealt.view(20, 3)[:, :1]).all()
    assert dealt.bincount().tolist() == [12] * 5
    values = torch.randn(20, generator=seeded(1), dtype=torch.float64)
    mean, error = proxy_search.clustered(values, torch.arange(20))
    assert (mean, error) == pytest.approx((float(values.mean()), float(values.std()) / 20**0.5))
    assert proxy_search.clustered(values.repeat_interleave(3), rows) == pytest.approx((mean, error))


def test_a_vocabulary_held_in_part_scores_as_the_whole() -> None:
    log_t = torch.cat([logs(55, 5, 4, 1.0), torch.full((5, 6), -4.0, dtype=torch.float64)], -1)
    log_t, right = log_t.log_softmax(-1), torch.tensor([0, 3, 9, 4, 1])
    whole, held = (labelled(log_t, right, torch.arange(5), entries=n) for n in (64, 4))
    assert held.log_t.shape == (5, 5) and held.counts.tolist() == [1, 1, 1, 1, 6]
    eps = coefficients(56, groups=1, draws=3)
    expected = whole.proxy_brier(eps, "all")
    torch.testing.assert_close(held.proxy_brier(eps, "all"), expected)
    torch.testing.assert_close(held.nll(held.log_t), -log_t.gather(-1, right[:, None])[:, 0])
    onehot = torch.nn.functional.one_hot(right, 10)
    torch.testing.assert_close(whole.brier(log_t.exp()), (log_t.exp() - onehot).square().sum(-1))


def test_questions_with_fewer_answers_are_joined_with_others() -> None:
    parts = [
        labelled(logs(i, 1, classes), torch.tensor([1]), torch.tensor([i]), entries=64)
        for i, classes in enumerate((2, 3))
    ]
    data = joined(parts)
    found = data.proxy_brier(coefficients(57, groups=1), "all")[0]
    alone = [p.proxy_brier(coefficients(57, groups=1), "all")[0, 0] for p in parts]
    torch.testing.assert_close(found, torch.stack(alone))


# -- recalibration ---------------------------------------------------------------------------------


def test_temperature_and_vector_scaling_undo_what_was_spoiled() -> None:
    truth = logs(70, 4000, 3, sharp=1.0)
    for spoiled, with_bias in (
        (Recalibration(2.0), False),
        (Recalibration(2.0, (1.0, 0, 0)), True),
    ):
        found = fitted(sampled(truth, spoiled(truth), 71), with_bias)
        assert found.factor == pytest.approx(0.5, rel=0.1)
        assert (found(spoiled(truth).log_softmax(-1)).log_softmax(-1) - truth).abs().mean() < 0.1
        assert len(found.bias) == 3 * with_bias


def test_as_it_stands_a_recalibration_changes_no_bit() -> None:
    z = torch.randn(3, 4, generator=seeded(1))
    assert Recalibration()(z).equal(z)


# -- a student and a teacher -----------------------------------------------------------------------


def plain(eps: torch.Tensor | None = None) -> fitting.Fit:
    rows = ((),) if eps is None else tuple(map(tuple, eps.tolist()))
    return fitting.Fit(rows)


def test_the_explicit_proxy_asks_for_the_same_minimum() -> None:
    log_t, eps, unknown = logs(80), coefficients(81, groups=1)[0], torch.full((6,), -1)
    aim = proxy(log_t.exp(), eps, ONE).log().requires_grad_()
    for to_proxy in (False, True):
        losses = Teaching(to_proxy=to_proxy).losses(log_t, aim, unknown, plain(eps))
        (slope,) = torch.autograd.grad(losses.sum(), aim)
        assert slope.abs().max() < 1e-12


def test_known_labels_alone_add_cross_entropy() -> None:
    z_t, z_s, labels = logs(82), logs(83), torch.tensor([0, -1, 3, -1, 2, 1])
    ways = (Teaching(beta=b, temperature=2.0) for b in (0.0, 0.5))
    without, with_ = (way.losses(z_t, z_s, labels, plain()) for way in ways)
    nll = torch.nn.functional.cross_entropy(z_s, labels.clamp(min=0), reduction="none")
    torch.testing.assert_close(with_ - without, 0.5 * nll * (labels >= 0))
    assert known_nll(z_s, torch.full((6,), -1)).eq(0).all()


def test_temperature_divides_both_and_keeps_the_size_of_gradients() -> None:
    z_t, z_s, unknown = logs(84), logs(85), torch.full((6,), -1)
    found = Teaching(temperature=3.0).losses(z_t, z_s, unknown, plain())
    expected = 9 * kl((z_t / 3).log_softmax(-1), (z_s / 3).log_softmax(-1))
    torch.testing.assert_close(found, expected)


def test_smoothing_mixes_the_teacher_with_the_uniform() -> None:
    found = smoothed(logs(86), 0.2).exp()
    torch.testing.assert_close(found, 0.8 * logs(86).exp() + 0.05)


def test_a_spoiled_teacher_is_sharper_and_leans_to_a_class() -> None:
    z = logs(87)
    found = Teaching(spoiled=Recalibration(2.0, (0.0, 1.0, 0.0, 0.0))).teacher(z)
    bias = torch.tensor([0.0, 1.0, 0.0, 0.0])
    torch.testing.assert_close(found, (2 * z + bias).log_softmax(-1))


def vocabulary(seed: int, rows: int, width: int, size: int) -> Readout:
    states, head = (
        torch.randn(shape, generator=seeded(seed + i))
        for i, shape in enumerate(((rows, width), (size, width)))
    )
    return Readout(states, lambda h: h @ head.T)


def test_pieces_give_the_loss_of_the_whole() -> None:
    teacher, student = vocabulary(90, 2 * CHUNK + 3, 4, 12), vocabulary(95, 2 * CHUNK + 3, 4, 12)
    states = student.states.requires_grad_()
    labels, weights = torch.arange(len(states)) % 12, torch.linspace(0, 2, len(states))
    for groups, fit in (
        ("all", plain(coefficients(91, 1)[0])),
        ("rank", plain(coefficients(92, 3)[0])),
    ):
        way = Teaching(groups=groups, beta=0.3)
        total = way.token_loss(teacher, student, labels, weights, fit)
        logits = [r.head(r.states) for r in (teacher, student)]
        whole = (weights * way.losses(*logits, labels, fit)).sum()
        torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-5)
        slopes = [torch.autograd.grad(x, states)[0] for x in (total, whole)]
        torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", ["all", "rank"])
def test_no_more_than_the_plan_says_is_held(groups: str) -> None:
    """Ten float32 tensors of a piece, whatever the number of positions."""
    size, rows = 3000, 3 * CHUNK
    teacher, student = vocabulary(93, rows, 4, size), vocabulary(97, rows, 4, size)
    fit = plain(coefficients(94, 3 if groups == "rank" else 1)[0])
    student.states.requires_grad_()
    with HeldBytes() as held:
        labels, weights = torch.zeros(rows, dtype=torch.int64), torch.ones(rows)
        Teaching(groups=groups).token_loss(teacher, student, labels, weights, fit).backward()
    planned = PERTURBED_BYTES * CHUNK * size
    assert 0.5 * planned < held.peak <= planned
