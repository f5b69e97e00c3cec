"""Layers that share states: maps, counts, equality of all ways of computing, folders."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SHAPE, batch_of, context, decoded, generator, logits, tiny_model
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM

from effbench.api.cost import cost_of
from effbench.api.footprint import Pass, step_flops, training_of
from effbench.api.shape import ModelShape
from effbench.api.sharing import (
    TAKEN,
    LayerMap,
    listed_map,
    pair_map,
    require_unshared,
    shared_shape,
    top_map,
)
from effbench.api.spec import ModelSpec
from effbench.methods.adapters.lora import LoRA
from effbench.methods.base import Method
from effbench.methods.chain import chain_cost, shape_of
from effbench.methods.compresses import compress_whole
from effbench.methods.depth.depths import Depths
from effbench.methods.depth.lora_drop import LoRADrop
from effbench.methods.full import Full
from effbench.methods.pruning.structured import Structured
from effbench.methods.quant.rtn import RTN
from effbench.models.load import load
from effbench.nn.decode import native
from effbench.nn.decode.cuda_graph import StaticStep
from effbench.nn.decode.pointwise import fused
from effbench.nn.decode.session import CachedSession
from effbench.nn.decode.sessions import session_for
from effbench.nn.decode.shared import SharedSession
from effbench.nn.decode.static import StaticSession
from effbench.nn.llama.shared_attention import (
    ValueLayer,
    attention_map,
    convert,
    copying,
    last_logits,
    map_of,
    put_sharing,
    shape_shared,
    share,
    sharing_layers,
)
from effbench.nn.llama.surgery import decoder_linears
from effbench.nn.llama.walk import why_not
from effbench.nn.scoring.prefix_tree import has_trees
from effbench.nn.sharing.checkpoint import follow_map, read_shared, write_map, write_shared
from effbench.resources.counting import flops
from effbench.resources.roofline import prefill_flops
from effbench.util.errors import UserError

DEEP = replace(SHAPE, num_layers=6, tied=True)
MAPS = {
    "top": lambda mode: top_map(6, 3, mode),
    "pairs": lambda mode: pair_map(6, 2, mode),
    "listed": lambda mode: listed_map(6, (1, 2, 4), mode),
}
Make = Callable[[Any], LayerMap]
every = pytest.mark.parametrize(
    "sharing",
    [
        pytest.param(make(mode), id=f"{mode}-{name}")
        for mode in TAKEN
        for name, make in MAPS.items()
    ],
)


EAGER = {"atol": 1e-4, "rtol": 1e-4}
"""What float32 gives, in which eager attention has its softmax."""


def dense(dtype: torch.dtype = torch.float64, attention: str = "sdpa") -> Any:
    model = tiny_model(dtype=dtype, shape=DEEP).eval()
    model.set_attn_implementation(attention)
    return model


def shared(sharing: LayerMap, dtype: torch.dtype = torch.float64, attention: str = "sdpa") -> Any:
    if attention == "eager":  # in float64 its masked rows are NaN
        dtype = torch.float32
    return share(dense(dtype, attention), sharing).eval()


def tokens(rows: int = 3, length: int = 14) -> torch.Tensor:
    return torch.randint(3, SHAPE.vocab_size, (rows, length), generator=generator(4))


# -- maps --------------------------------------------------------------------------------------


def test_maps() -> None:
    assert top_map(6, 3).sources == (0, 1, 2, 2, 2, 2)
    assert top_map(6, 0).sources == (0, 1, 2, 3, 4, 5)
    assert pair_map(6, 2).sources == (0, 1, 2, 2, 4, 4)
    assert pair_map(5, 2).sources == (0, 0, 2, 2, 4)
    assert listed_map(6, (4, 1, 2)).sources == (0, 0, 0, 3, 3, 5)
    assert top_map(6, 3).tail == 3
    assert top_map(6, 3, "qk").tail == 0
    assert pair_map(6, 2).tail == 1
    assert listed_map(6, (1, 2, 4)).tail == 0
    one = top_map(6, 3)
    assert (one.consumers, one.givers) == ((3, 4, 5), (2,))
    assert one.only((5,)).sources == (0, 1, 2, 3, 4, 2)


@pytest.mark.parametrize("sources", [(1, 1), (0, 0, 1), (0, -1)])
def test_a_source_is_an_earlier_layer_of_its_own(sources: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="cannot take"):
        LayerMap("kv", sources)


def test_there_is_no_way_to_share_all_three() -> None:
    with pytest.raises(ValueError, match="no way of sharing"):
        LayerMap("qkv", (0, 0))  # type: ignore[arg-type]


@pytest.mark.parametrize("listed", [(0,), (6,), (2, 2)])
def test_listed_layers_are_checked(listed: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"method\.layers"):
        listed_map(6, listed)


# -- what is gone ------------------------------------------------------------------------------


@every
def test_parameters_are_removed(sharing: LayerMap) -> None:
    whole, model = dense(), shared(sharing)
    shape = shape_shared(model, DEEP)
    assert shape == shared_shape(DEEP, sharing)
    assert not shape.uniform
    count = sum(p.numel() for p in model.parameters())
    d, q, kv = 64, 64, 32
    per_layer = 2 * d * kv if sharing.mode == "kv" else d * q + d * kv
    before = sum(p.numel() for p in whole.parameters())
    assert before - count == len(sharing.consumers) * per_layer == DEEP.params - shape.params
    gone = [f"layers.{i}.self_attn.{n}" for i in sharing.consumers for n in TAKEN[sharing.mode]]
    assert not any(name in key for key in model.state_dict() for name in gone)
    names = {n.removeprefix("model.") for n, _ in decoder_linears(model)}
    assert names == {
        f"layers.{i}.{'self_attn' if n[0] in 'qkvo' else 'mlp'}.{n}" for i, n, *_ in shape.linears()
    }


def test_sizes_of_the_papers_models() -> None:
    small = replace(
        DEEP,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        vocab_size=49152,
    )
    half = shared_shape(small, top_map(30, 15))
    assert (small.params - half.params) // 15 == 221_184
    assert (small.kv_bytes_per_token(2), half.kv_bytes_per_token(2)) == (23_040, 11_520)
    qk = shared_shape(small, top_map(30, 15, "qk"))
    assert (small.params - qk.params) // 15 == 442_368
    assert qk.kv_bytes_per_token(2) == 23_040 * 45 // 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_shared_is_the_model_itself(dtype: torch.dtype) -> None:
    whole, model = dense(dtype), shared(top_map(6, 0), dtype)
    assert logits(model).equal(logits(whole))
    assert map_of(model) is None
    assert shape_shared(model, DEEP) == ModelShape.of(DEEP)
    assert type(model.model.layers[0].self_attn).__name__ == "LlamaAttention"


# -- ways of computing that are equal ----------------------------------------------------------


def by_hand(model: Any, sharing: LayerMap, ids: torch.Tensor) -> torch.Tensor:
    """Compute the logits with a loop over layers and heads that knows nothing of modules."""
    inner, width = model.model, DEEP.head_dim
    hidden = inner.embed_tokens(ids)
    cos, sin = inner.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    made: dict[int, dict[str, torch.Tensor]] = {}

    def turn(x: torch.Tensor) -> torch.Tensor:
        low, high = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]

    hide = torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool()
    for index, layer in enumerate(inner.layers):
        x, source = layer.input_layernorm(hidden), sharing.sources[index]
        own = dict(made[source]) if source != index else {}
        for name in ("q_proj", "k_proj", "v_proj"):
            if hasattr(layer.self_attn, name):
                y = getattr(layer.self_attn, name)(x)
                y = y.view(*ids.shape, -1, width).transpose(1, 2)
                own[name] = y if name == "v_proj" else turn(y)
        made[index] = own
        outputs = []
        for head in range(DEEP.num_heads):
            kv = head * DEEP.num_kv_heads // DEEP.num_heads
            scores = own["q_proj"][:, head] @ own["k_proj"][:, kv].mT / width**0.5
            weights = scores.masked_fill(hide, -torch.inf).softmax(-1)
            outputs.append(weights @ own["v_proj"][:, kv])
        hidden = hidden + layer.self_attn.o_proj(torch.cat(outputs, -1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(inner.norm(hidden))


@every
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_pass_is_what_a_loop_computes(sharing: LayerMap, attention: str) -> None:
    model, ids = shared(sharing, attention=attention), tokens()
    with torch.no_grad():
        found = model(input_ids=ids).logits
        near: Any = EAGER if attention == "eager" else {}
        torch.testing.assert_close(found, by_hand(model, sharing, ids), **near)
        # Sharing does change the model.
        assert not torch.allclose(found, dense(found.dtype)(input_ids=ids).logits, atol=1e-3)


@every
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(sharing: LayerMap, attention: str, side: str) -> None:
    model, ids = shared(sharing, attention=attention), tokens(2)
    mask = torch.ones_like(ids)
    real = slice(4, None) if side == "left" else slice(None, -4)
    mask[1] = 0
    mask[1, real] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        both = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        alone = model(input_ids=ids[1:, real]).logits
    near: Any = EAGER if attention == "eager" else {}
    torch.testing.assert_close(both[1:, real], alone, **near)


@pytest.mark.parametrize("make", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_copied_map_is_one_that_is_computed_again(make: Make, attention: str) -> None:
    model = shared(make("qk"), attention=attention)
    batch = batch_of()
    expected, ids = logits(model, batch), tokens()
    with copying(model):
        torch.testing.assert_close(logits(model, batch), expected, **EAGER)
        session = SharedSession(model)
        decoded = [session.prefill(ids[:, :6])]
        decoded += [session.step(ids[:, t : t + 1]) for t in range(6, 14)]
    with torch.no_grad():
        whole = model(input_ids=ids).logits[:, 5:]
    torch.testing.assert_close(torch.stack(decoded, 1), whole, **EAGER)
    assert not any(m.copies for m in sharing_layers(model))


def test_rows_of_a_map_add_up_and_see_no_future() -> None:
    q, k = (torch.randn(2, h, 9, 16, generator=generator(h)) for h in (4, 2))
    weights = attention_map(q, k, None, 0.25)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 9))
    assert weights.triu(1).eq(0).all()
    last = attention_map(q[:, :, -1:], k, None, 0.25)
    torch.testing.assert_close(last, weights[:, :, -1:])


@every
def test_sharing_is_exact_where_states_are_equal(sharing: LayerMap) -> None:
    whole = dense()
    layers = whole.model.layers
    with torch.no_grad():
        for consumer in sharing.consumers:
            source = sharing.sources[consumer]
            layers[consumer].input_layernorm.weight.copy_(layers[source].input_layernorm.weight)
            for name in TAKEN[sharing.mode]:
                part = getattr(layers[source].self_attn, name).weight
                getattr(layers[consumer].self_attn, name).weight.copy_(part)
            for layer in layers[source:consumer]:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
    model = share(copy.deepcopy(whole), sharing)
    torch.testing.assert_close(logits(model), logits(whole), atol=1e-9, rtol=1e-9)


@every
def test_no_token_sees_a_later_one(sharing: LayerMap) -> None:
    model, ids = shared(sharing), tokens()
    other = ids.clone()
    other[:, 8] = (other[:, 8] + 1) % SHAPE.vocab_size
    with torch.no_grad():
        a, b = (model(input_ids=x).logits for x in (ids, other))
    assert a[:, :8].equal(b[:, :8])
    assert not a[:, 8].equal(b[:, 8])


# -- on the way --------------------------------------------------------------------------------


@every
def test_a_blend_leads_from_one_model_to_the_other(sharing: LayerMap) -> None:
    whole, model = dense(), put_sharing(dense(), sharing)
    assert map_of(model) is None
    assert logits(model).equal(logits(whole))
    found = []
    for a in (0.0, 0.5, 1.0):
        for m in sharing_layers(model):
            m.share = a
        found.append(logits(model))
    assert found[0].equal(logits(whole))
    torch.testing.assert_close(found[2], logits(shared(sharing)), atol=1e-9, rtol=1e-9)
    assert not torch.allclose(found[1], found[0]) and not torch.allclose(found[1], found[2])
    for layer in sharing.consumers:
        convert(model, layer)
    assert logits(model).equal(logits(shared(sharing)))


@every
def test_a_blend_is_decoded_as_it_is_read(sharing: LayerMap) -> None:
    model: Any = put_sharing(dense(), sharing)
    for m in sharing_layers(model):
        m.share = 0.3
    convert(model, sharing.consumers[-1])
    ids, session = tokens(), CachedSession(model)
    steps = [session.prefill(ids[:, :5])]
    steps += [session.step(ids[:, t : t + 1]) for t in range(5, 14)]
    with torch.no_grad():
        torch.testing.assert_close(torch.stack(steps, 1), model(input_ids=ids).logits[:, 4:])


# -- gradients ---------------------------------------------------------------------------------


def gradients(model: Any, checkpointing: bool = False) -> dict[str, torch.Tensor]:
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    Full().loss(model, batch_of(), None).backward()  # type: ignore[arg-type]
    return {n: p.grad for n, p in model.named_parameters()}


@every
def test_gradients_are_those_of_the_loop(sharing: LayerMap) -> None:
    model, batch = shared(sharing), batch_of()
    batch.attention_mask[:] = 1
    found = gradients(shared(sharing))
    out = by_hand(model, sharing, batch.input_ids)
    targets = batch.labels[:, 1:]
    torch.nn.functional.cross_entropy(
        out[:, :-1][targets != -100], targets[targets != -100]
    ).backward()
    for name, p in model.named_parameters():
        # norms compute in float32
        torch.testing.assert_close(found[name], p.grad, atol=1e-6, rtol=1e-4)


@every
def test_checkpointing_changes_no_gradient(sharing: LayerMap) -> None:
    expected, found = gradients(shared(sharing)), gradients(shared(sharing), checkpointing=True)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


@every
def test_a_source_learns_from_all_its_consumers(sharing: LayerMap) -> None:
    source = sharing.givers[-1]
    takers = [i for i in sharing.consumers if sharing.sources[i] == source]

    def part(watched: set[int]) -> torch.Tensor:
        """Return the gradient of the source's k_proj along the given layers alone."""
        model = shared(sharing)
        for m in sharing_layers(model):
            if m.layer in (source, *takers) and m.layer not in watched:
                forward = m.forward

                def detached(*args: Any, forward: Any = forward, m: Any = m, **kwargs: Any) -> Any:
                    states = kwargs["shared_states"]
                    if m.layer in takers:
                        kwargs["shared_states"] = type(states)(
                            {n: tuple(t.detach() for t in s) for n, s in states.items()}
                        )
                    return forward(*args, **kwargs)

                m.forward = detached
        model.train()
        Full().loss(model, batch_of(), None).backward()  # type: ignore[arg-type]
        gradient: torch.Tensor = model.model.layers[source].self_attn.k_proj.weight.grad
        return gradient

    alone = part(set())
    each = [part({taker}) - alone for taker in takers]
    assert all(float(g.abs().max()) > 1e-6 for g in each)
    torch.testing.assert_close(alone + sum(each), part(set(takers)), atol=1e-9, rtol=1e-6)


