"""Models with experts, whose linears are adapted, packed and written like any others."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from effbench.api.batch import make_batch
from effbench.api.cost import cost_of
from effbench.api.method_types import Context
from effbench.api.plugins import make_method
from effbench.api.shape import ModelShape
from effbench.api.spec import Plugin
from effbench.methods.base import Method
from effbench.methods.chain import resolved, shape_of
from effbench.methods.compresses import Compresses, compress_whole
from effbench.methods.trains import Trains
from effbench.models.survey import empty_model, survey
from effbench.nn.llama.experts import Experts, layers_of
from effbench.nn.llama.stack import as_linears
from effbench.nn.pruning.plain import plain_model
from effbench.nn.quant.linears import QuantisedLinear, storage_bytes
from effbench.resources.counting import parameters
from effbench.testing.models import move
from effbench.util.errors import UserError

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {**SIZES, "num_local_experts": 4},
    "qwen2_moe": {**SIZES, "num_experts": 4, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {**SIZES, "num_experts": 4, "head_dim": 8, "mlp_only_layers": [0]},
    "gpt_oss": {**SIZES, "num_local_experts": 4, "head_dim": 8},
}
"""With an expert for all tokens, with a dense layer, and with turned tensors and biases."""
IDS = torch.arange(12).reshape(2, 6) % 60 + 3


@cache
def stock_model(kind: str) -> Any:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**MODELS[kind])
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


def stock(kind: str) -> Any:
    return copy.deepcopy(stock_model(kind))


def split(kind: str) -> Any:
    model = stock(kind)
    as_linears(model)
    return model


@cache
def shape(kind: str) -> ModelShape:
    return survey(empty_model(CONFIG_MAPPING[kind](**MODELS[kind]).to_dict()))


def ready(name: str, kind: str, **settings: Any) -> tuple[Method, Any]:
    """Return a method and a model with it in; what trains was moved away from its start."""
    method: Method = resolved(make_method(Plugin(name, settings)), shape(kind))
    model, draws = split(kind), torch.Generator().manual_seed(0)
    ctx = Context(
        seed=0, device=torch.device("cpu"), dtype=torch.float32, generator=draws, load_model=split
    )
    rows = [make_batch([(list(range(3, 11)), list(range(3, 11))), ([5, 6, 7], [5, 6, 7])], 0)]
    if isinstance(method, Compresses):
        compress_whole(method, model, rows, ctx)
        return method, model
    assert isinstance(method, Trains)
    model = method.prepare(model, ctx)
    move(model)
    return method, model.requires_grad_(False).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_split_experts_say_what_the_tensors_of_all_say(kind: str) -> None:
    model = split(kind)
    torch.testing.assert_close(logits(model), logits(stock(kind)), atol=1e-6, rtol=0)
    assert len(list(layers_of(model))) == (1 if kind == "qwen3_moe" else 2)
    back = plain_model(model).model
    own = dict(stock(kind).named_parameters())
    assert {n: p.shape for n, p in back.named_parameters()} == {n: p.shape for n, p in own.items()}
    assert all(torch.equal(p, own[n]) for n, p in back.named_parameters())


def test_what_an_expert_says_of_a_token_does_not_depend_on_the_others() -> None:
    experts = next(module for _, module in layers_of(split("mixtral")))
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    chosen = torch.tensor([[0, 1], [1, 0], [3, 0], [0, 3], [1, 3]])
    weights = torch.tensor([0.7, 0.3]).expand(5, 2)
    with torch.no_grad():
        whole = experts(x, chosen, weights)
        for row in range(5):
            alone = experts(x[row : row + 1], chosen[row : row + 1], weights[:1])
            torch.testing.assert_close(whole[row : row + 1], alone)
        first, second = experts[3](x[2:3]), experts[0](x[2:3])
    torch.testing.assert_close(whole[2:3], 0.7 * first + 0.3 * second)


SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"rank": 4} for name in ("lora", "dora", "adalora", "dylora", "deep_lora")},
    **{name: {} for name in ("rtn", "gptq", "lut_gemm", "ptqtp")},
    "any_precision": {"bits": 4},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_counted_with_experts_is_what_the_modules_have(name: str) -> None:
    method, model = ready(name, "qwen2_moe", **SETTINGS[name])
    cost = cost_of(shape_of(method, shape("qwen2_moe"), phase="train"), "float32")
    assert cost.params == parameters(model).total
    if name not in ("adalora", "deep_lora"):  # which hold more than the model while they train
        assert cost.resident_bytes == storage_bytes(model)
    experts = next(module for _, module in layers_of(model))
    kept = type(experts[0].gate_up_proj)
    assert kept is not torch.nn.Linear
    assert all(type(e.gate_up_proj) is type(e.down_proj) is kept for e in experts)
    assert logits(model).isfinite().all()


def test_experts_that_no_row_reaches_are_rounded_and_padding_reaches_none() -> None:
    _, model = ready("gptq", "mixtral", bits=4)
    assert isinstance(model.model.layers[0].mlp.experts[0].down_proj, QuantisedLinear)
    experts: Experts = split("mixtral").model.layers[0].mlp.experts
    experts.only = torch.tensor([True, False])
    out = experts(torch.ones(2, 32), torch.tensor([[0, 1], [0, 1]]), torch.ones(2, 2))
    assert out[0].abs().min() > 0
    assert not out[1].any()


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_peft_loads_adapters_on_experts(kind: str, tmp_path: Path) -> None:
    method, model = ready("lora", kind, rank=4)
    method.export(model, method.default_point(), tmp_path)
    theirs = peft.PeftModel.from_pretrained(stock(kind), tmp_path).eval()
    assert (logits(model) - logits(stock(kind))).abs().max() > 1e-3
    torch.testing.assert_close(logits(theirs), logits(model), atol=1e-5, rtol=1e-5)
    merged = method.as_plain(model, method.default_point()).model
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-5, rtol=1e-5)


def test_what_peft_would_read_otherwise_is_refused(tmp_path: Path) -> None:
    method, model = ready("lora", "qwen3_moe", rank=4)
    with pytest.raises(UserError, match="it takes down_proj for a name of the experts' alone"):
        method.export(model, method.default_point(), tmp_path)
    method, model = ready("dora", "mixtral", rank=4)
    with pytest.raises(UserError, match="no DoRA on experts"):
        method.export(model, method.default_point(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_experts_that_are_computed_in_another_way_are_refused_by_name() -> None:
    sizes = {**SIZES, "num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 48}
    other = survey(empty_model(CONFIG_MAPPING["llama4_text"](**sizes).to_dict()))
    with pytest.raises(UserError, match="down_proj is one tensor"):
        resolved(make_method(Plugin("rtn", {})), other)
    with pytest.raises(UserError, match=r"single tensors \(experts"):
        resolved(make_method(Plugin("lora", {})), other)
