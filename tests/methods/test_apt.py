"""APT: every invariant of its spec."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    SHAPE,
    adamw,
    batch_of,
    begun,
    context,
    generator,
    logits,
    prepared,
    tiny_model,
    train,
    window,
)
from scipy.stats import kurtosis
from transformers import AutoModelForCausalLM

from effbench.api.batch import Batch
from effbench.api.method_types import Context
from effbench.api.shape import LINEARS
from effbench.api.spec import Machine, ModelSpec
from effbench.config.compose import compose
from effbench.methods.adapters.lora import LoRA
from effbench.methods.base import Method
from effbench.methods.chain import shape_of
from effbench.methods.pruning.apt import APT
from effbench.models.load import load
from effbench.nn.adapters.growth import (
    Growth,
    OptimizerRemap,
    adapter_parameters,
    grow,
    grown_ranks,
    merge,
    rank_sums,
)
from effbench.nn.adapters.lowrank import copy_adapters, low_rank_layers
from effbench.nn.adapters.peft_lora import peft_adapters
from effbench.nn.depth.droppable import LowRankMap
from effbench.nn.losses.self_distill import (
    as_teacher,
    captured,
    draw_layers,
    layer_loss,
)
from effbench.nn.pruning.masks import masks_of
from effbench.nn.pruning.pruner import BlockSearch, Pruning, weights_left
from effbench.nn.pruning.salience import Salience, outliers, ranked, root_kurtosis, salience_of
from effbench.nn.pruning.schedule import PruningSchedule
from effbench.resources.predict import predict
from effbench.results.events import read_events
from effbench.runner.signals import Stop
from effbench.runner.stages import train as stage
from effbench.runner.worker import run_here
from effbench.testing.bench import Bench
from effbench.util.errors import StoppedError, UserError

NO_PRUNING = {"keep": 1.0, "grow": 1.0}
SOON: dict[str, Any] = {"end": 0.5, "prunings": 3, "mask_step": 1.0, "growths": 3, "rank": 4}


def ready(
    method: APT, dtype: torch.dtype = torch.float32, steps: int = 8
) -> tuple[Any, Context, Any]:
    model, ctx = prepared(method, steps=steps)
    model.to(dtype)
    return model, ctx, adamw(model)


def shaken(model: Any, seed: int = 3) -> Any:
    """Return the model with adapters that do something."""
    draws = generator(seed)
    with torch.no_grad():
        for _, layer in low_rank_layers(model):
            for p in (layer.lora_A, layer.lora_B):
                p.add_(0.1 * torch.randn(p.shape, generator=draws).to(p))
    return model


def backward(method: APT, model: Any, ctx: Context, parts: list[Batch] | None = None) -> None:
    for batch in parts or window():
        method.loss(model, batch, ctx).backward()


# -- the start ---------------------------------------------------------------------------------


def test_at_the_start_it_is_the_base() -> None:
    model, _ = prepared(APT())
    assert logits(model).equal(logits(tiny_model()))


@pytest.mark.parametrize("distill", [False, True])
def test_masks_are_in_force_in_training_too(distill: bool) -> None:
    method = APT(distill=distill)
    model, ctx, _ = ready(method)
    before = method.loss(model, batch_of(), ctx).item()
    masks = masks_of(model)
    assert masks is not None
    masks.layout.dims(masks.values)[:9] = 0
    assert method.loss(model, batch_of(), ctx).item() != before


def test_keeping_everything_is_plain_lora() -> None:
    ours = APT(targets=LINEARS, **NO_PRUNING)  # type: ignore[arg-type]
    model, ctx, optimizer = ready(ours)
    losses = train(ours, model, ctx, 6, optimizer)
    plain = LoRA(rank=8, alpha=16)
    other, other_ctx = prepared(plain)
    assert losses == train(plain, other, other_ctx, 6)
    mine = {n: (x.lora_A, x.lora_B) for n, x in low_rank_layers(model)}
    for name, a, b in peft_adapters(other):
        assert mine[name][0].equal(a.weight)
        assert mine[name][1].equal(b.weight)
    assert masks_of(model) is None  # the window is over: it is sliced, and nothing was cut
    assert logits(model).equal(logits(other))


# -- salience ----------------------------------------------------------------------------------


def reference_salience(model: Any, parts: list[Batch]) -> dict[str, torch.Tensor]:
    """Return S~ from activations kept whole with their gradients, in float64."""
    values: dict[str, torch.Tensor] = {}
    gradients: dict[str, torch.Tensor] = {}
    kept: dict[str, torch.Tensor] = {}

    def keep(key: str, x: torch.Tensor) -> None:
        x.retain_grad()
        kept[key] = x

    hooks = []
    for i, layer in enumerate(model.model.layers):
        o, down = layer.self_attn.o_proj, layer.mlp.down_proj
        hooks += [
            o.register_forward_pre_hook(lambda _, x, i=i: keep(f"heads{i}", x[0])),
            o.register_forward_hook(lambda _, __, y, i=i: keep(f"dims{i}", y)),
            down.register_forward_pre_hook(lambda _, x, i=i: keep(f"neurons{i}", x[0])),
        ]
    for batch in parts:
        (Method().token_nll(model, batch).sum() / batch.window_tokens).backward()
        real = batch.attention_mask.bool()
        for key, x in kept.items():
            assert x.grad is not None
            values[key] = values.get(key, 0) + x.detach()[real].abs().sum(0)
            gradients[key] = gradients.get(key, 0) + x.grad[real].abs().sum(0)
    for hook in hooks:
        hook.remove()
    return {key: values[key] * gradients[key] for key in values}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_salience_is_that_of_an_independent_computation(checkpointing: bool) -> None:
    method = APT(beta=0.0)
    model, ctx, _ = ready(method, torch.float64)
    shaken(model)
    parts = window()
    expected = reference_salience(model, parts)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    backward(method, model, ctx, parts)
    watcher = salience_of(model)
    assert watcher is not None
    watcher.finish_step()
    layout = watcher.layout
    dims = torch.zeros(layout.hidden_size).double()
    for i, view in enumerate(layout.views(watcher.activity)):
        heads = expected[f"heads{i}"].view(2, -1).sum(1)
        torch.testing.assert_close(view.groups.double(), heads, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(
            view.neurons.double(), expected[f"neurons{i}"], rtol=1e-4, atol=1e-9
        )
        dims += expected[f"dims{i}"]
    found = layout.dims(watcher.activity).double()
    torch.testing.assert_close(found, dims, rtol=1e-4, atol=1e-9)


def activity_after(method: APT, parts: list[Batch], scale: float = 1.0) -> torch.Tensor:
    model, ctx, _ = ready(method, torch.float64)
    for batch in parts:
        (scale * method.loss(shaken(model) if not ctx.step else model, batch, ctx)).backward()
        ctx.step += 1
    watcher = salience_of(model)
    assert watcher is not None
    watcher.finish_step()
    return watcher.activity


def test_the_cut_into_micro_batches_does_not_matter() -> None:
    whole = batch_of(rows=4)
    rows = [
        replace(
            whole,
            input_ids=whole.input_ids[i : i + 2],
            attention_mask=whole.attention_mask[i : i + 2],
            labels=whole.labels[i : i + 2],
        )
        for i in (0, 2)
    ]
    one = activity_after(APT(), [whole])
    torch.testing.assert_close(one, activity_after(APT(), rows), rtol=1e-4, atol=1e-12)


def test_a_gradient_scaler_does_not_matter() -> None:
    one = activity_after(APT(), [batch_of()])
    assert one.max() > 0
    torch.testing.assert_close(one, activity_after(APT(), [batch_of()], 4096.0), rtol=1e-4, atol=0)


def test_padding_does_not_count() -> None:
    batch = batch_of()
    wider = replace(
        batch,
        input_ids=torch.nn.functional.pad(batch.input_ids, (0, 5), value=7),
        attention_mask=torch.nn.functional.pad(batch.attention_mask, (0, 5)),
        labels=torch.nn.functional.pad(batch.labels, (0, 5), value=-100),
    )
    one, other = activity_after(APT(), [batch]), activity_after(APT(), [wider])
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-12)


def test_evaluation_is_not_watched() -> None:
    method = APT()
    model, _, _ = ready(method)
    method.token_nll(model, batch_of()).sum().backward()
    watcher = salience_of(model)
    assert watcher is not None
    assert not watcher._sums


@pytest.mark.parametrize(("average", "expected"), [("ema", 0.15 + 0.85 * 0.15), ("sum", 2.0)])
def test_running_average_and_plain_sums(average: Any, expected: float) -> None:
    once = activity_after(APT(beta=0.0), [batch_of()]).float()
    model = shaken(prepared(APT(salience=average))[0].double())
    watcher = salience_of(model)
    assert watcher is not None
    for _ in range(2):
        APT().loss(model, batch_of(), context()).backward()
        watcher.finish_step()
    torch.testing.assert_close(watcher.activity.float(), expected * once, rtol=1e-4, atol=1e-12)


def test_kurtosis_against_scipy() -> None:
    draws = generator(1)
    values = torch.randn(200, 7, generator=draws)
    values[3, 2] = 25.0
    expected = kurtosis(values.double().numpy(), axis=0, fisher=True, bias=True)
    found = root_kurtosis(values, 0)
    torch.testing.assert_close(
        found.double(), torch.tensor(expected).clamp(min=0).sqrt(), rtol=1e-3, atol=1e-3
    )
    assert found.argmax() == 2
    assert root_kurtosis(torch.zeros(5, 3), 0).tolist() == [0, 0, 0]


def test_outliers_protect_a_block() -> None:
    model = tiny_model()
    watcher = Salience(model)
    layout = watcher.layout
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[5, 17] = 9.0  # an outlier of neuron 17
        model.model.layers[1].self_attn.o_proj.weight[3, 40] = 9.0  # of head 2, group 1
    inputs = torch.ones_like(watcher.inputs)
    found = outliers(model, layout, inputs)
    views = list(layout.views(found))
    assert views[0].neurons.argmax() == 17
    assert views[1].groups.argmax() == 1
    assert layout.dims(found).argmax() == 3
    # a neuron's column tells, whatever the data were
    other = next(layout.views(outliers(model, layout, 3 * inputs)))
    assert other.neurons.equal(views[0].neurons)
    activity = torch.ones(layout.size)
    assert ranked(activity, None, layout, False).equal(activity)
    assert ranked(activity, found, layout, False).equal(activity + found)


def test_normalising_leaves_what_a_kind_is_worth_beside_another() -> None:
    layout = Salience(tiny_model()).layout
    kinds = ("groups", "neurons", "dims")
    places = {k: [p for name, p in layout.segments() if name == k] for k in kinds}
    worth = dict(zip(kinds, (170.0, 1.0, 30.0), strict=True))
    activity, outlying = torch.empty(layout.size), torch.empty(layout.size)
    for kind, value in worth.items():
        for place in places[kind]:
            activity[place] = value
            outlying[place] = 1 + torch.rand(place.stop - place.start, generator=generator(3))
    found = ranked(activity, outlying, layout, True)
    for kind, value in worth.items():
        mean = torch.cat([found[p] for p in places[kind]]).mean().item()
        assert mean == pytest.approx(2 * value), "half of it is the outlier term"


def test_an_average_that_has_just_begun_is_not_too_small_beside_the_outliers() -> None:
    once = activity_after(APT(beta=0.0), [batch_of()]).float()
    model = shaken(prepared(APT())[0].double())
    watcher = salience_of(model)
    assert watcher is not None
    assert watcher.averaged().equal(watcher.activity)
    for _ in range(3):
        APT().loss(model, batch_of(), context()).backward()
        watcher.finish_step()
        torch.testing.assert_close(watcher.averaged().float(), once, rtol=1e-4, atol=1e-12)
    pruner = Pruning.of(model)
    assert pruner is not None
    assert "salience.steps" in pruner.tensors(), "a checkpoint keeps the count"
    torch.testing.assert_close(pruner.salience(False, False).float(), once, rtol=1e-4, atol=1e-12)


def test_what_adds_nothing_goes_first() -> None:
    method = APT(kurtosis=False, keep=0.91, beta=0.0, targets=("q_proj", "v_proj"), grow=1.0)
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[:, 11] = 0
        model.model.layers[1].self_attn.o_proj.weight[:, 32:] = 0  # both heads of group 1
    ctx = context()
    ctx.total_steps = 2
    model = begun(method, model, ctx)
    backward(method, model, ctx)
    watcher, masks = salience_of(model), masks_of(model)
    assert watcher is not None
    assert masks is not None
    watcher.finish_step()
    views = list(watcher.layout.views(watcher.activity))
    assert views[0].neurons[11] == 0
    assert views[1].groups[1] == 0
    assert (watcher.activity == 0).sum() == 2
    ctx.evolution.aim(Pruning(model, masks, watcher), 0.91)
    wanted = list(watcher.layout.views(masks.wanted))
    assert not wanted[0].neurons[11]
    assert not wanted[1].groups[1]


# -- pruning -----------------------------------------------------------------------------------


def test_the_steps_of_a_run() -> None:
    method = APT(begin=0.1, end=0.5, prunings=4, keep=0.4)
    schedule = method.schedule(100)
    assert schedule.window == (9, 49)
    assert schedule.pruning_steps == {19, 29, 39, 49}
    ratios = [schedule.ratio(step, 0.4) for step in range(100)]
    assert ratios[0] == ratios[9] == 1
    assert ratios[49] == ratios[99] == pytest.approx(0.4)
    assert all(a >= b for a, b in pairwise(ratios))
    once = APT(begin=0.2, end=0.2, prunings=1)
    assert once.schedule(10).pruning_steps == {1}
    assert APT(begin=0.0, end=0.0, prunings=1, warm_steps=4).schedule(10).pruning_steps == {3}
    assert APT(begin=1.0, end=1.0, prunings=1).schedule(10).pruning_steps == {9}


def test_masks_through_a_run() -> None:
    method = APT(keep=0.6, end=0.3, prunings=3, mask_step=0.05, grow=1.0)
    model, ctx, optimizer = ready(method, steps=40)
    whole = ctx.evolution.whole
    before, shares = None, []
    while (masks := masks_of(model)) is not None:
        now = masks.values.clone()
        assert now.min() >= 0
        assert now.max() <= 1
        if before is not None:
            assert (now - before).abs().max() <= 0.05 + 1e-6
        before = now
        shares.append(ctx.evolution.metrics()["kept"])
        train(method, model, ctx, 1, optimizer)
    assert ctx.step < 40
    assert shares[0] == 1
    assert shares == sorted(shares, reverse=True)
    assert ((before < 0.05 + 1e-6) | (before > 0.95 - 1e-6)).all()
    layout_weights = ctx.evolution.metrics()["kept"] * whole
    assert layout_weights <= 0.6 * whole
    assert layout_weights > 0.6 * whole - 2 * 96 * 64


def test_frozen_weights_stay_until_the_slice() -> None:
    method = APT(keep=0.6, end=0.9, prunings=4, mask_step=0.02)
    model, ctx, optimizer = ready(method, steps=10)
    weights = {n: p.clone() for n, p in model.named_parameters() if "lora_" not in n}
    train(method, model, ctx, 9, optimizer)
    assert masks_of(model) is not None
    now = dict(model.named_parameters())
    assert all(now[n].equal(p) for n, p in weights.items())


def test_masks_and_slice_agree_in_a_trained_model() -> None:
    method = APT(keep=0.5, end=1.0, prunings=2, mask_step=1.0, rank=4)
    model, ctx, optimizer = ready(method, torch.float64, steps=6)
    train(method, model, ctx, 5, optimizer)
    masks, watcher = masks_of(model), salience_of(model)
    assert masks is not None
    assert watcher is not None
    ctx.evolution.aim(Pruning(model, masks, watcher), 0.5)
    ctx.evolution.searched = 0.5
    masks.move(1)
    masked = logits(model)
    finished = method.finalize(model, ctx).eval()
    torch.testing.assert_close(logits(finished), masked, atol=1e-6, rtol=1e-5)
    assert not list(low_rank_layers(finished))
    assert not any(p.requires_grad for p in finished.parameters())


def test_a_run_too_short_for_its_masks_is_cut_all_the_same() -> None:
    method = APT(keep=0.6, end=0.9, prunings=2, mask_step=0.01, grow=1.0)
    model, ctx, optimizer = ready(method, steps=6)
    train(method, model, ctx, 6, optimizer)
    pruning = Pruning.of(model)
    assert pruning is not None
    assert not pruning.masks.hard
    wanted = pruning.masks.wanted.clone()
    budget, layout = 0.6 * ctx.evolution.whole, pruning.layout
    finished = method.finalize(model, ctx)
    assert ctx.evolution.metrics()["kept"] <= 0.6
    assert weights_left(finished) == layout.weights(wanted) > budget - 3 * 96 * 64
    assert logits(finished).isfinite().all()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_slicing_early_is_slicing_late(optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the moments kept, the cut changes nothing that training does."""
    method = APT(keep=0.6, moments="keep", grow=1.0, **SOON)
    ends = []
    for late in (False, True):
        model, ctx, _ = ready(method, torch.float64)
        shaken(model)
        if late:
            monkeypatch.setattr(PruningSchedule, "over", lambda self, step: step > 99)
        trained = [p for p in model.parameters() if p.requires_grad]
        train(method, model, ctx, 8, optimizer(trained, lr=1e-2))
        assert (masks_of(model) is not None) == late
        ends.append(logits(method.finalize(model, ctx)))
    torch.testing.assert_close(ends[0], ends[1], atol=1e-5, rtol=1e-5)


