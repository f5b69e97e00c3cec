"""Codes of the embedding and of the head: numbers, ties, decoding, what may follow and export."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from effbench.api.method_types import Context
from effbench.api.registry import find
from effbench.api.shape import Shape
from effbench.methods.chain import chain_cost
from effbench.methods.compresses import compress_whole
from effbench.methods.quant.rtn import RTN
from effbench.methods.quant.rtn_embedding import RTNEmbedding
from effbench.nn.adapters.merge import merge_for_good
from effbench.nn.decode.session import greedy
from effbench.nn.decode.static import StaticSession
from effbench.nn.pruning.plain import plain_model
from effbench.nn.quant import groupwise
from effbench.nn.quant.embedding import PackedEmbedding, is_tied
from effbench.nn.quant.linears import PackedLinear, storage_bytes
from effbench.nn.quant.packing import codes_at, pack
from effbench.util.errors import UserError

IDS = torch.arange(40).view(2, 20)
CONTEXT = Context(
    seed=0,
    device=torch.device("cpu"),
    dtype=torch.float32,
    generator=torch.Generator(),
    load_model=lambda name: torch.nn.Identity(),
)


def shape(tied: bool) -> Shape:
    return Shape(
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=97,
        tied=tied,
    )


def tiny(tied: bool, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).eval()
    model.requires_grad_(False)
    return model.to(dtype=dtype)


def coded(method: RTNEmbedding, tied: bool, dtype: torch.dtype = torch.float32) -> Any:
    model = tiny(tied, dtype)
    compress_whole(method, model, [], CONTEXT)
    return model


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_at_any_places_are_those_that_were_packed(bits: int) -> None:
    codes = torch.randint(2**bits, (61,), dtype=torch.uint8)
    places = torch.tensor([[0, 60, 7], [13, 13, 59]])
    assert torch.equal(codes_at(pack(codes, bits), bits, places), codes[places].int())


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(3, 16, False), (5, 23, True), (8, 64, False)]
)
def test_rows_are_those_of_the_whole_weight(bits: int, group: int, symmetric: bool) -> None:
    weight, rows = torch.randn(11, 46), torch.tensor([10, 0, 3, 3])
    stored = groupwise.quantise(weight, bits, group, symmetric)
    whole = groupwise.dequantise(stored, 46, bits, group, torch.bfloat16)
    some = groupwise.dequantise_rows(stored, rows, 46, bits, group, torch.bfloat16)
    assert torch.equal(some, whole[rows])


@pytest.mark.parametrize("tied", [True, False])
def test_both_tables_are_what_rounding_to_nearest_makes_of_them(
    tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("effbench.methods.quant.rtn_embedding.PIECE", 64 * 8 * 3)
    base, model = tiny(tied), coded(RTNEmbedding(bits=5, group_size=32), tied)
    for dense, packed in (
        (base.lm_head.weight, model.lm_head),
        (base.model.embed_tokens.weight, model.model.embed_tokens.table),
    ):
        expected = groupwise.quantise(dense, 5, 32, False)
        assert torch.equal(packed.codes, expected.codes)
        assert torch.equal(packed.scales, expected.scales)
    assert is_tied(model) == tied
    assert (model.model.embed_tokens.table is model.lm_head) == tied
    looked = model.model.embed_tokens(IDS)
    assert looked.dtype == torch.float32
    assert torch.equal(looked, model.model.embed_tokens.weight[IDS])


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_held_are_those_counted(tied: bool) -> None:
    method = RTNEmbedding(bits=5, group_size=48)
    held = storage_bytes(coded(method, tied))
    assert held == chain_cost([method], shape(tied), "float32").resident_bytes
    packed = groupwise.grouped_bytes(64, 97, 5, 48, False)
    assert held == storage_bytes(tiny(tied)) - (1 if tied else 2) * (4 * 97 * 64 - packed)


def test_a_table_is_one_wherever_the_model_goes() -> None:
    model = coded(RTNEmbedding(), tied=True)
    for moved in (copy.deepcopy(model), copy.deepcopy(model).to(torch.bfloat16)):
        assert moved.model.embed_tokens.table is moved.lm_head
        assert moved.lm_head is not model.lm_head
        assert torch.equal(moved.lm_head.codes, model.lm_head.codes)
        assert moved.model.embed_tokens(IDS).dtype == moved.model.norm.weight.dtype


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_read_the_codes_as_they_lie(tied: bool, dtype: torch.dtype) -> None:
    model = coded(RTNEmbedding(group_size=32), tied, dtype)
    compress_whole(RTN(group_size=32), model, [], CONTEXT)
    session = StaticSession(model)
    assert session.engine == "native"
    session.reserve(2, 32, 20)
    with torch.inference_mode():
        expected = model(IDS).logits[:, -1].float()
        assert torch.allclose(
            session.prefill(IDS).float(), expected, atol=0.02 * expected.abs().max()
        )
        token = torch.tensor([[5], [9]])
        expected = model(torch.cat([IDS, token], 1)).logits[:, -1].float()
        found = session.step(token).float()
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_kernel_expands_the_vectors_of_tokens(bits: int, symmetric: bool) -> None:
    model = coded(RTNEmbedding(bits, 32, symmetric), tied=True, dtype=torch.bfloat16)
    session = StaticSession(model)
    session.prefill(IDS[:1])
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(PackedEmbedding, "forward", lambda *_: pytest.fail("by torch"))
        found = session.advance(torch.tensor([[96]]), (False, False))
    with torch.inference_mode():
        expected = model.lm_head(model.model.norm(model.model.embed_tokens(torch.tensor([96]))))
    assert (found - expected).abs().max() <= 0.02 * expected.abs().max()


def test_a_token_that_is_not_there_is_refused() -> None:
    embedding = coded(RTNEmbedding(), tied=True).model.embed_tokens
    for token in (-1, 97):
        with pytest.raises(IndexError):
            embedding(torch.tensor([token]))


def test_long_prompts_do_not_expand_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model = coded(RTNEmbedding(group_size=32), tied=True)
    session, walk = StaticSession(model), StaticSession(model, use_native=False)
    long = torch.arange(2 * 400).view(2, 400) % 97
    with torch.inference_mode():
        expected = walk.prefill(long)
        monkeypatch.setattr(PackedLinear, "dense_weight", lambda *_: pytest.fail("expanded"))
        assert torch.allclose(session.prefill(long), expected, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_a_plain_model_and_a_merged_one_have_dense_tables(tied: bool) -> None:
    model = coded(RTNEmbedding(), tied)
    expected = greedy(StaticSession(model), IDS, 4)
    assert plain_model(model).expanded == (1 if tied else 2)
    for dense in (plain_model(model).model, copy.deepcopy(model)):
        merge_for_good(dense)
        assert type(dense.model.embed_tokens) is torch.nn.Embedding
        assert type(dense.lm_head) is torch.nn.Linear
        assert is_tied(dense) == tied
        assert torch.equal(greedy(StaticSession(dense), IDS, 4), expected)


def test_an_artefact_is_loaded_into_the_base(tmp_path: Path) -> None:
    method = RTNEmbedding(bits=4)
    model = coded(method, tied=False)
    method.save(model, tmp_path)
    again = method.load(tiny(False), tmp_path, CONTEXT)
    assert isinstance(again.get_submodule("model.embed_tokens"), PackedEmbedding)
    with torch.inference_mode():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("then", "fits"),
    [
        ("rtn", True),
        ("any_precision", True),
        ("lora", True),
        ("full", False),
        ("rtn_embedding", False),
    ],
)
def test_what_may_follow(then: str, fits: bool) -> None:
    method = find("methods", then)()
    if fits:
        method.check_start([find("methods", "rtn_embedding")()])
    else:
        with pytest.raises(UserError, match="cannot go on from what rtn_embedding left"):
            method.check_start([find("methods", "rtn_embedding")()])


def test_what_is_no_plain_table_is_refused() -> None:
    class Scaled(torch.nn.Embedding):
        pass

    model = tiny(tied=False)
    model.model.embed_tokens = Scaled(97, 64)
    with pytest.raises(UserError, match="a Scaled where a plain Embedding is needed"):
        compress_whole(RTNEmbedding(), model, [], CONTEXT)
    model = tiny(tied=False)
    model.lm_head.weight.data[3, 2] = float("nan")
    with pytest.raises(UserError, match="finite"):
        compress_whole(RTNEmbedding(), model, [], CONTEXT)
