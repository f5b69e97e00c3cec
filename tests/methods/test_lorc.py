"""A cache of coordinates: what it holds, what is lost and what is not, and what it goes with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SHAPE, batch_of, context, decoded, generator, some_ids, tiny_model
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

from effbench.api.cost import cache_bytes, cost_of
from effbench.api.points import UNNAMED
from effbench.api.shape import ModelShape
from effbench.api.sharing import listed_map, shared_shape
from effbench.methods.cache.kv_quant import KVQuant
from effbench.methods.cache.lorc import Kept, LoRC
from effbench.methods.chain import resolved
from effbench.methods.compresses import compress_whole
from effbench.models.survey import survey
from effbench.nn.decode.decoder import Decoder, Drafts, Exits
from effbench.nn.decode.early_exit import confident
from effbench.nn.decode.handing import KeepingLayer
from effbench.nn.decode.latent import Basis, LatentLayer
from effbench.nn.decode.latent_cache import LatentCache, hold
from effbench.nn.decode.latent_plan import Plan, Ranks
from effbench.nn.decode.quantised_cache import QuantisedCache
from effbench.nn.decode.session import CachedSession, greedy
from effbench.nn.decode.staged import StagedDecoder, WholeSession, whole_logits
from effbench.nn.llama.factorised import (
    AbsorbedOutput,
    FactorisedLinear,
    absorb,
    bases,
    directions,
    factorised,
)
from effbench.nn.quant import linears
from effbench.resources.counting import flops
from effbench.util.errors import UserError

EXACT = {"atol": 1e-9, "rtol": 1e-9}
ROUNDED = {"atol": 1e-5, "rtol": 1e-5}
"""Norms, and the softmax of eager attention, are computed in float32."""
PLAN = Plan(32, {"few": Ranks([32, 20], [24, 8])})
FEW = LatentCache("few")


def model_of(attention: str = "sdpa", **sizes: int) -> Any:
    shape = replace(SHAPE, **sizes)
    model = tiny_model(dtype=torch.float64, shape=shape).eval().requires_grad_(False)
    model.config._attn_implementation = attention
    return model


def compressed(method: LoRC, model: Any) -> Any:
    compress_whole(method, model, [batch_of()], context())
    return model


def factorised_model(plan: Plan = PLAN, **kwargs: Any) -> Any:
    model = model_of(**kwargs)
    hold(model, plan, [bases(layer.self_attn) for layer in model.model.layers])
    return model


def projections(model: Any) -> list[Any]:
    return [p for x in model.model.layers for p in (x.self_attn.k_proj, x.self_attn.v_proj)]


# -- directions ------------------------------------------------------------------------------------


def test_no_matrix_of_the_rank_is_nearer() -> None:
    """And what is left is the sum of the squares of the sizes that are left out."""
    draws = generator(0)
    linear = torch.nn.Linear(20, 12, dtype=torch.float64).requires_grad_(False)
    basis, singular = directions(linear.weight)
    torch.testing.assert_close(singular.double(), torch.linalg.svdvals(linear.weight), **ROUNDED)
    torch.testing.assert_close(basis.T @ basis, torch.eye(12), **ROUNDED)
    errors = []
    for rank in range(1, 13):
        part = factorised(linear, basis[:, :rank])
        left = linear.weight - part.up.weight @ part.down.weight
        errors.append(float(left.pow(2).sum()))
        expected = float(singular[rank:].double().pow(2).sum())
        assert errors[-1] == pytest.approx(expected, abs=1e-6)
        other = torch.linalg.qr(torch.randn(12, rank, generator=draws, dtype=torch.float64))[0]
        far = linear.weight - other @ (other.T @ linear.weight)
        assert rank == 12 or float(far.pow(2).sum()) > errors[-1]
    assert errors == sorted(errors, reverse=True)


def test_whitened_directions_are_nearest_in_what_the_weight_gives() -> None:
    x = torch.randn(50, 20, generator=generator(0)) * torch.logspace(-2, 1, 20)
    weight = torch.randn(12, 20, generator=generator(1))

    def error(basis: torch.Tensor) -> float:
        y, part = x @ weight.T, basis[:, :4]
        return float((y - y @ part @ part.T).pow(2).sum())

    basis, singular = directions(weight, x.T @ x)
    assert error(basis) == pytest.approx(float(singular[4:].pow(2).sum()), rel=1e-3)
    assert error(basis) < 0.9 * error(directions(weight)[0])


def test_permuting_heads_changes_no_size() -> None:
    weight = torch.randn(12, 20, generator=generator(0))
    moved = weight.view(3, 4, 20)[[2, 0, 1]].flatten(0, 1)
    torch.testing.assert_close(directions(weight)[1], directions(moved)[1])


# -- what it computes ------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_with_all_directions_nothing_is_lost(kv_heads: int, attention: str) -> None:
    """Also where coordinates are really cached: there are as many as elements."""
    model, ids = model_of(attention, num_kv_heads=kv_heads), some_ids(2, 12)
    model = model.float() if attention == "eager" else model  # whose masks are float32's
    mask = torch.tensor([[0, 0, 0, 1, 1], [1] * 5])
    plain = decoded(CachedSession(model), ids, 5, mask)
    width = 16 * kv_heads
    half, full = Ranks([width // 2] * 2, [width // 2] * 2), Ranks([width] * 2, [width] * 2)
    hold(
        model, Plan(width, {"half": half, "all": full}), [bases(x.self_attn) for x in layers(model)]
    )
    assert all(type(p) is FactorisedLinear for p in projections(model))
    session = WholeSession(model, LatentCache("all"))
    for layer, own in zip(session.staged.cache.layers, layers(model), strict=True):
        layer.key_basis, layer.value_basis = (  # type: ignore[union-attr]
            Basis(p.up.weight, None, kv_heads) for p in (own.self_attn.k_proj, own.self_attn.v_proj)
        )
    torch.testing.assert_close(decoded(session, ids, 5, mask), plain, **ROUNDED)


def layers(model: Any) -> Any:
    return model.model.layers


def test_a_share_of_all_leaves_the_model_as_it_is() -> None:
    method, ids = LoRC(kept_keys=(1.0,)), some_ids(2, 9)
    model, base = compressed(method, model_of()), model_of()
    assert all(type(p) is torch.nn.Linear for p in projections(model))
    assert method.decoder(UNNAMED) == method.decoder(method.points()[0]) == Decoder()
    assert model(ids).logits.equal(base(ids).logits)


def test_a_weight_of_few_directions_loses_nothing() -> None:
    model, ids, draws = model_of(), some_ids(2, 20), generator(3)
    for linear in projections(model):
        left, right = (torch.randn(n, 8, generator=draws).double() for n in (32, 64))
        linear.weight.data = left @ right.T / 20
    expected = decoded(CachedSession(model), ids, 9)
    method = LoRC(kept_keys=(0.25,), order="uniform")
    model = compressed(method, model)
    assert model.config.latent_plan.at("") == Ranks([8, 8], [8, 8])
    found = decoded(method.session(model, method.points()[0]), ids, 9)
    torch.testing.assert_close(found, expected, **ROUNDED)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_decoding_is_one_pass_and_chunks_are(kv_heads: int, attention: str) -> None:
    """And both are the model whose projections have lost the directions."""
    plan = Plan(16 * kv_heads, PLAN.points)
    model, ids = factorised_model(plan, attention=attention, num_kv_heads=kv_heads), some_ids(2, 30)
    one_pass = whole_logits(model, FEW, ids)
    torch.testing.assert_close(one_pass, model(ids).logits, **ROUNDED)
    assert (one_pass - model_of(attention, num_kv_heads=kv_heads)(ids).logits).abs().max() > 0.1
    close = EXACT if attention == "sdpa" else ROUNDED
    for prompt in (1, 11, 29):
        found = decoded(WholeSession(model, FEW), ids, prompt)
        torch.testing.assert_close(found, one_pass[:, prompt - 1 :], **close)
    staged, parts = StagedDecoder(model, [2], FEW), []
    for chunk in ids.split(7, dim=1):
        staged.read(chunk)
        parts.append(staged.logits(0, staged.run(0)))
    torch.testing.assert_close(torch.cat(parts, 1), one_pass, **close)


def test_a_point_reads_the_first_directions_of_a_larger_one() -> None:
    ids, both, point = some_ids(2, 12), LoRC(kept_keys=(0.9, 0.7)), Kept(0.7, 0.7)
    model, alone = compressed(both, model_of()), LoRC(kept_keys=(0.7,))
    expected = decoded(alone.session(compressed(alone, model_of()), point), ids, 5)
    found = decoded(both.session(model, point), ids, 5)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert (found - decoded(both.session(model, UNNAMED), ids, 5)).abs().max() > 0.1


def test_many_queries_have_values_made_and_few_mix_coordinates() -> None:
    """With the same result."""
    model = factorised_model(Plan(32, {"": Ranks([20, 20], [24, 24])}))
    attention, draws = model.model.layers[0].self_attn, generator(0)
    layer = LatentLayer(attention, 20, 24, KeepingLayer())
    keys, values = torch.randn(2, 2, 2, 40, 16, generator=draws, dtype=torch.float64)
    many = layer.update(keys, values)[1]
    few = layer.update(keys[:, :, :1], values[:, :, :1])[1]
    assert many.shape == (2, 2, 40, 16) and few.shape == (2, 2, 41, 24)
    assert layer.view is not None and layer.view.expand is not None
    shares = torch.rand(2, 1, 4, 41, generator=draws, dtype=torch.float64)
    mixed = torch.einsum("bwhs,bhsr->bwhr", shares, few.repeat_interleave(2, 1))
    made = layer.value_basis.states(layer.inner.values).repeat_interleave(2, 1)  # type: ignore[union-attr, arg-type]
    expected = torch.einsum("bwhs,bhsd->bwhd", shares, made)
    torch.testing.assert_close(layer.view.expand(mixed), expected, **EXACT)


def test_what_is_absorbed_has_the_biases_of_both_projections() -> None:
    draws = generator(2)
    values, output = torch.nn.Linear(8, 6).double(), torch.nn.Linear(12, 5).double()
    values, output = values.requires_grad_(False), output.requires_grad_(False)
    basis = torch.linalg.qr(torch.randn(6, 6, generator=draws, dtype=torch.float64))[0][:, :3]
    few = factorised(values, basis)
    absorbed = AbsorbedOutput(output, few, 3)  # two heads of values, two queries for each
    mixed = torch.randn(2, 7, 4, 3, generator=draws, dtype=torch.float64)
    up = few.up.weight.view(2, 3, 3).repeat_interleave(2, 0)
    made = torch.einsum("bthr,hdr->bthd", mixed, up)
    made = made + values.bias.view(2, 3).repeat_interleave(2, 0)
    found = absorbed(absorbed.marked(mixed).flatten(2))
    torch.testing.assert_close(found, output(made.flatten(2)), **EXACT)


@pytest.mark.parametrize("config", [None, Qwen2Config])
def test_an_output_projection_that_absorbs_directions_gives_the_same(config: Any) -> None:
    """Also with as many coordinates as a head is wide, one more, and where all values are kept."""
    ranks = {n: Ranks([24, 24], [r, 32]) for n, r in (("a", 24), ("b", 16), ("c", 17), ("d", 8))}
    plan, found = Plan(32, {**ranks, "e": Ranks([24, 24], [32, 32])}), []
    ids, mask = some_ids(2, 12), torch.tensor([[0, 0, 0, 1, 1], [1] * 5])
    for absorbs in (False, True):
        model = other_model(config) if config else model_of()
        hold(model, plan, [bases(x.self_attn) for x in layers(model)])
        if absorbs:
            absorb(model)
            kinds = [type(x.self_attn.o_proj) for x in layers(model)]
            assert kinds == [AbsorbedOutput, torch.nn.Linear]
        sessions = [WholeSession(model, LatentCache(point)) for point in plan.points]
        found.append(torch.stack([decoded(x, ids, 5, mask) for x in sessions]))
    torch.testing.assert_close(*found, **ROUNDED)
    assert (found[0][0] - found[0][3]).abs().max() > 0.01


def test_what_absorbing_costs_is_counted(tmp_path: Path) -> None:
    settings: Any = {"kept_keys": (1.0,), "kept_values": (0.75, 0.5), "order": "uniform"}
    ids = some_ids(1, 2)
    off, on = LoRC(**settings), LoRC(**settings, absorb=True)
    off.save(model := compressed(off, model_of()), tmp_path)
    taken = on.load(model_of(), tmp_path, context())
    assert linears.storage_bytes(taken) - linears.storage_bytes(model) == 2 * 4 * 24 * 64 * 8
    for point in on.points():
        work, stated = [], []
        for method, own in ((off, model), (on, taken)):
            session = method.session(own, point)
            session.prefill(ids[:, :1])
            work.append(flops(lambda s=session: s.step(ids[:, 1:])))  # type: ignore[misc]
            shape = method.shape(ModelShape.of(SHAPE), point, "use", tmp_path)
            stated.append(cost_of(shape, "float64"))
        assert work[1] - work[0] == stated[1].flops_per_token - stated[0].flops_per_token
        assert stated[1].resident_bytes - stated[0].resident_bytes == 2 * 4 * 24 * 64 * 8
        assert stated[1].params == sum(p.numel() for p in taken.parameters())
    with pytest.raises(UserError, match="nothing to absorb"):
        LoRC(kept_values=(1.0,), absorb=True).resolve(SHAPE)


# -- the cache -------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["progressive", "uniform", "reversed", "error"])
def test_its_bytes_are_those_of_its_tensors_and_as_planned(order: Any, tmp_path: Path) -> None:
    deep = replace(SHAPE, num_layers=4)
    method = LoRC(kept_keys=(0.8, 1), kept_values=(0.5, 0.7), order=order, multiple=4)
    model, ids = compressed(method, model_of(num_layers=4)), some_ids(2, 9)
    method.save(model, tmp_path)
    for point, planned in zip(method.points(), (102 + 64, 128 + 88), strict=True):
        session: Any = method.session(model, point)
        session.prefill(ids)
        kept: Any = [layer.inner for layer in session.staged.cache.layers]
        plan = model.config.latent_plan.at(point.name)
        assert [x.keys.numel() // 18 for x in kept] == plan.keys
        assert [x.values.numel() // 18 for x in kept] == plan.values
        assert session.kv_bytes() == sum(t.nbytes for x in kept for t in (x.keys, x.values))
        for folder in (None, tmp_path):
            shape = method.shape(ModelShape.of(deep), point, "use", folder)
            assert 2 * cache_bytes(shape, "float32", 9, 2) == session.kv_bytes()
            assert cost_of(shape, "float32", deep).saving == "physical"
        held = [x.mixer.cache for x in shape.layers if x.mixer]
        assert [x.keys for x in held] == plan.keys and [x.values for x in held] == plan.values
        assert session.kv_bytes() == 8 * 18 * (planned - planned % 4)


def test_keys_alone_and_values_alone_leave_the_other_as_it_is() -> None:
    keys, values = (
        LoRC(kept_keys=(0.7,), kept_values=(1.0,)),
        LoRC(kept_keys=(1.0,), kept_values=(0.75, 0.7)),
    )
    assert [p.name for p in values.points()] == ["k100-v75", "k100-v70"]
    for method, turns, place in ((keys, True, 1), (values, False, 0)):
        model = compressed(method, model_of())
        decoder = method.decoder(method.default_point())
        assert decoder.cache.turns_at_places is turns and decoder.engines == {"auto"}
        untouched = projections(model)[place::2]
        expected = projections(model_of())[place::2]
        pairs = zip(untouched, expected, strict=True)
        assert all(a.weight.equal(b.weight) for a, b in pairs)


def test_coordinates_are_held_in_codes() -> None:
    """Also where a layer keeps all directions; counted token by token, whole while all are last."""
    settings: Any = {"kept_keys": (0.7, 1), "kept_values": (0.75, 1), "protect": 1}
    method = LoRC(**settings, bits=4, group_size=4, recent=6)
    model, ids, dense = compressed(method, model_of()), some_ids(1, 24), LoRC(**settings)
    for point in method.points():
        session: Any = method.session(model, point)
        plain = decoded(dense.session(model, point), ids, 3)
        found = [session.prefill(ids[:, :3])]
        shape = method.shape(ModelShape.of(SHAPE), point, "use", None)
        for t in range(3, 24):
            found.append(session.step(ids[:, t : t + 1]))
            inner: Any = [getattr(x, "inner", x) for x in session.staged.cache.layers]
            held = sum(x.keys.nbytes + x.values.nbytes for x in inner) / 2  # float64
            held += sum(t.nbytes for x in inner for part in x.packed or () for t in part)
            doubled = session.kv_bytes() - sum(x.keys.nbytes + x.values.nbytes for x in inner) / 2
            assert doubled == held == cache_bytes(shape, "float32", t + 1)
        codes = torch.cat(found)
        assert codes[:7].equal(plain[0, :7])
        assert 1e-3 < (codes - plain[0])[7:].abs().max() < 1


def test_protected_layers_keep_all() -> None:
    model = compressed(LoRC(kept_keys=(0.75,), protect=1), model_of())
    assert model.config.latent_plan.at("k75-v75") == Ranks([32, 16], [32, 16])
    assert [type(p) is FactorisedLinear for p in projections(model)] == [False, False, True, True]


def test_whitening_is_nearer_on_what_it_was_calibrated_on() -> None:
    batch, errors = batch_of(rows=4, length=30), []
    expected = model_of()(batch.input_ids).logits
    for whiten in (False, True):
        method = LoRC(kept_keys=(0.5,), order="uniform", whiten=whiten)
        model = model_of()
        compress_whole(method, model, [batch], context())
        errors.append(float((model(batch.input_ids).logits - expected).pow(2).mean()))
        assert method.calibrates is whiten
    assert errors[1] < errors[0]


# -- with other ways of decoding, and other models -------------------------------------------------


def test_exits_and_drafts_work_with_it() -> None:
    plan = Plan(32, {"few": Ranks([32, 24, 20, 16], [24, 24, 20, 8])})
    model, ids = factorised_model(plan, num_layers=4), some_ids(2, 6)
    full = greedy(WholeSession(model, FEW), ids, 24)
    assert greedy(Decoder(driver=Drafts(2), cache=FEW).session(model), ids, 24).equal(full)
    never = Exits((2,), lambda exits: confident([2.0] * (exits - 1)))
    assert greedy(Decoder(never, cache=FEW).session(model), ids, 24).equal(full)
    codes = replace(FEW, codes=QuantisedCache(2, 4, 1))
    full = greedy(WholeSession(model, codes), ids, 24)
    assert not greedy(WholeSession(model, FEW), ids, 24).equal(full)
    assert greedy(Decoder(driver=Drafts(2), cache=codes).session(model), ids, 24).equal(full)
    assert greedy(Decoder(never, cache=codes).session(model), ids, 24).equal(full)
    with pytest.raises(UserError, match="propagated"):
        Decoder(Exits((2,), lambda exits: confident([0.5]), propagate=True), cache=FEW)


def other_model(config: type) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    made: Any = AutoModelForCausalLM.from_config(config(**sizes, **heads))
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return made.double().eval().requires_grad_(False)


def test_biases_are_added_to_what_is_made_and_cost_what_they_did() -> None:
    model, ids = other_model(Qwen2Config), some_ids(2, 20)
    method, before = LoRC(kept_keys=(0.7,)), survey(model)
    model = compressed(resolved(method, before), model)
    found = decoded(method.session(model, UNNAMED), ids, 7)
    torch.testing.assert_close(found, model(ids).logits[:, 6:], **ROUNDED)
    counted = sum(p.numel() for p in model.parameters())
    shape = method.shape(before, UNNAMED, "use", None)
    assert cost_of(shape, "float32").params == counted


def test_normed_keys_lie_in_no_directions_and_are_refused() -> None:
    with pytest.raises(UserError, match="it needs blocks that are made as Llama's are"):
        resolved(LoRC(), survey(other_model(Qwen3Config)))


# -- as a method -----------------------------------------------------------------------------------


def test_what_cannot_be_is_refused_before_loading() -> None:
    deep = replace(SHAPE, num_layers=4)
    with pytest.raises(UserError, match="take states from others"):
        LoRC().resolve(shared_shape(deep, listed_map(4, [2], "kv")))
    with pytest.raises(UserError, match=r"kept_keys=0\.3 is less than progr") as error:
        LoRC(kept_keys=(0.3,)).resolve(SHAPE)
    assert error.value.hint == "Keep 0.63 or more."
    with pytest.raises(UserError, match=r"method\.protect=2 leaves no layer of 2"):
        LoRC(protect=2).resolve(SHAPE)
    with pytest.raises(UserError, match=r"has 2 shares, method\.kept_values 3"):
        LoRC(kept_keys=(0.9, 0.8), kept_values=(0.9, 0.8, 0.7))
    with pytest.raises(UserError, match="needs dense linear layers, not factorised ones"):
        LoRC().check_start([LoRC()])
    with pytest.raises(UserError, match="lorc has a cache of its own, which kv_quant") as error:
        KVQuant(bits=8).check_start([LoRC()])
    assert "method.bits=8 beside from=RUN" in error.value.hint
    with pytest.raises(UserError, match="fills no whole bytes"):
        LoRC(kept_keys=(0.7,), multiple=1, bits=2, group_size=2).resolve(SHAPE)


def test_a_file_of_ranks_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    PLAN.write(tmp_path)
    assert Plan.read(tmp_path) == PLAN
    (tmp_path / "ranks.json").write_text('{"width": 32}')
    with pytest.raises(UserError, match=r"ranks\.json cannot be read"):
        Plan.read(tmp_path)
