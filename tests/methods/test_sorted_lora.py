"""Sorted-LoRA, and what all methods with depths share: see also `test_sorted_full.py`."""

import copy
import json
import weakref
from dataclasses import replace
from itertools import pairwise

import peft
import pytest
import torch
from helpers import (
    SHAPE,
    adamw,
    batch_of,
    begun,
    context,
    counted,
    flops,
    generator,
    stated,
    tiny_model,
    train,
    window,
)
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from effbench.api.cost import cost_of
from effbench.api.footprint import training_of
from effbench.api.points import UNNAMED
from effbench.api.schema import build
from effbench.api.shape import ModelShape
from effbench.api.submodels import depth_set
from effbench.methods.adapters.lora import LoRA
from effbench.methods.base import Method
from effbench.methods.chain import chain_cost, shape_of
from effbench.methods.depth.points import Depth, Mixed
from effbench.methods.depth.sorted_lora import SortedLoRA
from effbench.methods.full import Full
from effbench.methods.quant.rtn import RTN
from effbench.nn.adapters.merge import merged
from effbench.nn.decode.early_exit import confident, paper_thresholds
from effbench.nn.decode.session import greedy
from effbench.nn.depth import layerskip
from effbench.nn.depth.submodel import exit_states, readout
from effbench.nn.llama.stack import at_layers
from effbench.nn.llama.surgery import replace_linears
from effbench.nn.quant.linears import PackedLinear
from effbench.resources.counting import LayerForwards
from effbench.util.errors import UserError

DEEP = replace(SHAPE, num_layers=5)
IDS = batch_of().input_ids


def deep(seed=0, dtype=torch.float32):
    return tiny_model(seed, dtype, DEEP)


def ready(dtype=torch.float32, seed=0, **settings):
    """Return the method, its model and a context."""
    method = SortedLoRA(**{"rank": 4, "depths": (2, 3, 5), **settings}).resolve(DEEP)
    ctx = context(seed, dtype)
    return method, begun(method, deep(dtype=dtype), ctx), ctx


def trained_model(**settings):
    """Return method and model with adapters and norm moved away from where they started."""
    method, model, ctx = ready(**settings)
    for p in trainable(model).values():
        p.data.add_(0.1 * torch.randn(p.shape, generator=generator(3)))
    return method, model, ctx


def trainable(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def layer_of(name):
    return int(name.split(".")[2]) if ".layers." in name else -1


@torch.no_grad()
def logits_at(method, model, point, batch=None):
    with method.at(model.eval(), point):
        return method.logits(model, batch or batch_of(), point)


# -- invariants 1, 2, 6: an exit is the model cut there ----------------------------------------


@pytest.mark.parametrize("n", range(1, 6))
def test_a_depth_is_the_model_that_transformers_cuts(n):
    method, model, _ = trained_model()
    ours = logits_at(method, model, Depth(n))
    batch = batch_of()
    states = exit_states(model, (1, n), batch.input_ids, batch.attention_mask)
    model.config.num_hidden_layers = n  # the stock model runs layers[:n]
    with torch.no_grad():
        stock = Method().logits(model, batch)
    assert ours.equal(stock)
    model.config.num_hidden_layers = 5
    with torch.no_grad():
        assert readout(model, states[n], n).equal(stock)


def test_the_last_exit_is_normed_once():
    model = deep().eval().requires_grad_(False)
    batch = batch_of()
    state = exit_states(model, (5,), batch.input_ids, batch.attention_mask)[5]
    out = model(batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
    assert readout(model, state, 5).equal(out.logits)
    assert model.model.norm(state).equal(out.hidden_states[-1])
    assert not state.equal(out.hidden_states[-1])


@pytest.mark.parametrize("layout", ["prefix", "skip_middle"])
def test_untrained_every_exit_is_the_bases(layout):
    method, model, _ = ready(layout=layout)
    base = deep().eval()
    for n in (2, 3, 5):
        with at_layers(base, method.kept(n, 5)), torch.no_grad():
            expected = Method().logits(base, batch_of())
        assert logits_at(method, model, Depth(n)).equal(expected)


def test_a_sub_model_without_middle_layers():
    method, model, _ = trained_model(layout="skip_middle")
    assert [method.kept(n, 5) for n in (1, 2, 3, 4, 5)] == [
        [0],
        [0, 4],
        [0, 1, 4],
        [0, 1, 3, 4],
        [0, 1, 2, 3, 4],
    ]
    model.eval()
    with method.at(model, Depth(3)), torch.no_grad():
        assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]
        session = method.session(model)
        steps = [session.prefill(IDS[:1, :6])]
        steps += [session.step(IDS[:1, t : t + 1]) for t in range(6, 12)]
        whole = method.logits(model, batch_of())[0, 5:]
    torch.testing.assert_close(torch.cat(steps), whole, atol=1e-5, rtol=1e-4)
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3, 4]