@every
def test_a_consumers_input_changes_no_state_of_others(sharing: LayerMap) -> None:
    model, consumer = shared(sharing), sharing.consumers[0]
    caches = []
    for shift in (0.0, 1.0):
        norm = model.model.layers[consumer].input_layernorm
        hook = norm.register_forward_hook(lambda _, __, y, shift=shift: y + shift)
        cache = DynamicCache()
        with torch.no_grad():
            model(input_ids=tokens(), past_key_values=cache, use_cache=True)
        hook.remove()
        caches.append(cache.layers)
    place = model.model.layers[consumer].self_attn.layer_idx
    for a, b in list(zip(*caches, strict=True))[:place]:
        assert a.keys.equal(b.keys) and a.values.equal(b.values)
    if sharing.mode == "qk":
        assert caches[0][place].keys.shape[-1] == 0


def test_reentrant_checkpointing_is_refused() -> None:
    model = shared(top_map(6, 3)).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        model(input_ids=tokens())


# -- decoding ----------------------------------------------------------------------------------


def sessions(model: Any) -> list[Any]:
    assert isinstance(session_for(model), StaticSession)
    return [session_for(model), SharedSession(model), CachedSession(model)]


@every
@pytest.mark.parametrize(
    ("padded", "attention"), [(False, "sdpa"), (True, "sdpa"), (True, "eager")]
)
def test_decoding_gives_what_one_pass_gives(
    sharing: LayerMap, padded: bool, attention: str
) -> None:
    model, ids = shared(sharing, attention=attention), tokens()
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, 5:]
    shape = shape_shared(model, DEEP)
    for session in sessions(model):
        found = decoded(session, ids, 6, mask[:, :6] if padded else None)
        near: Any = EAGER if attention == "eager" else {"atol": 1e-9, "rtol": 1e-9}
        torch.testing.assert_close(found, expected, **near)
        element = expected.element_size()
        assert session.kv_bytes() == shape.kv_bytes_per_token(element) * ids.numel()


