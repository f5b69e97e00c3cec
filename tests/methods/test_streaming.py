"""Sinks and a window: what the cache keeps, what each token sees of it, and where."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SHAPE, context, decoded, some_ids
from transformers import LlamaConfig, LlamaForCausalLM

from effbench.api.batch import make_batch
from effbench.api.cost import cache_bytes
from effbench.api.points import UNNAMED, Point
from effbench.api.shape import ModelShape
from effbench.api.sharing import listed_map, shared_shape
from effbench.methods.adapters.lora import LoRA
from effbench.methods.cache.streaming import SinkWindow, Streaming
from effbench.methods.depth.depths import Depths
from effbench.methods.depth.lora_drop import LoRADrop
from effbench.methods.depth.points import Depth, Mixed
from effbench.nn.decode.decoder import CopiedMaps, Decoder, Drafts, Drops, Exits
from effbench.nn.decode.early_exit import confident
from effbench.nn.decode.session import CachedSession, greedy
from effbench.nn.decode.sinks import SinkLayer
from effbench.nn.decode.staged import WholeSession, whole_logits
from effbench.results.store import RunFolder
from effbench.runner.open import open_data, open_model
from effbench.runner.run import open_run
from effbench.testing.bench import Bench
from effbench.util.errors import UserError

DEEP = replace(SHAPE, num_layers=4)
CASES = [(4, 8), (0, 7), (1, 1), (3, 2)]
"""Sinks and window."""


def model_of(
    kv_heads: int = 2, layers: int = 3, attention: str = "sdpa", dtype: Any = torch.float32
) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        vocab_size=128,
        initializer_range=0.2,
        attn_implementation=attention,
    )
    return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=1e-4)


# -- what it computes ------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_while_all_tokens_fit_no_bit_changes(kv_heads: int, attention: str) -> None:
    model, ids, policy = model_of(kv_heads, 3, attention), some_ids(2, 30), SinkWindow(4, 26)
    ours, theirs = WholeSession(model, policy), CachedSession(model)
    assert decoded(ours, ids, 9).equal(decoded(theirs, ids, 9))
    assert ours.kv_bytes() == theirs.kv_bytes()
    assert whole_logits(model, policy, ids).equal(model(ids).logits)
    assert not ours.step(ids[:, :1]).equal(theirs.step(ids[:, :1]))  # the first that does not fit


def reference(model: Any, ids: torch.Tensor, sinks: int, window: int) -> torch.Tensor:
    """Return the logits [T, V] of one sequence, token by token and head by head, from the formulas.

    Complex numbers turn pairs of features; nothing is shared with what is tested.
    """
    config, inner = model.config, model.model
    size, heads = config.head_dim, config.num_attention_heads
    group = heads // config.num_key_value_heads
    # A model's angles are computed in float32.
    rates = 1 / config.rope_parameters["rope_theta"] ** (torch.arange(0, size, 2).float() / size)

    def turn(x: torch.Tensor, place: int) -> torch.Tensor:
        angles, pairs = rates * place, torch.complex(x[: size // 2], x[size // 2 :])
        pairs = pairs * torch.complex(angles.cos().double(), angles.sin().double())
        return torch.cat([pairs.real, pairs.imag])

    hidden = inner.embed_tokens(ids)
    for layer in inner.layers:
        own, normed = layer.self_attn, layer.input_layernorm(hidden)
        q, k, v = (m(normed).view(len(ids), -1, size) for m in (own.q_proj, own.k_proj, own.v_proj))
        mixed = torch.zeros(len(ids), heads, size, dtype=torch.float64)
        for t in range(len(ids)):
            seen = sorted({s for s in range(t + 1) if s < sinks or s > t - window})
            for h in range(heads):
                asked = turn(q[t, h], len(seen) - 1)
                keys = torch.stack([turn(k[s, h // group], p) for p, s in enumerate(seen)])
                weights = (keys @ asked / size**0.5).softmax(0)
                mixed[t, h] = weights @ v[seen, h // group]
        hidden = hidden + own.o_proj(mixed.flatten(1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    logits: torch.Tensor = model.lm_head(inner.norm(hidden))
    return logits


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("sinks", "window"), CASES)
def test_beyond_it_computes_the_formulas(sinks: int, window: int, kv_heads: int) -> None:
    model, ids = model_of(kv_heads, 2, dtype=torch.float64), some_ids(2, 18)
    expected = torch.stack([reference(model, row, sinks, window) for row in ids])
    policy = SinkWindow(sinks, window)
    exact = {"atol": 1e-9, "rtol": 1e-9}
    torch.testing.assert_close(whole_logits(model, policy, ids), expected, **exact)
    for prompt in (1, 6, 17):
        found = decoded(WholeSession(model, policy), ids, prompt)
        torch.testing.assert_close(found, expected[:, prompt - 1 :], **exact)
    assert (expected - model(ids).logits).abs().max() > 0.1


def test_without_sinks_one_layer_is_dense_recomputation_of_the_window() -> None:
    model, ids, window = model_of(layers=1), some_ids(1, 20), 6
    found = whole_logits(model, SinkWindow(0, window), ids)[0]
    for t in range(20):
        dense = model(ids[:, max(0, t - window + 1) : t + 1]).logits[0, -1]
        close(found[t], dense)


def test_without_sinks_it_is_dense_attention_under_a_sliding_mask() -> None:
    model, ids, window = model_of(dtype=torch.float64), some_ids(2, 20), 6
    places = torch.arange(20)
    band = (places <= places[:, None]) & (places > places[:, None] - window)
    dense = model(ids, attention_mask=band.expand(2, 1, 20, 20)).logits
    found = whole_logits(model, SinkWindow(0, window), ids)
    close(found, dense)
    assert (whole_logits(model, SinkWindow(1, window - 1), ids) - dense).abs().max() > 0.1


# -- the cache -------------------------------------------------------------------------------------


def held(session: WholeSession) -> int:
    """Return the bytes of all storages that the cache holds."""
    layers: Any = session.staged.cache.layers
    tensors = [t for layer in layers for t in (layer.keys, layer.values)]
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize(("sinks", "window"), CASES)
@pytest.mark.parametrize("prompt", [3, 20])
def test_its_bytes_are_constant_once_it_is_full(sinks: int, window: int, prompt: int) -> None:
    model, ids = model_of(), some_ids(2, 40)
    session, per_token = WholeSession(model, SinkWindow(sinks, window)), 2 * 3 * 2 * 16 * 4
    session.prefill(ids[:, :prompt])
    for t in range(prompt, 40):
        session.step(ids[:, t : t + 1])
        expected = 2 * min(t + 1, sinks + window) * per_token
        assert session.kv_bytes() == held(session) == expected
    assert all(layer.view is None for layer in session.staged.cache.layers)  # type: ignore[union-attr]


def test_plan_counts_no_more_tokens_than_the_cache_holds() -> None:
    """And the bytes are those of the tensors, before it is full and long after."""
    model, ids = model_of(), some_ids(2, 40)
    base = replace(SHAPE, hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16)
    method = Streaming(sinks=4, window=8)
    shape = method.shape(ModelShape.of(base), UNNAMED, "use", None)
    session = WholeSession(model, method.decoder(UNNAMED).cache)
    session.prefill(ids[:, :5])
    for t in range(5, 40):
        session.step(ids[:, t : t + 1])
        assert session.kv_bytes() == cache_bytes(shape, "float32", t + 1, 2)


def test_layers_may_have_a_window_alone() -> None:
    """The others keep every token, at its own place; the bytes are as counted."""
    model, ids = model_of(dtype=torch.float64), some_ids(1, 30)
    none = whole_logits(model, SinkWindow(2, 5, (7,)), ids)
    torch.testing.assert_close(none, model(ids).logits)
    method = Streaming(sinks=2, window=5, layers=(1,))
    policy = method.decoder(UNNAMED).cache
    session = WholeSession(model, policy)
    found = decoded(session, ids, 4)
    torch.testing.assert_close(found, whole_logits(model, policy, ids)[:, 3:])
    assert (found - none[:, 3:]).abs().max() > 0.01
    per_layer = 2 * 2 * 16 * 8
    assert session.kv_bytes() == (2 * 30 + 7) * per_layer
    base = ModelShape.of(replace(SHAPE, num_layers=3))
    kept = [
        x.mixer and x.mixer.cache.window for x in method.shape(base, UNNAMED, "use", None).layers
    ]
    assert kept == [None, 7, None]


def test_layers_that_there_are_not_are_refused() -> None:
    with pytest.raises(UserError, match="layer 4 of 4"):
        Streaming(layers=(1, 4)).resolve(DEEP)
    with pytest.raises(UserError, match="names no layer"):
        Streaming(layers=()).resolve(DEEP)


# -- with other ways of decoding -------------------------------------------------------------------


@dataclass(frozen=True)
class StreamingDepths(Depths):
    """What a plug-in would write to have exits and a window at once."""

    def decoder(self, point: Point) -> Decoder:
        return replace(super().decoder(point), cache=SinkWindow(2, 5))


def test_exits_and_drafts_work_with_it() -> None:
    model, ids, policy = model_of(layers=4), some_ids(2, 6), SinkWindow(2, 5)
    full = greedy(WholeSession(model, policy), ids, 30)
    assert not full.equal(greedy(CachedSession(model), ids, 30))
    assert greedy(Decoder(driver=Drafts(2), cache=policy).session(model), ids, 30).equal(full)
    never = Exits((2,), lambda exits: confident([2.0] * (exits - 1)))
    assert greedy(Decoder(never, cache=policy).session(model), ids, 30).equal(full)


@pytest.mark.parametrize("point", [Mixed("exit"), Mixed("speculative"), Depth(2), Depth(4)])
def test_two_ideas_in_one_method_see_in_one_pass_what_decoding_sees(point: Point) -> None:
    method = StreamingDepths(
        eval_depths=(2, 4), decoding=("exit", "speculative"), thresholds=(0.12,)
    )
    model, ids = model_of(layers=4), some_ids(1, 24)
    batch = make_batch([(ids[0].tolist(), [-100] * 5 + ids[0, 5:].tolist())], 0)
    with method.at(model, point), torch.no_grad():
        session: Any = method.session(model, point)
        steps = decoded(session, ids, 5)[0]
        close(method.logits(model, batch, point)[0, 4:], steps)
        assert not method.forward(point).shares_prefixes and method.engines(point) == {"auto"}
        if point == Mixed("exit"):
            assert 2 < session.counts()["exit_depth"] < 4
        plain = Depths.decoder(method, point).session(model)
        assert (decoded(plain, ids, 5)[0] - steps).abs().max() > 0.1


@pytest.mark.parametrize(
    ("route", "why"),
    [
        (Drops("lora_drop", 3), "leave gaps"),
        (CopiedMaps(), "all of their source's keys"),
        (Exits((2,), lambda exits: confident([0.5]), propagate=True), "propagated"),
    ],
)
def test_what_does_not_go_with_it_is_refused_without_a_model(route: Any, why: str) -> None:
    with pytest.raises(UserError, match=why):
        Decoder(route, cache=SinkWindow(4, 8))


# -- as a method -----------------------------------------------------------------------------------


def test_its_window_fits_the_model_unless_it_is_given() -> None:
    short = replace(DEEP, max_positions=100)
    assert Streaming().resolve(DEEP).window == 1020
    assert Streaming().resolve(short).window == 96
    assert Streaming(window=50).resolve(short).window == 50
    with pytest.raises(UserError, match=r"method\.window=97 .* 100 positions"):
        Streaming(window=97).resolve(short)


def test_artefacts_and_shapes_that_it_would_misread_are_refused_before_loading() -> None:
    shared = shared_shape(DEEP, listed_map(4, [2], "kv"))
    with pytest.raises(UserError, match="take states from others"):
        Streaming().resolve(shared)
    Streaming().check_start([LoRA()])
    with pytest.raises(UserError, match="decodes in a way of its own at k0"):
        Streaming().check_start([LoRADrop()])


def test_adapters_are_called_as_modules() -> None:
    ctx, ids = context(), some_ids(1, 30)
    model: Any = LoRA(rank=4).prepare(model_of(), ctx).eval()
    plain = whole_logits(model, SinkWindow(2, 6), ids)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.2)
    moved = whole_logits(model, SinkWindow(2, 6), ids)
    assert (moved - plain).abs().max() > 0.1
    close(decoded(WholeSession(model, SinkWindow(2, 6)), ids, 4), moved[:, 3:])


def test_perplexity_is_the_loss_of_decoding_token_by_token(bench: Bench, tmp_path: Path) -> None:
    words = ["method=streaming", "method.sinks=2", "method.window=10", "dataset.limit.test=4"]
    words += ["hardware.device=cpu", "hardware.dtype=float32", "hardware.threads=1"]
    record = bench.run("eval", *words, "evaluator=[perplexity]")
    found = {m.name: m.value for m in record.metrics}
    job = bench.job("eval", *words, "evaluator=[perplexity]")
    run = open_run(job, RunFolder(tmp_path), bench.store)
    opened = open_model(run)
    model, method = opened.model.eval(), opened.method
    total, count = 0.0, 0
    for example in open_data(run).documents("test"):
        ids, labels = torch.tensor([example.ids]), torch.tensor(example.labels())
        logits = decoded(method.session(model), ids, 1)[0]
        nll = -logits[:-1].double().log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        counted = labels[1:] != -100
        total, count = total + float(nll[counted].sum()), count + int(counted.sum())
    assert count == found["loss_tokens"]
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    plain = bench.run("eval", "method=none", *words[3:], "evaluator=[perplexity]")
    assert {m.name: m.value for m in plain.metrics}["loss"] != found["loss"]


@pytest.mark.parametrize("prompt", [5, 6, 7])
def test_a_token_that_has_left_cannot_come_back(prompt: int) -> None:
    """The token after six has the room of one that is gone."""
    layer = SinkLayer(2, 4)
    for width in (prompt, *[1] * (7 - prompt)):
        layer.update(*torch.randn(2, 1, 1, width, 8))
    assert layer.get_seq_length() == 6
    with pytest.raises(ValueError, match="only the last 0 tokens"):
        layer.crop(-1)
