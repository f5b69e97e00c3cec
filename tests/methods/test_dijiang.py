"""Layers with linear attention in a model: conversion, decoding, costs, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    SHAPE,
    context,
    counted,
    decoded,
    full_batch,
    generator,
    kept_bytes,
    logits,
    prepared,
    some_ids,
    stated,
    tiny_model,
    train,
)

from effbench.api.cost import cache_bytes, cost_of
from effbench.api.footprint import Pass, step_flops, training_of
from effbench.api.points import UNNAMED
from effbench.api.shape import Shape
from effbench.api.sharing import shared_shape, top_map
from effbench.methods.adapters.lora import LoRA
from effbench.methods.chain import resolved, shape_of
from effbench.methods.full import Full
from effbench.methods.linear_attention.dijiang import DiJiang
from effbench.methods.pruning.structured import Structured
from effbench.nn.decode import mixing, session, sessions, speculative, static
from effbench.nn.linear_attention import native, products
from effbench.nn.linear_attention.attention import Design, LinearAttention
from effbench.nn.llama.stack import require_plain_layers
from effbench.nn.llama.weights import cast_parameters
from effbench.nn.pruning import plain
from effbench.nn.scoring.prefix_tree import has_trees
from effbench.resources.counting import flops
from effbench.util import cpp
from effbench.util.errors import UserError

LONG: Shape = replace(SHAPE, vocab_size=500)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"layers": (1,)},
    {"features": "exp", "decay": "learned"},
    {"features": "prf", "gate": False},
    {"features": "elu", "author_groups": True},
    {"projection": "orthogonal", "weighted": False, "decay": "table"},
    {"layers": (0,), "trains": "converted"},
]
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def converted(dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """Return a model in evaluation, what trains moved away from where it starts."""
    model, _ = prepared(DiJiang(**settings), dtype=dtype)
    draws = generator(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=draws, dtype=p.dtype))
    return model.requires_grad_(False).eval()


def ids_of(settings: dict[str, Any]) -> str:
    return "-".join(str(v) for v in settings.values()) or "default"


variants = pytest.mark.parametrize("settings", VARIANTS, ids=ids_of)
needs_kernels = pytest.mark.skipif(bool(cpp.why_off() or not cpp.compiler()), reason="no kernels")

# -- conversion --------------------------------------------------------------------------------


def test_layers_are_listed_or_spread() -> None:
    assert DiJiang().chosen(4) == (0, 1, 2, 3)
    assert DiJiang(layers=(3, 1)).chosen(4) == (1, 3)
    assert DiJiang(count=1).chosen(30) == (15,)
    assert DiJiang(count=4).chosen(8) == (1, 3, 5, 7)


def test_settings_are_those_of_the_layers() -> None:
    given: Any = {
        "features": "exp",
        "projection": "orthogonal",
        "weighted": False,
        "decay": "table",
        "gate": False,
        "author_groups": True,
        "eps": 0.25,
    }
    assert DiJiang(**given)._design() == Design(**given)
    model, _ = prepared(DiJiang(layers=(1,), eps=0.25))
    assert model.model.layers[1].self_attn.norm.eps == 0.25  # type: ignore[union-attr,index]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": (2,)}, "not different layers of 2"),
        ({"layers": (1, 1)}, "not different layers"),
        ({"count": 3}, "2 layers, not 3"),
        ({"layers": (1,), "count": 1}, "both there"),
        ({"features": "elu", "projection": "orthogonal"}, "no C and w"),
        ({"features": "prf", "weighted": False}, "no C and w"),
        ({"layers": (), "trains": "converted"}, "trains nothing"),
    ],
)
def test_what_cannot_be_converted_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        DiJiang(**settings).resolve(SHAPE)
    assert error.value.hint


def test_models_without_keys_of_their_own_are_refused() -> None:
    with pytest.raises(UserError, match="states from others"):
        DiJiang().resolve(shared_shape(SHAPE, top_map(2, 1)))
    left = shape_of(DiJiang(), SHAPE)
    empty = replace(left, layers=(left.layers[0], replace(left.layers[1], mixer=None)))
    with pytest.raises(UserError, match="Layer 1 of this model has no attention"):
        DiJiang().resolve(empty)


def test_projections_stay_and_a_gate_begins_small() -> None:
    base, (model, _) = tiny_model(), prepared(DiJiang(layers=(1,)))
    before, after = base.model.layers[1].self_attn, model.model.layers[1].self_attn  # type: ignore[union-attr,index]
    assert isinstance(after, LinearAttention)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert getattr(after, name).weight.equal(getattr(before, name).weight)
    bound = 2**-2.5 * (6 / 128) ** 0.5
    assert bound * 0.98 < float(after.g_proj.weight.detach().abs().max()) <= bound
    assert type(model.model.layers[0].self_attn) is type(before)  # type: ignore[union-attr,index]


def test_draws_depend_on_the_seed_and_the_layer() -> None:
    def drawn(seed: int) -> list[torch.Tensor]:
        model, _ = prepared(DiJiang(), seed)
        return [layer.self_attn.features.directions for layer in model.model.layers]  # type: ignore[union-attr]

    first, second = drawn(0)
    assert not first.equal(second)
    assert first.equal(drawn(0)[0]) and not first.equal(drawn(1)[0])


def test_what_trains_is_all_or_the_converted_layers() -> None:
    model, _ = prepared(DiJiang(layers=(1,), trains="converted"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if n.startswith("model.layers.1.")}
    model, _ = prepared(DiJiang(layers=(1,)))
    assert all(p.requires_grad for p in model.parameters())


def test_only_the_converted_layers_change() -> None:
    method = DiJiang(layers=(1,), trains="converted")
    model, ctx = prepared(method)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = train(method, model, ctx, 3, same_batch=True)
    assert losses[-1] < losses[0]
    for name, p in model.named_parameters():
        assert p.equal(before[name]) != name.startswith("model.layers.1."), name


def test_a_loaded_artefact_has_the_directions_that_were_drawn(tmp_path: Path) -> None:
    """Also where the run that loads it would draw others."""
    method = DiJiang(layers=(0,), features="exp", decay="learned")
    model, ctx = prepared(method)
    train(method, model, ctx, 1)
    method.save(model, tmp_path)
    again = method.load(tiny_model(), tmp_path, context(seed=5))
    assert logits(again).equal(logits(model))
    assert dict(again.named_buffers()).keys() == dict(model.named_buffers()).keys()
    for name, buffer in model.named_buffers():
        assert buffer.equal(again.get_buffer(name)), name


# -- the module --------------------------------------------------------------------------------


def module(**settings: Any) -> tuple[LinearAttention, dict[str, Any]]:
    """Return an attention in float64, and 9 positions without turning."""
    own = LinearAttention(tiny_model().model.layers[0].self_attn, Design(**settings), generator())
    own = own.double().eval().requires_grad_(False)
    ones = torch.ones(1, 9, 16, dtype=torch.float64)
    return own, {"position_embeddings": (ones, 0 * ones), "position_ids": torch.arange(9)[None]}


def entered() -> torch.Tensor:
    return torch.randn(2, 9, 64, generator=generator(4), dtype=torch.float64)


def test_where_nothing_is_turned_no_position_matters() -> None:
    own, inputs = module()
    expected = own(entered(), **inputs)[0]
    later = {**inputs, "position_ids": inputs["position_ids"] + 100}
    assert own(entered(), **later)[0].equal(expected)


def test_turning_comes_before_the_features() -> None:
    own, inputs = module()
    cos, sin = torch.randn(2, 1, 9, 16, generator=generator(1), dtype=torch.float64)
    turned = own(entered(), **{**inputs, "position_embeddings": (cos, sin)})[0]
    assert not turned.allclose(own(entered(), **inputs)[0])
    q, k, _ = own._projected(entered(), cos, sin)
    assert (own._mapped(q, k, None)[1] > 0).all()


def test_tables_as_they_start_are_the_fixed_rates() -> None:
    fixed, inputs = module()
    table, _ = module(decay="table")
    assert table(entered(), **inputs)[0].equal(fixed(entered(), **inputs)[0])


def test_the_norm_takes_the_scale_of_values_out() -> None:
    own, inputs = module(eps=1e-30)
    expected = own(entered(), **inputs)[0]
    own.v_proj.weight.mul_(7)
    torch.testing.assert_close(own(entered(), **inputs)[0], expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("author", [False, True])
def test_the_norms_groups(author: bool) -> None:
    own, _ = module(author_groups=author)
    y = torch.randn(2, 2, 2, 9, 16, generator=generator(5), dtype=torch.float64)
    side = y.permute(0, 3, 1, 2, 4).reshape(18, 64)
    expected = F.group_norm(side, 16 if author else 4).view(2, 9, 64)
    torch.testing.assert_close(own._normed(y), expected, atol=1e-10, rtol=1e-10)


def test_without_a_gate_the_normed_output_is_projected() -> None:
    own, inputs = module(gate=False)
    q, k, v = own._projected(entered(), *inputs["position_embeddings"])
    y = own._advanced(*own._mapped(q, k, None), v, None)
    assert own(entered(), **inputs)[0].equal(own.o_proj(own._normed(y)))


@pytest.mark.parametrize("features", ["softmax", "exp", "prf", "elu"])
def test_gradients_are_finite_over_long_texts_in_bfloat16(features: Any) -> None:
    model, _ = prepared(DiJiang(layers=(1,), features=features))
    ids = some_ids(1, 2048)
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# -- decoding ----------------------------------------------------------------------------------


@variants
def test_decoding_gives_what_one_pass_gives(settings: dict[str, Any]) -> None:
    """Rows with padding on their left, in float64, with states alone or beside keys and values."""
    model = converted(torch.float64, **settings)
    ids = some_ids(2, 80)
    mask = torch.ones(2, 70, dtype=torch.long)
    mask[1, :5] = 0
    with torch.no_grad():
        found = decoded(sessions.session_for(model), ids, 70, mask)
        first = model(input_ids=ids[:1], use_cache=False).logits[0, 69:]
        second = model(input_ids=ids[1:, 5:], use_cache=False).logits[0, 64:]
    torch.testing.assert_close(found[0], first, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(found[1], second, atol=1e-9, rtol=1e-9)


@needs_kernels
@variants
@pytest.mark.parametrize("padded", [False, True])
def test_the_kernels_products_and_steps_give_what_modules_give(
    settings: dict[str, Any], padded: bool
) -> None:
    """Padded rows beside keys and values go through the modules."""
    model = converted(**settings)
    ids = some_ids(3, 16)
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[1, : 4 * padded] = 0
    ours, theirs = sessions.session_for(model), session.CachedSession(model)
    assert isinstance(ours, mixing.MixingSession)
    expected = decoded(theirs, ids, 6, mask)
    torch.testing.assert_close(decoded(ours, ids, 6, mask), expected, **CLOSE)
    assert ours.kv_bytes() == theirs.kv_bytes()
    for each in (ours, theirs):
        each.reorder(torch.tensor([2, 1, 1]))
    torch.testing.assert_close(ours.step(ids[:, :1]), theirs.step(ids[:, :1]), **CLOSE)


@needs_kernels
def test_in_bfloat16_the_kernel_rounds_where_modules_do() -> None:
    model = converted()
    cast_parameters(model, torch.bfloat16)
    ids = some_ids(2, 12)
    own, other = (f(model) for f in (sessions.session_for, session.CachedSession))
    assert isinstance(own, mixing.MixingSession)
    found, expected = (decoded(each, ids, 5).float() for each in (own, other))
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0.03)


@needs_kernels
@variants
@torch.no_grad()
def test_a_step_of_the_kernel_is_that_of_the_operations(settings: dict[str, Any]) -> None:
    """On states that are not there yet and on some, with values far from each other."""
    own = next(m for m in converted(**settings).modules() if isinstance(m, LinearAttention))
    draws, positions = generator(1), torch.tensor([[3], [0], [9]])
    q, k, v = (3 * torch.randn(3, n, 1, 16, generator=draws) for n in (4, 2, 2))
    own.norm.weight.add_(torch.randn(64, generator=draws))
    decays = own.decay.factors(positions), own.decay.rates()
    for before in (None, torch.randn(3, 2, 16, 16, generator=draws)):
        found, after = native.step((q, k, v), own.features, *decays, own.norm, before)
        y, state = products.step(*own._mapped(q, k, positions), v, decays[1], before)
        torch.testing.assert_close(found, own._normed(y), **CLOSE)
        torch.testing.assert_close(after, state, **CLOSE)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_padding_changes_nothing_on_either_side(kind: str) -> None:
    model = converted()
    model.set_attn_implementation(kind)
    ids = some_ids(1, 12)
    with torch.no_grad():
        alone = model(input_ids=ids, use_cache=False).logits
        pad, mask = torch.full((1, 4), 3), torch.ones(1, 16, dtype=torch.long)
        mask[:, :4] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        left = model(
            input_ids=torch.cat([pad, ids], 1), attention_mask=mask, position_ids=positions
        ).logits[:, 4:]
        right = model(input_ids=torch.cat([ids, pad], 1), attention_mask=mask.flip(1)).logits
    torch.testing.assert_close(left, alone, **CLOSE)
    torch.testing.assert_close(right[:, :12], alone, **CLOSE)


@pytest.mark.parametrize("layers", [None, (1,), (0,)])
def test_caches_grow_by_what_is_counted(layers: Any) -> None:
    method, model = DiJiang(layers=layers), converted(layers=layers)
    shape = shape_of(method, SHAPE).used()
    held = session.CachedSession(model)
    for tokens, ids in ((7, some_ids(2, 7)), (8, some_ids(2, 1)), (9, some_ids(2, 1))):
        _ = held.prefill(ids) if tokens == 7 else held.step(ids)
        assert held.kv_bytes() == cache_bytes(shape, "float32", tokens, 2)
        assert held.kv_bytes() == cost_of(shape, "float32").cached(tokens, 2)
        assert [held.cache.get_seq_length(i) for i in range(2)] == [tokens] * 2
    states = [x.state for x in held.cache.layers if hasattr(x, "state")]
    assert {s.dtype for s in states} == {torch.float32}
    assert {s.shape for s in states} == {(2, 2, 16, 16)}


def test_states_are_float32_whatever_the_model_is() -> None:
    model = converted(layers=(0,))
    cast_parameters(model, torch.bfloat16)
    held = session.CachedSession(model)
    held.prefill(some_ids(2, 7))
    state: Any = held.cache.layers[0]
    assert state.state.dtype == torch.float32 and model.dtype == torch.bfloat16


def test_the_loop_of_transformers_decodes_the_same() -> None:
    model = converted(layers=(0,))
    ids = some_ids(2, 6)
    theirs = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0, num_beams=1)
    held = session.CachedSession(model)
    ours = session.greedy(held, ids, 5)
    assert theirs[:, 6:].equal(ours)


# -- what is refused ---------------------------------------------------------------------------


def test_what_a_state_cannot_do_is_refused() -> None:
    model = converted(layers=(1,))
    with pytest.raises(ValueError, match="some layers keep a state"):
        static.StaticSession(model)
    for call in (
        lambda: speculative.SpeculativeSession(model, (1, 2), 2, False),
        lambda: require_plain_layers(model),
        lambda: plain.plain_model(model),
        lambda: DiJiang(layers=(1,)).as_plain(model, UNNAMED),
        lambda: LoRA().as_plain(model, UNNAMED),
    ):
        with pytest.raises(UserError, match="keep a state"):
            call()
    assert has_trees(tiny_model()) and not has_trees(model)
    with pytest.raises(UserError, match="no room for one"):
        model.generate(some_ids(1, 4), max_new_tokens=2, cache_implementation="static")


def test_methods_that_know_llama_alone_cannot_follow() -> None:
    left = shape_of(DiJiang(layers=(1,)), SHAPE)
    for method in (Structured(), DiJiang()):
        with pytest.raises(UserError, match="blocks"):
            resolved(method, left)
    assert resolved(Full(), left) == Full()
    assert resolved(Structured(), shape_of(DiJiang(layers=()), SHAPE))


# -- what it costs -----------------------------------------------------------------------------


@variants
def test_it_costs_what_is_counted(settings: dict[str, Any]) -> None:
    method = DiJiang(**settings)
    model, _ = prepared(method)
    assert stated(method) == counted(model)
    cast_parameters(model, torch.bfloat16)
    used = cost_of(shape_of(method, SHAPE).used(), "bfloat16")
    assert used.resident_bytes == counted(model)["resident_bytes"]


@variants
def test_a_step_makes_the_products_that_are_stated(settings: dict[str, Any]) -> None:
    model = converted(**settings)
    held = session.CachedSession(model)
    held.prefill(some_ids(1, 7))
    spent = flops(lambda: held.step(some_ids(1, 1)))
    shape = shape_of(DiJiang(**settings), SHAPE)
    assert spent == cost_of(shape, "float32").flops_per_token == shape.flops_per_token()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@variants
def test_training_keeps_and_computes_what_is_stated(settings: dict[str, Any], dtype: str) -> None:
    method, rows, length = DiJiang(**settings), 2, 256
    training = training_of(shape_of(method, LONG, phase="train"), dtype)
    kept = kept_bytes(method, dtype, LONG, rows, length)
    assert training.layers * rows * length + training.fixed == pytest.approx(kept, rel=0.06)
    if dtype == "bfloat16":
        return
    model, ctx = prepared(method)
    batch = full_batch(SHAPE, rows, length)
    spent = flops(lambda: ctx.backward(method.loss(model, batch, ctx)))
    one = Pass("train", rows, length, batch.loss_tokens)
    work = training_of(shape_of(method, SHAPE, phase="train"), dtype)
    unseen = replace(work, attention=0, attention_gradient=0)  # of the others, on a CPU
    assert step_flops(unseen, one) == pytest.approx(spent, rel=0.03)
