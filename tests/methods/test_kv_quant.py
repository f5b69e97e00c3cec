"""A quantised cache: bytes, error, and that decoding, one pass, padding and going back agree."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import SHAPE, decoded, generator, some_ids, tiny_model

from effbench.api.cost import cache_bytes, cost_of
from effbench.api.points import UNNAMED
from effbench.api.shape import ModelShape
from effbench.api.sharing import listed_map, shared_shape
from effbench.methods.cache.kv_quant import KVQuant
from effbench.methods.depth.lora_drop import LoRADrop
from effbench.nn.decode import quantised
from effbench.nn.decode.decoder import Decoder, Drafts
from effbench.nn.decode.quantised import QuantisedLayer
from effbench.nn.decode.quantised_cache import QuantisedCache
from effbench.nn.decode.session import CachedSession, greedy
from effbench.nn.decode.staged import StagedDecoder, WholeSession, whole_logits
from effbench.nn.quant.ranges import decode, encode
from effbench.util.errors import UserError

POLICY = QuantisedCache(4, 4, 6)
"""Groups of 4 tokens once they are not among the last 6."""
EXACT = {"atol": 1e-9, "rtol": 1e-9}


def model_of(dtype: torch.dtype = torch.float64, attention: str = "sdpa", **sizes: int) -> Any:
    model = tiny_model(dtype=dtype, shape=replace(SHAPE, **sizes)).eval().requires_grad_(False)
    model.config._attn_implementation = attention
    return model


# -- codes -----------------------------------------------------------------------------------------


def test_codes_are_the_nearest_levels_between_least_and_largest() -> None:
    x = torch.randn(3, 5, 8, generator=generator(0), dtype=torch.float64) + 40
    for bits in (2, 4, 8):
        stored = encode(x, bits, 1)
        assert stored.codes.shape == (3, 5 * bits) and stored.bytes == 3 * 5 * (bits + 4)
        error = decode(stored, bits, 8, x.dtype) - x
        scales = stored.scales.double()
        # Half a level, and what the largest number lies beyond the last one for float16.
        assert (error.abs().amax(2) <= scales * 0.5 + 40 * 2.0**-10).all()
        assert torch.allclose(scales, (x.amax(2) - x.amin(2)) / (2**bits - 1), atol=0.02)


def test_a_range_far_from_zero_and_one_of_no_width_are_held() -> None:
    flat = torch.full((1, 1, 4), -3.0)
    assert decode(encode(flat, 2, 1), 2, 4, torch.float32).equal(flat)
    huge = torch.tensor([[[1e6, -1e6, 0.0, 5.0]]])
    assert decode(encode(huge, 8, 1), 8, 4, torch.float32).isfinite().all()


def test_an_outlying_channel_of_keys_costs_the_others_nothing() -> None:
    keys = torch.randn(1, 1, 8, 4, generator=generator(0))
    loud = keys * torch.tensor([1.0, 1.0, 1.0, 100.0])

    def quiet_error(states: torch.Tensor, values: bool) -> float:
        layer = QuantisedLayer(2, 4, 1)
        layer.update(states, states)
        layer.update(states[:, :, :1], states[:, :, :1])
        found = layer._decoded()[int(values)]
        return float((found - states)[..., :3].abs().max())

    assert quiet_error(loud, False) == pytest.approx(quiet_error(keys, False))
    assert quiet_error(loud, True) > 5 * quiet_error(keys, True)


# -- what it computes ------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_while_all_tokens_are_in_the_window_no_bit_changes(kv_heads: int, attention: str) -> None:
    model = model_of(torch.float32, attention, num_kv_heads=kv_heads)
    ids, policy = some_ids(2, 24), QuantisedCache(2, 4, 20)
    ours, theirs = WholeSession(model, policy), CachedSession(model)
    assert decoded(ours, ids[:, :23], 9).equal(decoded(theirs, ids[:, :23], 9))
    assert ours.kv_bytes() == theirs.kv_bytes()
    assert whole_logits(model, policy, ids[:, :23]).equal(model(ids[:, :23]).logits)
    # The 24th is the first after which a group has left the window.
    assert not ours.step(ids[:, 23:]).equal(theirs.step(ids[:, 23:]))


@pytest.mark.parametrize(
    ("bits", "kv_heads", "attention"),
    [(2, 1, "sdpa"), (4, 2, "sdpa"), (8, 4, "sdpa"), (2, 2, "eager"), (8, 2, "eager")],
)
def test_decoding_is_one_pass(bits: int, kv_heads: int, attention: str) -> None:
    model, ids = model_of(attention=attention, num_kv_heads=kv_heads), some_ids(2, 30)
    policy = QuantisedCache(bits, 4, 6)  # type: ignore[arg-type]
    close = EXACT if attention == "sdpa" else {"atol": 1e-5, "rtol": 0}  # a softmax in float32
    one_pass = whole_logits(model, policy, ids)
    for prompt in (1, 11, 29):
        found = decoded(WholeSession(model, policy), ids, prompt)
        torch.testing.assert_close(found, one_pass[:, prompt - 1 :], **close)
    staged = StagedDecoder(model, [2], policy)
    parts = []
    for chunk in ids.split(7, dim=1):
        staged.read(chunk)
        parts.append(staged.logits(0, staged.run(0)))
    torch.testing.assert_close(torch.cat(parts, 1), one_pass, **close)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_prompt_looks_in_parts_as_at_once(
    padded: bool, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of 5 queries, some of which see codes and some of which do not yet."""
    model, ids = model_of(attention=attention), some_ids(2, 41)
    mask, found, seen = torch.ones_like(ids), [], []
    mask[1, : 6 * padded] = 0
    whole = QuantisedLayer._seen
    monkeypatch.setattr(
        QuantisedLayer, "_seen", lambda self, *given: seen.append(given[:2]) or whole(self, *given)
    )
    for looking in (41, 5):
        monkeypatch.setattr(quantised, "LOOKING", looking)
        session = WholeSession(model, POLICY)
        found.append(torch.stack([session.prefill(ids, mask), session.step(ids[:, :1])]))
    near = EXACT if attention == "sdpa" else {"atol": 1e-6, "rtol": 1e-4}  # softmax in float32
    torch.testing.assert_close(*found, **near)
    parts = [(start, min(start + 5, 41)) for start in range(0, 41, 5)]
    assert seen.count((0, 41)) == len(model.model.layers)
    assert all(seen.count(part) == len(model.model.layers) for part in parts)