def test_everything_is_as_before_after_a_depth_even_after_an_error():
    method, model, _ = trained_model()
    model.config.layer_types = ["full_attention"] * 5
    layers = list(model.model.layers)
    with pytest.raises(RuntimeError), method.at(model, Depth(2)):
        assert len(model.model.layers) == model.config.num_hidden_layers == 2
        assert len(model.config.layer_types) == 2
        raise RuntimeError
    assert list(model.model.layers) == layers and model.config.num_hidden_layers == 5
    assert len(model.config.layer_types) == 5


# -- invariant 3: the deepest depth alone is LoRA ----------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", ["sampled", "soft"])
def test_drawing_the_full_depth_alone_is_lora(dtype, objective):
    settings = {"depths": (5,), "train_norm": False, "alpha": 16.0, "dropout": 0.1}
    runs = []
    for method in (SortedLoRA(rank=4, objective=objective, **settings), LoRA(4, 16.0, 0.1)):
        ctx = context(dtype=dtype)
        model = begun(method, deep(dtype=dtype), ctx)
        torch.manual_seed(5)
        runs.append((train(method, model, ctx, 4), trainable(model)))
    (losses, ours), (expected, theirs) = runs
    if objective == "sampled":
        assert losses == expected
        assert ours.keys() == theirs.keys() and all(p.equal(theirs[n]) for n, p in ours.items())
    else:
        assert losses == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 1e-2)


def test_one_depth_alone_is_lora_on_the_extracted_model(tmp_path):
    method, model, ctx = ready(depths=(2,), train_norm=False)
    losses = train(method, model, ctx, 4)
    small, small_ctx = deep(), context()
    small.model.layers = small.model.layers[:2]
    small.config.num_hidden_layers = 2
    alone = LoRA(4, 32.0)
    small = begun(alone, small, small_ctx)
    assert train(alone, small, small_ctx, 4) == losses
    ours, theirs = trainable(model), trainable(small)
    assert ours.keys() == theirs.keys() and all(p.equal(theirs[n]) for n, p in ours.items())
    assert method.points() == (Depth(2),)


# -- invariant 4: what does not run does not change --------------------------------------------


@pytest.mark.parametrize("layout", ["prefix", "skip_middle"])
def test_layers_that_do_not_run_stay_bit_for_bit(layout):
    method, model, ctx = ready(layout=layout)
    optimizer = adamw(model, weight_decay=0.1)
    train(method, model, ctx, 6, optimizer)  # every tensor has moments now
    run = method.kept(3, 5)
    ctx.evolution.left = [3, 3]
    before = {n: p.detach().clone() for n, p in trainable(model).items()}
    moments = {p: s["exp_avg"].clone() for p, s in optimizer.state.items()}
    method.update(model, optimizer, window(9), ctx)
    for name, p in trainable(model).items():
        inside = layer_of(name) in (-1, *run)
        assert (p.grad is not None) == inside, name
        assert p.equal(before[name]) != inside, name
        assert optimizer.state[p]["exp_avg"].equal(moments[p]) != inside, name


# -- invariant 5: the summed loss --------------------------------------------------------------


