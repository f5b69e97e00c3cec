import copy

import bitsandbytes
import numpy as np
import pytest
import torch
from helpers import (
    SHAPE,
    adamw,
    base_for,
    batch_of,
    check_cost,
    context,
    generator,
    logits,
    prepared,
    tiny_model,
    train,
)

from effbench.api.schema import build
from effbench.methods.adapters.dylora import DyLoRA
from effbench.methods.adapters.lora import LoRA, Rank
from effbench.nn.adapters.lowrank import LowRankLinear, RankControl, control_of, low_rank_layers
from effbench.nn.llama.surgery import replace_linears
from effbench.nn.quant.linears import PackedLinear
from effbench.util.errors import UserError


def factors(model):
    return {n: p for n, p in model.named_parameters() if "lora_" in n}


def by_rank(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a factor with its ranks first."""
    return tensor if name.endswith("lora_A") else tensor.T


# -- the layer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["nested", "frozen"])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_one_step_agrees_with_float64_written_by_hand(mode, rank):
    layer = LowRankLinear(torch.nn.Linear(7, 6, bias=False), RankControl(5, mode), alpha=12.0)
    layer.double().base.requires_grad_(False)
    for p in layer.parameters():
        p.data = torch.randn(p.shape, generator=generator(1), dtype=torch.float64)
    layer.control.active = rank
    x, g = (torch.randn(4, n, generator=generator(2), dtype=torch.float64) for n in (7, 6))
    W, A, B = (p.detach().numpy().copy() for p in (layer.base.weight, layer.lora_A, layer.lora_B))
    X, G = x.numpy(), g.numpy()

    # y = x W' + s (x A') B' with s = alpha / b, and L = sum(g * y):
    # dA[k] = s * sum_t (g_t . B[:, k]) x_t,  dB[:, k] = s * sum_t (A[k] . x_t) g_t.
    scale = 12.0 / rank
    Y = X @ W.T
    dA, dB = np.zeros_like(A), np.zeros_like(B)
    for k in range(rank):
        Y += scale * np.outer(X @ A[k], B[:, k])
        if mode == "nested" or k == rank - 1:
            dA[k] = scale * (G @ B[:, k]) @ X
            dB[:, k] = scale * (X @ A[k]) @ G

    y = layer(x)
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.1)
    (y * g).sum().backward()
    optimizer.step()
    np.testing.assert_allclose(y.detach().numpy(), Y, atol=1e-12)
    np.testing.assert_allclose(layer.lora_A.detach().numpy(), A - 0.1 * dA, atol=1e-12)
    np.testing.assert_allclose(layer.lora_B.detach().numpy(), B - 0.1 * dB, atol=1e-12)


def test_the_scale_is_the_papers():
    # alpha / R with both factors multiplied by sqrt(R / b) is alpha / b.
    layer = LowRankLinear(torch.nn.Linear(7, 6, bias=False), RankControl(5), alpha=12.0).double()
    for p in layer.parameters():
        p.data = torch.randn(p.shape, generator=generator(1), dtype=torch.float64)
    x = torch.randn(4, 7, generator=generator(2), dtype=torch.float64)
    grown = (5 / 3) ** 0.5
    with layer.control.using(3), torch.no_grad():
        a, b = layer.lora_A[:3] * grown, layer.lora_B[:, :3] * grown
        expected = layer.base(x) + 12.0 / 5 * (x @ a.T) @ b.T
        torch.testing.assert_close(layer(x), expected, atol=1e-13, rtol=1e-13)


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "ranks", "points"),
    [
        ({"rank": 4}, (1, 2, 3, 4), ("r1", "r2", "r4")),
        ({"rank": 6, "ranks": "powers"}, (1, 2, 4, 6), ("r1", "r2", "r4", "r6")),
        ({"rank": 1, "ranks": "powers"}, (1,), ("r1",)),
        ({"rank": 8, "ranks": [3, 8]}, (3, 8), ("r3", "r8")),
        ({"rank": 8, "ranks": [8], "eval_ranks": [1, 8]}, (8,), ("r1", "r8")),
    ],
)
def test_rank_set_and_points(settings, ranks, points):
    method = build(DyLoRA, settings, "method")
    assert method.rank_set() == ranks
    assert tuple(p.name for p in method.points()) == points


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rank": 0}, "method.rank"),
        ({"rank": 8, "ranks": [0, 8]}, "method.ranks"),
        ({"rank": 8, "ranks": [8, 4]}, "method.ranks"),
        ({"rank": 8, "ranks": [4, 4, 8]}, "method.ranks"),
        ({"rank": 8, "ranks": [4, 16]}, "method.ranks"),
        ({"rank": 8, "ranks": [1, 2]}, "Add 8, or set method.rank=2"),
        ({"rank": 8, "ranks": "all"}, "method.ranks"),
        ({"rank": 8, "eval_ranks": [9]}, "method.eval_ranks"),
        ({"mode": "sorted"}, "method.mode"),
        ({"targets": ["lm_head"]}, "method.targets"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings, named):
    with pytest.raises(UserError, match=named):
        build(DyLoRA, settings, "method").resolve(SHAPE)


def test_a_rank_above_what_a_layer_can_have_is_refused():
    DyLoRA(rank=32).resolve(SHAPE)
    with pytest.raises(UserError, match=r"method\.rank=33 .* k_proj"):
        DyLoRA(rank=33).resolve(SHAPE)


@pytest.mark.parametrize(
    ("distribution", "ranks"), [("uniform", ()), ("inverse", "powers"), ("proportional", ())]
)
def test_ten_thousand_draws_follow_the_distribution(distribution, ranks):
    method = DyLoRA(rank=8, ranks=ranks, distribution=distribution, targets=("q_proj",))
    model, ctx = prepared(method, seed=4)
    drawn = []
    for _ in range(10_000):
        ctx.evolution.before_step()
        drawn.append(control_of(model).active)
    weight = {"uniform": lambda b: 1.0, "inverse": lambda b: 1 / b, "proportional": float}
    total = sum(weight[distribution](b) for b in method.rank_set())
    assert set(drawn) == set(method.rank_set())
    for b in method.rank_set():
        p = weight[distribution](b) / total
        assert abs(drawn.count(b) / 10_000 - p) < 4 * (p * (1 - p) / 10_000) ** 0.5


def test_all_layers_of_a_step_have_the_same_rank():
    model, ctx = prepared(DyLoRA(rank=8))
    for _ in range(5):
        ctx.evolution.before_step()
        assert len({id(layer.control) for _, layer in low_rank_layers(model)}) == 1
    assert len(list(low_rank_layers(copy.deepcopy(model)))) == 14
    assert control_of(copy.deepcopy(model)) is not control_of(model)


# -- training --------------------------------------------------------------------------------------


def test_training_learns_at_every_point():
    method = DyLoRA(rank=4)
    model, ctx = prepared(method)
    before = method.loss(model, batch_of(), ctx).item()
    train(method, model, ctx, 24, same_batch=True)
    for point in method.points():
        with method.at(model, point):
            assert method.loss(model, batch_of(), ctx).item() < before - 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drawing_the_highest_rank_alone_is_lora(dtype):
    losses = []
    for method in (DyLoRA(rank=4, ranks=(4,), dropout=0.1), LoRA(rank=4, dropout=0.1)):
        model, ctx = prepared(method, dtype=dtype)
        torch.manual_seed(5)
        losses.append(train(method, model, ctx, 4))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("mode", ["nested", "frozen"])
def test_only_the_ranks_of_a_step_get_gradients(mode):
    method = DyLoRA(rank=6, mode=mode)
    model, ctx = prepared(method)
    for p in factors(model).values():
        p.data.normal_(std=0.1, generator=generator(3))
    with method.at(model, Rank(4)):
        method.loss(model, batch_of(), ctx).backward()
    for name, p in factors(model).items():
        moved = by_rank(name, p.grad).abs().amax(1) > 0
        assert moved.tolist() == [mode == "nested"] * 3 + [True] + [False] * 2, name


def test_frozen_and_nested_have_the_same_loss():
    found = []
    for mode in ("nested", "frozen"):
        method = DyLoRA(rank=6, mode=mode)
        model, ctx = prepared(method)
        for p in factors(model).values():
            p.data.normal_(std=0.1, generator=generator(3))
        with method.at(model, Rank(4)):
            found.append(method.loss(model, batch_of(), ctx).item())
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def step_at(method, model, ctx, optimizer, rank):
    control_of(model).active = rank
    method.update(model, optimizer, [batch_of(rank)], ctx)


@pytest.mark.parametrize("mode", ["nested", "frozen"])
@pytest.mark.parametrize("first", [2, 6])
def test_protected_ranks_and_their_moments_stay_bit_for_bit(mode, first):
    method = DyLoRA(rank=6, mode=mode, protect_inactive=True)
    model, ctx = prepared(method)
    optimizer = adamw(model, weight_decay=0.1)
    step_at(method, model, ctx, optimizer, first)
    now = factors(model)
    state = optimizer.state_dict()["state"]
    old = {n: p.detach().clone() for n, p in now.items()}
    moments = [{k: v.clone() for k, v in s.items()} for s in state.values()]
    step_at(method, model, ctx, optimizer, 2)
    for (name, p), before, after in zip(now.items(), moments, state.values(), strict=True):
        kept = [k for k in range(6) if k > 1 or (mode == "frozen" and k == 0)]
        assert by_rank(name, p)[kept].equal(by_rank(name, old[name])[kept])
        assert not by_rank(name, p)[1].equal(by_rank(name, old[name])[1])
        for key in ("exp_avg", "exp_avg_sq"):
            assert by_rank(name, after[key])[kept].equal(by_rank(name, before[key])[kept])


def test_protection_reaches_moments_that_a_step_has_just_made():
    method = DyLoRA(rank=6, protect_inactive=True)
    model, ctx = prepared(method)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9, weight_decay=0.1)
    step_at(method, model, ctx, optimizer, 2)
    for (name, _), state in zip(
        factors(model).items(), optimizer.state_dict()["state"].values(), strict=True
    ):
        assert (by_rank(name, state["momentum_buffer"])[2:] == 0).all()


def test_unprotected_ranks_are_moved_by_momentum():
    method = DyLoRA(rank=6)
    model, ctx = prepared(method)
    optimizer = adamw(model)
    step_at(method, model, ctx, optimizer, 6)
    step_at(method, model, ctx, optimizer, 6)
    old = {n: p.detach().clone() for n, p in factors(model).items()}
    step_at(method, model, ctx, optimizer, 2)
    assert all(
        not by_rank(n, p)[2:].equal(by_rank(n, old[n])[2:]) for n, p in factors(model).items()
    )


def test_protection_refuses_moments_that_it_cannot_put_back():
    method = DyLoRA(rank=6, protect_inactive=True)
    model, ctx = prepared(method)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = bitsandbytes.optim.AdamW8bit(trained, min_8bit_size=16)
    with pytest.raises(UserError, match="protect_inactive"):
        step_at(method, model, ctx, optimizer, 2)


def test_a_resumed_run_draws_the_same_ranks_and_ends_the_same():
    method = DyLoRA(rank=8)
    model, ctx = prepared(method)
    whole = train(method, model, ctx, 6)

    first, first_ctx = prepared(method)
    optimizer = adamw(first)
    losses = train(method, first, first_ctx, 3, optimizer)
    saved = copy.deepcopy(
        (method.trained_tensors(first), optimizer.state_dict(), first_ctx.generator.get_state())
    )
    second, second_ctx = prepared(method)
    for name, tensor in method.trained_tensors(second).items():
        tensor.copy_(saved[0][name])
    optimizer = adamw(second)
    optimizer.load_state_dict(saved[1])
    second_ctx.generator.set_state(saved[2])
    second_ctx.step = 3
    assert losses + train(method, second, second_ctx, 3, optimizer) == whole
    assert control_of(second).active == control_of(model).active
    assert all(p.equal(factors(second)[n]) for n, p in factors(model).items())


def test_recomputed_activations_have_the_rank_of_the_step():
    grads = []
    for recompute in (False, True):
        method = DyLoRA(rank=6)
        model, ctx = prepared(method)
        for p in factors(model).values():
            p.data.normal_(std=0.1, generator=generator(3))
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        control_of(model).active = 3
        method.loss(model, batch_of(), ctx).backward()
        grads.append([p.grad for p in factors(model).values()])
    assert all(a.equal(b) for a, b in zip(*grads, strict=True))


# -- use -------------------------------------------------------------------------------------------


def test_the_rank_is_as_before_after_a_point_even_after_an_error():
    method = DyLoRA(rank=8)
    model, ctx = prepared(method)
    assert control_of(model).active == 8
    ctx.evolution.before_step()
    before = control_of(model).active
    with pytest.raises(RuntimeError), method.at(model, Rank(1)):
        assert control_of(model).active == 1
        raise RuntimeError
    assert control_of(model).active == before
    with pytest.raises(ValueError, match="no rank 9"):
        method.at(model, Rank(9))


@pytest.mark.parametrize("point", [Rank(1), Rank(4)])
def test_cost_is_what_is_counted(point):
    method = DyLoRA(rank=4, targets=("k_proj", "gate_proj"))
    check_cost(method, prepared(method)[0], point)


def test_it_goes_on_from_a_packed_base():
    method = DyLoRA(rank=4)
    base = tiny_model()
    replace_linears(base, lambda _, linear: PackedLinear.quantise(linear, 4, 32))
    before = logits(base)
    ctx = context()
    model = method.prepare(base, ctx)
    assert logits(model).equal(before)
    losses = train(method, model, ctx, 10, same_batch=True)
    assert losses[-1] < losses[0] - 0.1


def test_save_and_load_give_the_same_logits_at_every_point(tmp_path):
    method = DyLoRA(rank=4)
    model, ctx = prepared(method)
    train(method, model, ctx, 4)
    method.save(model, tmp_path)
    again = method.load(base_for(method), tmp_path, context(seed=9))
    for point in method.points():
        with method.at(model, point), method.at(again, point):
            assert logits(again).equal(logits(model))