@every
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_takes_what_others_made(
    sharing: LayerMap, padded: bool, dtype: torch.dtype
) -> None:
    model, ids, mask = shared(sharing, dtype), tokens(), None
    if padded:
        mask = torch.ones_like(ids)
        mask[1, :4] = 0
    first = None if mask is None else mask[:, :6]
    session = StaticSession(model)
    session.reserve(*ids.shape)
    assert session.engine == ("native" if native.kernels() else "walk")
    found = decoded(session, ids, 6, first)
    expected = decoded(StaticSession(model, use_native=False), ids, 6, first)
    near = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.05}
    torch.testing.assert_close(found, expected, **near)
    bytes_held = shape_shared(model, DEEP).kv_bytes_per_token(dtype.itemsize) * ids.numel()
    assert session.kv_bytes() == bytes_held
    session.reorder(torch.tensor([1, 1, 0]))
    assert session.step(ids[:, :1]).isfinite().all()


@every
def test_a_step_of_fixed_addresses_gives_the_same(sharing: LayerMap) -> None:
    """What a CUDA graph captures, run as it is."""
    model, ids = shared(sharing, torch.float32), tokens()
    one, other = (StaticSession(model, use_native=False) for _ in range(2))
    for session in (one, other):
        session.prefill(ids[:, :6])
    with torch.inference_mode():
        static = StaticStep(other, fused(lambda function: function))
        for t in range(6, 10):
            static.token.copy_(ids[:, t : t + 1])
            found = static.logits(other)
            static.advance(other)
            torch.testing.assert_close(found, one.step(ids[:, t : t + 1]), atol=5e-5, rtol=0)