def test_random_blocks_are_a_baseline_of_the_same_size() -> None:
    sizes = []
    for criterion in ("salience", "random"):
        method = APT(criterion=criterion, keep=0.6, **SOON)  # type: ignore[arg-type]
        model, ctx, optimizer = ready(method)
        train(method, model, ctx, 8, optimizer)
        sizes.append((ctx.evolution.metrics()["kept"], ctx.evolution.kept))
    assert sizes[0][1] != sizes[1][1]
    assert abs(sizes[0][0] - sizes[1][0]) < 0.07


def test_warm_steps_learn_nothing() -> None:
    method = APT(warm_steps=3, end=0.0, prunings=1, mask_step=1.0, salience="sum", keep=0.6)
    model, ctx, optimizer = ready(method)
    before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    for done in range(3):
        assert masks_of(model) is not None
        assert all(p.equal(before[n]) for n, p in model.named_parameters() if n in before), done
        train(method, model, ctx, 1, optimizer)
    assert masks_of(model) is None
    assert not optimizer.state
    train(method, model, ctx, 1, optimizer)
    assert optimizer.state


# -- growth ------------------------------------------------------------------------------------


def test_both_factors_hold_the_same_information() -> None:
    method = APT()
    model, ctx, _ = ready(method, torch.float64)
    shaken(model)
    backward(method, model, ctx)
    for name, layer in low_rank_layers(model):
        assert layer.lora_A.grad is not None
        assert layer.lora_B.grad is not None
        of_a = (layer.lora_A * layer.lora_A.grad).sum(1)
        of_b = (layer.lora_B * layer.lora_B.grad).sum(0)
        torch.testing.assert_close(of_a, of_b, atol=1e-10, rtol=1e-10, msg=name)
        assert rank_sums(layer).equal(of_a.abs().detach())
        assert of_a.abs().max() > 1e-6