def test_rows_that_end_early_are_read_as_alone() -> None:
    model, ids = model_of(), some_ids(2, 30)
    mask = torch.ones_like(ids)
    mask[1, 23:] = 0
    found = whole_logits(model, POLICY, ids, mask)
    torch.testing.assert_close(found[1:, :23], whole_logits(model, POLICY, ids[1:, :23]), **EXACT)
    torch.testing.assert_close(found[:1], whole_logits(model, POLICY, ids[:1]), **EXACT)


def test_one_layer_is_attention_to_rounded_keys_and_values() -> None:
    """The formulas once more: groups of tokens for keys, of channels for values, token by token."""
    model, ids, tokens = model_of(num_layers=1), some_ids(1, 17), 17
    dense = CachedSession(model)
    dense.prefill(ids)
    cached: Any = dense.cache.layers[0]
    keys, values = cached.keys[0, :, :tokens], cached.values[0, :, :tokens]

    def rounded(x: torch.Tensor, dim: int) -> torch.Tensor:
        low = x.amin(dim, keepdim=True).half().double()
        step = ((x.amax(dim, keepdim=True) - low) / 15).half().double()
        return low + step * ((x - low) / step).round().clamp(0, 15)

    expected_keys = torch.cat([rounded(keys[:, i : i + 4], 1) for i in (0, 4)], dim=1)
    expected_values = rounded(values[:, :8].unflatten(2, (4, 4)), 3).flatten(2)
    session = WholeSession(model, POLICY)
    session.prefill(ids)
    layer: Any = session.staged.cache.layers[0]
    found_keys, found_values = layer._decoded()
    torch.testing.assert_close(found_keys[0], expected_keys, **EXACT)
    torch.testing.assert_close(found_values[0], expected_values, **EXACT)
    assert layer.keys[0].equal(keys[:, 8:]) and layer.values[0].equal(values[:, 8:])
    assert layer.get_seq_length() == tokens


def test_more_bits_are_nearer_to_the_dense_cache() -> None:
    model, ids = model_of(), some_ids(4, 40)
    dense = model(ids).logits
    errors = [
        float((whole_logits(model, QuantisedCache(b, 8, 4), ids) - dense).pow(2).mean())  # type: ignore[arg-type]
        for b in (2, 4, 8)
    ]
    assert errors[0] > 10 * errors[1] > 1000 * errors[2] > 0


# -- the cache -------------------------------------------------------------------------------------


def held(session: WholeSession) -> int:
    """Return the bytes of all storages that the cache holds."""
    layers: Any = session.staged.cache.layers
    tensors = [t for layer in layers for part in layer.packed or () for t in part]
    tensors += [t for layer in layers for t in (layer.keys, layer.values)]
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize(
    ("group", "window", "bits"), [(4, 6, 2), (8, 1, 4), (32, 3, 2), (32, 3, 8)]
)
def test_its_bytes_are_those_of_its_tensors_and_as_counted(
    group: int, window: int, bits: int
) -> None:
    model, ids = model_of(torch.float32), some_ids(2, 75)
    method = KVQuant(bits=bits, group_size=group, window=window)  # type: ignore[arg-type]
    shape = method.shape(ModelShape.of(SHAPE), UNNAMED, "use", None)
    session: Any = method.session(model)
    session.prefill(ids[:, :3])
    for t in range(3, 75):
        session.step(ids[:, t : t + 1])
        assert session.kv_bytes() == held(session)
        if t + 1 >= window and (t + 1 - window) % group == 0:
            assert session.kv_bytes() == cache_bytes(shape, "float32", t + 1, 2)
    per_token = cost_of(shape, "float32", SHAPE)
    ranges = 4 / group + 4 / min(group, 16)
    assert per_token.kv_bytes_per_token == 2 * 2 * 16 * (2 * bits / 8 + ranges)
    assert per_token.saving == "physical"


def test_drafts_work_with_it() -> None:
    model, ids = model_of(num_layers=3), some_ids(2, 6)
    full = greedy(WholeSession(model, POLICY), ids, 24)
    assert greedy(Decoder(driver=Drafts(1), cache=POLICY).session(model), ids, 24).equal(full)


# -- as a method -----------------------------------------------------------------------------------


def test_models_and_artefacts_that_it_would_misread_are_refused_before_loading() -> None:
    deep = replace(SHAPE, num_layers=4)
    with pytest.raises(UserError, match="take states from others"):
        KVQuant().resolve(shared_shape(deep, listed_map(4, [2], "kv")))
    with pytest.raises(UserError, match="decodes in a way of its own at k0"):
        KVQuant().check_start([LoRADrop()])
    with pytest.raises(UserError, match="fills no whole bytes") as error:
        KVQuant(bits=2, group_size=1).resolve(replace(SHAPE, head_dim=2))
    assert error.value.hint == "Set method.group_size=4."