def test_queries_of_an_earlier_source_are_left_to_the_walk() -> None:
    model = shared(LayerMap("qk", (0, 1, 0, 1, 4, 5)), torch.float32)
    session = StaticSession(model)
    session.reserve(3, 14)
    assert session.engine == "walk"
    ids = tokens()
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, 5:]
    torch.testing.assert_close(decoded(session, ids, 6), expected, atol=1e-5, rtol=1e-4)


def test_what_is_half_converted_is_decoded_by_its_forward_pass() -> None:
    model: Any = put_sharing(dense(), top_map(6, 3))
    sharing_layers(model)[5].share = 0.5
    assert "half converted" in why_not(model)
    convert(model, 5)
    assert not why_not(model)
    model = shared(top_map(6, 3, "qk"))
    with copying(model):
        assert isinstance(session_for(model), CachedSession)


@every
def test_reordered_sequences_go_on(sharing: LayerMap) -> None:
    model, ids = shared(sharing), tokens(3, 9)
    mask = torch.ones_like(ids[:, :6])
    mask[2, :3] = 0
    rows = torch.tensor([2, 0, 2])
    for make in (lambda: session_for(model), lambda: CachedSession(model)):
        session, other = make(), make()
        session.prefill(ids[:, :6], mask)
        session.step(ids[:, 6:7])
        session.reorder(rows)
        other.prefill(ids[rows, :6], mask[rows])
        other.step(ids[rows, 6:7])
        for t in (7, 8):
            torch.testing.assert_close(
                session.step(ids[rows, t : t + 1]), other.step(ids[rows, t : t + 1])
            )