def test_growing_changes_no_logit() -> None:
    model = shaken(prepared(APT())[0].double())
    before = logits(model)
    for i, (_, layer) in enumerate(low_rank_layers(model)):
        old = layer.lora_A.clone()
        grow(layer, 8 + i, generator(i))
        assert layer.lora_A.shape[0] == layer.lora_B.shape[1] == 8 + i
        assert layer.lora_A[:8].equal(old)
        assert i == 0 or layer.lora_A[8:].abs().min() > 0
        assert layer.lora_B[:, 8:].abs().sum() == 0
        assert layer.alpha / layer.control.active == 2.0
    torch.testing.assert_close(logits(model), before, atol=1e-12, rtol=1e-12)


def test_growing_a_new_adapter_changes_no_bit() -> None:
    model, _ = prepared(APT())
    before = logits(model)
    for _, layer in low_rank_layers(model):
        grow(layer, 20, generator())
    assert logits(model).equal(before)
    rows = torch.cat(
        [(x.lora_A[8:].detach() * x.in_features**0.5).flatten() for _, x in low_rank_layers(model)]
    )
    assert float(rows.std()) == pytest.approx(3**-0.5, rel=0.05), "that of the first rows"


def test_importance_is_a_running_mean() -> None:
    model, _ = prepared(APT(rank=4))
    shaken(model)
    growing = Growth(model, {9: 2.0}, 64, 0.75, generator())
    expected = {name: 0.0 for name, _ in low_rank_layers(model)}
    for step, size in enumerate((1.0, 5.0)):
        for name, layer in low_rank_layers(model):
            layer.lora_A.grad = torch.full_like(layer.lora_A, size)
            own = float((size * layer.lora_A.detach().sum(1)).abs().mean())
            expected[name] = 0.75 * expected[name] + 0.25 * own
        growing.after_backward(step, lambda *_: None)
    assert growing.importance == pytest.approx(expected)


