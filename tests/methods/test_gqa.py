"""Pooled key/value heads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SHAPE, batch_of, context, counted, logits, stated, tiny_model
from transformers import AutoModelForCausalLM

from effbench.api.points import UNNAMED
from effbench.api.sharing import shared_shape, top_map
from effbench.methods.chain import shape_of
from effbench.methods.compresses import compress_whole
from effbench.methods.sharing.gqa import GQA
from effbench.nn.decode.sessions import session_for
from effbench.nn.decode.static import StaticSession
from effbench.util.errors import UserError


def pooled(heads: int = 1, dtype: torch.dtype = torch.float32) -> Any:
    model = tiny_model(dtype=dtype).eval().requires_grad_(False)
    compress_whole(GQA(kv_heads=heads), model, [], context())
    return model


def test_each_head_is_the_mean_of_its_run() -> None:
    before, after = tiny_model(), pooled()
    for old, new in zip(before.model.layers, after.model.layers, strict=True):
        a, b = old.self_attn.k_proj.weight.split(SHAPE.head_dim)
        torch.testing.assert_close(new.self_attn.k_proj.weight, (a + b) / 2)
        assert new.self_attn.q_proj.weight.equal(old.self_attn.q_proj.weight)


def test_equal_heads_can_be_pooled_without_loss() -> None:
    model = tiny_model().eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for part in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                part.weight[SHAPE.head_dim :] = part.weight[: SHAPE.head_dim]
    expected = logits(model)
    compress_whole(GQA(), model, [], context())
    torch.testing.assert_close(logits(model), expected)


def test_as_many_heads_as_before_are_the_model_itself() -> None:
    assert logits(pooled(2)).equal(logits(tiny_model()))


def test_it_costs_what_is_counted_and_decodes_in_our_engine() -> None:
    model, left = pooled(), shape_of(GQA(), SHAPE)
    assert stated(GQA(), shape=left) == counted(model)
    session = session_for(model)
    assert isinstance(session, StaticSession)
    ids = batch_of().input_ids
    last = session.prefill(ids)
    torch.testing.assert_close(last, model(input_ids=ids).logits[:, -1])
    assert session.kv_bytes() == left.kv_bytes_per_token(4) * ids.numel()


def test_transformers_loads_what_it_exports(tmp_path: Path) -> None:
    model = pooled()
    GQA().export(model, UNNAMED, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert logits(again).equal(logits(model))


def test_an_artefact_gives_the_same_model(tmp_path: Path) -> None:
    model = pooled()
    GQA().save(model, tmp_path)
    again = GQA().load(tiny_model(), tmp_path, context())
    assert logits(again).equal(logits(model))


def test_what_cannot_be_pooled_is_refused() -> None:
    with pytest.raises(UserError, match="does not divide"):
        GQA(kv_heads=3).resolve(replace(SHAPE, num_kv_heads=4))
    with pytest.raises(UserError, match="cannot start"):
        GQA().resolve(shared_shape(SHAPE, top_map(2, 1)))