@every
def test_a_shared_cache_can_be_cropped_repeated_and_selected(sharing: LayerMap) -> None:
    model, ids = shared(sharing), tokens(2, 10)
    cache = DynamicCache(config=model.config)

    def run(inputs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=inputs, past_key_values=cache, use_cache=True).logits

    run(ids[:, :8])
    cache.crop(-2)
    used = [layer for layer in cache.layers if layer.is_initialized]
    assert {layer.get_seq_length() for layer in used} == {6}
    assert sum(isinstance(x, ValueLayer) for x in used) == (
        len(sharing.consumers) if sharing.mode == "qk" else 0
    )
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([2, 1]))
    found = run(ids[[1, 0], 6:])
    with torch.no_grad():
        torch.testing.assert_close(found, model(input_ids=ids[[1, 0]]).logits[:, 6:])


def test_upper_layers_read_the_last_position_alone() -> None:
    model, ids = shared(top_map(6, 3)), tokens()
    widths: list[int] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[1]))
    session_for(model).prefill(ids)
    assert widths == [14, 14, 14, 1, 1, 1]


@every
def test_prefill_flops_are_what_torch_counts(sharing: LayerMap) -> None:
    model, ids = shared(sharing, attention="eager"), tokens(2, 32)
    shape = shape_shared(model, DEEP)
    with torch.no_grad():
        counted = flops(lambda: last_logits(model, ids, None, None, DynamicCache()))
    stated = prefill_flops(cost_of(shape, "float32"), shape, 2, 32)
    # torch counts whole squares of scores, of which a query sees half
    squares = 4 * DEEP.num_heads * DEEP.head_dim * (6 - shape.tail) * (32 * 32 - 32 * 33 // 2) * 2
    assert stated + squares == pytest.approx(counted, rel=1e-6)


@every
def test_trees_of_requests_are_scored(sharing: LayerMap) -> None:
    import random

    from test_scoring import alone, benchmark, by_tree, close

    model = shared(sharing)
    assert has_trees(model)
    requests = benchmark(random.Random(1), 6, 40, 12, 3)
    close(by_tree(model, requests, row_tokens=48), [alone(model, r) for r in requests])


# -- counts ------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("method", [Full(), LoRA(rank=4)], ids=lambda m: type(m).__name__)
def test_training_costs_what_is_stated(sharing: LayerMap, method: Method) -> None:
    model = shared(sharing, torch.float32, "eager")
    shape, batch = shape_shared(model, DEEP), batch_of(length=40)
    model = method.prepare(model.requires_grad_(False), context()).train()
    assert chain_cost([method], shape, "float32").params == sum(
        p.numel() for p in model.parameters()
    )
    counted = flops(lambda: method.loss(model, batch, context()).backward())
    one = Pass("train", *batch.input_ids.shape, batch.loss_tokens)
    stated = step_flops(
        training_of(shape_of(method, shape, phase="train"), "float32"), one, square=True
    )
    assert stated == pytest.approx(counted, rel=0.01)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_for_the_backward_pass(sharing: LayerMap, dtype: torch.dtype) -> None:
    wide = replace(DEEP, vocab_size=500)  # by which the filter below knows logits
    model = share(tiny_model(shape=wide), sharing).train()
    batch = batch_of(rows=4, length=64)
    batch.attention_mask[:] = 1
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    seen: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        logit = tensor.shape[-1:] == (500,) and tensor.shape[0] != SHAPE.hidden_size
        if place not in own and not logit:
            seen[place] = tensor
        return tensor

    cast = torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), cast:
        Full().loss(model, batch, None)  # type: ignore[arg-type]
    kept = sum(t.untyped_storage().nbytes() for t in seen.values())
    training = training_of(shape_shared(model, wide).trained(), str(dtype).removeprefix("torch."))
    assert training.layers * 256 + training.fixed == pytest.approx(kept, rel=0.06)