def test_only_the_more_important_half_grows() -> None:
    ranks = {f"l{i}": 8 for i in range(5)} | {"full": 64}
    widths = {n: 100 + 10 * i for i, n in enumerate(ranks)}
    importance = {n: float(i) for i, n in enumerate(ranks)}
    now = sum(ranks[n] * widths[n] for n in ranks)
    found = grown_ranks(ranks, widths, importance, 2 * now, 64)
    assert set(found) == {"l2", "l3", "l4"}
    after = ranks | found
    assert now < sum(after[n] * widths[n] for n in after) <= 2 * now
    assert all(8 < rank <= 64 for rank in found.values())
    assert not grown_ranks(ranks, widths, importance, now, 64)
    assert not grown_ranks({"full": 64}, {"full": 10}, {"full": 1.0}, 10**9, 64)


def test_ranks_through_a_run() -> None:
    method = APT(keep=0.9, grow=4.0, growths=4, rank=2, max_rank=6, end=0.5, mask_step=0.1)
    model, ctx, optimizer = ready(method, steps=12)
    first = adapter_parameters(model)
    steps = method.schedule(12).growth_steps(4.0)
    assert max(steps.values()) == 4
    before, ever = {n: 2 for n, _ in low_rank_layers(model)}, 0
    for step in range(12):
        train(method, model, ctx, 1, optimizer)
        now = {n: x.control.max_rank for n, x in low_rank_layers(model)}
        grown = [n for n in now if now[n] > before[n]]
        assert all(before[n] <= now[n] <= 6 for n in now)
        assert not grown or step in steps
        if grown:
            order = sorted(
                (n for n in now if before[n] < 6), key=lambda n: -ctx.evolution.growth.importance[n]
            )
            assert set(grown) <= set(order[: -(-len(order) // 2)])
        reached = max([1.0, *(f for s, f in steps.items() if s <= step)])
        if masks_of(model) is not None:
            assert adapter_parameters(model) <= reached * first
        live = {id(p) for p in model.parameters() if p.requires_grad}
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert live == held
        assert {id(p) for p in optimizer.state} <= held
        before, ever = now, ever + len(grown)
    assert ever > 3


@pytest.mark.parametrize("moments", ["reset", "keep"])
def test_moments_of_what_grows(moments: Any) -> None:
    model, ctx, optimizer = ready(APT(**NO_PRUNING))  # type: ignore[arg-type]
    train(APT(**NO_PRUNING), model, ctx, 2, optimizer)  # type: ignore[arg-type]
    _, layer = next(low_rank_layers(model))
    old = optimizer.state[layer.lora_A]["exp_avg"].clone()
    gradient = layer.lora_A.grad
    assert gradient is not None
    grow(layer, 11, generator(), OptimizerRemap(optimizer, moments))
    if moments == "reset":
        assert layer.lora_A not in optimizer.state
    else:
        state = optimizer.state[layer.lora_A]
        assert state["exp_avg"][:8].equal(old)
        assert state["exp_avg"].shape == layer.lora_A.shape
        assert state["exp_avg"][8:].abs().sum() == 0
        assert state["step"] == 2
    assert layer.lora_A.grad is not None
    assert layer.lora_A.grad[:8].equal(gradient)
    train(APT(**NO_PRUNING), model, ctx, 1, optimizer)  # type: ignore[arg-type]


def test_quantised_moments_cannot_be_cut() -> None:
    model, _, optimizer = ready(APT())
    _, layer = next(low_rank_layers(model))
    optimizer.state[layer.lora_A] = {"state1": torch.zeros_like(layer.lora_A).to(torch.uint8)}
    with pytest.raises(UserError, match="8-bit"):
        grow(layer, 9, generator(), OptimizerRemap(optimizer, "keep"))


# -- self-distillation -------------------------------------------------------------------------


def test_the_share_of_distillation() -> None:
    schedule = APT(distill=True, begin=0.2, end=0.6).schedule(50)
    shares = [schedule.share(step) for step in range(50)]
    first, last = schedule.window
    assert shares[: first + 1] == [0.0] * (first + 1)
    assert shares[last:] == [1.0] * (50 - last)
    assert shares[(first + last) // 2] == pytest.approx(0.5)


def test_a_student_like_its_teacher_has_nothing_to_learn_from_it() -> None:
    method = APT(distill=True)
    model, _, _ = ready(method)
    shaken(model)
    masks = masks_of(model)
    assert masks is not None
    copies = copy_adapters(model)
    with captured(model) as student, torch.no_grad():
        method.logits(model, batch_of())
    with as_teacher(model, masks, copies), captured(model) as teacher:
        method.logits(model, batch_of())
    real = batch_of().attention_mask.bool()
    dims = torch.ones(64)
    arguments = student, teacher, [0, 1], [0, 1], model.transfer, dims, real
    assert layer_loss(*arguments).item() == 0
    with torch.no_grad():
        model.transfer.B.add_(0.1)
    assert layer_loss(*arguments).item() > 0


def test_the_teacher_is_the_unpruned_model_with_the_copied_adapters() -> None:
    method = APT(distill=True)
    model, _, _ = ready(method)
    shaken(model)
    unpruned, copies = logits(model), copy_adapters(model)
    masks = masks_of(model)
    assert masks is not None
    masks.values[::3] = 0.5
    shaken(model, seed=8)
    student = logits(model)
    with as_teacher(model, masks, copies):
        assert logits(model).equal(unpruned)
    assert logits(model).equal(student)
    assert not student.equal(unpruned)


def test_layers_are_matched_with_the_nearest_that_is_left() -> None:
    draws = generator(4)
    teacher = [torch.randn(1, 3, 8, generator=draws) for _ in range(4)]
    student = [teacher[2] + 0.1, teacher[0] + 1.0, teacher[2] + 0.5, teacher[1] + 3.0]
    real, dims = torch.ones(1, 3).bool(), torch.ones(8)
    none = LowRankMap(8, 2, 1.0, generator())
    found = layer_loss(student, teacher, [2], [0, 1, 2, 3], none, dims, real)
    assert found.item() == pytest.approx(0.01, rel=1e-4)
    found = layer_loss(student, teacher, [2], [1, 2, 3], none, dims, real)
    assert found.item() == pytest.approx(0.25, rel=1e-4)
    dims[4:] = 0
    student[0][..., 4:] = 99.0
    found = layer_loss(student, teacher, [2], [0], none, dims, real)
    assert found.item() == pytest.approx(0.01, rel=1e-4)


def test_both_parts_of_distillation_have_their_weight_and_training_its_share() -> None:
    """mu (a KL + b L_layer) + (1 - mu) CE, the same layers being drawn each time."""
    found = {}
    for a, b in ((1.0, 0.0), (0.0, 1.0), (2.0, 3.0)):
        method = APT(distill=True, end=1.0, distill_logits=a, distill_layers=b)
        model, ctx, _ = ready(method, steps=9)
        ctx.evolution.teacher = copy_adapters(model)
        shaken(model)
        hard = method.loss(model, batch_of(), ctx).item()
        ctx.step, ctx.generator = 4, generator(2)
        found[a, b] = method.loss(model, batch_of(), ctx).item() - hard / 2
    plain, target = logits(tiny_model()), logits(model)
    batch = batch_of()
    counted = batch.labels[:, 1:] != -100
    log_t, log_s = (x[:, :-1][counted].double().log_softmax(-1) for x in (plain, target))
    kl = (log_t.exp() * (log_t - log_s)).sum() / batch.window_tokens
    assert found[1, 0] == pytest.approx(float(kl) / 2, rel=1e-4)
    assert found[0, 1] > 0
    assert found[2, 3] == pytest.approx(2 * found[1, 0] + 3 * found[0, 1], rel=1e-4)


def test_settings_reach_what_prunes_and_grows() -> None:
    chosen: Any = {"keep": 0.6, "align": 4, "criterion": "salience", "kurtosis": False}
    chosen["normalise"] = True
    method = APT(
        blocks=("neurons",), mask_step=0.25, moments="keep", max_rank=16, beta=0.5, **chosen
    )
    _, ctx, _ = ready(method)
    own = ctx.evolution
    assert own.search == BlockSearch(prunable=("neurons",), seed=ctx.seed, **chosen)
    assert (own.mask_step, own.moments, own.growth.most, own.growth.beta) == (0.25, "keep", 16, 0.5)


def test_one_layer_of_each_quarter_is_drawn() -> None:
    draws, seen = generator(), set()
    for _ in range(60):
        drawn = draw_layers(8, draws)
        assert [i // 2 for i in drawn] == [0, 1, 2, 3]
        seen |= set(drawn)
    assert seen == set(range(8))
    assert draw_layers(2, draws) == [0, 1]


def test_a_distilled_run() -> None:
    method = APT(distill=True, begin=0.25, end=0.75, prunings=2, mask_step=0.5, keep=0.6, rank=4)
    model, ctx, optimizer = ready(method, steps=8)
    copies = []
    for _ in range(3):
        train(method, model, ctx, 1, optimizer)
        copies.append(copy.deepcopy(ctx.evolution.teacher))
    _, before, frozen = copies
    assert copies[0].keys() == before.keys() == frozen.keys()
    assert any(not before[n][1].equal(b) for n, (_, b) in copies[0].items()), "until pruning begins"
    assert all(before[n][1].equal(b) for n, (_, b) in frozen.items())
    train(method, model, ctx, 5, optimizer)
    assert all(
        a.equal(b) for n in frozen for a, b in zip(frozen[n], ctx.evolution.teacher[n], strict=True)
    )
    assert model.transfer.B.abs().sum() > 0
    assert masks_of(model) is not None
    finished = method.finalize(model, ctx)
    assert not hasattr(finished, "transfer")
    assert ctx.evolution.metrics()["kept"] <= 0.6


# -- a whole run -------------------------------------------------------------------------------

RUN = [
    "method=apt",
    "method.keep=0.6",
    "method.end=0.4",
    "method.prunings=2",
    "method.mask_step=0.5",
    "method.growths=3",
    "train.max_steps=8",
    "train.batch_size=2",
    "+dataset.limit.train=16",
    "hardware.device=cpu",
    "hardware.dtype=float32",
    "evaluator=[perplexity]",
]


def steps_of(bench: Bench, job: Any) -> list[dict[str, Any]]:
    events = read_events(bench.folder(job).path / "events.jsonl", "step")
    return [{k: e[k] for k in ("loss", "kept", "adapter_params")} for e in events]


@pytest.mark.parametrize(
    "extra",
    [
        ["method.moments=keep"],
        pytest.param(["method.distill=true"], marks=pytest.mark.slow),
        pytest.param([], marks=pytest.mark.slow),
    ],
)
def test_resumed_across_growth_and_slice(
    extra: list[str], bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = Bench(tmp_path / "whole")
    job = whole.job("train", *RUN, *extra)
    run_here(job)
    expected = steps_of(whole, job)
    assert expected[-1]["kept"] <= 0.6
    assert len({e["adapter_params"] for e in expected}) > 2
    again = bench.job("train", *RUN, *extra)
    stops = 0
    while True:
        with monkeypatch.context() as patch:
            stop_after_a_step(patch)
            try:
                run_here(again)
                break
            except StoppedError:
                stops += 1
    assert stops == 7 or stops == 8
    assert steps_of(bench, again) == expected
    artefacts = [b.folder(j).artefact for b, j in ((whole, job), (bench, again))]
    for path in artefacts[0].iterdir():
        assert path.read_bytes() == (artefacts[1] / path.name).read_bytes()


def stop_after_a_step(patch: pytest.MonkeyPatch) -> None:
    one_step: Callable[..., float] = stage.one_step

    def then_stop(trainer: Any) -> float:
        loss = one_step(trainer)
        Stop.requested = True
        return loss

    patch.setattr(stage, "one_step", then_stop)
    patch.setattr(Stop, "requested", False)


def test_the_record_tells_what_is_left(bench: Bench, tmp_path: Path) -> None:
    record = bench.run("train", *RUN)
    folder = bench.store.run(record.key).artefact
    found = {m.name: m.value for m in record.metrics if m.phase == ""}
    method = APT(keep=0.6)
    tiny = compose("eval", ["model=tiny"]).spec.model.shape
    assert tiny is not None
    left = shape_of(method, tiny, folder=folder)
    assert left.linear_params <= 0.6 * tiny.linear_params
    assert found["params"] == found["params_total"] == left.params
    assert found["weight_bytes"] == found["resident_bytes"] == 4 * left.params
    assert found["trainable_params"] > 0
    assert record.plan["cost"]["params"] >= left.params
    facts = json.loads((folder / "sizes.json").read_text())
    assert len(facts["kept"]["dims"]) == left.hidden_size
    assert max(facts["ranks"].values()) > 8

    from effbench.runner.stages.export import export

    export(record.key, tmp_path / "out", "", bench.root)
    spec = ModelSpec(name="folder", source="folder", path=str(tmp_path / "out"))
    loaded = load(spec, device="cpu", dtype=torch.float32)
    assert loaded.shape == left
    assert loaded.tokenizer is not None
    words = ["model=folder", f"model.path={tmp_path / 'out'}", "method=none"]
    again = bench.run("eval", *words, "hardware.dtype=float32", "evaluator=[perplexity]")
    losses = [{m.value for m in r.metrics if m.name == "loss"} for r in (record, again)]
    assert losses[0] == losses[1]


def test_one_size_for_all_layers_loads_in_transformers(bench: Bench, tmp_path: Path) -> None:
    words = [w for w in RUN if not w.startswith("method.keep")]
    record = bench.run("train", *words, "method.keep=0.9", "method.blocks=[dims]", "method.align=8")
    from effbench.runner.stages.export import export

    export(record.key, tmp_path / "out", "", bench.root)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert model.config.hidden_size == 56
    assert sum(p.numel() for p in model.parameters()) == next(
        m.value for m in record.metrics if m.name == "params"
    )


@pytest.mark.slow
def test_early_stopping_waits_for_the_slice(bench: Bench) -> None:
    words = ["train.validate_every=1", "train.patience=1", "train.learning_rate=1e-30"]
    record = bench.run("train", *RUN, *words)
    steps = {m.name: m.value for m in record.metrics}["train_steps"]
    assert 4 < steps < 8


def test_the_plan() -> None:
    job = compose(None, ["experiment=apt_paper"])
    shape = job.spec.model.shape
    assert shape is not None
    prediction = predict(job.spec, shape, Machine())
    assert prediction.cost.params < 0.72 * shape.params
    assert prediction.memory["weights"] > 2 * shape.params
    assert prediction.trained == prediction.memory["gradients"] // 4 > 0


def test_refused_settings() -> None:
    with pytest.raises(UserError, match="behind"):
        APT(begin=0.5, end=0.1)
    with pytest.raises(UserError, match="max_rank"):
        APT(rank=8, max_rank=4)
    with pytest.raises(UserError, match="cannot be reached"):
        APT(keep=0.2, blocks=("groups",)).resolve(SHAPE)
    with pytest.raises(UserError, match="rank"):
        APT(rank=64, max_rank=64).resolve(replace(SHAPE, hidden_size=32))
    APT(keep=0.05).resolve(SHAPE)


def test_another_family_is_refused() -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(UserError, match="Llama"):
        APT().prepare(GPTNeoXForCausalLM(config), context())


def test_merging_is_the_adapter_in_the_weight() -> None:
    model, _ = prepared(APT())
    shaken(model)
    before = logits(model)
    masks, watcher = masks_of(model), salience_of(model)
    assert masks is not None
    assert watcher is not None
    watcher.remove(model)
    masks.remove(model)
    torch.testing.assert_close(logits(merge(model)), before, atol=2e-5, rtol=1e-4)
