"""ECHO-LLaMA: the schedule, conversion under the optimiser, resume, adapters, counts.

What holds for every model that shares is in `tests/nn/test_sharing.py`.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SHAPE, adamw, batch_of, begun, context, logits, tiny_model, train

from effbench.api.cost import cost_of
from effbench.api.footprint import Pass, step_flops, training_of
from effbench.api.method_types import Context
from effbench.api.points import UNNAMED
from effbench.api.sharing import TAKEN, LayerMap, shared_shape, top_map
from effbench.api.spec import ModelSpec
from effbench.methods.chain import chain_cost, shape_of
from effbench.methods.full import Full
from effbench.methods.sharing.echo_llama import EchoLLaMA
from effbench.models.load import load
from effbench.nn.llama.shared_attention import map_of, sharing_layers
from effbench.nn.sharing.conversion import share_at
from effbench.resources.counting import flops, parameters
from effbench.testing.bench import Bench
from effbench.util.errors import UserError

DEEP = replace(SHAPE, num_layers=4, tied=True)


def started(method: EchoLLaMA, steps: int = 8) -> tuple[Any, Context, torch.optim.AdamW]:
    ctx = context()
    ctx.total_steps = steps
    model = begun(method, tiny_model(shape=DEEP), ctx)
    return model, ctx, adamw(model)


def shares(model: Any) -> list[float]:
    return [m.share for m in sharing_layers(model)]


# -- settings ----------------------------------------------------------------------------------


def test_maps_follow_the_settings() -> None:
    assert EchoLLaMA().sharing(30).sources == (*range(15), *[14] * 15)
    assert EchoLLaMA(share=0.25, map="pairs").sharing(8).consumers == (5, 7)
    assert EchoLLaMA(layers=(1, 3), mode="qk").sharing(4) == LayerMap("qk", (0, 0, 2, 2))
    assert shape_of(EchoLLaMA(), DEEP).used().frozen() == shared_shape(DEEP, top_map(4, 2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 1.0}, "more than the 3 consumers"),
        ({"share": 0.75, "map": "pairs"}, "more than the 2 consumers"),
        ({"layers": (4,)}, "not possible with 4 layers"),
    ],
)
def test_what_cannot_be_shared_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EchoLLaMA(**settings).resolve(DEEP)


def test_a_model_that_shares_is_not_shared_again() -> None:
    with pytest.raises(UserError, match="cannot start"):
        EchoLLaMA().resolve(shape_of(EchoLLaMA(), DEEP))


# -- the schedule ------------------------------------------------------------------------------


def test_one_layer_after_the_other_from_the_last_on() -> None:
    method = EchoLLaMA(share=0.75, adapt=0.75)
    assert method.spans(4, 16) == {3: (0, 4), 2: (4, 8), 1: (8, 12)}
    assert list(replace(method, order="up").spans(4, 16)) == [1, 2, 3]
    assert [share_at(t, 4, 8) for t in (0, 3, 4, 5, 7, 9)] == [0, 0, 0.25, 0.5, 1, 1]
    assert method.spans(4, 2) == {3: (0, 0), 2: (0, 1), 1: (1, 2)}  # several in a step


@pytest.mark.parametrize("mode", TAKEN)
def test_after_so_many_steps_so_many_layers_are_converted(mode: Any) -> None:
    method = EchoLLaMA(share=0.75, adapt=0.75, mode=mode)
    model, ctx, optimizer = started(method, 16)
    for step in range(16):
        train(method, model, ctx, 1, optimizer)
        done = [m.layer for m in sharing_layers(model) if m.takes]
        assert len(done) == min(3, (step + 1) // 4)
        assert done == [1, 2, 3][3 - len(done) :]
        assert ctx.evolution.final == (len(done) == 3)
    assert ctx.evolution.metrics() == {"converted": 3}


@pytest.mark.parametrize("mode", TAKEN)
def test_a_layer_on_its_way_takes_its_share(mode: Any) -> None:
    model, *_ = started(EchoLLaMA(share=0.25, mode=mode), 8)
    attention = sharing_layers(model)[3]
    attention.share = 0.25
    own = {name: torch.randn(1, 2, 3, 16) for name in ("q_proj", "k_proj", "v_proj")}
    given = tuple(torch.randn(2, 1, 2, 3, 16))
    before = dict(own)
    attention._mix(own, given)
    for name, taken in zip(TAKEN[mode], given, strict=True):
        torch.testing.assert_close(own[name], 0.75 * before[name] + 0.25 * taken)
    assert sum(own[name] is before[name] for name in own) == 1


def test_conversion_changes_nothing_in_the_step_that_ends_it() -> None:
    method = EchoLLaMA(share=0.25, adapt=0.5)
    model, ctx, optimizer = started(method, 8)
    train(method, model, ctx, 3, optimizer)
    ctx.evolution.before_step()
    assert shares(model) == [0, 0, 0, 1]
    before = logits(model)
    ctx.evolution.after_backward(optimizer)
    assert sharing_layers(model)[3].takes
    torch.testing.assert_close(logits(model), before)


def test_survivors_keep_their_moments_and_the_removed_are_forgotten() -> None:
    method = EchoLLaMA(share=0.25, adapt=0.5)
    model, ctx, optimizer = started(method, 8)
    train(method, model, ctx, 3, optimizer)
    gone = [p for n, p in model.named_parameters() if "layers.3.self_attn.k_proj" in n]
    kept = model.model.layers[3].self_attn.q_proj.weight
    moment = optimizer.state[kept]["exp_avg"].clone()
    ctx.evolution.before_step()
    ctx.evolution.after_backward(optimizer)
    assert optimizer.state[kept]["exp_avg"].equal(moment)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in trained] == [id(p) for p in method.param_groups(model)[0][0]]
    assert all(p not in optimizer.state for p in gone)
    assert len(optimizer.state) == len(trained)


@pytest.mark.parametrize("method", [EchoLLaMA(blend=False), EchoLLaMA(adapt=0.0)])
def test_abrupt_is_converted_before_the_first_step(method: EchoLLaMA) -> None:
    model, ctx, optimizer = started(method)
    assert map_of(model) == top_map(4, 2)
    assert ctx.evolution.final
    losses = train(method, model, ctx, 4, optimizer, same_batch=True)
    assert losses[-1] < losses[0]


def test_what_is_not_converted_at_the_end_is_then() -> None:
    method = EchoLLaMA(share=0.5)
    model, ctx, optimizer = started(method, 100)
    train(method, model, ctx, 2, optimizer)
    assert map_of(model) is None
    assert map_of(method.finalize(model, ctx)) == top_map(4, 2)


# -- starts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", TAKEN)
def test_a_source_may_start_from_the_mean(mode: Any) -> None:
    before = tiny_model(shape=DEEP)
    model, *_ = started(EchoLLaMA(producer_init="mean", mode=mode, blend=False))
    pairs, *_ = started(EchoLLaMA(producer_init="mean", mode=mode, blend=False, map="pairs"))
    for name in ("q_proj", "k_proj", "v_proj"):
        for own, group in ((model, (1, 2, 3)), (pairs, (0, 1)), (pairs, (2, 3))):
            parts = [getattr(before.model.layers[i].self_attn, name).weight for i in group]
            expected = torch.stack(parts).mean(0) if name in TAKEN[mode] else parts[0]
            source = own.model.layers[group[0]].self_attn
            torch.testing.assert_close(getattr(source, name).weight, expected)


def test_the_original_is_a_teacher_that_does_not_change() -> None:
    method = EchoLLaMA(kl=0.5, blend=False)
    model, ctx, optimizer = started(method)
    original = ctx.aux["original"]
    before = logits(original)
    assert before.equal(logits(tiny_model(shape=DEEP)))
    assert method.holds() == ("",)
    batch = batch_of()
    total = method.loss(model, batch, ctx)
    own = replace(method, kl=0.0).loss(model, batch, ctx)
    log_p, log_q = (
        x[:, :-1][batch.labels[:, 1:] != -100].log_softmax(-1) for x in (before, logits(model))
    )
    expected = own + 0.5 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    torch.testing.assert_close(total, expected)
    train(method, model, ctx, 2, optimizer)
    assert logits(original).equal(before)
    assert not any("original" in n for n in method.trained_tensors(model))


# -- adapters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", TAKEN)
def test_adapters_are_where_sharing_changes_something(mode: Any, tmp_path: Path) -> None:
    method = EchoLLaMA(trains="lora", rank=4, mode=mode)
    base = tiny_model(shape=DEEP)
    model, ctx, optimizer = started(method)
    names = {n.removesuffix(".lora_A") for n, p in model.named_parameters() if n.endswith("lora_A")}
    own = {"kv": ("q_proj", "o_proj"), "qk": ("v_proj", "o_proj")}[mode]
    assert names == {
        *(f"model.layers.1.self_attn.{n}" for n in TAKEN[mode]),
        *(f"model.layers.{i}.self_attn.{n}" for i in (2, 3) for n in own),
    }
    assert (
        parameters(model).trainable
        == cost_of(shape_of(method, DEEP, phase="train"), "float32").trainable
    )
    train(method, model, ctx, 8, optimizer)
    model.eval()
    before = logits(model)
    adapter = model.model.layers[3].self_attn.o_proj
    merged = adapter.base.weight + adapter.lora_B @ adapter.lora_A  # the scale is 1
    model = method.finalize(model, ctx)
    torch.testing.assert_close(model.model.layers[3].self_attn.o_proj.weight, merged)
    torch.testing.assert_close(logits(model), before)
    assert parameters(model).total == chain_cost([method], DEEP, "float32").params
    assert model.model.layers[0].mlp.up_proj.weight.equal(base.model.layers[0].mlp.up_proj.weight)
    method.save(model, tmp_path)
    again = method.load(tiny_model(seed=0, shape=DEEP), tmp_path, context())
    assert logits(again).equal(logits(model))


def test_adapters_follow_the_seed_and_a_full_run_has_float32_masters() -> None:
    method = EchoLLaMA(trains="lora", rank=4)
    found = [method.prepare(tiny_model(shape=DEEP), context(seed)) for seed in (0, 0, 1)]
    one, two, three = (m.model.layers[3].self_attn.q_proj.lora_A for m in found)
    assert one.equal(two) and not one.equal(three)
    assert (method.weights, EchoLLaMA().weights) == ("compute", "float32")


# -- counts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        EchoLLaMA(),
        EchoLLaMA(blend=False),
        EchoLLaMA(trains="lora", rank=4),
        EchoLLaMA(trains="lora", rank=4, blend=False, mode="qk"),
    ],
    ids=["full", "abrupt", "lora", "qk"],
)
def test_the_first_step_costs_what_is_stated(method: EchoLLaMA) -> None:
    base = tiny_model(shape=DEEP)
    base.set_attn_implementation("eager")
    ctx, batch = context(), batch_of(length=40)
    ctx.total_steps = 16
    model = begun(method, base, ctx).train()
    ctx.evolution.before_step()
    counted = flops(lambda: method.loss(model, batch, ctx).backward())
    one = Pass("train", *batch.input_ids.shape, batch.loss_tokens)
    stated = step_flops(
        training_of(shape_of(method, DEEP, phase="train"), "float32"), one, square=True
    )
    assert stated == pytest.approx(counted, rel=0.02)
    assert (
        parameters(model).total == cost_of(shape_of(method, DEEP, phase="train"), "float32").params
    )


def test_the_shape_is_known_before_there_is_an_artefact(tmp_path: Path) -> None:
    method = EchoLLaMA(map="pairs", mode="qk", blend=False)
    model, ctx, _ = started(method)
    method.save(method.finalize(model, ctx), tmp_path)
    assert shape_of(method, DEEP, folder=tmp_path) == shape_of(method, DEEP)
    assert not shape_of(method, DEEP).uniform


def test_a_run_is_exported_and_read_by_effbench_alone(tmp_path: Path) -> None:
    method = EchoLLaMA(blend=False)
    model, ctx, _ = started(method)
    model = method.finalize(model, ctx).eval()
    method.export(model, UNNAMED, tmp_path)
    spec = ModelSpec(name="folder", source="folder", path=str(tmp_path))
    again = load(spec, device="cpu", dtype=torch.float32, tokenizer=False)
    assert logits(again.model).equal(logits(model))


# -- runs --------------------------------------------------------------------------------------

SMALL = (
    "train.max_steps=4",
    "train.batch_size=2",
    "+dataset.limit.train=16",
    "hardware.dtype=float32",
    "hardware.threads=1",
    "evaluator.perplexity.split=test",
)


def test_a_chain_goes_on_from_a_run(bench: Bench) -> None:
    first = bench.run("train", "method=echo_llama", *SMALL)
    before = {m.name: m.value for m in first.metrics}
    rest = [w for w in SMALL if not w.startswith("+dataset")]
    words = [f"from={first.key}", "evaluator=[perplexity]"]
    for method in ("lora", "full"):
        again = [*words, f"method={method}", "dataset.allow_overlap=true", *rest]
        found = {m.name: m.value for m in bench.run("train", *again).metrics}
        assert found["params"] == found["params_total"]
        assert found["kv_bytes_per_token"] == before["kv_bytes_per_token"]
    packed = bench.run("compress", *words, "method=rtn", "hardware.dtype=float32")
    found = {m.name: m.value for m in packed.metrics}
    assert found["weight_bytes"] < before["weight_bytes"]
    assert found["kv_bytes_per_token"] == before["kv_bytes_per_token"]


def test_a_blend_that_was_interrupted_goes_on_bit_for_bit() -> None:
    method = EchoLLaMA(share=0.5, adapt=0.75)
    whole, ctx, optimizer = started(method, 8)
    losses = train(method, whole, ctx, 8, optimizer)

    model, ctx, optimizer = started(method, 8)
    train(method, model, ctx, 4, optimizer)  # layer 3 converted, layer 2 at a third
    saved = copy.deepcopy(
        (
            method.trained_tensors(model),
            optimizer.state_dict(),
            ctx.evolution.state_dict(),
            ctx.generator.get_state(),
        )
    )
    again, ctx, optimizer = started(method, 8)
    tensors, state, evolved, draws = saved
    ctx.evolution.load_state_dict(evolved)
    assert method.trained_tensors(again).keys() == tensors.keys()
    optimizer.param_groups[0]["params"] = method.param_groups(again)[0][0]
    for name, target in method.trained_tensors(again).items():
        target.copy_(tensors[name])
    optimizer.load_state_dict(state)
    ctx.generator.set_state(draws)
    ctx.step = 4
    assert train(method, again, ctx, 4, optimizer) == losses[4:]
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert a.equal(b)


def test_gradual_and_abrupt_end_in_the_same_structure() -> None:
    found = []
    for method in (EchoLLaMA(), EchoLLaMA(blend=False)):
        model, ctx, optimizer = started(method)
        train(method, model, ctx, 8, optimizer)
        found.append({n: p.shape for n, p in method.finalize(model, ctx).named_parameters()})
    assert found[0] == found[1]
    plain = dict(Full().prepare(tiny_model(shape=DEEP), context()).named_parameters())
    assert len(plain) - len(found[0]) == 4