@pytest.mark.parametrize("layout", ["prefix", "skip_middle"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_soft_loss_is_the_mean_over_exits_and_so_is_its_gradient(layout, checkpointing):
    method, model, ctx = trained_model(objective="soft", layout=layout)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = batch_of()
    loss = method.loss(model, batch, ctx)
    loss.backward()
    ours = {n: p.grad.clone() for n, p in trainable(model).items()}
    model.zero_grad(set_to_none=True)
    singles = []
    for n in (2, 3, 5):
        with method.at(model, Depth(n)):
            single = Full().loss(model, batch, ctx)
            (single / 3).backward()
        singles.append(single.item())
    assert loss.item() == pytest.approx(sum(singles) / 3, abs=1e-6)
    for name, p in trainable(model).items():
        torch.testing.assert_close(ours[name], p.grad, atol=1e-6, rtol=1e-5)


def test_the_logits_of_two_exits_are_never_in_memory_at_once():
    method, model, ctx = trained_model(objective="soft")
    alive, most = [], 0

    def watch(module, inputs, output):
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))
        alive.append(weakref.ref(output))

    model.lm_head.register_forward_hook(watch)
    method.loss(model, batch_of(), ctx).backward()
    assert len(alive) == 6  # each of three exits, and again when its gradient is taken
    assert most == 0


# -- LayerSkip's objective ---------------------------------------------------------------------


def test_layers_are_left_out_ever_more_often():
    rates = layerskip.drop_rates(32)
    assert rates[0] == 0 and rates[-1] == pytest.approx(layerskip.MOST_DROPPED)
    assert rates[16] / rates[-1] == pytest.approx(2 ** (16 / 31) - 1)
    assert rates == sorted(rates) and layerskip.drop_rates(1) == [0]


def test_exits_weigh_what_their_depth_is_and_take_turns():
    depths = (18, 21, 24, 30)
    seen = [layerskip.exit_weights(depths, 30, step) for step in range(4)]
    assert [min(w) for w in seen] == [18, 21, 24, 18]
    assert all(max(w) == 30 and sum(w.values()) == pytest.approx(1) for w in seen)
    below, last = 18 * 17 / 2, 29 + 29 * 28 / 2  # 0 + 1 + ... + 17; L - 1 and 0 + ... + L - 2
    assert seen[0][18] == pytest.approx(below / (below + last))
    assert layerskip.exit_weights((5,), 5, 3) == {5: 1.0}
    assert layerskip.exit_weights((1,), 5, 0) == {1: 1.0}


