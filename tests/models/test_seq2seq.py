"""Encoder-decoders: counted as they are, and trained as transformers' own loss would have it."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from effbench.api.batch import Batch, collate
from effbench.api.cost import cost_of
from effbench.api.examples import Example, Tokens
from effbench.api.method_types import Context
from effbench.api.shape import ModelShape
from effbench.methods.base import Method
from effbench.methods.chain import resolved, shape_of
from effbench.methods.trains import Trains
from effbench.models.random import random_of
from effbench.models.survey import empty_model, require_same_when_padded, survey
from effbench.nn.model_kinds.base import find, kind_of
from effbench.nn.quant.linears import storage_bytes
from effbench.resources.counting import flops, parameters
from effbench.testing.models import given

KIND = find("seq2seq")
SIZES = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
MODELS: dict[str, dict[str, Any]] = {
    "t5": SIZES,
    "mt5": SIZES,
    "umt5": {**SIZES, "feed_forward_proj": "gated-gelu"},
}


def config(name: str, **more: Any) -> dict[str, Any]:
    return {**CONFIG_MAPPING[name](**MODELS[name]).to_dict(), **more}


@cache
def shape(name: str) -> ModelShape:
    return survey(empty_model(config(name), "seq2seq"))


def made(name: str) -> Any:
    model = random_of(config(name), KIND, 0)
    for parameter in model.parameters():  # so that a token more is felt at all
        parameter.data.mul_(10 if parameter.ndim > 1 else 1)
    return model


def row(prompt: list[int], answer: list[int]) -> Example:
    tokens = Tokens([*prompt, *answer], len(prompt), 1)
    return KIND.example(Example(str(prompt), (tokens,)), [1], 64)


ROWS = [row([5, 6, 7, 8, 9], [11, 12]), row([20], [21, 22, 23, 24, 1]), row([5, 6, 7], [30])]


def test_losses_are_those_of_transformers() -> None:
    for name in MODELS:
        model = made(name).double()
        batch = collate(ROWS, 0)
        logits = KIND.logits(model, batch.input_ids, batch.attention_mask, batch.labels)
        assert logits.dtype == torch.float64
        targets, counted = batch.labels[:, 1:], batch.labels[:, 1:] != -100
        nll = torch.nn.functional.cross_entropy(logits[:, :-1][counted], targets[counted])
        prompts = torch.tensor([[5, 6, 7, 8, 9, 1], [20, 1, 0, 0, 0, 0], [5, 6, 7, 1, 0, 0]])
        mask = torch.tensor([[1] * 6, [1] * 2 + [0] * 4, [1] * 4 + [0] * 2])
        answers = [[11, 12, -100, -100, -100], [21, 22, 23, 24, 1], [30] + [-100] * 4]
        theirs = model(input_ids=prompts, attention_mask=mask, labels=torch.tensor(answers)).loss
        torch.testing.assert_close(nll, theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_counted_is_what_the_modules_have(name: str) -> None:
    model, cost = made(name), cost_of(shape(name), "float32")
    model.set_attn_implementation("eager")  # whose products are counted
    assert cost.params == shape(name).params == parameters(model).total
    assert cost.resident_bytes == storage_bytes(model)
    assert kind_of(model) is KIND
    assert (shape(name).encoder, shape(name).num_layers) == (2, 5)
    with torch.no_grad():
        one = torch.tensor([[5]])
        both = flops(lambda: model(input_ids=one, decoder_input_ids=one, use_cache=False))
    assert cost.flops_per_token + 4 * shape(name).attention_width == both
    assert not any("per" in key for key in cost.told())
    require_same_when_padded(model)