def test_rounding_goes_on_from_a_shared_model() -> None:
    model = shared(top_map(6, 3), torch.float32)
    shape = shape_shared(model, DEEP)
    from effbench.nn.quant.linears import PackedLinear, storage_bytes

    compress_whole(RTN(bits=8), model, [], context())
    assert sum(isinstance(m, PackedLinear) for m in model.modules()) == 36
    assert len(list(shape.linears())) == 36
    assert storage_bytes(model) == chain_cost([RTN(bits=8)], shape, "float32").resident_bytes


@pytest.mark.parametrize(
    "method", [Depths(), LoRADrop(), Structured()], ids=lambda m: type(m).__name__
)
def test_what_leaves_layers_or_heads_out_refuses_it(method: Any) -> None:
    model = shared(top_map(6, 3), torch.float32)
    with pytest.raises(UserError, match=r"share states|take states"):
        method.resolve(shape_shared(model, DEEP))
        if method.stage == "compress":
            compress_whole(method, model, [batch_of()], context())
        method.prepare(model, context())


def test_what_shares_already_is_refused() -> None:
    with pytest.raises(UserError, match="x cannot start"):
        require_unshared(shared_shape(DEEP, top_map(6, 1)), "x")


# -- folders -----------------------------------------------------------------------------------


@every
def test_a_folder_is_ours_alone(sharing: LayerMap, tmp_path: Path) -> None:
    model = shared(sharing, torch.float32)
    write_shared(model, tmp_path)
    with pytest.raises(ValueError, match="shared_llama"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    spec = ModelSpec(name="folder", source="folder", path=str(tmp_path))
    loaded = load(spec, device="cpu", dtype=torch.float32, tokenizer=False)
    assert logits(loaded.model).equal(logits(model))
    assert loaded.shape == shape_shared(model, replace(DEEP, rms_eps=1e-6))
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    again = read_shared(tmp_path, "cpu", torch.bfloat16)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert map_of(again) == sharing


def test_a_folder_without_sharing_is_transformers_own(tmp_path: Path) -> None:
    model = shared(top_map(6, 0), torch.float32)
    write_shared(model, tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert logits(again).equal(logits(model))


def test_a_folder_that_does_not_fit_its_map_is_refused(tmp_path: Path) -> None:
    write_shared(shared(top_map(6, 3), torch.float32), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["layer_sources"] = [0, 1, 2, 3, 3, 3]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not fit its config"):
        read_shared(tmp_path, "cpu", torch.float32)


@every
def test_an_artefact_states_its_map(sharing: LayerMap, tmp_path: Path) -> None:
    write_map(shared(sharing), tmp_path)
    assert map_of(follow_map(dense(), tmp_path)) == sharing
    (tmp_path / "sharing.json").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        follow_map(dense(), tmp_path)