@pytest.mark.parametrize("step", [0, 1])
def test_the_layerskip_loss_is_the_weighted_sum_of_two_exits(step, monkeypatch):
    monkeypatch.setattr(layerskip, "MOST_DROPPED", 0.0)
    method, model, ctx = trained_model(objective="layerskip")
    ctx.step = step
    loss = method.loss(model, batch_of(), ctx)
    loss.backward()
    ours = {n: p.grad.clone() for n, p in trainable(model).items() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    total = 0.0
    for n, weight in layerskip.exit_weights((2, 3, 5), 5, step).items():
        with method.at(model, Depth(n)):
            single = weight * Full().loss(model, batch_of(), ctx)
            single.backward()
        total += single.item()
    assert loss.item() == pytest.approx(total, rel=1e-6)
    for name, p in trainable(model).items():
        torch.testing.assert_close(ours[name], p.grad, atol=1e-6, rtol=1e-5)


def test_a_layer_that_is_left_out_hands_its_input_on(monkeypatch):
    # Layers 1 and 4 are out: the exit at 3 is layers 0 and 2, the last one 0, 2 and 3.
    monkeypatch.setattr(layerskip, "drop_rates", lambda count: [0, 2, 0, 0, 2])
    method, model, ctx = trained_model(objective="layerskip", depths=(3, 5))
    loss = method.loss(model, batch_of(), ctx)
    expected = 0.0
    for n, weight in layerskip.exit_weights((3, 5), 5, 0).items():
        with at_layers(model, [i for i in (0, 2, 3) if i < n]):
            expected += weight * Full().loss(model, batch_of(), ctx).item()
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    grads = {layer_of(n) for n, p in trainable(model).items() if p.grad is not None}
    assert grads == {-1, 0, 2, 3}
    assert len(model.model.layers) == 5


def test_layers_are_left_out_as_often_as_stated():
    method, model, ctx = ready(objective="layerskip")
    counted = LayerForwards(model.model.layers)
    for _ in range(100):
        method.loss(model, batch_of(rows=1), ctx)
    passes = counted.count / batch_of(rows=1).input_ids.numel() / 100
    counted.close()
    stated = training_of(shape_of(method, DEEP, phase="train"), "float32").run
    assert stated == pytest.approx(sum(1 - p for p in layerskip.drop_rates(5)))
    assert abs(passes - stated) < 4 * (sum(layerskip.drop_rates(5)) / 100) ** 0.5


def test_layerskip_with_one_depth_and_no_dropout_is_plain(monkeypatch):
    monkeypatch.setattr(layerskip, "MOST_DROPPED", 0.0)
    runs = []
    for objective in ("layerskip", "soft"):
        method, model, ctx = ready(objective=objective, depths=(5,))
        runs.append(train(method, model, ctx, 3))
    assert runs[0] == runs[1]


# -- draws -------------------------------------------------------------------------------------


def test_a_cycle_goes_through_all_depths_before_one_repeats():
    _, _, ctx = ready()
    drawn = [ctx.evolution.draw() for _ in range(30)]
    cycles = [tuple(drawn[i : i + 3]) for i in range(0, 30, 3)]
    assert all(sorted(c) == [2, 3, 5] for c in cycles)
    assert len(set(cycles)) > 2


def test_ten_thousand_independent_draws_are_uniform():
    _, _, ctx = ready(sampling="uniform")
    drawn = [ctx.evolution.draw() for _ in range(10_000)]
    for n in (2, 3, 5):
        assert abs(drawn.count(n) / 10_000 - 1 / 3) < 4 * (2 / 9 / 10_000) ** 0.5
    threes = [set(drawn[i : i + 3]) for i in range(0, 30, 3)]
    assert any(len(three) < 3 for three in threes), "no cycle"


def test_one_step_mixes_depths():
    method, model, ctx = ready()
    seen = []
    hooks = [
        layer.register_forward_hook(lambda *_, i=i: seen.append(i))
        for i, layer in enumerate(model.model.layers)
    ]
    method.update(model, adamw(model), window(), ctx)
    for hook in hooks:
        hook.remove()
    ends = [a for a, b in zip(seen, [*seen[1:], 0], strict=True) if b == 0]
    assert len(ends) == 2 and len(set(ends)) == 2


def test_a_resumed_run_draws_on_and_ends_the_same():
    method, model, ctx = ready()
    whole = train(method, model, ctx, 5)
    method, first, first_ctx = ready()
    optimizer = adamw(first)
    losses = train(method, first, first_ctx, 2, optimizer)
    saved = copy.deepcopy(
        (
            method.trained_tensors(first),
            optimizer.state_dict(),
            first_ctx.generator.get_state(),
            first_ctx.evolution.state_dict(),
        )
    )
    assert saved[3].keys() == {"left"} and len(saved[3]["left"]) == 2
    _, second, ctx = ready()
    for name, tensor in method.trained_tensors(second).items():
        tensor.copy_(saved[0][name])
    optimizer = adamw(second)
    optimizer.load_state_dict(saved[1])
    ctx.generator.set_state(saved[2])
    ctx.evolution.load_state_dict(saved[3])
    ctx.step = 2
    assert losses + train(method, second, ctx, 3, optimizer) == whole


def test_reweighting_is_a_learning_rate_of_each_layer():
    rate = {-1: 1, 0: 1, 1: 1, 2: 3 / 2, 3: 3, 4: 3}

    def step(reweight, by_layer):
        method, model, ctx = trained_model(reweight=reweight)
        groups = [
            {"params": [p], "lr": 1e-2 * (rate[layer_of(n)] if by_layer else 1)}
            for n, p in trainable(model).items()
        ]
        ctx.evolution.left = [5, 5]
        method.update(model, torch.optim.AdamW(groups, weight_decay=0.1), window(), ctx)
        return trainable(model)

    ours, theirs, plain = step(True, False), step(False, True), step(False, False)
    for name, p in ours.items():
        torch.testing.assert_close(p, theirs[name], atol=1e-6, rtol=1e-5)
        assert torch.allclose(p, plain[name], atol=1e-5) == (rate[layer_of(name)] == 1), name


# -- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["sampled", "soft", "layerskip"])
def test_every_depth_learns(objective):
    method, model, ctx = ready(objective=objective)
    nll = {}
    for when in ("before", "after"):
        for point in method.points():
            with method.at(model, point), torch.no_grad():
                nll[when, point] = method.token_nll(model, batch_of(0), point).sum().item()
        if when == "before":
            train(method, model, ctx, 9, same_batch=True)
    for point in method.points():
        assert nll["after", point] < nll["before", point] - 1


def test_the_norm_trains_in_float32_below_a_short_dtype():
    method, model, ctx = ready(dtype=torch.bfloat16)
    norm = model.model.norm.weight
    assert norm.requires_grad and norm.dtype == torch.float32
    before = norm.detach().clone()
    optimizer = torch.optim.SGD([norm], lr=1e-3)
    method.update(model, optimizer, window(), ctx)
    assert 0 < (norm - before).abs().max() < 2e-3  # bfloat16 cannot tell 1.001 from 1
    assert method.logits(model, batch_of()).dtype == torch.bfloat16
    _, frozen, _ = ready(dtype=torch.bfloat16, train_norm=False)
    assert not frozen.model.norm.weight.requires_grad


def test_it_goes_on_from_a_packed_base():
    method = SortedLoRA(rank=4, depths=(2, 5))
    base = deep()
    replace_linears(base, lambda _, linear: PackedLinear.quantise(linear, 4, 32))
    ctx = context()
    model = begun(method, base, ctx)
    losses = train(method, model, ctx, 8, same_batch=True)
    assert losses[-1] < losses[1]
    base_cost = chain_cost([RTN(bits=4, group_size=32), method], DEEP, "float32", Depth(2))
    with method.at(model, Depth(2)):
        found = counted(model)
    assert base_cost.resident_bytes == found["resident_bytes"]
    assert base_cost.trainable == found["trainable"]


# -- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "shallowest", "depths"),
    [
        (40, 0.3, tuple(range(12, 41, 4))),  # Sorted LLaMA's
        (32, 0.6, (20, 24, 28, 32)),
        (30, 0.6, (18, 21, 24, 27, 30)),
        (4, 0.6, (3, 4)),
        (2, 0.6, (2,)),
        (1, 0.3, (1,)),
    ],
)
def test_depths_follow_from_the_number_of_layers(layers, shallowest, depths):
    assert depth_set(layers, shallowest) == depths
    shape = replace(SHAPE, num_layers=layers)
    if shallowest == 0.6:
        assert SortedLoRA().resolve(shape).points() == tuple(Depth(n) for n in depths)
        assert SortedLoRA().validation_point(shape) == Depth(layers)


def test_thresholds_are_the_papers_at_its_exits():
    assert paper_thresholds(7) == (0.95, 0.95, 0.9, 0.9, 0.8, 0.8, 0.7)
    assert paper_thresholds(4) == (0.95, 0.95, 0.9, 0.8)
    assert paper_thresholds(1) == (0.95,)


def test_a_threshold_is_to_be_exceeded():
    logits = torch.tensor([[0.0, 0.0], [0.0, 0.1], [0.0, 200.0]])  # 0.5, more, and 1
    assert confident((0.5,))(0, logits).tolist() == [False, True, True]
    assert not confident((1.0,))(0, logits).any()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"depths": [5, 2]}, r"method\.depths"),
        ({"depths": [2, 2, 5]}, r"method\.depths"),
        ({"depths": [2, 6]}, r"depth 6, but the model has 5"),
        ({"depths": [2, 4]}, r"does not hold 5"),
        ({"depths": [0, 5]}, r"method\.depths"),
        ({"eval_depths": [6]}, r"method\.eval_depths"),
        ({"layout": "skip_middle", "decoding": ["exit"]}, r"method\.decoding"),
        ({"objective": "soft", "reweight": True}, r"method\.reweight"),
        ({"objective": "layerskip", "layout": "skip_middle"}, r"method\.objective=layerskip"),
        ({"decoding": ["exit"], "thresholds": [0.5]}, r"method\.thresholds has 1"),
        ({"depths": [5], "decoding": ["exit"]}, r"method\.decoding"),
        ({"decoding": ["speculative"], "draft_depth": 5}, r"method\.draft_depth"),
        ({"rank": 33}, r"method\.rank=33"),
        ({"targets": ["lm_head"]}, r"method\.targets"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings, named):
    with pytest.raises(UserError, match=named):
        build(SortedLoRA, {"depths": [2, 3, 5], **settings}, "method").resolve(DEEP)


def test_a_depth_that_the_model_does_not_have_is_refused():
    method, model, _ = ready()
    for depth in (6, 0):
        with pytest.raises(ValueError, match="no depth"), method.at(model, Depth(depth)):
            pass


# -- invariants 7, 8: what a depth costs -------------------------------------------------------


@pytest.mark.parametrize("layout", ["prefix", "skip_middle"])
def test_a_depth_caches_its_own_layers_alone(layout):
    method, model, _ = ready(layout=layout)
    full = None
    for n in (5, 3, 2):
        with method.at(model.eval(), Depth(n)):
            session = method.session(model)
            session.prefill(IDS)
            session.step(IDS[:, :1])
        used = session.kv_bytes()
        assert used == 2 * n * SHAPE.num_kv_heads * SHAPE.head_dim * 4 * 13 * 2
        full = full or used
        assert used == full * n / 5
        assert chain_cost([method], DEEP, "float32", Depth(n)).kv_bytes_per_token == used / 13 / 2


@pytest.mark.parametrize("layout", ["prefix", "skip_middle"])
def test_parameters_rise_with_depth_and_nest(layout):
    method, model, _ = ready(layout=layout, depths=(5,))
    names, held, sizes, stated_ = [], [], [], []
    for n in range(1, 6):
        kept = method.kept(n, 5)
        with method.at(model, Depth(n)):
            sizes.append(sum(p.numel() for p in model.parameters()))
            names.append(set(dict(model.named_parameters())))
            held.append({id(p) for p in model.parameters()})
        stated_.append(chain_cost([method], DEEP, "float32", Depth(n)).params)
        assert len(kept) == n
    assert sizes == sorted(set(sizes)) == stated_
    assert all(a < b for found in (names, held) for a, b in pairwise(found))


@pytest.mark.parametrize("point", [Depth(2), Depth(5), UNNAMED])
@pytest.mark.parametrize("norm", [True, False])
def test_cost_is_what_is_counted(point, norm):
    method, model, _ = ready(train_norm=norm, targets=("k_proj", "gate_proj"))
    with method.at(model.eval(), point):
        assert stated(method, point, DEEP) == counted(model)
        assert chain_cost([method], DEEP, "float32", point).flops_per_token == flops(model)
        assert chain_cost([method], DEEP, "float32", point).saving == (
            "physical" if point == Depth(2) else "none"
        )


@pytest.mark.parametrize(("layout", "layers"), [("prefix", (0, 1, 2)), ("skip_middle", (0, 1, 4))])
def test_one_depth_alone_trains_its_own_layers_alone(layout, layers):
    method, model, _ = ready(depths=(3,), eval_depths=(2, 3, 5), layout=layout)
    assert {layer_of(n) for n in trainable(model)} == {-1, *layers}
    for point in method.points():
        with method.at(model, point):
            assert stated(method, point, DEEP) == counted(model)


@pytest.mark.parametrize("point", [Mixed("exit"), Mixed("speculative")])
def test_the_stated_work_of_dynamic_decoding_is_the_most_it_can_be(point):
    from effbench.resources.counting import flops as work

    settings = {"thresholds": (1.0, 1.0), "draft_window": "constant", "draft_tokens": 3}
    method, model, _ = trained_model(decoding=("exit", "speculative"), **settings)
    with method.at(model.eval(), point), torch.inference_mode():
        session = method.session(model, point)
        token = session.prefill(IDS[:1]).argmin(-1, keepdim=True)

        def decode():
            nonlocal token
            for _ in range(6):  # the least likely token is never a draft
                token = session.step(token).argmin(-1, keepdim=True)

        found = work(decode) / 6
    cost = chain_cost([method], DEEP, "float32", point)
    assert cost.flops_per_token == pytest.approx(found, rel=0.01)
    passes = session.counts()["layer_passes"]
    assert passes == {"exit": 5, "speculative": 2 * 4 + 3}[point.name]
    # Weights once a pass, and the head at each exit or draft and at verification.
    head = cost_of(ModelShape.of(DEEP).only(()), "float32").bytes_per_token
    layer = (chain_cost([method], DEEP, "float32", Depth(5)).bytes_per_token - head) / 5
    heads = {"exit": 3, "speculative": 4}[point.name]
    assert cost.bytes_per_token == pytest.approx(passes * layer + heads * head)


# -- decoding ----------------------------------------------------------------------------------


def test_the_points_of_dynamic_decoding_come_first():
    method, _, _ = ready(decoding=("exit", "speculative"))
    assert [p.name for p in method.points()] == ["exit", "speculative", "d2", "d3", "d5"]
    assert replace(method, eval_depths=(3,)).exits(5) == (3, 5)
    assert replace(method, depths=(3,), eval_depths=(2, 4)).exits(5) == (2, 3)


@pytest.mark.parametrize("kv", ["recompute", "propagate"])
def test_logits_at_exit_are_those_of_decoding(kv):
    method, model, _ = trained_model(decoding=("exit",), thresholds=(0.06, 0.05), kv=kv)
    batch = batch_of(rows=1)
    batch.labels[:, :3] = -100
    model.eval()
    with method.at(model, Mixed("exit")), torch.no_grad():
        session = method.session(model, Mixed("exit"))
        steps = [session.prefill(batch.input_ids[:, :3])]
        steps += [session.step(batch.input_ids[:, t : t + 1]) for t in range(3, 10)]
        whole = method.logits(model, batch, Mixed("exit"))
        nll = method.token_nll(model, batch, Mixed("exit"))
    assert 2 < session.counts()["exit_depth"] < 5
    torch.testing.assert_close(torch.stack(steps, 1), whole[:, 2:10], atol=1e-5, rtol=1e-4)
    expected = whole[:, 2:9].log_softmax(-1).gather(-1, batch.labels[:, 3:10, None])[..., 0]
    torch.testing.assert_close(nll[:, 2:9], -expected, atol=1e-5, rtol=1e-4)
    assert not nll[:, :2].any()
    with torch.no_grad():
        assert not method.logits(model, batch)[:, 2:10].equal(whole[:, 2:10])


@torch.no_grad()
def test_dynamic_decoding_with_adapters_ends_at_the_full_model_or_the_shallowest_exit():
    method, model, _ = trained_model(decoding=("exit", "speculative"))

    def tokens(point, **settings):
        own = replace(method, **settings)
        with own.at(model.eval(), point):
            return greedy(own.session(model, point), IDS[:1], 20)

    full, shallow = tokens(Depth(5)), tokens(Depth(2))
    assert not full.equal(shallow)
    assert tokens(Mixed("speculative")).equal(full)
    assert tokens(Mixed("exit"), thresholds=(1.1, 1.1)).equal(full)
    assert tokens(Mixed("exit"), thresholds=(0.0, 0.0)).equal(shallow)
    with merged(model):
        assert tokens(Mixed("speculative")).equal(tokens(Depth(5)))


def test_sessions_follow_the_settings():
    method, model, _ = ready(
        decoding=("exit", "speculative"), draft_depth=3, draft_tokens=2, draft_window="constant"
    )
    with method.at(model, Mixed("speculative")):
        session = method.session(model, Mixed("speculative"))
        assert [len(s) for s in session.staged.stages] == [3, 2]
        assert (session.window, session.adaptive) == (2, False)
    with method.at(model, Mixed("exit")):
        assert [len(s) for s in method.session(model, Mixed("exit")).staged.stages] == [2, 1, 2]
        with pytest.raises(RuntimeError), method.at(model, Depth(2)):
            raise RuntimeError
        assert hasattr(method.session(model, Mixed("exit")), "rule")
    assert not hasattr(method.session(model), "staged")


# -- artefact ----------------------------------------------------------------------------------


def test_save_and_load_give_the_same_logits_at_every_point(tmp_path):
    method, model, ctx = ready()
    train(method, model, ctx, 3)
    method.save(model, tmp_path)
    again = method.load(deep(), tmp_path, context(seed=9))
    for point in method.points():
        assert logits_at(method, again, point).equal(logits_at(method, model, point))


@pytest.mark.parametrize("layout", ["prefix", "skip_middle"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_loads_an_exported_depth(tmp_path, layout, dtype):
    method, model, _ = trained_model(layout=layout, dtype=dtype)
    method.export(model.eval(), Depth(3), tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval().requires_grad_(False)
    assert type(stock) is LlamaForCausalLM
    assert stock.config.num_hidden_layers == len(stock.model.layers) == 3
    assert json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == 3
    assert stock.dtype == torch.float32
    # Against adapters in float32 on the same base: merging itself rounds nothing away.
    exact = model.float()
    exact.model.rotary_emb = deep().model.rotary_emb  # its angles are never held in bfloat16
    torch.testing.assert_close(
        stock(IDS).logits, logits_at(method, exact, Depth(3), batch_like(IDS)), atol=1e-5, rtol=1e-5
    )


def batch_like(ids):
    return replace(batch_of(), input_ids=ids, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize(("layout", "layers"), [("prefix", (0, 1, 2)), ("skip_middle", (0, 1, 4))])
def test_the_adapters_of_a_depth_are_those_of_its_layers(layout, layers):
    method, model, _ = trained_model(layout=layout)
    found = method.as_peft(model, Depth(3)).factors
    assert {layer_of(name) for name in found} == {0, 1, 2}
    for place, layer in enumerate(layers):
        a, b = found[f"model.layers.{place}.self_attn.q_proj"]
        own = dict(model.model.layers[layer].self_attn.q_proj.named_parameters())
        assert a.equal(own["lora_A.default.weight"])
        assert b.equal(own["lora_B.default.weight"])


def test_peft_loads_the_adapters_of_an_exported_depth(tmp_path):
    method, model, _ = trained_model()
    (tmp_path / "out").mkdir()
    method.export(model.eval(), Depth(3), tmp_path / "out")
    base = deep().eval()
    base.save_pretrained(tmp_path / "base")
    cut = AutoModelForCausalLM.from_pretrained(tmp_path / "base", num_hidden_layers=3)
    theirs = peft.PeftModel.from_pretrained(cut, tmp_path / "out" / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(IDS).logits,
            logits_at(method, model, Depth(3), batch_like(IDS)),
            atol=1e-5,
            rtol=1e-5,
        )


def test_an_exported_packed_base_is_expanded(tmp_path):
    base = deep()
    replace_linears(base, lambda _, linear: PackedLinear.quantise(linear, 4, 32))
    method = SortedLoRA(rank=4, depths=(2, 5))
    model = method.prepare(base, context())
    for p in trainable(model).values():
        p.data.add_(0.1 * torch.randn(p.shape, generator=generator(3)))
    method.export(model.eval(), Depth(2), tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval().requires_grad_(False)
    torch.testing.assert_close(
        stock(IDS).logits, logits_at(method, model, Depth(2), batch_like(IDS)), atol=1e-5, rtol=1e-5
    )
